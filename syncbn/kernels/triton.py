"""The four operations for CUDA tensors, as Triton kernels.

Forward reads x for the moments, and x (and the residual) once more to write y. Backward reads x and dy (and what
tells the activation's derivative) twice, and writes dx (and the residual's gradient). Nothing else passes over the
data:

    moments      one kernel, and a second one that adds up its programs' sums where there are several
    (all-reduce)
    normalize    one kernel; each program forms its channels' statistics from the message. The first programs do not
                 normalize, but move the running statistics and leave mean, r and N for backward

and the same for grad_moments and grad_input. The sums stand in the message from the start, where the all-reduce
reads them.

Accuracy: a program sums at most ``RUN`` tiles, in float32, of values that are centred by a pivot near their mean, which
is the mean of its first tile; what the programs have summed is added in float64. Later, x − mean is (x − hi) − lo, hi
being the mean in float32; lo goes into a shift, which is formed in float64. For float64 input all is float64. Nothing
depends on the order in which programs run: there are no atomics, and the same input gives the same bits.

A program's tile is [block_s, block_c] (see ``tiling``). Legend: C channels, S places in an image, K = 2C+3 forward and
2C+2 backward, P splits; x, y, dx, dy, residual, dresidual and kept are [N, C, S] in x's order of memory, of its dtype;
mask is [N, S]; weight, bias, running_mean, running_var, dweight and dbias are [C], any floating dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..moments import Running
from .launch import Kernel
from .layout import channels_last, dense, dense_like
from .operands import Layer
from .precision import computing_dtype
from .tiling import RUN, tiling

_STEP = 256
CHECKED = tl.constexpr(512)  # channels that are looked at at a time; more would take registers from the other programs
STEP = tl.constexpr(_STEP)  # channels whose statistics are kept at a time
WARPS = 4
WARPS_OF_SINGLES = 8  # where a read is of one value or two, and its address takes registers
REDUCING = 8  # programs on each multiprocessor at a time
STREAMING = 16
FEW = 4  # tiles that one program sums sooner than two, whose sums take another kernel to be added


# ---- what the kernels have in common


@triton.jit
def _tile(
    t, C, S, tiles_per_image, c0,
    LAST: tl.constexpr, VEC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tile t of an image's places, in the channels from c0 on.

    Returns the offset of its first value (64 bits), its values' offsets from there and whether they exist [BLOCK_S,
    BLOCK_C], the offset of its first place in the mask, and how many of its places exist.
    """
    n = (t // tiles_per_image).to(tl.int64)
    s0 = (t - n * tiles_per_image) * BLOCK_S
    s, c = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_C)
    s_left = tl.minimum(S - s0, BLOCK_S).to(tl.int32)
    c_left = tl.minimum(C - c0, BLOCK_C)
    if LAST:
        c_left = tl.multiple_of(c_left, VEC)
        start = tl.multiple_of(s0 * C, VEC) + c0
        offsets = tl.multiple_of(s * C, VEC)[:, None] + c[None, :]
    else:
        s_left = tl.multiple_of(s_left, VEC)
        start = tl.multiple_of((n * C + c0) * S, VEC) + s0
        offsets = s[:, None] + tl.multiple_of(c * S.to(tl.int32), VEC)[None, :]
    return start, offsets, (s < s_left)[:, None] & (c < c_left)[None, :], n * S + s0, s_left


@triton.jit
def _count(message_ptr, n, tags, world_size):
    """What to divide sums by: n, or infinity where it is 0; NaN where the processes met in different layers.

    That is what the summed tags (at ``tags``) say.
    """
    tag, squares = tl.load(message_ptr + tags), tl.load(message_ptr + tags + 1)
    n = tl.where(n == 0, float("inf"), n)
    return tl.where((world_size * squares == tag * tag) | (world_size == 1), n, float("nan"))


@triton.jit
def _mean_and_variance(message_ptr, count, c, C, inside):
    mean = tl.load(message_ptr + c, mask=inside, other=0.0) / count
    var = tl.load(message_ptr + C + c, mask=inside, other=0.0) / count - mean * mean
    var = tl.where(count == float("inf"), 1.0, var)
    return mean, tl.where(var < 0, 0.0, var)  # a comparison, which keeps NaN


@triton.jit
def _scale_and_shift(mean, rstd, weight_ptr, bias_ptr, c, inside, DTYPE: tl.constexpr):
    """hi, scale and shift in the computing dtype, and γ·r and lo in float64: γ·x̂ + β = (x − hi)·scale + shift."""
    hi = mean.to(DTYPE)
    lo = mean - hi.to(tl.float64)
    scale = rstd
    if weight_ptr is not None:
        scale = rstd * tl.load(weight_ptr + c, mask=inside, other=0.0).to(tl.float64)
    shift = -lo * scale
    if bias_ptr is not None:
        shift += tl.load(bias_ptr + c, mask=inside, other=0.0).to(tl.float64)
    return hi, scale.to(DTYPE), shift.to(DTYPE), scale, lo


@triton.jit
def _activate(z, slope, ACTIVATION: tl.constexpr):
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * slope)
    elif ACTIVATION == "silu":
        z = z / (1 + tl.exp(-z))
    return z


@triton.jit
def _grad_sum(dy, x, kept_ptr, start, offsets, inside, hi, scale, shift, slope, ACTIVATION: tl.constexpr):
    """dz = dy·activation'(z), with z = γ·x̂ + β (+ the residual, kept for silu). y, too, tells relu and leaky_relu."""
    if ACTIVATION is not None:
        if kept_ptr is None:
            z = (x - hi[None, :]) * scale[None, :] + shift[None, :]
        else:
            z = tl.load(kept_ptr + start + offsets, mask=inside, other=0.0).to(x.dtype)
            if ACTIVATION == "silu":
                z += (x - hi[None, :]) * scale[None, :] + shift[None, :]
        if ACTIVATION == "relu":
            dy = tl.where(z <= 0, 0.0, dy)
        elif ACTIVATION == "leaky_relu":
            dy = tl.where(z > 0, dy, dy * slope)
        else:
            s = 1 / (1 + tl.exp(-z))
            dy = dy * s * (1 + z * (1 - s))
    return dy


@triton.jit
def _mask(mask_ptr, place, places, DTYPE: tl.constexpr, BLOCK_S: tl.constexpr):
    """The weights of a tile's places [BLOCK_S]; 0 where there is no place."""
    s = tl.arange(0, BLOCK_S)
    return tl.load(mask_ptr + place + s, mask=s < places, other=0).to(DTYPE)


# ---- forward


def _moments(
    x_ptr, mask_ptr, rows_ptr,
    tag: tl.int64, C: tl.int32, S: tl.int64, tiles_per_image: tl.int32, tiles: tl.int32, share: tl.int32,
    channel_blocks: tl.int32,
    LAST: tl.constexpr, VEC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each split's part of the forward message: Σw·x | Σw·x² | Σw | tag | tag².

    x [N, C, S], read once; mask [N, S] uint8, or weights in the computing dtype, or None; rows [P, 2C+3] float64,
    written: split 0 brings the tag for all.
    Bytes: x, and 8·P·(2C+3).
    """
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    split = tl.program_id(0) // channel_blocks
    c0 = (tl.program_id(0) - split * channel_blocks) * BLOCK_C
    t, last = split * share, tl.minimum((split + 1) * share, tiles)
    if mask_ptr is not None:  # tiles without any weight add nothing, and cannot give the pivot
        weight = tl.full((), 0.0, DTYPE)
        while (weight == 0) & (t < last):
            _start, _offsets, _inside, place, places = _tile(t, C, S, tiles_per_image, c0, LAST, VEC, BLOCK_S, BLOCK_C)
            weight = tl.sum(_mask(mask_ptr, place, places, DTYPE, BLOCK_S), 0)
            t += tl.where(weight == 0, 1, 0)
    S_here = tl.where(t < last, S, 0)  # nothing, where no tile has any weight, or there is none
    start, offsets, inside, place, places = _tile(t, C, S_here, tiles_per_image, c0, LAST, VEC, BLOCK_S, BLOCK_C)
    x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
    count = tl.maximum(places, 0).to(tl.int64)
    if mask_ptr is None:
        pivot = tl.sum(x * (1 / tl.maximum(count, 1).to(DTYPE)), 0)
        z = tl.where(inside, x - pivot[None, :], 0.0)
        acc_z = z
    else:
        acc_w = _mask(mask_ptr, place, places, DTYPE, BLOCK_S)
        weight = tl.sum(acc_w, 0)
        pivot = tl.sum(x * (acc_w / tl.where(weight > 0, weight, 1.0))[:, None], 0)
        z = tl.where(inside, x - pivot[None, :], 0.0)
        acc_z = z * acc_w[:, None]
    acc_zz = z * acc_z
    for u in range(t + 1, last):
        start, offsets, inside, place, places = _tile(u, C, S, tiles_per_image, c0, LAST, VEC, BLOCK_S, BLOCK_C)
        z = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
        z = tl.where(inside, z - pivot[None, :], 0.0)
        if mask_ptr is None:
            count += places
            acc_z += z
            acc_zz += z * z
        else:
            w = _mask(mask_ptr, place, places, DTYPE, BLOCK_S)
            acc_w += w
            acc_z += z * w[:, None]
            acc_zz += z * z * w[:, None]
    weights = count.to(tl.float64) if mask_ptr is None else tl.sum(acc_w, 0).to(tl.float64)
    sum_z, pivot64 = tl.sum(acc_z, 0).to(tl.float64), pivot.to(tl.float64)
    sum_x = sum_z + weights * pivot64
    sum_xx = tl.sum(acc_zz, 0).to(tl.float64) + pivot64 * (sum_z + sum_x)
    row_ptr = rows_ptr + split.to(tl.int64) * (2 * C + 3)
    c = c0 + tl.arange(0, BLOCK_C)
    tl.store(row_ptr + c, sum_x, mask=c < C)
    tl.store(row_ptr + C + c, sum_xx, mask=c < C)
    if c0 == 0:
        one = tl.arange(0, 1)
        tag64 = tl.zeros([1], tl.float64) + tag * (split == 0).to(tl.float64)
        tl.store(row_ptr + 2 * C + one, tl.zeros([1], tl.float64) + weights)
        tl.store(row_ptr + 2 * C + 1 + one, tag64)
        tl.store(row_ptr + 2 * C + 2 + one, tag64 * tag64)


def _combine(
    rows_ptr, message_ptr, dweight_ptr, dbias_ptr,
    K: tl.int32, C: tl.int32, P: tl.int32,
    BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sum of all splits' rows: message[k] = Σ rows[p, k]. In backward its parts are dβ and dγ as well.

    rows [P, K] float64, read once; message [K] float64, written; dweight and dbias [C], written, or None.
    Bytes: 8·K·(P + 1).
    """
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    p = tl.arange(0, BLOCK_P)
    acc = tl.zeros([BLOCK_P, BLOCK_K], tl.float64)
    for p0 in range(0, P, BLOCK_P):
        row = (p0 + p).to(tl.int64)
        acc += tl.load(rows_ptr + row[:, None] * K + k[None, :], mask=(row < P)[:, None] & (k < K)[None, :], other=0.0)
    total = tl.sum(acc, 0)
    tl.store(message_ptr + k, total, mask=k < K)
    _store_rounded(dbias_ptr, k, total, k < C)
    _store_rounded(dweight_ptr, k - C, total, (k >= C) & (k < 2 * C))


@triton.jit
def _store_rounded(pointer, offsets, values, inside):
    if pointer is not None:
        tl.store(pointer + offsets, _rounded(values, pointer.dtype.element_ty), mask=inside)


@triton.jit
def _rounded(values, dtype: tl.constexpr):
    """float64 in another dtype; the smaller ones by way of float32, since not every GPU rounds them directly."""
    if dtype != tl.float64:
        values = values.to(tl.float32)
    return values.to(dtype)


def _normalize(
    x_ptr, residual_ptr, y_ptr, message_ptr, weight_ptr, bias_ptr, running_mean_ptr, running_var_ptr, tracked_ptr,
    stats_ptr,
    eps: tl.float64, momentum: tl.float64, cumulative: tl.int32, slope: tl.float64, world_size: tl.float64,
    keepers: tl.int32, kept_channels: tl.int32, C: tl.int32, S: tl.int64, tiles_per_image: tl.int32, tiles: tl.int32,
    share: tl.int32, channel_blocks: tl.int32,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, VEC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """y = activation(γ·(x − mean)·r + β + residual), with mean = Σx/N, r = 1/√(Σx²/N − mean² + ε).

    x and residual (or None) [N, C, S], read once; y, written; message [2C+3] float64, summed over all processes; weight
    and bias [C] or None; stats [2C+1] float64, written: mean | r | N. running_mean and running_var [C] and tracked []
    int64, or None, are moved by momentum (by 1/tracked where ``cumulative``) toward mean and var·N/max(N−1, 1), unless
    any channel's is not finite.
    Bytes: x, residual and y, and a few times 8·C in each program.
    """
    if tl.program_id(0) < keepers:
        _keep_statistics(
            message_ptr, running_mean_ptr, running_var_ptr, tracked_ptr, stats_ptr, eps, momentum, cumulative,
            world_size, C, kept_channels,
        )  # fmt: skip
    else:
        DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
        pid = tl.program_id(0) - keepers
        split = pid // channel_blocks
        c0 = (pid - split * channel_blocks) * BLOCK_C
        c = c0 + tl.arange(0, BLOCK_C)
        count = _count(message_ptr, tl.load(message_ptr + 2 * C), 2 * C + 1, world_size)
        mean, var = _mean_and_variance(message_ptr, count, c, C, c < C)
        rstd = 1 / tl.sqrt(var + eps)
        hi, scale, shift, _a, _lo = _scale_and_shift(mean, rstd, weight_ptr, bias_ptr, c, c < C, DTYPE)
        slope_ = tl.full((), slope, DTYPE)
        # From the last tile to the first: what the moments have read last is still in the cache.
        first = tiles - (split + 1) * share
        for t in range(tl.maximum(first, 0), first + share):
            start, offsets, inside, _place, _places = _tile(t, C, S, tiles_per_image, c0, LAST, VEC, BLOCK_S, BLOCK_C)
            z = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
            z = (z - hi[None, :]) * scale[None, :] + shift[None, :]
            if residual_ptr is not None:
                z += tl.load(residual_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
            z = _activate(z, slope_, ACTIVATION)
            tl.store(y_ptr + start + offsets, z.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _keep_statistics(
    message_ptr, running_mean_ptr, running_var_ptr, tracked_ptr, stats_ptr, eps, momentum, cumulative, world_size, C,
    kept_channels,
):  # fmt: skip
    """Stores mean | r | N for backward, and moves the running statistics if all channels are finite.

    Each of the first programs looks at all channels and keeps ``kept_channels`` of them. Only the first one counts the
    batch, so that where the count is also read, it must be the only one.
    """
    n = tl.load(message_ptr + 2 * C)
    count = _count(message_ptr, n, 2 * C + 1, world_size)
    unbiased = n / tl.maximum(n - 1, 1.0)
    factor = tl.full((), momentum, tl.float64)
    moving = C  # channels: all of them, or none
    if running_mean_ptr is not None:
        broken = tl.zeros([CHECKED], tl.int32)
        for c0 in range(0, C, CHECKED):
            c = c0 + tl.arange(0, CHECKED)
            mean, var = _mean_and_variance(message_ptr, count, c, C, c < C)
            finite = _is_finite(_rounded(mean, running_mean_ptr.dtype.element_ty))
            finite &= _is_finite(_rounded(var * unbiased, running_var_ptr.dtype.element_ty))
            broken |= tl.where((c < C) & (finite == 0), 1, 0)
        moving = tl.where((tl.max(broken, 0) == 0) & (n > 0), C, 0)
        if tracked_ptr is not None:  # noqa: SIM102
            if tl.program_id(0) == 0:  # a branch of the program, where the one before is the compiler's
                tracked = tl.load(tracked_ptr) + tl.where(moving > 0, 1, 0)
                tl.store(tracked_ptr, tracked)
                factor = tl.where(cumulative != 0, 1.0 / tl.maximum(tracked, 1).to(tl.float64), factor)
    first = tl.program_id(0) * kept_channels
    for c0 in range(first, tl.minimum(first + kept_channels, C), STEP):
        c = c0 + tl.arange(0, STEP)
        mean, var = _mean_and_variance(message_ptr, count, c, C, c < C)
        tl.store(stats_ptr + c, mean, mask=c < C)
        tl.store(stats_ptr + C + c, 1 / tl.sqrt(var + eps), mask=c < C)
        if running_mean_ptr is not None:
            _move(running_mean_ptr + c, mean, factor, c < moving)
            _move(running_var_ptr + c, var * unbiased, factor, c < moving)
    if tl.program_id(0) == 0:
        tl.store(stats_ptr + 2 * C, n)


@triton.jit
def _is_finite(values):
    return (values * 0 == 0).to(tl.int32)


@triton.jit
def _move(pointers, batch, factor, inside):
    running = tl.load(pointers, mask=inside, other=0.0)
    moved = running.to(tl.float64) * (1 - factor) + batch * factor
    tl.store(pointers, _rounded(moved, running.dtype), mask=inside)


# ---- backward


def _grad_moments(
    x_ptr, dy_ptr, kept_ptr, stats_ptr, weight_ptr, bias_ptr, rows_ptr, dweight_ptr, dbias_ptr,
    tag: tl.int64, slope: tl.float64, C: tl.int32, S: tl.int64, tiles_per_image: tl.int32, tiles: tl.int32,
    share: tl.int32, channel_blocks: tl.int32,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, VEC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Each split's part of the backward message: Σdz | Σdz·x̂ | tag | tag², where Σdz·x̂ = r·(Σdz·(x − hi) − lo·Σdz).

    x, dy and kept (or None) [N, C, S], read once; stats [2C+1] float64: mean | r | N; weight and bias [C] or None; rows
    [P, 2C+2] float64, written; dweight and dbias [C] or None, written where there is one split only.
    Bytes: x, dy and kept, and 8·P·(2C+2).
    """
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    split = tl.program_id(0) // channel_blocks
    c0 = (tl.program_id(0) - split * channel_blocks) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    mean = tl.load(stats_ptr + c, mask=c < C, other=0.0)
    rstd = tl.load(stats_ptr + C + c, mask=c < C, other=0.0)
    hi, scale, shift, _a, lo = _scale_and_shift(mean, rstd, weight_ptr, bias_ptr, c, c < C, DTYPE)
    slope_ = tl.full((), slope, DTYPE)
    acc_dz = tl.zeros([BLOCK_S, BLOCK_C], DTYPE)
    acc_dz_centered = tl.zeros([BLOCK_S, BLOCK_C], DTYPE)
    for t in range(split * share, tl.minimum((split + 1) * share, tiles)):
        start, offsets, inside, _place, _places = _tile(t, C, S, tiles_per_image, c0, LAST, VEC, BLOCK_S, BLOCK_C)
        x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
        dy = tl.load(dy_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
        dz = _grad_sum(dy, x, kept_ptr, start, offsets, inside, hi, scale, shift, slope_, ACTIVATION)
        acc_dz += dz
        acc_dz_centered += dz * (x - hi[None, :])
    sum_dz = tl.sum(acc_dz, 0).to(tl.float64)
    sum_dz_centered = tl.sum(acc_dz_centered, 0).to(tl.float64)
    # Without a value there is nothing to sum, even where there is none on any process and r is NaN.
    sum_dz_xhat = tl.where(tiles * S > 0, rstd * (sum_dz_centered - lo * sum_dz), 0.0)
    row_ptr = rows_ptr + split.to(tl.int64) * (2 * C + 2)
    tl.store(row_ptr + c, sum_dz, mask=c < C)
    tl.store(row_ptr + C + c, sum_dz_xhat, mask=c < C)
    if share >= tiles:
        _store_rounded(dbias_ptr, c, sum_dz, c < C)
        _store_rounded(dweight_ptr, c, sum_dz_xhat, c < C)
    if c0 == 0:
        one = tl.arange(0, 1)
        tag64 = tl.zeros([1], tl.float64) + tag * (split == 0).to(tl.float64)
        tl.store(row_ptr + 2 * C + one, tag64)
        tl.store(row_ptr + 2 * C + 1 + one, tag64 * tag64)


def _grad_input(
    x_ptr, dy_ptr, kept_ptr, mask_ptr, dx_ptr, dresidual_ptr, stats_ptr, message_ptr, weight_ptr, bias_ptr,
    slope: tl.float64, world_size: tl.float64, C: tl.int32, S: tl.int64, tiles_per_image: tl.int32, tiles: tl.int32,
    share: tl.int32, channel_blocks: tl.int32,
    ACTIVATION: tl.constexpr, LAST: tl.constexpr, VEC: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx = γ·r·(dz − w·(Σdz/N + x̂·Σ(dz·x̂)/N)), as dz·a − w·((x − hi)·b + c); and dz, for the residual.

    x, dy and kept (or None) [N, C, S], read once; mask [N, S] or None; dx and dresidual (or None) [N, C, S], written;
    stats [2C+1] float64: mean | r | N; message [2C+2] float64, summed over all processes; weight and bias [C] or None.
    Bytes: x, dy, kept, dx and dresidual.
    """
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    split = tl.program_id(0) // channel_blocks
    c0 = (tl.program_id(0) - split * channel_blocks) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    mean = tl.load(stats_ptr + c, mask=c < C, other=0.0)
    rstd = tl.load(stats_ptr + C + c, mask=c < C, other=0.0)
    hi, scale, shift, a, lo = _scale_and_shift(mean, rstd, weight_ptr, bias_ptr, c, c < C, DTYPE)
    count = _count(message_ptr, tl.load(stats_ptr + 2 * C), 2 * C, world_size)
    mean_dz = tl.load(message_ptr + c, mask=c < C, other=0.0) / count
    mean_dz_xhat = tl.load(message_ptr + C + c, mask=c < C, other=0.0) / count
    b64 = a * rstd * mean_dz_xhat
    b, d = b64.to(DTYPE), (a * mean_dz - lo * b64).to(DTYPE)
    slope_ = tl.full((), slope, DTYPE)
    first = tiles - (split + 1) * share
    for t in range(tl.maximum(first, 0), first + share):
        start, offsets, inside, place, places = _tile(t, C, S, tiles_per_image, c0, LAST, VEC, BLOCK_S, BLOCK_C)
        x = tl.load(x_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
        dy = tl.load(dy_ptr + start + offsets, mask=inside, other=0.0).to(DTYPE)
        dz = _grad_sum(dy, x, kept_ptr, start, offsets, inside, hi, scale, shift, slope_, ACTIVATION)
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + start + offsets, dz.to(dresidual_ptr.dtype.element_ty), mask=inside)
        common = (x - hi[None, :]) * b[None, :] + d[None, :]
        if mask_ptr is not None:
            common *= _mask(mask_ptr, place, places, DTYPE, BLOCK_S)[:, None]
        tl.store(dx_ptr + start + offsets, (dz * scale[None, :] - common).to(dx_ptr.dtype.element_ty), mask=inside)


# ---- launching them

MOMENTS = Kernel(_moments, ("x_ptr",))
COMBINE = Kernel(_combine, ())
NORMALIZE = Kernel(_normalize, ("x_ptr", "residual_ptr", "y_ptr"))
GRAD_MOMENTS = Kernel(_grad_moments, ("x_ptr", "dy_ptr", "kept_ptr"))
GRAD_INPUT = Kernel(_grad_input, ("x_ptr", "dy_ptr", "kept_ptr", "dx_ptr", "dresidual_ptr"))
_COMBINED = (256, 4)  # rows and columns: a column's 4 numbers are one read of 32 bytes


class Plan(NamedTuple):
    """How the kernels are launched for one shape of tensor."""

    aligned: bool  # where reads take several values at once, which is where it helps
    warps: int
    splits: int  # of the reductions
    reducing: int  # programs
    reducing_numbers: tuple[int, ...]
    streaming: int  # programs
    streaming_numbers: tuple[int, ...]
    constants: tuple[Any, ...]


def moments(x: Tensor, mask: Tensor | None, tag: int) -> tuple[Tensor, Tensor]:
    """The forward message. One kernel, and a second one where there are several splits."""
    x, C = dense(x), x.shape[1]
    plan = _plan(x)
    rows = torch.empty(plan.splits * (2 * C + 3), dtype=torch.float64, device=x.device)
    pointers = (x, None if mask is None else _weights(mask, x), rows)
    MOMENTS(plan.reducing, plan.aligned, plan.warps, pointers, (tag, *plan.reducing_numbers), plan.constants)
    return _combined(rows, 2 * C + 3, C, plan.splits, None, None), x


def normalize(
    x: Tensor,
    residual: Tensor | None,
    message: Tensor,
    layer: Layer,
    running: Running | None,
    scratch: Tensor | None,
) -> tuple[Tensor, tuple[Tensor]]:
    """y, and mean | r | N [2C+1] float64. One kernel."""
    x, C = dense(x) if scratch is None else scratch, x.shape[1]
    residual = None if residual is None else dense_like(residual, x)
    y = torch.empty_like(x)
    stats = torch.empty(2 * C + 1, dtype=torch.float64, device=x.device)
    plan = _plan(x, residual, y)
    running = running or _NO_RUNNING
    cumulative = running.momentum is None
    keepers = 1 if cumulative else -(-C // _STEP)
    buffers = [None if each is None else each.contiguous() for each in running[:3]]
    NORMALIZE(
        keepers + plan.streaming,
        plan.aligned,
        plan.warps,
        (x, residual, y, message, _vector(layer.weight), _vector(layer.bias), *buffers, stats),
        (
            layer.eps,
            running.momentum or 0.0,
            int(cumulative),
            layer.negative_slope,
            layer.world_size,
            keepers,
            C if cumulative else _STEP,
            *plan.streaming_numbers,
        ),
        (layer.activation, *plan.constants),
    )
    for buffer, moved in zip(running[:3], buffers, strict=True):
        if buffer is not None and moved is not None and buffer is not moved:  # it was not contiguous
            buffer.copy_(moved)
    return y, (stats,)


def grad_moments(
    dy: Tensor, x: Tensor, kept: Tensor | None, stats: Sequence[Tensor], layer: Layer, tag: int
) -> tuple[Tensor, Tensor | None, Tensor | None, tuple[Tensor, ...]]:
    """The backward message, dγ and dβ. One kernel, and a second one where there are several splits."""
    C = x.shape[1]
    x, dy, kept = tensors = _dense_tensors(x, dy, kept)
    plan = _plan(*tensors)
    rows = torch.empty(plan.splits * (2 * C + 2), dtype=torch.float64, device=x.device)
    dweight = None if layer.weight is None else torch.empty_like(layer.weight)
    dbias = None if layer.bias is None else torch.empty_like(layer.bias)
    GRAD_MOMENTS(
        plan.reducing,
        plan.aligned,
        plan.warps,
        (x, dy, kept, *stats, *_affine_for_activation(layer, kept), rows, dweight, dbias),
        (tag, layer.negative_slope, *plan.reducing_numbers),
        (layer.activation, *plan.constants),
    )
    return _combined(rows, 2 * C + 2, C, plan.splits, dweight, dbias), dweight, dbias, tensors


def grad_input(
    dy: Tensor,
    x: Tensor,
    kept: Tensor | None,
    mask: Tensor | None,
    stats: Sequence[Tensor],
    layer: Layer,
    message: Tensor,
    wants_dresidual: bool,
    scratch: tuple[Tensor, ...],
) -> tuple[Tensor, Tensor | None]:
    """dx, and the residual's gradient: dy itself where there is no activation. One kernel."""
    x, dy, kept = scratch
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if wants_dresidual and layer.activation is not None else None
    plan = _plan(x, dy, kept)
    GRAD_INPUT(
        plan.streaming,
        plan.aligned,
        plan.warps,
        (
            x,
            dy,
            kept,
            None if mask is None else _weights(mask, x),
            dx,
            dresidual,
            *stats,
            message,
            _vector(layer.weight),
            _vector(layer.bias),
        ),
        (layer.negative_slope, layer.world_size, *plan.streaming_numbers),
        (layer.activation, *plan.constants),
    )
    return dx, dy if wants_dresidual and dresidual is None else dresidual


_NO_RUNNING = Running(None, None, None, 0.0)  # type: ignore[arg-type]


def _combined(rows: Tensor, length: int, C: int, splits: int, dweight: Tensor | None, dbias: Tensor | None) -> Tensor:
    """The message: the sum of all splits' rows, or the only one's row itself."""
    if splits == 1:
        return rows
    message = torch.empty(length, dtype=torch.float64, device=rows.device)
    COMBINE(-(-length // _COMBINED[1]), True, WARPS, (rows, message, dweight, dbias), (length, C, splits), _COMBINED)
    return message


def _affine_for_activation(layer: Layer, kept: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """γ and β where backward computes γ·x̂ + β again; without them there are fewer variants."""
    again = layer.activation is not None and (kept is None or layer.activation == "silu")
    return (_vector(layer.weight), _vector(layer.bias)) if again else (None, None)


def _vector(values_C: Tensor | None) -> Tensor | None:
    return None if values_C is None else values_C.contiguous()


def _dense_tensors(x: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    x = dense(x)
    return x, *[None if other is None else dense_like(other, x) for other in others]


def _weights(mask: Tensor, x: Tensor) -> Tensor:
    """The mask [N, 1, ...] as bytes, or as weights in the computing dtype, one after the other in memory."""
    mask = mask.contiguous()
    return mask.view(torch.uint8) if mask.dtype == torch.bool else mask.to(computing_dtype(x))


def _plan(x: Tensor, *others: Tensor | None) -> Plan:
    """The plan for x, which is dense, and tensors of the same shape and order that may start elsewhere."""
    aligned = x.data_ptr() % 16 == 0
    for other in others:
        aligned = aligned and (other is None or other.data_ptr() % 16 == 0)
    images, C = x.shape[:2]
    places = x.numel() // (images * C) if images else 0
    return _plan_for(images, C, places, channels_last(x), aligned, x.device.index)


@lru_cache(maxsize=4096)
def _plan_for(images: int, C: int, places: int, last: bool, aligned: bool, device: int | None) -> Plan:
    tiles = tiling(images, C, places, last, aligned)
    multiprocessors = _multiprocessors(device)
    few = tiles.tiles * tiles.channel_blocks <= FEW
    splits, share = tiles.shares(1 if few else REDUCING * multiprocessors, RUN)
    streams, stream_share = tiles.shares(STREAMING * multiprocessors)
    numbers = (C, tiles.places, tiles.tiles_per_image, tiles.tiles)
    return Plan(
        tiles.vector > 1,
        WARPS if tiles.vector > 2 else WARPS_OF_SINGLES,
        splits,
        splits * tiles.channel_blocks,
        (*numbers, share, tiles.channel_blocks),
        streams * tiles.channel_blocks,
        (*numbers, stream_share, tiles.channel_blocks),
        (last, tiles.vector, tiles.block_s, tiles.block_c),
    )


def _multiprocessors(device: int | None) -> int:
    """How many the GPU has; Triton's interpreter runs on the CPU and has one."""
    return 1 if device is None else torch.cuda.get_device_properties(device).multi_processor_count
