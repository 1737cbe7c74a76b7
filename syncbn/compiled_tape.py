"""What torch.compile sees of a tape: where Python checkpoints what is compiled, as also after a graph break.

Forward and recomputation must be the same graph, or autograd would save other tensors in one than in the other. So a
graph has operations that look for this thread's tapes when they run. Imported only while something is compiled.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from .calls import Call
from .compiled import Traced
from .kernels import Backend, Layer
from .moments import Running, settle
from .peers import Peers, Source
from .tape import Caller, tapes


def taped(call: Call) -> Call:
    """The call with its sums from a tape or onto some, and updating nothing where they come from one."""
    return call._replace(source=_Taped(call.source), backend=_UpdatingOnce(call.backend))


class _Taped(NamedTuple):
    source: Source

    def peers(self, index: int, x: Tensor) -> Peers:
        peers, caller = self.source.peers(index, x), Caller.of(self.source, index)
        return _TapedPeers(peers.world_size, peers.forward_tag, peers.backward_tag, peers, caller)


class _TapedPeers(NamedTuple):
    world_size: int
    forward_tag: int
    backward_tag: int
    peers: Peers
    caller: Caller

    @property
    def joint(self) -> Any:
        return getattr(self.peers, "joint", None)

    def sum_moments(self, message: Tensor) -> Tensor:
        if self.world_size == 1:
            return sum_on_tape(message, "", *self.caller)
        if not isinstance(self.peers, Traced):
            raise NotImplementedError(
                f"a compiled part of a model is checkpointed, inside of which {type(self.peers).__name__} stands "
                f"between a layer and its exchange: checkpoint it without torch.compile, or compile it without "
                f"checkpointing"
            )
        return sum_on_tape(message, self.peers.group_name, *self.caller)

    def sum_grad_moments(self, message: Tensor) -> Tensor:
        return self.peers.sum_grad_moments(message)


class _UpdatingOnce(NamedTuple):
    """A backend that moves no running statistics while a tape is played."""

    backend: Backend

    def moments(self, x: Tensor, mask: Tensor | None, tag: int) -> tuple[Tensor, Any]:
        return self.backend.moments(x, mask, tag)

    def normalize(
        self,
        x: Tensor,
        residual: Tensor | None,
        message: Tensor,
        layer: Layer,
        running: Running | None,
        scratch: Any,
    ) -> tuple[Tensor, Sequence[Tensor]]:
        if running is not None:
            settle(nan_if_played(message), layer.world_size, layer.eps, running)
        return self.backend.normalize(x, residual, message, layer, None, scratch)

    def grad_moments(self, *args: Any) -> tuple[Tensor, Tensor | None, Tensor | None, Any]:
        return self.backend.grad_moments(*args)

    def grad_input(self, *args: Any) -> tuple[Tensor, Tensor | None]:
        return self.backend.grad_input(*args)


# A CUDA graph would replay what it found on the tapes when it was captured.
_operation = functools.partial(torch.library.custom_op, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))


@_operation("syncbn::sum_on_tape")
def sum_on_tape(message: Tensor, group_name: str, exchange: int, layer: str) -> Tensor:
    """The forward message [2C+3] summed over the group, or played; recorded by the tapes that record."""
    player, recorders = tapes()
    caller, message = Caller(exchange, layer), message.clone()
    if player is not None:
        player.play(caller, message)
    elif group_name:
        dist.all_reduce(message, group=dist.distributed_c10d._resolve_process_group(cast(Any, group_name)))
    for recorder in recorders:
        recorder.record(caller, message)
    return message


@_operation("syncbn::nan_if_played")
def nan_if_played(message: Tensor) -> Tensor:
    """The message; or NaN, which moves no running statistics, where it comes from a tape."""
    player, _ = tapes()
    return message.clone() if player is None else torch.full_like(message, torch.nan)


@sum_on_tape.register_fake
def _(message: Tensor, group_name: str, exchange: int, layer: str) -> Tensor:
    return torch.empty_like(message)


@nan_if_played.register_fake
def _(message: Tensor) -> Tensor:
    return torch.empty_like(message)
