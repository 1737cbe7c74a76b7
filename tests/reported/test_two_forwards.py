"""Several forwards before one backward under DistributedDataParallel.

- pytorch/pytorch#175024: a GAN's discriminator on fake, then on real, then one backward: "one of the variables needed
  for gradient computation has been modified by an inplace operation", as DDP broadcasts the buffers in between.
- pytorch/pytorch#24397: the same of ``model(x1) + model(x2)`` with torch.nn.SyncBatchNorm, in eval and on one GPU.
- pytorch/pytorch#65907: the same of ``torch.autograd.grad`` in eval, when the model is called once more before.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from judge import assert_close
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn


class Net(nn.Module):
    """A discriminator with one layer that is used twice in a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.LeakyReLU(0.2, inplace=True))
        self.conv = nn.Conv2d(6, 6, 3, padding=1)
        self.shared = nn.BatchNorm2d(6)
        self.last = nn.Conv2d(6, 1, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.first(x)).relu()
        return self.last(self.shared(self.conv(x)))


# ---- what the reports do, each with a model and this process's parts of two batches; sums, as DDP averages


def discriminator(model: nn.Module, a: Tensor, b: Tensor) -> None:
    fake, real = model(a), model(b)
    (fake.relu().sum() - real.sigmoid().sum()).backward()


def sum_of_outputs(model: nn.Module, a: Tensor, b: Tensor) -> None:
    y = model(a) + model(b)
    y.square().sum().backward()


def one_by_one(model: nn.Module, a: Tensor, b: Tensor) -> None:
    fake, real = model(a), model(b)
    fake.relu().sum().backward()
    real.sigmoid().sum().backward()


def the_other_way_round(model: nn.Module, a: Tensor, b: Tensor) -> None:
    fake, real = model(a), model(b)
    real.sigmoid().sum().backward()
    fake.relu().sum().backward()


def one_more_forward(model: nn.Module, a: Tensor, b: Tensor) -> None:
    """Its output is never used: its layers exchange forward only."""
    y = model(a)
    model(b)
    y.square().sum().backward()


def three_forwards(model: nn.Module, a: Tensor, b: Tensor) -> None:
    outputs = [model(a), model(b), model(a + b)]
    (outputs[0] * outputs[1] * outputs[2]).sum().backward()


SCENARIOS = [discriminator, sum_of_outputs, one_by_one, the_other_way_round, one_more_forward, three_forwards]


@pytest.fixture(scope="module")
def inputs() -> list[tuple[Tensor, Tensor]]:
    """For each process, its parts of two batches."""
    generator = torch.Generator().manual_seed(4)

    def part(n: int, scale: float) -> Tensor:
        return torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64) * scale + scale

    return [(part(2, 1), part(2, 0.5)), (part(1, 2), part(1, 3))]


def build() -> nn.Module:
    torch.manual_seed(2)
    return Net().double()


def state_after(model: nn.Module, scenario: Any, a: Tensor, b: Tensor, training: bool) -> dict[str, Tensor]:
    """The gradients of the inputs and of the parameters, and the buffers, after two such steps."""
    net = model.module if isinstance(model, DistributedDataParallel) else model
    for layer in (net.first[1], net.shared):
        layer.running_mean.fill_(0.25)  # unlike 0 and 1, as eval normalizes by them
        layer.running_var.fill_(2.0)
    a, b = a.clone().requires_grad_(), b.clone().requires_grad_()
    model.train(training)
    for _ in range(2):
        scenario(model, a, b)
    grads = {name: p.grad for name, p in net.named_parameters()}
    return {"a": a.grad, "b": b.grad} | grads | dict(net.named_buffers())


def copy_in_place(module: nn.Module, _: Any) -> None:
    """What DistributedDataParallel's broadcast does in those releases of PyTorch in which autograd notices it."""
    with torch.no_grad():
        for buffer in module.buffers():
            dist.broadcast(received := buffer.clone(), 0)
            buffer.copy_(received)


def _run(a: Tensor, b: Tensor, scenario: Any, buffers: str, training: bool) -> dict[str, Tensor]:
    net = syncbn.convert(build())
    if buffers == "copied in place":
        net.register_forward_pre_hook(copy_in_place)
    model = DistributedDataParallel(net, broadcast_buffers=buffers == "broadcast")
    # DDP reduces in the first backward after a forward. Where there are more, gradients are summed here.
    several_backwards = scenario in (one_by_one, the_other_way_round)
    with model.no_sync() if several_backwards else nullcontext():
        state = state_after(model, scenario, a, b, training)
    for name, _ in net.named_parameters():
        if several_backwards:
            dist.all_reduce(state[name])
        else:
            state[name] *= dist.get_world_size()
    return state


def assert_like_the_union(processes: Any, inputs: Any, scenario: Any, buffers: str, training: bool) -> None:
    states = processes(2).run(_run, scenario, buffers, training, per_rank=inputs)
    union = [torch.cat(each) for each in zip(*inputs, strict=True)]
    expected = state_after(build(), scenario, *union, training)
    for name, theirs in expected.items():
        ours = [state[name] for state in states]
        if name in ("a", "b"):
            if theirs is None:
                assert ours == [None, None]
                continue
            ours = [torch.cat(ours)]
        for each in ours:
            assert_close(each, theirs.double(), 1e-9, name)


@pytest.mark.parametrize("buffers", ["broadcast", "not broadcast", "copied in place"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_in_training(processes: Any, inputs: Any, scenario: Any, buffers: str) -> None:
    assert_like_the_union(processes, inputs, scenario, buffers, training=True)


@pytest.mark.parametrize("buffers", ["broadcast", "not broadcast", "copied in place"])
@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_in_eval(processes: Any, inputs: Any, scenario: Any, buffers: str) -> None:
    assert_like_the_union(processes, inputs, scenario, buffers, training=False)


def _in_eval_then_in_training(a: Tensor, b: Tensor) -> Tensor:
    model = syncbn.convert(build()).eval()
    y = model(a.requires_grad_())
    model.train()(b)
    y.square().sum().backward()
    return a.grad


def test_a_forward_in_training_does_no_harm_to_one_in_eval(processes: Any, inputs: Any) -> None:
    """It moves the running statistics, by which eval has normalized, before eval's backward."""
    for (a, _), ours in zip(inputs, processes(2).run(_in_eval_then_in_training, per_rank=inputs), strict=True):
        x = a.clone().requires_grad_()
        build().eval()(x).square().sum().backward()
        assert_close(ours, x.grad, 1e-12)


class Reported(nn.Module):
    """The model of pytorch/pytorch#65907."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(2)

    def forward(self, z: Tensor) -> Tensor:
        return self.bn(z).sum()


def _gradient_after_one_more_forward(training: bool, broadcast_buffers: bool) -> tuple[Tensor, Tensor]:
    model = DistributedDataParallel(syncbn.convert(Reported()), broadcast_buffers=broadcast_buffers).train(training)
    x1, x2 = torch.zeros(1, 2, 3, 4, requires_grad=True), torch.zeros(1, 2, 3, 4, requires_grad=True)
    (before,) = torch.autograd.grad(model(x1), x1)
    y1, _ = model(x1), model(x2)
    (after,) = torch.autograd.grad(y1, x1)
    return before, after


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_a_gradient_after_one_more_forward(processes: Any, training: bool, broadcast_buffers: bool) -> None:
    for before, after in processes(2).run(_gradient_after_one_more_forward, training, broadcast_buffers):
        assert torch.equal(before, after)


def test_on_one_process_alone(processes: Any, inputs: Any) -> None:
    """pytorch/pytorch#24397 in its last comment: with one process, torch.nn.SyncBatchNorm is the layer that fails."""
    for part, state in zip(inputs, processes(2).run(_alone, per_rank=inputs), strict=True):
        expected = state_after(build(), sum_of_outputs, *part, training=True)
        for name, theirs in expected.items():
            assert_close(state[name], theirs.double(), 1e-9, name)


def _alone(a: Tensor, b: Tensor) -> dict[str, Tensor]:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    mine = groups[dist.get_rank()]
    model = DistributedDataParallel(syncbn.convert(build(), mine), process_group=mine)
    state = state_after(model, sum_of_outputs, a, b, training=True)
    dist.destroy_process_group(mine)
    return state
