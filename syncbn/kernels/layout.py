"""A normalization layer's input as a matrix: what a fast kernel needs to know about its memory."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Matrix(NamedTuple):
    """A dense tensor [N, C, ...], seen in the order of its memory as a matrix.

    Contiguous: N·C rows, each one channel of one image; sums run along dimension 1. Channels last (and [N, C] itself):
    C columns, each one channel; sums run along dimension 0. Other strides are copied into the closer of the two.
    Values of channels are *spread* to be combined with the matrix: [N·C, 1] or [1, C].
    """

    tensor: Tensor
    values: Tensor  # the matrix
    dim: int  # along which of its dimensions a channel's values lie

    @staticmethod
    def of(x: Tensor) -> Matrix:
        """x, which is not empty, as a matrix."""
        x = dense(x)
        dim = 0 if channels_last(x) else 1
        return Matrix(x, _matrix(x, dim), dim)

    @property
    def length(self) -> int:
        """How many values each row or column, whichever belongs to one channel, has."""
        return self.values.shape[self.dim]

    def same(self, other: Tensor) -> Tensor:
        """Another tensor of x's shape as a matrix in x's order, copied where its strides are different."""
        return _matrix(dense_like(other, self.tensor), self.dim)

    def spread(self, values_KC: Tensor) -> tuple[Tensor, ...]:
        """K rows of values of channels, each [N·C, 1] or [1, C]."""
        if self.dim == 0:
            return values_KC.unsqueeze(1).unbind()
        K, C = values_KC.shape
        images = self.tensor.shape[0]
        return values_KC.unsqueeze(1).expand(K, images, C).reshape(K, images * C, 1).unbind()

    def split(self, of_rows: Tensor, step: int) -> tuple[Tensor, ...]:
        """A matrix, or spread values, in chunks of ``step`` rows of the matrix."""
        rows = self.values.shape[0]
        if rows <= step:
            return (of_rows,)
        return of_rows.split(step) if len(of_rows) == rows else (of_rows,) * math.ceil(rows / step)

    def by_channel(self, sums_K: Tensor) -> Tensor:
        """K sums over each row or column, [K, N·C] or [K, C], as those of each channel [K, C]."""
        return sums_K.view(len(sums_K), -1, self.tensor.shape[1]).sum(1)


def dense_like(other: Tensor, x: Tensor) -> Tensor:
    """A tensor of x's shape, or a copy of it, whose memory is in the order of x, which is dense."""
    if other.stride() == x.stride() or (x.is_contiguous() and other.is_contiguous()):
        return other
    return torch.empty_like(x, dtype=other.dtype).copy_(other)


def dense(x: Tensor) -> Tensor:
    """x, or a copy of it whose memory is contiguous or channels last."""
    if x.is_contiguous() or _channels_last(x).is_contiguous():
        return x
    if x.stride(1) == 1:
        return _channels_last(x).contiguous().movedim(-1, 1)
    return x.contiguous()


def channels_last(x: Tensor) -> bool:
    """Whether the channels of x, which is dense, follow each other in memory. So do they where each has one place."""
    return not x.is_contiguous() or x.numel() == x.shape[0] * x.shape[1]


def _channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1)


def _matrix(x: Tensor, dim: int) -> Tensor:
    """A view of x, whose memory is dense, in one step: views are what small layers spend their time on."""
    C = x.shape[1]
    rows, width = (x.shape[0] * C, x.numel() // (x.shape[0] * C)) if dim == 1 else (x.numel() // C, C)
    return x.as_strided((rows, width), (width, 1))
