"""The backends under test, and where each can run: on the CPU, on a GPU where there is one, or else in its place.

Without a GPU, Triton's kernels are interpreted in a process of their own. PyTorch's CUDA operators have no CPU
implementation: there, in a process of their own, each is given one that follows its documentation, so that what the
backend makes of their results is tested, if not the operators themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from syncbn.kernels import Backend

NAMES = ("reference", "traced", "cpu", "aten", "triton")
ON_CUDA = ("reference", "traced", "aten", "triton")


def device_of(name: str) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and name in ON_CUDA else "cpu")


def with_triton(interpreters: Any, function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` here where Triton's kernels are compiled, or else in a process where they are interpreted."""
    if torch.cuda.is_available():
        return function(*args)
    (result,) = interpreters(1).run(function, *args)
    return result


def run_on(name: str, function: Callable[..., Any], interpreters: Any, *args: Any) -> Any:
    """``function(backend, device, *args)``, in this process or where the backend can run."""
    if name in ("aten", "triton") and not torch.cuda.is_available():
        (result,) = interpreters(1).run(_run, name, function, *args)
        return result
    return _run(name, function, *args)


def _run(name: str, function: Callable[..., Any], *args: Any) -> Any:
    device = device_of(name)
    if name == "aten" and device.type == "cpu":
        stand_in_for_cuda_operators()
    backend: Backend = import_module(f"syncbn.kernels.{name}")  # type: ignore[assignment]
    return function(backend, device, *args)


_registered: list[torch.library.Library] = []


def stand_in_for_cuda_operators() -> None:
    """PyTorch's own operators for synchronized batch normalization on CPU tensors, as their CUDA kernels compute."""
    if _registered:
        return
    library = torch.library.Library("aten", "IMPL")
    for function in (batch_norm_stats, batch_norm_elemt, batch_norm_backward_reduce, batch_norm_backward_elemt):
        library.impl(function.__name__, function, "CPU")
    _registered.append(library)


def _computing(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _spread(values_C: Tensor, x: Tensor) -> Tensor:
    return values_C.view(1, -1, *[1] * (x.dim() - 2))


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def batch_norm_stats(input: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = input.to(_computing(input))
    var, mean = torch.var_mean(x, _all_but_channels(x), correction=0)
    return mean, (var + eps).rsqrt()


def batch_norm_elemt(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, eps: float
) -> Tensor:
    y = (input - _spread(mean, input)) * _spread(invstd, input)
    y = y if weight is None else y * _spread(weight, input)
    return (y if bias is None else y + _spread(bias, input)).to(input.dtype)


def batch_norm_backward_reduce(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    input_g: bool,
    weight_g: bool,
    bias_g: bool,
) -> tuple[Tensor | None, ...]:
    one_order = grad_out.stride() == input.stride() or (grad_out.is_contiguous() and input.is_contiguous())
    assert one_order, "the CUDA kernel reads both in one order"
    dy = grad_out.to(_computing(input))
    sum_dy = dy.sum(_all_but_channels(dy))
    sum_dy_xmu = (dy * (input - _spread(mean, input))).sum(_all_but_channels(dy))
    gradients = sum_dy_xmu * invstd if weight_g else None, sum_dy if bias_g else None
    return (sum_dy, sum_dy_xmu, *gradients) if input_g else (None, None, *gradients)


def batch_norm_backward_elemt(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    count: Tensor,
) -> Tensor:
    assert count.dtype == torch.int32
    n = count.sum()
    x, scale = input.to(_computing(input)), invstd if weight is None else invstd * weight
    common = (x - _spread(mean, x)) * _spread(invstd.square() * sum_dy_xmu / n, x) + _spread(sum_dy / n, x)
    dx = ((grad_out - common) * _spread(scale, x)).to(input.dtype)
    return dx if input.dim() == 4 else dx.contiguous()  # what is not channels_last comes out contiguous
