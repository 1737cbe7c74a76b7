"""What evaluate, predict and export share: their arguments, and a trained task from its run folder alone."""

import ast
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from syncbn.training.checkpoints import read_checkpoint
from syncbn.training.config import explain
from syncbn.training.errors import UserError, did_you_mean, one_line
from syncbn.training.models.weights import skip_weights
from syncbn.training.resolution import resolve_what_is_set
from syncbn.training.train import mistakes_in_one_line, quiet

CONFIG_FILE = "config.yaml"
CHECKPOINTS = Path("checkpoints")
# The best one, if the run has had a validation.
_OF_A_RUN = (CHECKPOINTS / "best.ckpt", CHECKPOINTS / "last.ckpt")
# Parts of the task that stand at the top of a configuration, too: what an override there means.
_PARTS = ("model", "loss", "optimizer", "scheduler")
_EMA_STATE = "current_model_state"


@dataclass(frozen=True)
class Trained:
    """A run's task with the weights of one checkpoint, in eval mode on the CPU, and where it comes from."""

    task: LightningModule
    cfg: DictConfig
    checkpoint: Path
    weights: str  # which, in words

    @property
    def run_dir(self) -> Path:
        return run_folder(self.checkpoint)

    @property
    def class_names(self) -> tuple[str, ...]:
        names = getattr(self.task, "class_names", None) or self.cfg.get("class_names") or ()
        return tuple(map(str, names))


def command(usage: str, main: Callable[[list[str]], None]) -> NoReturn:
    """Runs a command with this process's arguments; a user's mistake ends it in one line with status 2."""
    arguments = sys.argv[1:]
    if not arguments or {"-h", "--help"} & set(arguments):
        print(usage, file=sys.stderr if not arguments else sys.stdout)
        raise SystemExit(2 if not arguments else 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    quiet()
    with mistakes_in_one_line():
        main(arguments)
    raise SystemExit(0)


def parse(
    arguments: Sequence[str], known: Mapping[str, Any], required: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Splits `key=value` arguments into a command's own, with their defaults, and all others.

    Args:
        arguments: as on the command line.
        known: the command's own keys and their defaults, whose types values are read as.
        required: those that must be given.

    Raises:
        UserError: an argument is no key=value, a value has another type, or a required one is missing.
    """
    values, others = dict(known), []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or argument.startswith("-"):
            raise UserError(f"{argument}: expected key=value, such as {required[0]}=...")
        if key not in known:
            others.append(argument)
        else:
            values[key] = _read(key, text, known[key])
    for key in required:
        if not values[key]:
            raise UserError(f"{key}=... is missing")
    return values, others


def refuse_others(others: Sequence[str], known: Mapping[str, Any]) -> None:
    """For a command that takes its own arguments only.

    Raises:
        UserError: there are others.
    """
    for argument in others:
        key = argument.partition("=")[0]
        raise UserError(f"{key}: no such key.{did_you_mean(key, known)}")


def _read(key: str, text: str, default: Any) -> Any:
    if default is None or isinstance(default, str):
        return text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        raise UserError(f"{key} must be such as {default!r}, got {text!r}")
    return value


def find(ckpt: str) -> Path:
    """The checkpoint that `ckpt` names: a file, or a run's folder, of which it is the best one, or else the last.

    Raises:
        UserError: there is none.
    """
    path = Path(ckpt).expanduser()
    if path.is_dir():
        found = [path / name for name in _OF_A_RUN if (path / name).is_file()]
        if not found:
            raise UserError(f"ckpt: the folder {path} has no {' or '.join(map(str, _OF_A_RUN))}")
        path = found[0]
    if not path.is_file():
        raise UserError(f"ckpt: there is no file {path}")
    return path.absolute()


def run_folder(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint comes from.

    Raises:
        UserError: there is no configuration beside the checkpoint.
    """
    folders = [checkpoint.parent.parent, checkpoint.parent]
    for folder in folders:
        if (folder / CONFIG_FILE).is_file():
            return folder
    raise UserError(f"ckpt: no {CONFIG_FILE} in {' or '.join(map(str, folders))}: a checkpoint needs that of its run")


def run_config(checkpoint: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that a run was started with, changed as the overrides say.

    It names the classes that are built, so that it is code to whoever loads it, other than the checkpoint beside it.

    Raises:
        UserError: there is none, it cannot be read, or an override is wrong.
    """
    path = run_folder(checkpoint) / CONFIG_FILE
    try:
        cfg = OmegaConf.load(path)
    except Exception as error:  # YAML's errors have no common class
        raise UserError(f"{path} cannot be read: {one_line(str(error))}") from error
    if not isinstance(cfg, DictConfig) or "task" not in cfg:
        raise UserError(f"{path} is no configuration of a training run: it has no task")
    override(cfg, overrides)
    return cfg


def override(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Changes values of a composed configuration, in Hydra's syntax: key=value, +key=value, ~key.

    Raises:
        UserError: it cannot be parsed, or there is no such key.
    """
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
        for each in parsed:
            for key in _meant(cfg, each.key_or_group):
                _require_known(cfg, key, new=each.is_add())
                if each.is_delete():
                    OmegaConf.update(cfg, key, None)
                else:
                    value = each.value()
                    node = OmegaConf.select(cfg, key)
                    if isinstance(node, DictConfig) and not isinstance(value, dict | None):
                        raise UserError(f"{key}: a finished run's groups cannot be exchanged, only values in them")
                    OmegaConf.update(cfg, key, value, merge=False, force_add=each.is_add())
        resolve_what_is_set(cfg)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(explain(error)) from error


def _meant(cfg: DictConfig, key: str) -> list[str]:
    """The places of a value: a part of the task stands in it as well, resolved."""
    first, _, rest = key.partition(".")
    return [key, f"task.{key}"] if first in _PARTS and rest and first in cfg.task else [key]


def _require_known(cfg: DictConfig, key: str, new: bool) -> None:
    node: Any = cfg
    parts = key.split(".")
    for depth, part in enumerate(parts):
        last = depth == len(parts) - 1
        if isinstance(node, ListConfig) and part.isdigit() and int(part) < len(node):
            node = node[int(part)]
        elif isinstance(node, DictConfig) and part in node:
            node = node._get_node(part) if last else node[part]
        elif last and new and isinstance(node, DictConfig):
            return
        else:
            siblings = [".".join([*parts[:depth], str(name)]) for name in node] if isinstance(node, DictConfig) else []
            raise UserError(f"{key}: no such key.{did_you_mean(key, siblings)}")


def load_trained(ckpt: str) -> Trained:
    """Rebuilds the task of a run and fills in a checkpoint's weights; needs nothing of the data.

    Raises:
        UserError: the checkpoint or its run's configuration cannot be used.
    """
    path = find(ckpt)
    cfg = run_config(path)
    checkpoint = read_checkpoint(path, "ckpt")
    task = build_task(cfg)
    try:
        task.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:
        raise UserError(f"ckpt: {path} does not fit the model: {misfit(error)}") from error
    averaged = _EMA_STATE in checkpoint
    steps = checkpoint.get("global_step")
    which = "averaged weights (EMA)" if averaged else "weights as trained"
    return Trained(task.eval(), cfg, path, which if steps is None else f"{which}, after step {steps}")


def build_task(cfg: DictConfig) -> LightningModule:
    """The task that a run's configuration describes, its model without pretrained weights.

    Raises:
        UserError: it cannot be built.
    """
    try:
        with skip_weights():
            task: LightningModule = instantiate(cfg.task)
    except InstantiationException as error:
        raise UserError(f"task: {error.__cause__ or error}") from error
    return task


def misfit(error: RuntimeError) -> str:
    """The first line of what `load_state_dict` says."""
    return one_line(str(error).partition(":")[2].strip().splitlines()[0])


def plain_state_dict(trained: Trained) -> dict[str, torch.Tensor]:
    """The model's own state_dict, contiguous and on the CPU, without the task around it."""
    model = getattr(trained.task, "model", trained.task)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}


def device_named(name: str) -> torch.device:
    """A device by its name; "auto" is the first GPU, or the CPU.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device={name}: {one_line(str(error)).split(';')[0]}") from error
    return device


def shown(path: Path) -> str:
    """The path as short as it can be pasted back."""
    relative = os.path.relpath(path)
    return relative if not relative.startswith("..") else str(path)
