"""The four operations as torch.compile is to trace them: plain PyTorch in float32, for Inductor to fuse.

The reference computes in float64, which costs Inductor twice the registers, or a GPU without fast float64 its speed.
Here nothing is float64 but what has the size of the channels:

- the moments are those of x − pivot, the pivot being the mean of some of the values (see ``cpu``);
- sums run over one row of an image in float32, then over the rows in float64;
- x − mean is (x − hi) − lo: hi is the mean in float32, lo what that leaves out, which goes into a shift.

Nothing is written down but the results: every intermediate value of x's size is there to be fused. float64 input is
computed in float64. Moments under a mask, and an empty batch, are left to the reference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..moments import Running, Statistics, gradient_means, settle
from . import reference
from .activation import activate
from .operands import Layer
from .precision import as_gradient, computing_dtype, in_two_parts
from .reference import grad_sum, numbers, of_channels


def moments(x: Tensor, mask: Tensor | None, tag: int) -> tuple[Tensor, None]:
    """The forward message, from one pass over x."""
    if mask is not None or x.numel() == 0:
        return reference.moments(x, mask, tag)
    pivot_C = _mean_of_some(x)
    z = x.to(pivot_C.dtype) - of_channels(pivot_C, x)
    sum_z, sum_zz, pivot_C = _sum(z), _sum(z * z), pivot_C.double()
    n = x.numel() // x.shape[1]
    sum_x = sum_z + n * pivot_C
    return torch.cat([sum_x, sum_zz + pivot_C * (sum_z + sum_x), numbers(x, n, tag, tag**2)]), None


def normalize(
    x: Tensor, residual: Tensor | None, message: Tensor, layer: Layer, running: Running | None, scratch: None
) -> tuple[Tensor, Statistics]:
    """y = activation((x − hi)·scale + shift + residual)."""
    stats = settle(message, layer.world_size, layer.eps, running)
    z = _affine(x, stats, layer)
    z = z if residual is None else z + residual
    return activate(z, layer.activation, layer.negative_slope).to(x.dtype), stats


def grad_moments(
    dy: Tensor, x: Tensor, kept: Tensor | None, stats: Sequence[Tensor], layer: Layer, tag: int
) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    """The backward message, from one pass: Σdz·x̂ = r·(Σdz·(x − hi) − lo·Σdz)."""
    stats = Statistics(*stats)
    if x.numel() == 0:
        return reference.grad_moments(dy, x, kept, stats, layer, tag)
    hi, lo = in_two_parts(stats.mean_C, computing_dtype(x))
    dz = _grad_sum(dy, x, kept, stats, layer)
    (hi,) = _written_down(hi)
    dbias = _sum(dz)
    dweight = (_sum(dz * _minus(x, hi)) - lo * dbias) * stats.rstd_C
    message = torch.cat([dbias, dweight, numbers(x, tag, tag**2)])
    return message, as_gradient(dweight, layer.weight), as_gradient(dbias, layer.bias), None


def grad_input(
    dy: Tensor,
    x: Tensor,
    kept: Tensor | None,
    mask: Tensor | None,
    stats: Sequence[Tensor],
    layer: Layer,
    message: Tensor,
    wants_dresidual: bool,
    scratch: None,
) -> tuple[Tensor, Tensor | None]:
    """dx = a·dz − w·(b·(x − hi) + c), with a = γ·r, b = a·r·Σ(dz·x̂)/N and c = a·Σdz/N − lo·b; and dz."""
    stats = Statistics(*stats)
    dtype = computing_dtype(x)
    hi, lo = in_two_parts(stats.mean_C, dtype)
    mean_dz, mean_dz_xhat = gradient_means(message, stats.n, layer.world_size)
    a = _scale(stats, layer)
    b = a * stats.rstd_C * mean_dz_xhat
    c = a * mean_dz - lo * b
    hi, a, b, c = _written_down(hi, a, b, c)
    a, b, c = (of_channels(each, x) for each in (a, b, c))
    dz = _grad_sum(dy, x, kept, stats, layer)
    # x comes first because the result takes its first operand's memory format.
    common = _minus(x, hi) * b + c
    dx = (-common if mask is None else -common * mask) + dz * a
    return dx.to(x.dtype), dz.to(x.dtype) if wants_dresidual else None


def _affine(x: Tensor, stats: Statistics, layer: Layer) -> Tensor:
    """γ·x̂ + β as (x − hi)·scale + shift."""
    hi, lo = in_two_parts(stats.mean_C, computing_dtype(x))
    scale = _scale(stats, layer)
    shift = -lo * scale if layer.bias is None else layer.bias - lo * scale
    hi, scale, shift = _written_down(hi, scale, shift)
    return _minus(x, hi) * of_channels(scale, x) + of_channels(shift, x)


def _scale(stats: Statistics, layer: Layer) -> Tensor:
    return stats.rstd_C if layer.weight is None else stats.rstd_C * layer.weight


def _grad_sum(dy: Tensor, x: Tensor, kept: Tensor | None, stats: Statistics, layer: Layer) -> Tensor:
    """dz, the gradient of z = BN(x) + residual, in the computing dtype."""
    return grad_sum(dy.to(computing_dtype(x)), kept, layer, lambda: _affine(x, stats, layer))


def _mean_of_some(x: Tensor) -> Tensor:
    """A value near each channel's mean, [C] in the computing dtype: the mean of every image's middle row."""
    some = x.select(2, x.shape[2] // 2) if x.dim() >= 4 else x
    dtype, n = computing_dtype(x), some.numel() // some.shape[1]
    (mean_C,) = _written_down((_sum(some.to(dtype)) / n).to(dtype))
    return mean_C


def _written_down(hi: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Values of channels in the first one's dtype, as a buffer of their own.

    Inductor would compute them again, in float64 and with their roots and divisions, for every value of x that they
    are combined with. as_strided needs memory to view, so that it writes them down first.
    """
    values = torch.stack([hi, *(each.to(hi.dtype) for each in others)])
    return values.as_strided(values.shape, (values.shape[1], 1)).unbind()


def _minus(x: Tensor, hi_C: Tensor) -> Tensor:
    return x.to(hi_C.dtype) - of_channels(hi_C, x)


_ROW = 1024  # values that are added up in x's dtype: Inductor adds one after another, others pairwise


def _sum(x: Tensor) -> Tensor:
    """Over all but the channels: over a row in x's dtype, over the rows in float64. [C] float64."""
    if x.dim() > 2 and x.shape[-1] > _ROW:
        whole = x.shape[-1] // _ROW * _ROW
        return _sum(x[..., :whole].unflatten(-1, (-1, _ROW))) + _sum(x[..., whole:])
    rows = x.sum(-1) if x.dim() > 2 else x
    return rows.sum([0, *range(2, rows.dim())], dtype=torch.float64)
