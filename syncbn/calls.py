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
        enter_only((*entered(), self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # The last entry of this block, which is the last of all but where a generator has left a block open.
        blocks = entered()
        after = len(blocks) - 1 - blocks[::-1].index(self)
        enter_only(blocks[:after] + blocks[after + 1 :])


# This thread's, since autograd runs a recomputation on threads of its own. Not of a subclass with a default: what
# torch.compile writes to one is lost at a graph break.
_this_thread = threading.local()


def entered() -> tuple[Surrounding, ...]:
    """The blocks that this thread is in, outermost first."""
    return getattr(_this_thread, "blocks", ())


def enter_only(blocks: tuple[Surrounding, ...]) -> None:
    """Puts this thread into these blocks, outermost first, and out of all others; none of them is told."""
    _this_thread.blocks = blocks


def surrounded(call: Call) -> Call:
    """The call, changed by all blocks that it is in, the innermost first."""
    for block in reversed(entered()):
        call = block.changed(call)
    return call
