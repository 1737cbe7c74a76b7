"""``sync_batch_norm``: where local work meets the exchange between processes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .exchange import Exchange
from .kernels import Backend, backend_for, reference
from .moments import Statistics, gradient_means, statistics, update_running_statistics


def sync_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    *,
    num_batches_tracked: Tensor | None = None,
    exchange: Exchange | None = None,
    index: int = 0,
) -> Tensor:
    """Batch normalization (Ioffe and Szegedy, 2015) over the union of all processes' batches.

    Like ``torch.nn.functional.batch_norm``; in training the statistics, and in backward the gradient's, are summed over
    the processes of ``exchange``: one all-reduce in each direction.

    Args:
        x: [N, C, ...] of 2 to 5 dimensions, floating. N and the places may differ between processes, and be 0.
        running_mean: [C] floating, updated in place in training, used otherwise; the same for ``running_var``.
        weight: γ, [C] floating, or None for 1.
        bias: β, [C] floating, or None for 0.
        training: whether to normalize by the batch's statistics, not by the running ones.
        momentum: the factor of the running statistics' moving average; None for the average of all batches.
        eps: ε, added to the variance.
        num_batches_tracked: [] int64, incremented with each update of the running statistics.
        exchange: how to reach the other processes; None for the statistics of this one alone.
        index: which of the exchange's layers this is, as ``exchange.register`` said.

    Returns:
        γ·(x − mean)/√(var + ε) + β in x's shape, dtype and memory format.

    Raises:
        ValueError: in training, there is one process and it has one value per channel, or ε is not positive.
        RuntimeError: the exchange cannot be set up; see ``Exchange.connect``.
        TypeError: in training, x is not floating.
    """
    if not training:
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, 0.0, eps)
    _require_floating(x)
    _require_positive(eps)
    peers = _peers_of(exchange, index, x.device)
    if peers.world_size == 1:
        _require_more_than_one_value(x)
    backend = backend_for(x)
    with torch.no_grad():
        message, centered = backend.moments(x, peers.forward_tag)
        stats = statistics(peers.sum(message), peers.world_size)
        if running_mean is not None and running_var is not None:
            update_running_statistics(stats, running_mean, running_var, num_batches_tracked, momentum)
        rstd_C = _rstd(stats, eps)
    return _Normalize.apply(x, weight, bias, centered, _Call(stats, rstd_C, eps, backend, peers))


class _Peers(NamedTuple):
    """The processes whose batches form the union, and the numbers by which they know this layer."""

    world_size: int = 1
    exchange: Exchange | None = None
    forward_tag: int = 0
    backward_tag: int = 0

    def sum(self, message: Tensor) -> Tensor:
        """``message`` summed over the processes: in place, or differentiably where gradients are recorded."""
        if self.exchange is None:
            return message
        if torch.is_grad_enabled():
            return self.exchange.differentiable_all_reduce(message)
        self.exchange.all_reduce(message)
        return message


_ALONE = _Peers()


def _peers_of(exchange: Exchange | None, index: int, device: torch.device) -> _Peers:
    if exchange is None or exchange.world_size == 1:
        return _ALONE
    exchange.connect(device)
    return _Peers(
        exchange.world_size, exchange, exchange.tag(index, backward=False), exchange.tag(index, backward=True)
    )


class _Call(NamedTuple):
    """What one call of the layer leaves for its backward, beside the tensors that autograd follows."""

    stats: Statistics
    rstd_C: Tensor
    eps: float
    backend: Backend
    peers: _Peers


class _Normalize(torch.autograd.Function):
    """y = γ·x̂ + β. Its backward knows that mean and var came from x, on all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, centered: Any, call: _Call) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.call = call
        ctx.bias_dtype = None if bias is None else bias.dtype
        return call.backend.normalize(x, call.stats.mean_C, call.rstd_C, weight, bias, centered)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        call: _Call = ctx.call
        if torch.is_grad_enabled():  # gradients of these gradients will be asked for
            call = _differentiable(call, x)
        (mean_C, _, n), rstd_C, peers, C = call.stats, call.rstd_C, call.peers, x.shape[1]
        needs_dx, needs_dweight, needs_dbias, *_ = ctx.needs_input_grad

        message = call.backend.grad_moments(dy, x, mean_C, rstd_C, peers.backward_tag)
        # γ's and β's gradients are this process's own sums: DistributedDataParallel averages them with all others.
        dbias = message[:C].to(ctx.bias_dtype, copy=True) if needs_dbias else None
        dweight = message[C : 2 * C].to(weight.dtype, copy=True) if needs_dweight else None
        if not needs_dx:
            return None, dweight, dbias, None, None
        means = gradient_means(peers.sum(message), n, peers.world_size)
        return call.backend.grad_input(dy, x, mean_C, rstd_C, weight, *means), dweight, dbias, None, None


def _differentiable(call: _Call, x: Tensor) -> _Call:
    """The same call with its statistics as functions of every process's x: formed again, by the reference."""
    message, _ = reference.moments(x, call.peers.forward_tag)
    stats = statistics(call.peers.sum(message), call.peers.world_size)
    return _Call(stats, _rstd(stats, call.eps), call.eps, reference, call.peers)


def _rstd(stats: Statistics, eps: float) -> Tensor:
    return (stats.var_C + eps).rsqrt()


def _require_more_than_one_value(x: Tensor) -> None:
    if x.numel() == x.shape[1]:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {x.size()}")


def _require_floating(x: Tensor) -> None:
    if not x.is_floating_point():
        raise TypeError(f"expected a floating input (float16, bfloat16, float32 or float64), got {x.dtype}")


def _require_positive(eps: float) -> None:
    if eps <= 0:
        raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
