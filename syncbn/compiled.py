"""What torch.compile sees of an Exchange: constants, and a functional collective.

A graph cannot follow weak references to process groups, counters and locks, and need not. This file is imported only
while something is compiled, since it imports torch._dynamo.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import _functional_collectives

from .communicator import world
from .peers import ALONE, Peers

if TYPE_CHECKING:
    from .exchange import Exchange


class Traced(NamedTuple):
    """The processes of an Exchange."""

    world_size: int
    forward_tag: int
    backward_tag: int
    group_name: Any

    @property
    def joint(self) -> Any:
        return self.group_name

    def sum_moments(self, message: Tensor) -> Tensor:
        return _functional_collectives.all_reduce(message, "sum", self.group_name)

    def sum_grad_moments(self, message: Tensor) -> Tensor:
        return _functional_collectives.all_reduce(message, "sum", self.group_name)


def traced_peers(exchange: Exchange, number: int, index: int, device: torch.device) -> Peers:
    """The peers as a graph has them; torch.compile traces it anew for another Exchange or default group."""
    constants = _constants(exchange, number, world(), index, device)
    return ALONE if constants is None else Traced(*constants)


@torch.compiler.assume_constant_result
def _constants(
    exchange: Exchange, number: int, world: Any, index: int, device: torch.device
) -> tuple[int, int, int, str] | None:
    """World size, tags and group name, or None for nobody; connects while the graph is traced, on all processes alike.

    ``number`` and ``world`` are arguments so that there is a guard on each.
    """
    if exchange.alone:
        return None
    communicator = exchange.connected(device)
    if exchange.alone:  # in its group, too
        return None
    tags = exchange.tag(index, backward=False), exchange.tag(index, backward=True)
    return len(communicator.ranks), *tags, communicator.group.group_name
