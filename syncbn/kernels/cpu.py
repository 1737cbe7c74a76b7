"""The four operations for CPU tensors, from PyTorch's own vectorized kernels.

PyTorch's fused forward kernels are not used: they sum in float32 (``batch_norm_update_stats`` is off by 5e-3 standard
deviations at mean/std = 1e3 in channels_last), or are slow (contiguous). Here a tensor is a matrix (``layout``), and

- the moments are those of z = x − pivot, where the pivot, the mean of some of the values, is so close to the mean that
  nothing cancels (Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983, section 3). z is
  computed where y will stand, and becomes y once the mean of all processes is known;
- in backward, x − mean is (x − hi) − lo: hi is the mean in float32, lo what that leaves out, which goes into a shift;
- two sums at once come from ``native_batch_norm_backward``: one fused pass over short runs, added up in float64;
- a residual and an activation come in while a chunk is in cache; backward forms dz once and uses it twice.

Computed in float32 for bfloat16, float16 and float32 input, in float64 for float64. A mask is left to the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..moments import Running, Statistics, gradient_means, settle
from . import reference
from .layout import Matrix
from .operands import Layer
from .precision import as_gradient, computing_dtype, in_two_parts

CHUNK = 1 << 18  # values for each thread that one step works on at a time: 1 MB in float32, so as to stay in cache
RUN = 1 << 14  # values that one float32 accumulator of a fused kernel may add up: an error of about 1e-6


class Centered(NamedTuple):
    """What moments leaves for normalize: x − pivot, to become y in place where the dtypes are the same."""

    matrix: Matrix
    z: Tensor  # [N, C, ...] float32, or float64 for float64
    pivot: Tensor  # spread, in z's dtype


def moments(x: Tensor, mask: Tensor | None, tag: int) -> tuple[Tensor, Centered | None]:
    """The forward message. Reads x, writes and reads z."""
    if mask is not None:
        return reference.moments(x, mask, tag)
    C = x.shape[1]
    numbers = torch.tensor([x.numel() // C, tag, tag * tag], dtype=torch.float64, device=x.device)
    if x.numel() == 0:
        return torch.cat([torch.zeros(2 * C, dtype=torch.float64, device=x.device), numbers]), None
    matrix, dtype = Matrix.of(x), computing_dtype(x)
    pivot = _pivot(matrix, dtype)
    z = torch.empty_like(matrix.tensor, dtype=dtype)
    x_chunks, z_chunks, pivots = _chunks(matrix, matrix.values, matrix.same(z), pivot)
    sums = []
    for x_chunk, z_chunk, pivot_chunk in zip(x_chunks, z_chunks, pivots, strict=True):
        torch.sub(x_chunk, pivot_chunk, out=z_chunk)
        sums.append(torch.stack([z_chunk.sum(matrix.dim), z_chunk.square().sum(matrix.dim)]))
    sum_z, sum_zz = _gather(matrix, sums).unbind()
    pivot_ = pivot.double().view(-1)
    sum_x = sum_z + matrix.length * pivot_
    sum_xx = sum_zz + pivot_ * (sum_z + sum_x)
    sums_2C = matrix.by_channel(torch.stack([sum_x, sum_xx])).view(-1)
    return torch.cat([sums_2C, numbers]), Centered(matrix, z, pivot)


def normalize(
    x: Tensor,
    residual: Tensor | None,
    message: Tensor,
    layer: Layer,
    running: Running | None,
    scratch: Centered | None,
) -> tuple[Tensor, Statistics]:
    """y = activation(z·scale + shift + residual), with scale = γ·r and shift = β + (pivot − mean)·scale."""
    stats = settle(message, layer.world_size, layer.eps, running)
    if x.numel() == 0:
        return torch.empty_like(x), stats
    matrix, z, pivot = scratch or _center(x, stats)
    scale, bias = _scale_and_bias(stats, layer)
    mean, scale, bias = matrix.spread(torch.stack([stats.mean_C, scale, bias]))
    shift = torch.addcmul(bias, pivot - mean, scale)
    scale, shift = scale.to(z.dtype), shift.to(z.dtype)
    y = z if z.dtype == x.dtype else torch.empty_like(matrix.tensor)
    if residual is None and layer.activation is None:
        _scale_and_shift(matrix.same(z), scale, shift, out=matrix.same(y))
    else:
        _scale_shift_add_activate(matrix, matrix.same(z), scale, shift, residual, layer, out=matrix.same(y))
    return y, stats


def grad_moments(
    dy: Tensor, x: Tensor, kept: Tensor | None, stats: Sequence[Tensor], layer: Layer, tag: int
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    """The backward message, and dz for ``grad_input``. Reads x and dz once.

    Σdz·x̂ = r·(Σdz·(x − hi) − lo·Σdz).
    """
    stats = Statistics(*stats)
    C = x.shape[1]
    numbers = torch.tensor([tag, tag * tag], dtype=torch.float64, device=x.device)
    if x.numel() == 0:
        sum_dz = sum_dz_xhat = torch.zeros(C, dtype=torch.float64, device=x.device)
        dz = dy
    else:
        matrix = Matrix.of(x)
        hi, lo = in_two_parts(stats.mean_C, computing_dtype(x))
        dz = dy if layer.activation is None else _through_activation(matrix, dy, kept, stats, layer)
        sums = _two_sums(matrix, matrix.same(dz), matrix.values, *matrix.spread(hi.unsqueeze(0)))
        sum_dz, sum_dz_centered = matrix.by_channel(sums)
        sum_dz_xhat = (sum_dz_centered - lo * sum_dz) * stats.rstd_C
    dweight, dbias = as_gradient(sum_dz_xhat, layer.weight), as_gradient(sum_dz, layer.bias)
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
    """dx as dz·a + (hi − x)·b + c. Reads x and dz once, writes dx once."""
    stats = Statistics(*stats)
    dz = scratch
    dresidual = dz if wants_dresidual else None
    if mask is not None:
        return reference.grad_input(dy, x, kept, mask, stats, layer, message, False, None)[0], dresidual
    if x.numel() == 0:
        return torch.empty_like(x), dresidual
    matrix, dtype = Matrix.of(x), computing_dtype(x)
    _, lo = in_two_parts(stats.mean_C, dtype)
    mean_dz, mean_dz_xhat = gradient_means(message, stats.n, layer.world_size)
    a, _ = _scale_and_bias(stats, layer)
    b = a * stats.rstd_C * mean_dz_xhat
    c = torch.addcmul(lo * b, a, mean_dz, value=-1)
    dx = torch.empty_like(matrix.tensor)
    spread = matrix.spread(torch.stack([stats.mean_C, a, b, c]).to(dtype))
    x_chunks, dz_chunks, dx_chunks, *others = _chunks(matrix, matrix.values, matrix.same(dz), matrix.same(dx), *spread)
    in_place = dx.dtype == dtype
    for x_chunk, dz_chunk, dx_chunk, hi, a, b, c in zip(x_chunks, dz_chunks, dx_chunks, *others, strict=True):
        z = torch.sub(hi, x_chunk, out=dx_chunk if in_place else None)
        _scale_and_shift(z, b, c, out=z)
        torch.addcmul(z, dz_chunk, a, out=dx_chunk)
    return dx, dresidual


def _center(x: Tensor, stats: Statistics) -> Centered:
    """x − mean, for a caller without what moments leaves."""
    matrix = Matrix.of(x)
    (pivot,) = matrix.spread(stats.mean_C.to(computing_dtype(x)).unsqueeze(0))
    z = torch.empty_like(matrix.tensor, dtype=pivot.dtype)
    torch.sub(matrix.values, pivot, out=matrix.same(z))
    return Centered(matrix, z, pivot)


def _scale_and_bias(stats: Statistics, layer: Layer) -> tuple[Tensor, Tensor]:
    """γ·r and β, [C] float64."""
    scale = stats.rstd_C if layer.weight is None else stats.rstd_C * layer.weight
    return scale, torch.zeros_like(scale) if layer.bias is None else layer.bias.double()


def _scale_shift_add_activate(
    matrix: Matrix, z: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, layer: Layer, out: Tensor
) -> None:
    """out = activation(z·scale + shift + residual); z is used up."""
    each = [z, scale, shift, out] + ([] if residual is None else [matrix.same(residual)])
    for z_chunk, scale_chunk, shift_chunk, out_chunk, *added in zip(*_chunks(matrix, *each), strict=True):
        _scale_and_shift(z_chunk, scale_chunk, shift_chunk, out=z_chunk)
        for residual_chunk in added:
            z_chunk.add_(residual_chunk)
        _activate_(z_chunk, layer)
        if out_chunk.data_ptr() != z_chunk.data_ptr():
            out_chunk.copy_(z_chunk)


def _activate_(z: Tensor, layer: Layer) -> None:
    match layer.activation:
        case "relu":
            z.relu_()
        case "leaky_relu":
            torch.nn.functional.leaky_relu_(z, layer.negative_slope)
        case "silu":
            torch.nn.functional.silu(z, inplace=True)


def _through_activation(matrix: Matrix, dy: Tensor, kept: Tensor | None, stats: Statistics, layer: Layer) -> Tensor:
    """dz = dy·activation'(z), in dy's dtype and the matrix's order; z is ``kept``, or computed again."""
    dz = torch.empty_like(matrix.tensor, dtype=dy.dtype)
    each = [matrix.same(dy), matrix.same(dz)] + ([] if kept is None else [matrix.same(kept)])
    if layer.activation != "silu" and kept is not None:  # the sign of y is that of z
        for dy_chunk, dz_chunk, y_chunk in zip(*_chunks(matrix, *each), strict=True):
            _activation_gradient(dy_chunk, y_chunk, layer, out=dz_chunk)
        return dz
    scale, bias = _scale_and_bias(stats, layer)
    hi, lo = in_two_parts(stats.mean_C, computing_dtype(matrix.tensor))
    spread = matrix.spread(torch.stack([hi.double(), scale, bias - lo * scale]).to(hi.dtype))
    chunks = _chunks(matrix, matrix.values, *spread, *each)
    for x_chunk, hi_chunk, scale_chunk, shift_chunk, dy_chunk, dz_chunk, *added in zip(*chunks, strict=True):
        z = torch.sub(x_chunk, hi_chunk)
        _scale_and_shift(z, scale_chunk, shift_chunk, out=z)
        for residual_chunk in added:
            z.add_(residual_chunk)
        _activation_gradient(dy_chunk, z.to(dy.dtype), layer, out=dz_chunk)
    return dz


def _activation_gradient(dy: Tensor, z: Tensor, layer: Layer, out: Tensor) -> None:
    match layer.activation:
        case "relu":
            torch.ops.aten.threshold_backward.grad_input(dy, z, 0, grad_input=out)
        case "leaky_relu":
            torch.ops.aten.leaky_relu_backward.grad_input(dy, z, layer.negative_slope, False, grad_input=out)
        case "silu":
            torch.ops.aten.silu_backward.grad_input(dy, z, grad_input=out)


def _pivot(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """A value near the mean of each row or column: the mean of every k-th of its n values, spread.

    The variance of z is computed to about 1e-7·(1 + d²), the pivot being d standard deviations away from the mean.
    Were all s sampled values outliers, they would make the variance itself so large that d² ≤ n/s; a single one,
    n/s². k is near 2√n, which bounds that by 4, and odd, so as not to sample one column of an image only.
    """
    step = 2 * math.isqrt(matrix.length) | 1
    sample = slice(min(step // 2, matrix.length - 1), None, step)
    values = matrix.values[:, sample] if matrix.dim == 1 else matrix.values[sample]
    return values.mean(matrix.dim, True, dtype=dtype)


def _chunks(matrix: Matrix, *of_rows: Tensor) -> list[tuple[Tensor, ...]]:
    """Matrices and spread values, each cut into the same chunks of whole rows."""
    step = max(1, CHUNK * torch.get_num_threads() // matrix.values.shape[1])
    return [matrix.split(each, step) for each in of_rows]


def _scale_and_shift(z: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """out = z·scale + shift. One fused pass where the factors lie along memory, else two vectorized ones."""
    if scale.shape[-1] > 1:
        torch.addcmul(shift, z, scale, out=out)
    else:
        torch.add(z.mul_(scale), shift, out=out)


def _gather(matrix: Matrix, sums: list[Tensor]) -> Tensor:
    """K sums over each chunk, [K, rows] or [K, C], as float64 sums over the matrix, [K, N·C] or [K, C]."""
    if len(sums) == 1:
        return sums[0].double()
    return torch.cat(sums, 1).double() if matrix.dim == 1 else torch.stack(sums).double().sum(0)


def _two_sums(matrix: Matrix, dy: Tensor, x: Tensor, center: Tensor) -> Tensor:
    """Σdy and Σdy·(x − center) over each row or column, [2, N·C] or [2, C] float64; all but ``center`` are matrices."""
    if matrix.dim == 1:
        pieces = _pieces(matrix.length)
        runs = (1, len(dy) * pieces, -1)
        sums = _fused_sums(dy.view(runs), x.view(runs), center.expand(-1, pieces).reshape(-1))
        return sums.view(2, -1, pieces).sum(2, dtype=torch.float64)
    pairs = zip(dy.split(RUN // 4), x.split(RUN // 4), strict=True)
    each = [_fused_sums(_as_channels_last(a), _as_channels_last(b), center.view(-1)) for a, b in pairs]
    return _gather(matrix, each)


def _fused_sums(dy: Tensor, x: Tensor, center: Tensor) -> Tensor:
    """Σdy and Σdy·(x − center) along all dimensions but the second: β's and γ's gradients at variance 1 and ε 0."""
    of_output = [False, True, True]
    _, sum_dy_centered, sum_dy = torch.ops.aten.native_batch_norm_backward.default(
        dy, x, None, center, torch.ones_like(center), None, None, False, 0.0, of_output
    )
    return torch.stack([sum_dy, sum_dy_centered])


def _as_channels_last(columns: Tensor) -> Tensor:
    """[M, C] as [1, C, M, 1] in channels_last."""
    M, C = columns.shape
    return columns.as_strided((1, C, M, 1), (M * C, 1, C, C))


def _pieces(length: int) -> int:
    """Into how many equal runs a row can be cut: 1 where its length has no suitable divisor."""
    fewest = math.ceil(length / RUN)
    return next((n for n in range(fewest, 8 * fewest) if length % n == 0), 1)
