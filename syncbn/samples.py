"""Where a batch has its samples: how many there are, and the same batch with fewer of them.

A batch is *stacked* if its tensors have the samples in dimension 0, as PyTorch's default collation makes them; lists,
tuples, dicts and dataclasses only hold them together. It is *listed* if its lists have one element for each sample, as
detectors take them: ``[sample, ...]``, or ``(images, targets)``.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import default_collate

Layout = Literal["stacked", "listed"]
LAYOUTS = ("stacked", "listed")

_SAY = (
    "Pass even_batches layout='stacked' if tensors have the samples in dimension 0, layout='listed' if lists have one "
    "element for each sample, or functions that know the batch: size=, how many samples it has, and empty=, the same "
    "batch without any"
)


def layout_of(loader: Any, batch: Any) -> Layout:
    """Which of the two the loader's batches are, told by this one.

    It goes by the kinds of things in the batch, so that it does not depend on sizes which happen to agree.

    Raises:
        ValueError: it might be either, or neither.
    """
    if getattr(loader, "collate_fn", None) is default_collate:
        return "stacked"
    if _is_sequence(batch) and not any(map(_is_sequence, batch)) and _are_alike(batch):
        if not _is_array(batch[0]):
            return "stacked" if _is_plain(batch[0]) else "listed"
        if isinstance(batch, list):
            raise ValueError(
                f"this batch is a list of {len(batch)} arrays of one kind, which may be stacked samples or one sample "
                f"each. {_SAY}"
            )
        count(batch, "stacked")
        return "stacked"
    arrays, lists = _parts(batch)
    guesses: tuple[Layout, Layout] = ("listed", "stacked") if lists and not arrays else ("stacked", "listed")
    fitting = [guess for guess in guesses if _fits(batch, guess)]
    if not fitting:
        count(batch, guesses[0])  # which says why
    return fitting[0]


def count(batch: Any, layout: Layout) -> int:
    """How many samples the batch has.

    Raises:
        ValueError: its parts disagree, or there is none that tells.
    """
    sizes = _sizes(batch, layout)
    if len(sizes) != 1:
        told = f"its parts have {sorted(sizes)}" if sizes else "nothing in it tells"
        raise ValueError(
            f"cannot tell how many samples a {type(batch).__name__} has as a {layout} batch: {told}. {_SAY}"
        )
    return sizes.pop()


def take(batch: Any, layout: Layout, samples: int) -> Any:
    """The same batch with only its first samples; it shares no memory with the batch.

    Raises:
        TypeError: it holds something that cannot be divided into samples.
    """

    def first(part: Any) -> Any:
        if isinstance(part, Tensor):
            return part[:samples].clone() if part.dim() else part.clone()
        if _is_array(part):
            return copy.deepcopy(part[:samples] if part.ndim else part)
        if isinstance(part, (list, tuple)):
            return copy.deepcopy(part[:samples])
        if _is_plain(part):
            return part
        raise TypeError(f"cannot make a batch with {samples} samples of one that holds a {type(part).__name__}. {_SAY}")

    return _map(first, batch, layout)


class _Packed:
    """A tensor on its way to another process, which has devices of the same type."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.device = tensor.detach().cpu(), tensor.device.type


def pack(batch: Any) -> Any:
    """The batch for another process: its tensors on the CPU."""
    return _map(lambda part: _Packed(part) if isinstance(part, Tensor) else part, batch, None)


def unpack(batch: Any) -> Any:
    """The batch of another process, with its tensors on devices of the same types."""
    return _map(lambda part: part.tensor.to(part.device) if isinstance(part, _Packed) else part, batch, None)


# ---- what batches are made of


def _is_array(part: Any) -> bool:
    """Tensors, and what is divided like them: NumPy's arrays, TensorDicts."""
    return isinstance(part, Tensor) or (hasattr(part, "shape") and hasattr(part, "ndim"))


def _is_plain(part: Any) -> bool:
    """What a batch may carry beside its samples."""
    return part is None or isinstance(part, (str, bytes, bool, int, float, complex))


def _is_namedtuple(part: Any) -> bool:
    return isinstance(part, tuple) and hasattr(part, "_fields")


def _is_sequence(part: Any) -> bool:
    return isinstance(part, (list, tuple)) and not _is_namedtuple(part)


def _is_list_of_plain(part: Any) -> bool:
    """Names or numbers, one for each sample. A tuple of numbers is rather a size."""
    if not _is_sequence(part) or not part:
        return False
    kinds = (str, bytes) if isinstance(part, tuple) else (str, bytes, bool, int, float)
    return all(isinstance(each, kinds) for each in part)


def _parts(batch: Any) -> tuple[bool, bool]:
    """Whether there are arrays, and lists of things that are not plain, outside of the lists of a batch."""
    if _is_array(batch):
        return True, False
    if isinstance(batch, Mapping):
        members = list(batch.values())
    elif isinstance(batch, (list, tuple)):
        members = list(batch)
    elif dataclasses.is_dataclass(batch):
        members = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    else:
        return False, False
    lists = any(_is_sequence(each) and not all(map(_is_plain, each)) for each in members)
    deeper = [_parts(each) for each in members if not _is_sequence(each)]
    return any(arrays for arrays, _ in deeper), lists or any(lists for _, lists in deeper)


def _kind(part: Any) -> Any:
    """Equal for two things that may be the same part of two samples."""
    if _is_array(part):
        return type(part), part.ndim, getattr(part, "dtype", None)
    if isinstance(part, Mapping):
        return Mapping, frozenset(part)
    return type(part)


def _are_alike(parts: Sequence[Any]) -> bool:
    return len({_kind(each) for each in parts}) == 1


def _is_list_of_samples(batch: Any) -> bool:
    """Whether a listed batch is ``[sample, ...]`` itself rather than ``(images, targets)``."""
    if not _is_sequence(batch) or not any(map(_is_sequence, batch)):
        return _is_sequence(batch) and (not batch or _are_alike(batch))
    if not all(map(_is_sequence, batch)):
        return False
    if not all(_are_alike(each) for each in batch if each):
        return True  # (image, target) pairs
    if len({_kind(each[0]) for each in batch if each}) == 1:
        raise ValueError(f"this batch may be a list of samples or a list for each part of them. {_SAY}")
    return False


def _map(function: Callable[[Any], Any], batch: Any, layout: Layout | None) -> Any:
    """The same structure with ``function`` of each part that is divided into samples as one; of each leaf, if None."""
    if layout == "listed" and _is_list_of_samples(batch):
        return function(batch)

    def rebuild(part: Any) -> Any:
        if _is_array(part) or isinstance(part, _Packed):
            return function(part)
        if part is not batch and layout == "listed" and _is_sequence(part):
            return function(part)
        if layout == "stacked" and _is_list_of_plain(part):
            return function(part)
        if isinstance(part, Mapping):
            items = {key: rebuild(value) for key, value in part.items()}
            if not isinstance(part, MutableMapping):
                return type(part)(items)  # type: ignore[call-arg]
            mapping = copy.copy(part)
            mapping.update(items)
            return mapping
        if _is_namedtuple(part):
            return type(part)(*map(rebuild, part))
        if isinstance(part, (list, tuple)):
            return type(part)(map(rebuild, part))
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            clone: Any = copy.copy(part)
            for field in dataclasses.fields(part):
                object.__setattr__(clone, field.name, rebuild(getattr(part, field.name)))
            return clone
        return function(part)

    return rebuild(batch)


def _sizes(batch: Any, layout: Layout) -> set[int]:
    """The numbers of samples that the parts of the batch have."""
    sizes: set[int] = set()

    def note(part: Any) -> Any:
        if _is_array(part) and part.ndim:
            sizes.add(int(part.shape[0]))
        elif isinstance(part, (list, tuple)):
            sizes.add(len(part))
        return part

    _map(note, batch, layout)
    return sizes


def _fits(batch: Any, layout: Layout) -> bool:
    return len(_sizes(batch, layout)) == 1
