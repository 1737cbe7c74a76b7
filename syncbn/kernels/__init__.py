"""The four local operations of synchronized batch normalization, and which backend runs them for a tensor.

A backend is a module with these functions. x is [N, C, ...] of 2 to 5 dimensions; mean, rstd and everything that
is summed are float64 [C]; ``reference`` is their specification.

    moments(x, tag)                                      the forward message, [2C+3]: Σx | Σx² | n | tag | tag²;
                                                         and what normalize can use of this pass over x, or None
    normalize(x, mean, rstd, weight, bias, centered)     y = γ·x̂ + β, in x's dtype and memory format; ``centered`` is
                                                         what moments left, used up by this call, or None
    grad_moments(dy, x, mean, rstd, tag)                 the backward message, [2C+2]: Σdy | Σdy·x̂ | tag | tag²
    grad_input(dy, x, mean, rstd, weight, mean_dy, mean_dy_xhat)
                                                         dx = γ·r·(dy − mean_dy − x̂·mean_dy_xhat)
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from . import aten, reference


class Backend(Protocol):
    """The four operations."""

    def moments(self, x: Tensor, tag: int) -> tuple[Tensor, Any]: ...

    def normalize(
        self,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        centered: Any = None,
    ) -> Tensor: ...

    def grad_moments(self, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, tag: int) -> Tensor: ...

    def grad_input(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        weight: Tensor | None,
        mean_dy: Tensor,
        mean_dy_xhat: Tensor,
    ) -> Tensor: ...


def backend_for(x: Tensor) -> Backend:
    """The fastest backend for ``x``; the plain PyTorch reference for any device without one of its own."""
    return aten if x.device.type == "cpu" else reference
