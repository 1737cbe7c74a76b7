"""What can be seen of layers' calls in training: ranges in a profiler's trace, and the messages, for who watches.

While no profiler is on and nobody watches, there is nothing but the question. What torch.compile traces is not seen: it
has no Python when it runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import profiler

from .peers import Source
from .traffic import Direction

_MOST_NAMES = 8  # of layers that are normalized together, in the name of a range


class Observable(Protocol):
    """What a call says of itself: a ``Frame``."""

    @property
    def peers(self) -> Any: ...

    @property
    def source(self) -> Source | None:
        """Where the layer had its peers from; None in what is traced."""
        ...

    @property
    def number(self) -> int:
        """Of the layer, at its source."""
        ...


class Watcher(Protocol):
    """Somebody who wants to see the forward messages."""

    def saw(self, frames: Sequence[Observable], own: Tensor, union: Tensor) -> None:
        """Called after an exchange, or where there is nobody to exchange with.

        Args:
            frames: the calls whose messages these are, laid end to end.
            own: [Σ 2C+3] float64, this process's.
            union: the same summed over the processes; not to be changed.
        """
        ...


_watchers: tuple[Watcher, ...] = ()  # on every thread: a layer's forward may run on any


@contextmanager
def watched_by(watcher: Watcher) -> Iterator[None]:
    """A block in which somebody sees all layers' forward messages."""
    global _watchers
    _watchers = (*_watchers, watcher)
    try:
        yield
    finally:
        _watchers = tuple(each for each in _watchers if each is not watcher)


def named(direction: Direction, *frames: Observable) -> AbstractContextManager[Any]:
    """The range of a profiler in which these layers' direction is computed, exchange included.

    It bears the layers' names. ``record_function`` also emits NVTX ranges where ``torch.autograd.profiler.emit_nvtx``
    is on, and ITT's likewise. A trace has the part on the device beside it.
    """
    if torch.compiler.is_dynamo_compiling() or not profiler._is_profiler_enabled:
        return _NOTHING
    return profiler.record_function(f"syncbn {_names(frames)} {direction}")


_NOTHING: AbstractContextManager[None] = nullcontext()


def sum_of(direction: Direction, frames: Sequence[Observable], message: Tensor) -> Tensor:
    """The message of these calls, laid end to end, summed over their peers, which are the same; for all to see."""
    peers = frames[0].peers
    sum_ = peers.sum_moments if direction == "forward" else peers.sum_grad_moments
    if torch.compiler.is_dynamo_compiling() or not (_watchers or profiler._is_profiler_enabled):
        return sum_(message)
    # Where gradients are recorded, the statistics are formed again, to be differentiated.
    watchers = _watchers if direction == "forward" and not torch.is_grad_enabled() else ()
    own = message.clone() if watchers else message  # it may be summed in place
    if peers.world_size == 1 or not profiler._is_profiler_enabled:
        union = sum_(message)
    else:
        with profiler.record_function(f"syncbn {_names(frames)} {direction} exchange"):
            union = sum_(message)
    for watcher in watchers:
        watcher.saw(frames, own, union)
    return union


def origin(source: Source | None) -> Any:
    """The source that a layer was called with, under what stood between it and its peers in this call."""
    while (inner := getattr(source, "source", None)) is not None:
        source = inner
    return source


def _names(frames: Sequence[Observable]) -> str:
    names = list(dict.fromkeys(_name(frame) for frame in frames))
    if len(names) > _MOST_NAMES:
        names[_MOST_NAMES:] = [f"and {len(names) - _MOST_NAMES} more"]
    return ", ".join(names)


def _name(frame: Observable) -> str:
    name: Callable[[int], str] | None = getattr(origin(frame.source), "layer_name", None)
    return "sync_batch_norm" if name is None else name(frame.number)
