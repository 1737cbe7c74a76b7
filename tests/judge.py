"""The judge of the layer: PyTorch's own BatchNorm1d in one process, in float64, on all values of all processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import syncbn
from syncbn import kernels


@dataclass
class Result:
    """What steps of one layer leave on one process: y and dx of the last, γ's and β's summed gradients, buffers."""

    y: Tensor
    dx: Tensor | None
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]
    calls: int = 0  # all-reduces in the last step


@dataclass
class Options:
    """How to build and run the layer under test."""

    arguments: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64  # of parameters and buffers
    steps: int = 1
    requires_grad: bool = True


def affine(layer: nn.Module) -> None:
    """γ and β that are unlike 1 and 0, the same in every layer of as many channels."""
    for parameter in layer.parameters():
        generator = torch.Generator().manual_seed(5)
        values = torch.rand(parameter.shape, generator=generator, dtype=torch.float64) + 0.5
        parameter.data.copy_(values)


def run_layer(x: Tensor, dy: Tensor, options: Options) -> Result:
    """On a worker: SyncBatchNorm over all processes, on this one's part, as if it were a larger one."""
    with large_enough():
        return _run_layer(x, dy, options)


@contextmanager
def large_enough() -> Iterator[None]:
    """No tensor is too small for the CPU's own backend."""
    before, kernels.SMALL = kernels.SMALL, 0
    try:
        yield
    finally:
        kernels.SMALL = before


def _run_layer(x: Tensor, dy: Tensor, options: Options) -> Result:
    layer = syncbn.SyncBatchNorm(x.shape[1], dtype=options.dtype, **options.arguments)
    affine(layer)
    for _ in range(options.steps):
        before = layer._exchange.calls
        x = x.detach().requires_grad_(options.requires_grad)
        y = layer(x)
        if y.requires_grad:
            y.backward(dy)
    return Result(
        y.detach(),
        x.grad,
        {name: p.grad for name, p in layer.named_parameters() if p.grad is not None},
        dict(layer.named_buffers()),
        layer._exchange.calls - before,
    )


def judge(parts: list[Tensor], dys: list[Tensor], options: Options) -> tuple[list[Result], Result]:
    """What should come out, for each process and for the union; gradients of γ and β are of the union."""
    union = torch.cat([_as_matrix(x) for x in parts]).double().requires_grad_(options.requires_grad)
    dy = torch.cat([_as_matrix(each) for each in dys]).double()
    layer = nn.BatchNorm1d(union.shape[1], dtype=torch.float64, **options.arguments)
    affine(layer)
    for _ in range(options.steps):
        union.grad = None
        y = layer(union)
        if y.requires_grad:
            y.backward(dy)
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    whole = Result(y.detach(), union.grad, grads, dict(layer.named_buffers()))
    sizes = [_as_matrix(x).shape[0] for x in parts]
    ys = y.detach().split(sizes)
    dxs = [None] * len(parts) if union.grad is None else union.grad.split(sizes)
    each = [
        Result(_like(y, x), None if dx is None else _like(dx, x), grads, whole.buffers)
        for x, y, dx in zip(parts, ys, dxs, strict=True)
    ]
    return each, whole


def _as_matrix(x: Tensor) -> Tensor:
    return x.movedim(1, -1).reshape(-1, x.shape[1])


def _like(matrix: Tensor, x: Tensor) -> Tensor:
    return matrix.view(x.movedim(1, -1).shape).movedim(-1, 1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str = "") -> None:
    """Within ``tolerance`` of the largest expected value, at least 1: errors add up to the size of what is summed."""
    if expected.numel() == 0:
        assert actual.shape == expected.shape
        return
    bound = tolerance * max(1.0, expected.abs().max().item())
    error = (actual.double() - expected).abs().max().item()
    assert error <= bound, f"{what} is off by {error:.2e}, allowed {bound:.2e}"


def assert_union(
    processes: Any,
    parts: list[Tensor],
    options: Options | None = None,
    tolerance: float = 1e-9,
) -> list[Result]:
    """The layer in as many processes as there are parts does what the judge does on the union."""
    options = options or Options()
    generator = torch.Generator().manual_seed(3)
    dys = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in parts]
    results = processes(len(parts)).run(run_layer, options, per_rank=list(zip(parts, dys, strict=True)))
    expected, whole = judge(parts, dys, options)
    for mine, theirs, x in zip(results, expected, parts, strict=True):
        assert mine.y.dtype == x.dtype
        assert_close(mine.y, theirs.y, tolerance, "y")
        if theirs.dx is not None:
            assert_close(mine.dx, theirs.dx, tolerance, "dx")
        for name, buffer in whole.buffers.items():
            assert_close(mine.buffers[name], buffer.double(), tolerance, name)
            assert torch.equal(mine.buffers[name], results[0].buffers[name]), f"{name} differs between processes"
    assert results[0].grads.keys() == whole.grads.keys()
    for name, grad in whole.grads.items():
        assert_close(sum(result.grads[name].double() for result in results), grad, 10 * tolerance, f"{name}.grad")
    return results
