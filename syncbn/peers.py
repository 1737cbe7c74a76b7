"""Those whose batches form the union with this process's: what one call of a layer needs to know of them.

An ``Exchange`` hands them out, and so does whatever stands in for one (see ``Source``).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor


class Peers(Protocol):
    """The processes of one call, and the numbers by which they know the layer.

    They may also have ``joint``: where that of several calls is equal, and not None, the peers of any of these calls
    sum the messages of all of them, laid end to end (see ``together``).
    """

    @property
    def world_size(self) -> int: ...

    @property
    def forward_tag(self) -> int: ...

    @property
    def backward_tag(self) -> int: ...

    def sum_moments(self, message: Tensor) -> Tensor:
        """The forward message [2C+3] summed over the processes: in place, or anew where gradients are recorded."""
        ...

    def sum_grad_moments(self, message: Tensor) -> Tensor:
        """The backward message [2C+2], likewise."""
        ...


class Source(Protocol):
    """Where a layer has its peers from."""

    def peers(self, index: int, x: Tensor) -> Peers:
        """Those of the layer that is registered as ``index``, for its input x."""
        ...


class Alone(NamedTuple):
    """Nobody: the union is this process's batch. Its own source, too."""

    world_size: int = 1
    forward_tag: int = 0
    backward_tag: int = 0

    def sum_moments(self, message: Tensor) -> Tensor:
        return message

    def sum_grad_moments(self, message: Tensor) -> Tensor:
        return message

    def peers(self, index: int, x: Tensor) -> Alone:
        return self


class Connected(NamedTuple):
    """The processes of an Exchange."""

    world_size: int
    forward_tag: int
    backward_tag: int
    exchange: Any  # an Exchange: what it is made of imports this file

    @property
    def joint(self) -> Any:
        return self.exchange._communicator

    def sum_moments(self, message: Tensor) -> Tensor:
        return self._sum(message, self.forward_tag)

    def sum_grad_moments(self, message: Tensor) -> Tensor:
        return self._sum(message, self.backward_tag)

    def _sum(self, message: Tensor, tag: int) -> Tensor:
        if torch.is_grad_enabled():
            return self.exchange.differentiable_all_reduce(message, tag)
        self.exchange.all_reduce(message, tag)
        return message


ALONE = Alone()
