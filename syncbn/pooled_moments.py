"""The moments of several batches of a layer, pooled: what their mean and variance are as if they were one batch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from .calls import Call, Surrounding
from .moments import TAGS, Running, mean_and_variance, update_running_statistics
from .peers import Peers, Source


class Pool:
    """One layer's sums over batches, on its device and in float64: [2C+2], ``Σx | Σx² | n | batches left out``.

    Means and variances of batches cannot be averaged: a batch's variance knows nothing of how far its mean is from the
    others', and batches differ in n. Sums can be added.
    """

    def __init__(self, layer: _BatchNorm) -> None:
        device = running_statistics(layer).mean.device
        self.sums = torch.zeros(2 * layer.num_features + 2, dtype=torch.float64, device=device)

    def add(self, message: Tensor, union: Tensor, world_size: int) -> None:
        """Adds a forward message, if that of its union is finite and of one layer. Nothing is read on the host.

        Args:
            message: [2C+3], what is added.
            union: [2C+3], the sum of all processes' messages in that call, by which all of them decide alike.
            world_size: how many these are.
        """
        mean_C, var_C, n = mean_and_variance(union, world_size)
        finite = (mean_C.sum() + var_C.sum()) * 0 == 0
        left_out = ~finite & (n != 0)  # a union without any value is no batch
        sums = torch.where(finite, message[:-TAGS], 0.0)
        self.sums.add_(torch.cat([sums, left_out.double().view(1)]))

    def move(self, running: Running) -> None:
        """Moves running statistics as one batch of all that was added would; an empty pool moves nothing."""
        message = torch.cat([self.sums[:-1], self.sums.new_zeros(TAGS)])
        update_running_statistics(*mean_and_variance(message, world_size=1), running)


def running_statistics(layer: _BatchNorm) -> Running:
    """What a call of the layer in training moves."""
    assert layer.running_mean is not None  # such layers alone are pooled
    assert layer.running_var is not None
    return Running(layer.running_mean, layer.running_var, layer.num_batches_tracked, layer.momentum)


class Pooling(Surrounding):
    """A block in which the given layers' calls in training add to a pool each, and move no running statistics.

    Args:
        layers: those that have running statistics; calls of other layers are left alone.
        of_union: whether to add the sums of all processes of a call, or those of this process.
    """

    def __init__(self, layers: Iterable[_BatchNorm], of_union: bool) -> None:
        self.pools = {layer: Pool(layer) for layer in layers}
        self._of_union = of_union
        # A call tells its layer by what it would move. Where another block has said that nothing moves, as in a
        # recomputation, there is nothing to add, either.
        self._by_buffer = {id(layer.running_mean): pool for layer, pool in self.pools.items()}

    def require_same_buffers(self) -> None:
        """Raises a RuntimeError unless all layers still have the running statistics by which their calls are known."""
        if any(id(layer.running_mean) not in self._by_buffer for layer in self.pools):
            raise RuntimeError(
                "the model's running statistics are other tensors than when the block began, so that not all batches "
                "have been pooled: move the model to another device or dtype before the block"
            )

    def changed(self, call: Call) -> Call:
        pool = None if call.running is None else self._by_buffer.get(id(call.running.mean))
        if pool is None:
            return call
        return call._replace(source=_Pooled(call.source, pool, self._of_union), running=None)


class _Pooled(NamedTuple):
    """A source whose peers add to the pool what they sum."""

    source: Source
    pool: Pool
    of_union: bool

    def peers(self, index: int, x: Tensor) -> Peers:
        peers = self.source.peers(index, x)
        return _PooledPeers(peers.world_size, peers.forward_tag, peers.backward_tag, peers, self.pool, self.of_union)


class _PooledPeers(NamedTuple):
    world_size: int
    forward_tag: int
    backward_tag: int
    peers: Any
    pool: Pool
    of_union: bool

    def sum_moments(self, message: Tensor) -> Tensor:
        if torch.is_grad_enabled():  # formed again, to be differentiated: it has been added already
            return self.peers.sum_moments(message)
        own = message if self.of_union else message.clone()  # which may be summed in place
        union = self.peers.sum_moments(message)
        self.pool.add(union if self.of_union else own, union, self.world_size)
        return union

    def sum_grad_moments(self, message: Tensor) -> Tensor:
        return self.peers.sum_grad_moments(message)
