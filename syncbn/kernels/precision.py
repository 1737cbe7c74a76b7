"""In which dtype the fast backends compute, and how they lose nothing by it."""

from __future__ import annotations

import torch
from torch import Tensor


def computing_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 input, float32 for all other."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def in_two_parts(mean: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """hi in ``dtype`` and lo in float64, whose sum is the float64 mean."""
    hi = mean.to(dtype)
    return hi, mean - hi


def as_gradient(sum_C: Tensor, parameter: Tensor | None) -> Tensor | None:
    """A sum as the gradient of a parameter, in its dtype: a tensor of its own, as autograd may add to it in place."""
    return None if parameter is None else sum_C.to(parameter.dtype, copy=True)
