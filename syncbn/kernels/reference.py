"""The specification: the four operations in plain differentiable PyTorch, on any device.

The formulas are those of Ioffe and Szegedy, "Batch Normalization", 2015, algorithm 1 and section 3, over the union of
all processes' batches. Everything is computed in float64; only the results are rounded to x's dtype. These lines run
for double backward and on every device without a faster backend, and every faster backend is tested against them.
``kernels/__init__`` says what goes in and comes out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..moments import Running, Statistics, gradient_means, settle
from .activation import activate, activation_gradient
from .operands import Layer
from .precision import as_gradient


def moments(x: Tensor, mask: Tensor | None, tag: int) -> tuple[Tensor, None]:
    """Σw·x | Σw·x² | n | tag | tag², with n = Σw; w = 1 without a mask."""
    x = x.double()
    if mask is None:
        n, weighted = numbers(x, x.numel() // x.shape[1]), x
    else:
        n, weighted = mask.sum(dtype=torch.float64).view(1), x * mask
    return torch.cat([_sum(weighted), _sum(weighted * x), n, numbers(x, tag, tag**2)]), None


def normalize(
    x: Tensor, residual: Tensor | None, message: Tensor, layer: Layer, running: Running | None, scratch: None
) -> tuple[Tensor, Statistics]:
    """y = activation(γ·x̂ + β + residual) with x̂ = (x − mean)·r."""
    stats = settle(message, layer.world_size, layer.eps, running)
    z = _affine(x, stats, layer)
    z = z if residual is None else z + residual
    return activate(z, layer.activation, layer.negative_slope).to(x.dtype), stats


def grad_moments(
    dy: Tensor, x: Tensor, kept: Tensor | None, stats: Sequence[Tensor], layer: Layer, tag: int
) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    """Σdz | Σdz·x̂ | tag | tag², and the gradients of γ and β."""
    stats = Statistics(*stats)
    dz = _grad_sum(dy, x, kept, stats, layer)
    dbias, dweight = _sum(dz), _sum(dz * _xhat(x, stats))
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
    """dx = γ·r·(dz − w·(Σdz/N + x̂·Σ(dz·x̂)/N)), and dz for the residual."""
    stats = Statistics(*stats)
    dz = _grad_sum(dy, x, kept, stats, layer)
    mean_dz, mean_dz_xhat = gradient_means(message, stats.n, layer.world_size)
    scale = stats.rstd_C if layer.weight is None else stats.rstd_C * layer.weight
    # x̂ comes first because the result takes its first operand's memory format.
    common = _xhat(x, stats) * of_channels(mean_dz_xhat, x) + of_channels(mean_dz, x)
    dx = (-common if mask is None else -common * mask) + dz
    return (dx * of_channels(scale, x)).to(x.dtype), dz.to(x.dtype) if wants_dresidual else None


def _xhat(x: Tensor, stats: Statistics) -> Tensor:
    return (x.double() - of_channels(stats.mean_C, x)) * of_channels(stats.rstd_C, x)


def _affine(x: Tensor, stats: Statistics, layer: Layer) -> Tensor:
    """γ·x̂ + β."""
    y = _xhat(x, stats)
    y = y if layer.weight is None else y * of_channels(layer.weight, x)
    return y if layer.bias is None else y + of_channels(layer.bias, x)


def _grad_sum(dy: Tensor, x: Tensor, kept: Tensor | None, stats: Statistics, layer: Layer) -> Tensor:
    """dz, the gradient of z = BN(x) + residual, in float64."""
    return grad_sum(dy.double(), kept, layer, lambda: _affine(x, stats, layer))


def grad_sum(dy: Tensor, kept: Tensor | None, layer: Layer, affine: Callable[[], Tensor]) -> Tensor:
    """The same in dy's dtype, from what gives γ·x̂ + β where that is needed."""
    match layer.activation:
        case None:
            return dy
        case "silu":
            z = affine() if kept is None else affine() + kept
        case _:
            z = affine() if kept is None else kept
    return activation_gradient(dy, z, layer.activation, layer.negative_slope)


def of_channels(values_C: Tensor, x: Tensor) -> Tensor:
    """[C] as [1, C, 1, ...], to be combined with x [N, C, ...]."""
    return values_C.view(1, -1, *[1] * (x.dim() - 2))


def _sum(x: Tensor) -> Tensor:
    return x.sum(dim=[0, *range(2, x.dim())])


def numbers(x: Tensor, *values: int) -> Tensor:
    """Host numbers as float64 on x's device, filled there rather than copied."""
    return torch.cat([torch.full((1,), value, dtype=torch.float64, device=x.device) for value in values])
