"""Under DistributedDataParallel: a convolutional network on uneven, empty and bad batches, compared with the union."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from judge import assert_close
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.LeakyReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).double()


def train(model: nn.Module, batches: list[Tensor], scale: float) -> list[Tensor]:
    """A few steps of SGD on a sum over samples; DDP averages over processes, which ``scale`` undoes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for x in batches:
        optimizer.zero_grad()
        (scale * model(x).pow(2).sum()).backward()
        optimizer.step()
    return [each.detach().clone() for each in (*model.parameters(), *model.buffers())]


def batches(*counts: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(n, 3, 11, 9, generator=generator, dtype=torch.float64) * (i + 1) for i, n in enumerate(counts)]


def _train_with_ddp(parts: list[Tensor], broadcast_buffers: bool, channels_last: bool) -> list[Tensor]:
    model = syncbn.convert(network())
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
        parts = [x.contiguous(memory_format=torch.channels_last) for x in parts]
    model = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
    return train(model, parts, scale=dist.get_world_size())


@pytest.mark.parametrize("broadcast_buffers", [False, True], ids=["no broadcast", "broadcast_buffers"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "counts", [([2, 2, 2], [2, 2, 2]), ([1, 3, 0], [2, 0, 4]), ([1, 1], [1, 1], [0, 1])], ids=["even", "uneven", "ones"]
)
def test_steps_equal_the_union(
    processes: Any, counts: tuple[list[int], ...], broadcast_buffers: bool, channels_last: bool
) -> None:
    parts = [batches(*each) for each in counts]
    states = processes(len(parts)).run(
        _train_with_ddp, broadcast_buffers, channels_last, per_rank=[(each,) for each in parts]
    )
    expected = train(network(), [torch.cat(step) for step in zip(*parts, strict=True)], scale=1)
    for state in states:
        for mine, theirs, first in zip(state, expected, states[0], strict=True):
            assert_close(mine, theirs.double(), 1e-8)
            assert torch.equal(mine, first), "processes differ"


def test_a_head_that_the_loss_ignores_still_takes_part(processes: Any) -> None:
    """Adding ``0 * out.sum()``, as the rule for users says, keeps the processes in step."""
    for gradient in processes(2).run(_ignore_a_head, per_rank=[(True,), (False,)]):
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


def _ignore_a_head(ignore: bool) -> Tensor:
    model = DistributedDataParallel(syncbn.convert(network()))
    out = model(batches(2)[0])
    (0 * out.sum() if ignore else out.sum()).backward()
    return model.module[0].weight.grad


def test_running_statistics_stay_bit_equal_without_broadcast(processes: Any) -> None:
    """Many steps of uneven batches, with gradient buckets on the default group in between."""
    first, second = processes(2).run(_many_steps)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def _many_steps() -> list[Tensor]:
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(16, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 512), nn.BatchNorm1d(512))
    model = DistributedDataParallel(syncbn.convert(model), broadcast_buffers=False)
    for _ in range(20):
        model(torch.randn(dist.get_rank() + 1, 16)).square().mean().backward()
    return [buffer.clone() for buffer in model.buffers()]
