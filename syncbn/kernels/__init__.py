"""The four local operations of synchronized batch normalization, and which backend runs them for a tensor.

A backend is a module with these functions; ``reference`` is their specification.

    moments(x, mask, tag) -> message, scratch
        The forward message, [2C+3] float64: Σx | Σx² | n | tag | tag².
    normalize(x, residual, message, layer, running, scratch) -> y, stats
        From the summed forward message: y = activation(γ·x̂ + β + residual), in x's dtype and memory format. Moves
        the running statistics.
    grad_moments(dy, x, kept, stats, layer, tag) -> message, dγ, dβ, scratch
        The backward message, [2C+2] float64: Σdz | Σdz·x̂ | tag | tag², where dz = dy·activation'. Its sums are also
        β's and γ's gradients, in their dtypes; None where there is no γ or β.
    grad_input(dy, x, kept, mask, stats, layer, message, wants_dresidual, scratch) -> dx, dresidual
        From the summed backward message: dx = γ·r·(dz − w·(Σdz/N + x̂·Σ(dz·x̂)/N)), in x's dtype and memory format,
        where w is the mask's weight; and dz itself, the residual's gradient, where it is wanted.

    x           [N, C, ...] of 2 to 5 dimensions, floating. dy and residual have its shape and dtype, in any strides.
    mask        [N, 1, ...], in shape like x with one channel: bool, or weights of at least 0; None for all ones.
    kept        what the forward has kept beside x, see ``activation.kept_for_backward``.
    scratch     what an operation leaves for the next one of the same call and direction, which may use it once.
    stats       tensors that normalize leaves for backward. Both are the backend's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ..moments import Running
from . import aten, cpu, reference, traced
from .operands import Layer


class Backend(Protocol):
    """The four operations."""

    def moments(self, x: Tensor, mask: Tensor | None, tag: int) -> tuple[Tensor, Any]: ...

    def normalize(
        self,
        x: Tensor,
        residual: Tensor | None,
        message: Tensor,
        layer: Layer,
        running: Running | None,
        scratch: Any,
    ) -> tuple[Tensor, Sequence[Tensor]]: ...

    def grad_moments(
        self, dy: Tensor, x: Tensor, kept: Tensor | None, stats: Sequence[Tensor], layer: Layer, tag: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Any]: ...

    def grad_input(
        self,
        dy: Tensor,
        x: Tensor,
        kept: Tensor | None,
        mask: Tensor | None,
        stats: Sequence[Tensor],
        layer: Layer,
        message: Tensor,
        wants_dresidual: bool,
        scratch: Any,
    ) -> tuple[Tensor, Tensor | None]: ...


SMALL = 1 << 14  # values up to which, on a CPU, the reference's fewer operations outweigh their float64


def backend_for(x: Tensor) -> Backend:
    """The fastest backend for ``x``; the plain PyTorch reference for any device without one of its own."""
    if torch.compiler.is_dynamo_compiling():  # this code, not some code of some thread
        return traced
    match x.device.type:
        case "cpu":
            return cpu if x.numel() > SMALL else reference
        case "cuda":
            return _cuda_backend(x.device.index)
        case _:
            return reference


_OLDEST_FOR_TRITON = (7, 0)  # the compute capability, as torch.compile requires it


@cache
def _cuda_backend(index: int) -> Backend:
    if find_spec("triton") is None or torch.cuda.get_device_capability(index) < _OLDEST_FOR_TRITON:
        return aten
    return cast(Backend, import_module(".triton", __name__))
