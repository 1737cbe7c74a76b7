"""Weights for torchvision's models: from a file, or published ones by an explicit word."""

import argparse
import logging
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from filelock import FileLock
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from syncbn.training.environment import rank_of_this_process
from syncbn.training.errors import few

DOWNLOAD = "download"
CLASS_HEADS = ("auto", "fresh", "kept")

_LOG = logging.getLogger(__name__)
_WRAPPINGS = ("state_dict", "model_state_dict", "model")  # what checkpoints call the state_dict in them
_CLASSIFIERS = ("fc.", "classifier.")  # of ImageNet's classes, in torchvision's classifiers
_AUXILIARY = "aux_classifier."
_COUNTER = ".num_batches_tracked"  # which FrozenBatchNorm2d and old files do not have

_skipped: ContextVar[bool] = ContextVar("skipped", default=False)


@contextmanager
def skip_weights() -> Iterator[None]:
    """Models that are built inside read no weights, since a checkpoint is about to be loaded into them.

    All else is as their configuration says, such as which stages are frozen.
    """
    token = _skipped.set(True)
    try:
        yield
    finally:
        _skipped.reset(token)


def load_weights(
    model: nn.Module,
    source: str | Path,
    published: type[WeightsEnum],
    build: Callable[[int], nn.Module],
    num_classes: int,
    class_heads: str = "auto",
) -> None:
    """Loads a whole model's weights; says in one line which of its tensors the source leaves as they are.

    The state_dict may be torchvision's, stand under "state_dict" or "model" in a checkpoint, and have any prefix.
    An auxiliary classifier may be missing in it or in the model.

    Args:
        model: of `num_classes` classes.
        source: a file, "download", or the name of one of the `published` weights.
        published: torchvision's weights for this model.
        build: makes this model for another number of classes.
        num_classes: the number of classes, the background included.
        class_heads: the tensors whose shape depends on the number of classes: "auto" leaves them as they are if
            they are of another number of classes, "fresh" in any case, "kept" never.

    Raises:
        ValueError: the source cannot be read or does not fit; nothing has been loaded then.
    """
    if class_heads not in CLASS_HEADS:
        raise ValueError(f"class_heads must be one of {', '.join(CLASS_HEADS)}, got {class_heads!r}")
    if _skipped.get():
        return
    own = model.state_dict()
    found = _without_prefix(read_weights("weights", source, published), own)
    if not any(key.startswith(_AUXILIARY) for key in own):
        found = {key: tensor for key, tensor in found.items() if not key.startswith(_AUXILIARY)}
    heads = _class_heads(build, num_classes)
    fresh = [key for key in own if key in heads and class_heads == "fresh"]
    if class_heads == "auto" and any(key in found and found[key].shape != own[key].shape for key in heads):
        fresh = [key for key in own if key in heads]
    if not any(key.startswith(_AUXILIARY) for key in found):
        fresh += [key for key in own if key.startswith(_AUXILIARY) and key not in fresh]
    found = {key: tensor for key, tensor in found.items() if key not in fresh}
    hint = f"; class_heads=auto leaves those of another number of classes than {num_classes} as they are"
    _require_fit("weights", source, found, own, fresh, hint if class_heads == "kept" else "")
    model.load_state_dict(found, strict=False)
    if fresh and rank_of_this_process() == 0:
        _LOG.warning("weights: %s: not loaded, but initialized: %s", source, ", ".join(fresh))


def load_backbone_weights(backbone: nn.Module, source: str | Path, published: type[WeightsEnum]) -> None:
    """Loads a classifier's weights, such as those trained on ImageNet, into a backbone of the same architecture.

    What classifies is left out. The backbone's own state_dict, with any prefix, such as a detector's, is taken, too.

    Raises:
        ValueError: the source cannot be read or does not fit; nothing has been loaded then.
    """
    if _skipped.get():
        return
    own = backbone.state_dict()
    found = _without_prefix(read_weights("weights_backbone", source, published), own)
    found = {key: tensor for key, tensor in found.items() if not key.startswith(_CLASSIFIERS)}
    _require_fit("weights_backbone", source, found, own)
    backbone.load_state_dict(found, strict=False)


def read_weights(option: str, source: str | Path, published: type[WeightsEnum]) -> dict[str, Tensor]:
    """The state_dict that `source` names: a file, or, if it is "download" or one of `published`, torchvision's.

    Args:
        option: what the user calls the source, for messages.

    Raises:
        ValueError: there is no such file or name, or it cannot be read; says why.
    """
    name = str(source).removeprefix(f"{published.__name__}.")
    if name == DOWNLOAD or name in published.__members__:
        return _download(option, published["DEFAULT" if name == DOWNLOAD else name])
    path = Path(source).expanduser()
    if not path.is_file():
        names = ", ".join([DOWNLOAD, *published.__members__])
        raise ValueError(f"{option}: there is no file {path}; expected one, or, to download weights, one of {names}")
    try:
        return read_state_dict(path)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a state_dict, or of the one within a checkpoint. Runs no code that the file brings along.

    Raises:
        ValueError: it is no such file, a damaged one, or one that asks for code.
    """
    try:
        # Namespace: torchvision's training scripts put their arguments beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, LookupError) as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise ValueError(
                f"{path} is refused: to load it would run {asked[1]}, and a file of weights needs no code. "
                f"If you trust it, save its state_dict alone"
            ) from error
        raise ValueError(f"{path} cannot be read as weights, or is damaged ({type(error).__name__})") from error
    for key in _WRAPPINGS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise ValueError(f"{path} holds no state_dict: {_what(content)}")
    return tensors


def _download(option: str, weights: WeightsEnum) -> dict[str, Tensor]:
    """From torch.hub's cache, or into it."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # One process of a machine fetches it, the others find it.
        with FileLock(folder / f"{Path(weights.url).name}.lock"):
            state: dict[str, Tensor] = weights.get_state_dict(
                progress=rank_of_this_process() == 0, check_hash=True, map_location="cpu", weights_only=True
            )
    except (URLError, OSError, RuntimeError) as error:
        raise ValueError(
            f"{option}: cannot download {weights.url} to {folder} ({error}): give the path of a file instead"
        ) from error
    return state


def _without_prefix(found: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the prefix ("model.", "module.", "features.", ...) that makes most keys the model's own."""
    prefixes = Counter(
        key.removesuffix(wanted) for wanted in own for key in found if key == wanted or key.endswith(f".{wanted}")
    )
    prefix = max(prefixes, key=lambda p: (prefixes[p], -len(p)), default="")
    return {key.removeprefix(prefix): tensor for key, tensor in found.items() if key.startswith(prefix)}


def _class_heads(build: Callable[[int], nn.Module], num_classes: int) -> set[str]:
    """The names of the tensors whose shape depends on the number of classes."""
    with torch.device("meta"):
        these, others = build(num_classes).state_dict(), build(num_classes + 1).state_dict()
    return {key for key in these if these[key].shape != others[key].shape}


def _require_fit(
    option: str,
    source: str | Path,
    found: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    fresh: Sequence[str] = (),
    hint: str = "",
) -> None:
    missing = [key for key in own if key not in found and key not in fresh and not key.endswith(_COUNTER)]
    unexpected = [key for key in found if key not in own]
    reshaped = [
        f"{key} {list(found[key].shape)} instead of {list(own[key].shape)}"
        for key in found
        if key in own and found[key].shape != own[key].shape
    ]
    problems = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    told = [f"{len(keys)} {problem} ({few(keys)})" for problem, keys in problems.items() if keys]
    if told:
        raise ValueError(
            f"{option}: {source} does not fit the model, of whose {len(own)} tensors: {'; '.join(told)}{hint}"
        )


def _what(content: Any) -> str:
    return f"a mapping of {few([str(k) for k in content])}" if isinstance(content, Mapping) else type(content).__name__
