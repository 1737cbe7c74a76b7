"""The activations that a layer can apply to its own output, and their gradients, in plain differentiable PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("relu", "leaky_relu", "silu")


def require_activation(name: str | None, negative_slope: float) -> None:
    """Raises ValueError unless the layer can apply ``name``.

    A negative slope would make the sign of the output say nothing about the sign of the input.
    """
    if name is not None and name not in ACTIVATIONS:
        raise ValueError(f"expected activation to be None or one of {', '.join(ACTIVATIONS)}, got {name!r}")
    if name == "leaky_relu" and not negative_slope >= 0:
        raise ValueError(f"expected negative_slope to be at least 0, got {negative_slope}")


def activate(z: Tensor, name: str | None, negative_slope: float) -> Tensor:
    """activation(z), a new tensor; z itself where there is none."""
    match name:
        case "relu":
            return F.relu(z)
        case "leaky_relu":
            return F.leaky_relu(z, negative_slope)
        case "silu":
            return F.silu(z)
        case _:
            return z


def activation_gradient(dy: Tensor, z: Tensor, name: str | None, negative_slope: float) -> Tensor:
    """dy·activation'(z). For relu and leaky_relu, z may as well be activation(z): only its sign counts."""
    match name:
        case "relu":
            return torch.where(z <= 0, 0, dy)
        case "leaky_relu":
            return torch.where(z > 0, dy, dy * negative_slope)
        case "silu":
            s = torch.sigmoid(z)
            return dy * s * (1 + z * (1 - s))
        case _:
            return dy


def kept_for_backward(name: str | None, residual: Tensor | None, y: Tensor) -> Tensor | None:
    """What backward needs, beside x, to know activation'(BN(x) + residual): never more than unfused layers keep.

    Without a residual, nothing: BN(x) is computed again. With one, ReLU and leaky ReLU are told by y, which the
    unfused activation keeps as well (and so does whatever comes next), and SiLU needs the residual, where the
    unfused one keeps the sum.
    """
    if name is None or residual is None:
        return None
    return residual if name == "silu" else y
