"""One call of a layer in training, and the ``with`` blocks that change what calls inside of them do."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import NamedTuple, Self

from torch import Tensor

from .kernels import Backend, Layer
from .moments import Running
from .peers import Source


class Call(NamedTuple):
    """What is to be normalized, how, by which operations and over whom."""

    x: Tensor
    residual: Tensor | None
    mask: Tensor | None
    layer: Layer
    running: Running | None  # moved by this call; None where nothing is to be moved
    backend: Backend
    source: Source
    number: int  # of the layer, at the source


class Surrounding:
    """A ``with`` block around calls of layers, on this thread. A subclass says what it changes.

    What is changed is always one of the call's parts, replaced by one that does more. So neither the layer nor its
    autograd function knows of any of these.
    """

    def changed(self, call: Call) -> Call:
        """The call as it is to be inside of the block."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        _entered.blocks = (*_entered.blocks, self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The last entry of this block, which is the last of all but where a generator has left a block open.
        after = len(_entered.blocks) - 1 - _entered.blocks[::-1].index(self)
        _entered.blocks = _entered.blocks[:after] + _entered.blocks[after + 1 :]


class _Entered(threading.local):
    """This thread's blocks, outermost first: autograd runs a recomputation on threads of its own."""

    blocks: tuple[Surrounding, ...] = ()


_entered = _Entered()


def entered() -> tuple[Surrounding, ...]:
    """The blocks that this thread is in, outermost first."""
    return _entered.blocks


def enter_only(blocks: tuple[Surrounding, ...]) -> None:
    """Puts this thread into these blocks, outermost first, and out of all others; none of them is told."""
    _entered.blocks = blocks


def surrounded(call: Call) -> Call:
    """The call, changed by all blocks that it is in, the innermost first."""
    for block in reversed(_entered.blocks):
        call = block.changed(call)
    return call
