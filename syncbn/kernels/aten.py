"""The four operations for CUDA tensors without Triton, from the kernels of torch.nn.SyncBatchNorm.

``batch_norm_stats`` and the others keep the mean in float32. Where the mean is many standard deviations away from 0,
its rounding alone would spoil y, so

- the first statistics only serve as a pivot: the moments are those of z = x − pivot, which normalize uses again;
- in backward, x − mean is (x − hi) − lo: hi is the mean in float32, and what lo adds to the sums is added in float64.

z is one tensor and two passes more than the Triton kernels have. The activation, the residual and the mask are
PyTorch's own operations. Computed in float32, or in float64 for float64 input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..moments import Running, Statistics, gradient_means, settle
from . import reference
from .activation import activate, activation_gradient
from .layout import dense, dense_like
from .operands import Layer
from .precision import as_gradient, computing_dtype, in_two_parts

_TINY = 1e-30  # as ε, so that the variance can be had back from 1/√(variance + ε), even where it is 0


class Centered(NamedTuple):
    """What moments leaves for normalize."""

    z: Tensor  # [N, C, ...] float32, or float64 for float64: x − pivot
    pivot: Tensor  # [C], in z's dtype


def moments(x: Tensor, mask: Tensor | None, tag: int) -> tuple[Tensor, Centered | None]:
    """The forward message. Reads x twice, writes and reads z."""
    if mask is not None or x.numel() == 0:
        return reference.moments(x, mask, tag)
    x = dense(x)
    pivot, _ = torch.batch_norm_stats(x, _TINY)
    z = _minus(x, pivot)
    mean_z, rstd_z = torch.batch_norm_stats(z, _TINY)
    n = x.numel() // x.shape[1]
    mean_z, var_z, mean = mean_z.double(), rstd_z.double().pow(-2), pivot.double() + mean_z.double()
    numbers = torch.cat([torch.full_like(mean[:1], value) for value in (n, tag, tag * tag)])
    return torch.cat([n * mean, n * (var_z + mean.square()), numbers]), Centered(z, pivot)


def normalize(
    x: Tensor,
    residual: Tensor | None,
    message: Tensor,
    layer: Layer,
    running: Running | None,
    scratch: Centered | None,
) -> tuple[Tensor, Statistics]:
    """y = activation(γ·r·(z − (mean − pivot)) + β + residual)."""
    stats = settle(message, layer.world_size, layer.eps, running)
    if x.numel() == 0:
        return torch.empty_like(x), stats
    scratch = scratch or _center(x, stats)
    y = _affine(scratch, stats, layer)
    y = y if residual is None else y + residual
    return activate(y, layer.activation, layer.negative_slope).to(x.dtype), stats


def grad_moments(
    dy: Tensor, x: Tensor, kept: Tensor | None, stats: Sequence[Tensor], layer: Layer, tag: int
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The backward message, and dz for ``grad_input``. Reads x and dz once: Σdz·x̂ = r·(Σdz·(x − hi) − lo·Σdz)."""
    stats = Statistics(*stats)
    if x.numel() == 0:
        return (*reference.grad_moments(dy, x, kept, stats, layer, tag)[:3], dy)
    x = dense(x)
    hi, lo = in_two_parts(stats.mean_C, computing_dtype(x))
    dz = dense_like(_through_activation(dy, x, kept, stats, layer), x)
    rstd = stats.rstd_C.to(hi.dtype)
    sum_dz, sum_dz_centered, _, _ = torch.batch_norm_backward_reduce(dz, x, hi, rstd, None, True, False, False)
    sum_dz = sum_dz.double()
    sum_dz_xhat = (sum_dz_centered.double() - lo * sum_dz) * stats.rstd_C
    dweight, dbias = as_gradient(sum_dz_xhat, layer.weight), as_gradient(sum_dz, layer.bias)
    numbers = torch.cat([torch.full_like(sum_dz[:1], value) for value in (tag, tag * tag)])
    return torch.cat([sum_dz, sum_dz_xhat, numbers]), dweight, dbias, dz


def grad_input(
    dy: Tensor,
    x: Tensor,
    kept: Tensor | None,
    mask: Tensor | None,
    stats: Sequence[Tensor],
    layer: Layer,
    message: Tensor,
    wants_dresidual: bool,
    scratch: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """dx = γ·r·(dz − Σdz/N − (x − hi)·k + lo·k), with k = r²·Σ(dz·(x − mean))/N = r·Σ(dz·x̂)/N."""
    stats = Statistics(*stats)
    dz = scratch
    dresidual = dz if wants_dresidual else None
    if mask is not None:
        return reference.grad_input(dy, x, kept, mask, stats, layer, message, False, None)[0], dresidual
    if x.numel() == 0:
        return torch.empty_like(x), dresidual
    x = dense(x)
    hi, lo = in_two_parts(stats.mean_C, computing_dtype(x))
    mean_dz, mean_dz_xhat = gradient_means(message, stats.n, layer.world_size)
    shifted = mean_dz - lo * stats.rstd_C * mean_dz_xhat
    # The kernel divides by the count: these are means already.
    one = torch.ones(1, dtype=torch.int32, device=x.device)
    dx = torch.batch_norm_backward_elemt(
        dz,
        x,
        hi,
        stats.rstd_C.to(hi.dtype),
        _in(hi, layer.weight),
        shifted.to(hi.dtype),
        (mean_dz_xhat / stats.rstd_C).to(hi.dtype),
        one,
    )
    return dense_like(dx, x), dresidual  # outside of channels_last, the kernel returns it contiguous


def _in(like: Tensor, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.to(like.dtype)


def _center(x: Tensor, stats: Statistics) -> Centered:
    x, pivot = dense(x), stats.mean_C.to(computing_dtype(x))
    return Centered(_minus(x, pivot), pivot)


def _affine(centered: Centered, stats: Statistics, layer: Layer) -> Tensor:
    """γ·x̂ + β, in z's dtype."""
    z, pivot = centered
    offset, rstd = (stats.mean_C - pivot).to(z.dtype), stats.rstd_C.to(z.dtype)
    return torch.batch_norm_elemt(z, _in(z, layer.weight), _in(z, layer.bias), offset, rstd, 0.0)


def _minus(x: Tensor, pivot_C: Tensor) -> Tensor:
    """x − pivot in the pivot's dtype and x's memory format."""
    return x - pivot_C.view(1, -1, *[1] * (x.dim() - 2))


def _through_activation(dy: Tensor, x: Tensor, kept: Tensor | None, stats: Statistics, layer: Layer) -> Tensor:
    """dz = dy·activation'(z), in dy's dtype; z is ``kept``, or computed again."""
    if layer.activation is None:
        return dy
    if layer.activation != "silu" and kept is not None:
        z = kept
    else:
        z = _affine(_center(x, stats), stats, layer)
        z = z if kept is None else z + kept
    return activation_gradient(dy, z, layer.activation, layer.negative_slope).to(dy.dtype)
