"""The judge of converted models: the plain model, in one process, on the union of all processes' batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn


@dataclass
class Step:
    """What one training step leaves. Gradients are summed over processes, buffers are this process's."""

    output: Tensor
    input_grad: Tensor
    grads: dict[str, Tensor]
    buffers: dict[str, Tensor]


def train_step(model: nn.Module, x: Tensor) -> Step:
    x = x.clone().requires_grad_()
    output = model(x)
    output.sin().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if dist.is_initialized():
        for grad in grads.values():
            dist.all_reduce(grad)
    return Step(output.detach(), x.grad, grads, {name: b.clone() for name, b in model.named_buffers()})


def converted_step(x: Tensor, build: Callable[[], nn.Module], options: dict[str, Any]) -> Step:
    """On a worker: the model that ``build`` builds, converted, on this process's part."""
    torch.manual_seed(0)
    return train_step(syncbn.convert(build().double(), **options), x)


def assert_like_the_union(
    processes: Any,
    build: Callable[[], nn.Module],
    parts: list[Tensor],
    judge: Callable[[], nn.Module] | None = None,
    tolerance: float = 1e-9,
    **options: Any,
) -> None:
    """A converted model in several processes does what ``judge`` (itself, if None) does on the union."""
    steps = processes(len(parts)).run(converted_step, build, options, per_rank=[(part,) for part in parts])
    torch.manual_seed(0)
    expected = train_step((judge or build)().double(), torch.cat(parts))
    close = {"rtol": 100 * tolerance, "atol": tolerance}
    torch.testing.assert_close(torch.cat([step.output for step in steps]), expected.output, **close)
    torch.testing.assert_close(torch.cat([step.input_grad for step in steps]), expected.input_grad, **close)
    for step in steps:
        torch.testing.assert_close(step.grads, expected.grads, **close)
        torch.testing.assert_close(step.buffers, expected.buffers, **close)


def parts(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Inputs of these shapes, one for each process, with unlike statistics."""
    generator = torch.Generator().manual_seed(7)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64) * (i + 1) + i for i, shape in enumerate(shapes)
    ]
