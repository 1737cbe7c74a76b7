"""Whether all processes are about to train the same: what each of them has, as text, and where that first differs.

Nodes are set up one by one, and one that was forgotten trains another model, or waits for ever in a collective that no
other process enters. So the processes compare what must be equal before they depend on it. A digest of fixed size comes
first: texts travel only where digests differ, and only one for each digest.
"""

import hashlib
import os
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

import syncbn
from syncbn.training.errors import few
from syncbn.training.processes import gather, rank
from syncbn.training.resolution import resolve_but_environment

Facts = dict[str, str]  # what -> how it is here
_PLACES = re.compile(r" at 0x[0-9a-f]+|(?<=cuda):\d+|(?<=type='cuda'), index=\d+")
_MOST_SHOWN = 4  # versions of a fact
_PACKAGES = (
    "torch",
    "lightning",
    "syncbn",
    "hydra-core",
    "omegaconf",
    "torchvision",
    "torchmetrics",
    "numpy",
    "pillow",
)
# A process that checks its exchanges, or orders its launches, alone, waits for the others.
_VARIABLES = ("SYNCBN_CHECK", "NCCL_LAUNCH_ORDER_IMPLICIT", "TORCH_DIST_USE_NCCL2")
# How a process gets its data, not which: an equal share of its own machine's cores.
_OF_THE_MACHINE = ("num_workers", "pin_memory")
_NOWHERE = "none"


# ---- comparing


def difference(facts: Mapping[str, str]) -> str | None:
    """Where the processes' facts first differ, rank by rank, in words that are the same on all; None if nowhere.

    Every process of the default group must call it at the same time.
    """
    digests = gather(hashlib.sha256(repr(list(facts.items())).encode()).digest())
    ranks: dict[bytes, list[int]] = {}
    for number, digest in enumerate(digests):
        ranks.setdefault(digest, []).append(number)
    if len(ranks) == 1:
        return None
    shown = list(ranks.values())[:_MOST_SHOWN]
    texts = [_told_by(each[0], dict(facts)) for each in shown]
    names = list(dict.fromkeys(name for text in texts for name in text))
    differing = [name for name in names if len({text.get(name, _NOWHERE) for text in texts}) > 1]
    if not differing:  # the same in another order
        return f"the order of {few(names)}"
    first, others = differing[0], len(differing) - 1
    values: dict[str, list[int]] = {}
    for text, each in zip(texts, shown, strict=True):
        values.setdefault(text.get(first, _NOWHERE), []).extend(each)
    told = ", ".join(f"{value} on {_ranks(each)}" for value, each in values.items())
    more = f" (and {others} more difference{'s' * (others > 1)}, such as {differing[1]})" if others else ""
    return f"{first} is {told}{more}"


def _told_by(source: int, facts: Facts) -> Facts:
    box = [facts if rank() == source else None]
    dist.broadcast_object_list(box, src=source)
    told = box[0]
    assert told is not None
    return told


def _ranks(ranks: list[int]) -> str:
    """ "rank 1", "ranks 0 and 2 to 7"."""
    runs: list[list[int]] = []
    for number in sorted(ranks):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    parts = [str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs]
    if len(parts) > _MOST_SHOWN:
        parts = [*parts[:_MOST_SHOWN], "more"]
    return f"rank{'s' * (len(ranks) > 1)} {' and '.join([', '.join(parts[:-1]), parts[-1]] if parts[1:] else parts)}"


# ---- what the program is


def configuration(cfg: DictConfig) -> Facts:
    """The values of a configuration by key, without what may be another on each machine: the place of a file, the
    number of loading processes, and what is read from the environment, which is compared as it is written."""
    return dict(_values(OmegaConf.to_container(resolve_but_environment(cfg), resolve=False), ""))


def _values(node: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        if not node:
            yield key, repr(node)
        for name, child in items:
            if name not in _OF_THE_MACHINE:
                yield from _values(child, f"{key}.{name}" if key else str(name))
    elif isinstance(node, str) and os.path.isabs(os.path.expanduser(node)):
        yield key, "an absolute path"
    else:
        yield key, repr(node)


def software() -> tuple[Facts, Facts]:
    """The releases that must be equal, and the exact versions, which should be."""
    exact = {name: _version(name) for name in _PACKAGES}
    exact["Python"] = ".".join(map(str, sys.version_info[:3]))
    releases = {f"the release of {name}": ".".join(text.split(".")[:2]) for name, text in exact.items()}
    variables = {f"the environment's {name}": os.environ.get(name, "not set") for name in _VARIABLES}
    return releases | variables, {f"the version of {name}": text for name, text in exact.items()}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def source(objects: Iterable[Any] = (), cfg: DictConfig | None = None) -> Facts:
    """Checksums of the code: all of syncbn's, and that of the user's own modules, whichever define the classes of
    ``objects`` or are named by a ``_target_`` of the configuration. Installed packages are told by their versions.

    Of a package, all modules and subpackages count; of a folder without ``__init__.py``, which may be one of data, only
    those that are in use.
    """
    root = Path(syncbn.__file__).parent
    files = {f"syncbn/{file.relative_to(root).as_posix()}": file for file in root.rglob("*.py")}
    used = {base.__module__ for each in objects for base in type(each).__mro__}
    used |= {name for target in _targets(cfg) if (name := _module_of(target))}
    for name in used:
        files |= _own_files(sys.modules.get(name), root)
    return {f"the code of {name}": _checksum(file) for name, file in sorted(files.items())}


def _targets(cfg: DictConfig | None) -> Iterator[str]:
    found = [] if cfg is None else [OmegaConf.to_container(cfg, resolve=False)]
    while found:
        node = found.pop()
        if isinstance(node, dict | list):
            found += node.values() if isinstance(node, dict) else node
        if isinstance(node, dict) and isinstance(node.get("_target_"), str):
            yield node["_target_"]


def _module_of(target: str) -> str | None:
    parts = target.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in sys.modules), None)


def _own_files(module: ModuleType | None, root: Path) -> dict[str, Path]:
    file = Path(getattr(module, "__file__", None) or "")
    if module is None or file.suffix != ".py" or file.is_relative_to(root) or _is_installed(file):
        return {}
    top = sys.modules.get(module.__name__.partition(".")[0], module)
    if getattr(top, "__file__", None) and hasattr(top, "__path__"):
        folder = Path(str(top.__file__)).parent
        return {f"{top.__name__}/{each.relative_to(folder).as_posix()}": each for each in _modules_in(folder)}
    return {module.__name__: file}


def _modules_in(package: Path) -> Iterator[Path]:
    """Its modules' files, whether they are in use or not: one process may import more than another."""
    if not package.is_dir():  # an archive
        return
    for entry in package.iterdir():
        # What an editor or a file system has left beside a module has a name that cannot be imported.
        if entry.suffix == ".py" and entry.stem.isidentifier():
            yield entry
        elif not entry.suffix and (entry / "__init__.py").is_file():
            yield from _modules_in(entry)


def _is_installed(file: Path) -> bool:
    folders = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    return any(file.is_relative_to(folder) for folder in folders) or not {"site-packages", "dist-packages"}.isdisjoint(
        file.parts
    )


def _checksum(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12] if file.is_file() else _NOWHERE


# ---- what it has built


def layers(module: nn.Module) -> Facts:
    """Each module's class and options by name, and whether it is in eval mode."""
    facts = {}
    for name, layer in module.named_modules(remove_duplicate=False):
        kind = type(layer)
        what = f"{kind.__module__}.{kind.__qualname__}({_text(layer.extra_repr())})"
        facts[f"layer {name or '(the whole)'}"] = f"{what}{'' if layer.training else ' in eval mode'}"
    return facts


def tensors(module: nn.Module) -> Facts:
    """Parameters and buffers by name: dtype, shape, and whether they learn. Not their values: rank 0's go to all."""
    facts = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        shape = "of a shape not yet known" if is_lazy(tensor) else str(list(tensor.shape))
        frozen = isinstance(tensor, nn.Parameter) and not tensor.requires_grad
        facts[f"tensor {name}"] = f"{str(tensor.dtype).removeprefix('torch.')} {shape}{' frozen' * frozen}"
    return facts


def optimizers(trainer: Any) -> Facts:
    """Each optimizer's class, hyper-parameters and number of parameters, group by group; and each schedule's class."""
    facts = {}
    for number, optimizer in enumerate(trainer.optimizers):
        facts[f"optimizer {number}"] = type(optimizer).__name__
        for place, group in enumerate(optimizer.param_groups):
            options = {name: _text(value) for name, value in group.items() if name != "params"}
            options["number of parameters"] = str(len(group["params"]))
            facts |= {f"{name} of optimizer {number}, group {place}": value for name, value in options.items()}
    for number, config in enumerate(trainer.lr_scheduler_configs):
        facts[f"schedule {number}"] = type(config.scheduler).__name__
    return facts


def batches(trainer: Any) -> Facts:
    """How many there are, and where in training the run stands."""
    return {
        "the number of training batches in an epoch": _number(trainer.num_training_batches),
        "the number of validation batches": ", ".join(map(_number, trainer.num_val_batches)) or _NOWHERE,
        "the number of accumulated batches": str(trainer.accumulate_grad_batches),
        "the epoch": str(trainer.current_epoch),
        "the step": str(trainer.global_step),
    }


def _number(value: float) -> str:
    return "not known" if value == float("inf") else str(int(value))


def _text(value: Any) -> str:
    """What a value looks like, without where it lies: in memory, or on which of a machine's devices."""
    if isinstance(value, Tensor):
        value = value.tolist()
    return _PLACES.sub("", value if isinstance(value, str) else repr(value))
