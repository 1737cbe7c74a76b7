"""The four operations for CPU tensors, from PyTorch's own vectorized kernels.

PyTorch's fused forward kernels are not used: they sum in float32 (``batch_norm_update_stats`` is off by 5e-3 standard
deviations at mean/std = 1e3 in channels_last), or are slow (contiguous). Here a tensor is a matrix (``layout``), and

- the moments are those of z = x − pivot, where the pivot, the mean of some of the values, is so close to the mean that
  nothing cancels (Chan, Golub and LeVeque, "Algorithms for Computing the Sample Variance", 1983, section 3). z is
  computed where y will stand, and becomes y once the mean of all processes is known;
- in backward, x − mean is (x − hi) − lo: hi is the mean in float32, lo what that leaves out, which goes into a shift;
- two sums at once come from ``native_batch_norm_backward``: one fused pass over short runs, added up in float64.

Computed in float32 for bfloat16, float16 and float32 input, in float64 for float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .layout import Matrix

CHUNK = 1 << 18  # values for each thread that backward works on at a time: 1 MB in float32, so as to stay in cache
RUN = 1 << 14  # values that one float32 accumulator of a fused kernel may add up: an error of about 1e-6


class Centered(NamedTuple):
    """What moments leaves for normalize: x − pivot, to become y in place where the dtypes are the same."""

    matrix: Matrix
    z: Tensor  # [N, C, ...] float32, or float64 for float64
    pivot: Tensor  # spread, in z's dtype


def moments(x: Tensor, tag: int) -> tuple[Tensor, Centered | None]:
    """The forward message, [2C+3] float64: Σx | Σx² | n | tag | tag². Reads x, writes and reads z."""
    C = x.shape[1]
    numbers = torch.tensor([x.numel() // C, tag, tag * tag], dtype=torch.float64, device=x.device)
    if x.numel() == 0:
        return torch.cat([torch.zeros(2 * C, dtype=torch.float64, device=x.device), numbers]), None
    matrix, dtype = Matrix.of(x), _compute_dtype(x)
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
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    centered: Centered | None = None,
) -> Tensor:
    """y = z·scale + shift, with scale = γ·r and shift = β + (pivot − mean)·scale. Reads z, writes y."""
    if x.numel() == 0:
        return torch.empty_like(x)
    if centered is None:
        matrix = Matrix.of(x)
        (pivot,) = matrix.spread(mean.to(_compute_dtype(x)).unsqueeze(0))
        z = torch.empty_like(matrix.tensor, dtype=pivot.dtype)
        torch.sub(matrix.values, pivot, out=matrix.same(z))
    else:
        matrix, z, pivot = centered
    scale = rstd if weight is None else rstd * weight
    bias = torch.zeros_like(mean) if bias is None else bias.double()
    mean, scale, bias = matrix.spread(torch.stack([mean, scale, bias]))
    shift = torch.addcmul(bias, pivot - mean, scale)
    y = z if z.dtype == x.dtype else torch.empty_like(matrix.tensor)
    _scale_and_shift(matrix.same(z), scale.to(z.dtype), shift.to(z.dtype), out=matrix.same(y))
    return y


def grad_moments(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, tag: int) -> Tensor:
    """The backward message, [2C+2] float64: Σdy | Σdy·x̂ | tag | tag². Reads x and dy once.

    Σdy·x̂ = r·(Σdy·(x − hi) − lo·Σdy).
    """
    C = x.shape[1]
    numbers = torch.tensor([tag, tag * tag], dtype=torch.float64, device=x.device)
    if x.numel() == 0:
        return torch.cat([torch.zeros(2 * C, dtype=torch.float64, device=x.device), numbers])
    matrix = Matrix.of(x)
    hi, lo = _in_two_parts(mean, _compute_dtype(x))
    sums = _two_sums(matrix, matrix.same(dy), matrix.values, *matrix.spread(hi.unsqueeze(0)))
    sum_dy, sum_dy_centered = matrix.by_channel(sums)
    return torch.cat([sum_dy, (sum_dy_centered - lo * sum_dy) * rstd, numbers])


def grad_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    mean_dy: Tensor,
    mean_dy_xhat: Tensor,
) -> Tensor:
    """dx = γ·r·(dy − mean_dy − x̂·mean_dy_xhat), as dy·a + (hi − x)·b + c. Reads x and dy once, writes dx once."""
    if x.numel() == 0:
        return torch.empty_like(x)
    matrix, dtype = Matrix.of(x), _compute_dtype(x)
    _, lo = _in_two_parts(mean, dtype)
    a = rstd if weight is None else rstd * weight
    b = a * rstd * mean_dy_xhat
    c = torch.addcmul(lo * b, a, mean_dy, value=-1)
    dx = torch.empty_like(matrix.tensor)
    spread = matrix.spread(torch.stack([mean, a, b, c]).to(dtype))
    x_chunks, dy_chunks, dx_chunks, *others = _chunks(matrix, matrix.values, matrix.same(dy), matrix.same(dx), *spread)
    in_place = dx.dtype == dtype
    for x_chunk, dy_chunk, dx_chunk, hi, a, b, c in zip(x_chunks, dy_chunks, dx_chunks, *others, strict=True):
        z = torch.sub(hi, x_chunk, out=dx_chunk if in_place else None)
        _scale_and_shift(z, b, c, out=z)
        torch.addcmul(z, dy_chunk, a, out=dx_chunk)
    return dx


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


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


def _in_two_parts(mean: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """hi in ``dtype`` and lo in float64, whose sum is the mean."""
    hi = mean.to(dtype)
    return hi, mean - hi


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
