"""The messages that processes exchange, and what statistics their sums become.

Forward, 2C+3 float64 numbers: ``Σx | Σx² | n | tag | tag²``. Backward, 2C+2: ``Σdy | Σdy·x̂ | tag | tag²``.

A few details are taken care of here:

- The local sums lose nothing (see ``kernels``) and travel in float64, where ``E[x²] − E[x]²`` costs a relative
  variance error of about √P·(1 + (mean/std)²)·2⁻⁵³ over P processes: 1e-10 at mean/std = 1e3.
- The count is data: processes may bring different numbers of values, or none, and no process reads n on the host.
- The tag says which layer and direction is calling. By Cauchy-Schwarz P·Σtag² = (Σtag)² exactly where all P tags agree;
  where processes meet in different layers, everything becomes NaN instead of plausible.
- What is not finite never enters the running statistics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TAGS = 2


class Statistics(NamedTuple):
    """What normalization needs to know of the union of all processes' batches. All float64."""

    mean_C: Tensor
    rstd_C: Tensor  # 1/√(var + ε)
    n: Tensor  # [], how many values each channel has


class Running(NamedTuple):
    """Running statistics, which a step in training moves in place."""

    mean: Tensor  # [C], any floating dtype
    var: Tensor  # [C]
    num_batches_tracked: Tensor | None  # [] int64; None where nobody counts
    momentum: float | None  # None for the plain average of all batches, which needs the count


def settle(message: Tensor, world_size: int, eps: float, running: Running | None) -> Statistics:
    """The statistics that the summed forward message [2C+3] becomes; moves the running ones toward them."""
    mean_C, var_C, n = mean_and_variance(message, world_size)
    if running is not None:
        with torch.no_grad():
            update_running_statistics(mean_C, var_C, n, running)
    return Statistics(mean_C, (var_C + eps).rsqrt(), n)


def mean_and_variance(message: Tensor, world_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance from the summed forward message.

    Args:
        message: [2C+3] float64, summed over ``world_size`` processes.

    Returns:
        mean [C], biased variance [C] (at least 0) and count [], float64. NaN where the processes met in different
        layers. Where there is no value at all, 0 and 1: not NaN, which would reach all gradients, even times 0.
    """
    C = (message.numel() - TAGS - 1) // 2
    count = message[2 * C].clone()  # a view would keep the message, and torch.compile does not save views
    divisor = _divisor(message, world_size, count)
    mean_C, mean_of_squares_C = message[:C] / divisor, message[C : 2 * C] / divisor
    var_C = (mean_of_squares_C - mean_C.square()).clamp(min=0)
    return mean_C, torch.where(divisor == torch.inf, 1.0, var_C), count


def gradient_means(message: Tensor, count: Tensor, world_size: int) -> tuple[Tensor, Tensor]:
    """Σdy/N [C] and Σ(dy·x̂)/N [C], float64, from the summed backward message [2C+2]; NaN where the tags differ."""
    C = (message.numel() - TAGS) // 2
    means = message[: 2 * C] / _divisor(message, world_size, count)
    return means[:C], means[C:]


def _divisor(message: Tensor, world_size: int, count: Tensor) -> Tensor:
    """What to divide sums by: the count, or infinity where it is 0. All on the device.

    NaN where the summed tags show that not all processes sent the same one.
    """
    count = count.masked_fill(count == 0, torch.inf)
    if world_size == 1:
        return count
    sum_of_tags, sum_of_squares = message[-2], message[-1]
    return torch.where(world_size * sum_of_squares == sum_of_tags.square(), count, torch.nan)


def update_running_statistics(mean_C: Tensor, var_C: Tensor, count: Tensor, running: Running) -> None:
    """Moves the running statistics toward a batch's, in place and without reading anything on the host.

    r ← (1−f)·r + f·s, with f = momentum, or 1/num_batches_tracked where momentum is None (the plain average of all
    batches so far). Not as a lerp: f = 1 must give s itself. The variance is the unbiased one, N/max(N−1, 1) times the
    batch's. A batch in which any channel is not finite, in the buffers' dtype, changes nothing; nor does one
    without any value.

    Args:
        mean_C: [C] float64. The same for ``var_C``, the biased variance.
        count: [] float64.
        running: what is moved.
    """
    running_mean, running_var, num_batches_tracked, momentum = running
    batch_2C = torch.stack([mean_C, var_C * (count / (count - 1).clamp(min=1))])
    running_2C = torch.stack([running_mean, running_var])
    # Zero times the sum is zero, unless there is an infinity or a NaN among the values.
    moves = (batch_2C.to(running_2C.dtype).sum(dtype=torch.float64) * 0 == 0) & (count > 0)
    if num_batches_tracked is not None:
        num_batches_tracked += moves
    factor = momentum if momentum is not None else _one_by(num_batches_tracked)
    moved_2C = running_2C.double() * (1 - factor) + batch_2C * factor
    moved_2C = torch.where(moves, moved_2C.to(running_2C.dtype), running_2C)
    running_mean.copy_(moved_2C[0])
    running_var.copy_(moved_2C[1])


def _one_by(num_batches_tracked: Tensor | None) -> Tensor:
    assert num_batches_tracked is not None  # sync_batch_norm has seen to it
    return 1 / num_batches_tracked.double().clamp(min=1)
