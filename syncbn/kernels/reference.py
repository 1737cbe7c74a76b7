"""The specification: the four operations in plain differentiable PyTorch, on any device.

The formulas are those of Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 1 and section 3, over the union of
all processes' batches. Everything is computed in float64; only the results are rounded to x's dtype. These lines run
for double backward and on every device without a faster backend, and every faster backend is tested against them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def moments(x: Tensor, tag: int) -> tuple[Tensor, None]:
    """The forward message, [2C+3] float64: Σx | Σx² | n | tag | tag²."""
    x = x.double()
    n = x.numel() // x.shape[1]
    return torch.cat([_sum(x), _sum(x.square()), _numbers(x, n, tag, tag**2)]), None


def normalize(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, centered: None = None
) -> Tensor:
    """y = γ·x̂ + β with x̂ = (x − mean)·r; γ = 1 and β = 0 where they are None. y has x's dtype and memory format."""
    y = _xhat(x, mean, rstd)
    if weight is not None:
        y = y * _of_channels(weight, x)
    if bias is not None:
        y = y + _of_channels(bias, x)
    return y.to(x.dtype)


def grad_moments(dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, tag: int) -> Tensor:
    """The backward message, [2C+2] float64: Σdy | Σdy·x̂ | tag | tag²."""
    dy = dy.double()
    return torch.cat([_sum(dy), _sum(dy * _xhat(x, mean, rstd)), _numbers(x, tag, tag**2)])


def grad_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    mean_dy: Tensor,
    mean_dy_xhat: Tensor,
) -> Tensor:
    """dx = γ·r·(dy − Σdy/N − x̂·Σ(dy·x̂)/N), in x's dtype and memory format."""
    xhat = _xhat(x, mean, rstd)
    scale = rstd if weight is None else rstd * weight
    # x̂ comes first because the result takes its first operand's memory format.
    dx = (-xhat * _of_channels(mean_dy_xhat, x) + dy - _of_channels(mean_dy, x)) * _of_channels(scale, x)
    return dx.to(x.dtype)


def _xhat(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x.double() - _of_channels(mean, x)) * _of_channels(rstd, x)


def _of_channels(values_C: Tensor, x: Tensor) -> Tensor:
    """[C] as [1, C, 1, ...], to be combined with x [N, C, ...]."""
    return values_C.view(1, -1, *[1] * (x.dim() - 2))


def _sum(x: Tensor) -> Tensor:
    return x.sum(dim=[0, *range(2, x.dim())])


def _numbers(x: Tensor, *values: int) -> Tensor:
    """Host numbers as float64 on x's device, filled there rather than copied."""
    return torch.cat([torch.full((1,), value, dtype=torch.float64, device=x.device) for value in values])
