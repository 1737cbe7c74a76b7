"""What only some ranks do.

- ultralytics/yolov5#4615, #3754, #3998: rank 0 alone traces the model for TensorBoard in the middle of training with
  --sync-bn, and "the training process will be blocked at epoch 0".
- pytorch/pytorch#44957: "Sync Batch Norm hangs if i don't call a module in one of the Processes": a model for videos
  skips its second part for a video's first frame, while other processes are at later frames.
"""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from documentation import blocks
from judge import assert_close
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import syncbn
from syncbn.checkpoint import checkpoint_contexts


class Net(nn.Module):
    """With a pooled branch, as in DeepLab's ASPP, in which one image has one value per channel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6), nn.ReLU())
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(x + self.pooled(x))


def images(n: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


# ---- ultralytics/yolov5#4615: what rank 0 does alone


def trace(model: nn.Module, x: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch.jit.trace is deprecated
        torch.jit.trace(model, x, strict=False)


def add_graph(model: nn.Module, x: Tensor) -> None:
    from torch.utils.tensorboard._pytorch_graph import graph  # all of SummaryWriter.add_graph but the file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        drawn, _ = graph(model, x, use_strict_trace=False)
    assert any("pooled" in node.name for node in drawn.node)


def profile(model: nn.Module, x: Tensor) -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model(x).sum().backward()
    assert not any("all_reduce" in event.key for event in profiler.key_averages())
    model.zero_grad()


def count(model: nn.Module, x: Tensor) -> None:
    with FlopCounterMode(display=False) as flops:
        model(x)
    assert flops.get_total_flops() > 0


def measure_a_copy(model: nn.Module, x: Tensor) -> None:
    """As yolov5 does with thop."""
    copied = copy.deepcopy(model)
    copied(x).sum().backward()
    pickle.loads(pickle.dumps(copied))(x)


def recompute(model: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=False).sum().backward()
    model.zero_grad()


def recompute_from_sums(model: nn.Module, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    checkpoint(model, x, use_reentrant=False, context_fn=checkpoint_contexts).sum().backward()
    model.zero_grad()


ALONE = [trace, add_graph, profile, count, measure_a_copy, recompute, recompute_from_sums]


def _train(alone: Callable[[nn.Module, Tensor], None] | None) -> list[Tensor]:
    """Three steps; in the second, rank 0 does something alone, in training mode."""
    rank = dist.get_rank()
    model = DistributedDataParallel(syncbn.convert(Net()), broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(3):
        x = images(1, 10 * step + rank)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if step == 1 and rank == 0 and alone is not None:
            with syncbn.local(model):
                alone(model.module, x)
    return [each.detach().clone() for each in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("alone", ALONE, ids=lambda alone: alone.__name__)
def test_rank_0_does_something_alone_and_training_goes_on(processes: Any, alone: Any) -> None:
    """Nobody waits for anybody, and not a bit of the training changes."""
    expected = processes(2).run(_train, None)
    for ours, theirs in zip(processes(2).run(_train, alone), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _wrapped_in_ddp() -> str:
    model = DistributedDataParallel(syncbn.convert(Net()))
    said = ""
    if dist.get_rank() == 0:
        try:
            with syncbn.local(model):
                model(images())
        except RuntimeError as error:
            said = str(error)
    model(images()).sum().backward()
    return said


def test_ddp_itself_cannot_be_called_by_one_process(processes: Any) -> None:
    """It broadcasts buffers and sums gradients."""
    said, _ = processes(2).run(_wrapped_in_ddp)
    assert "call its module, model.module" in said


def _backward_inside(x: Tensor) -> tuple[int, int, int]:
    model = syncbn.convert(Net())
    exchange = model.stem[1]._exchange
    before = model(x).sum()
    calls = exchange.calls
    with syncbn.local(model):
        inside = model(x).sum()
        before.backward()
        between = exchange.calls
    inside.backward()
    return calls, between, exchange.calls


def test_what_was_called_outside_of_the_block_has_its_backward_as_before(processes: Any) -> None:
    for calls in processes(2).run(_backward_inside, per_rank=[(images(2),), (images(1, 1),)]):
        assert calls == (2, 4, 4)


def test_the_block_normalizes_by_this_process_alone() -> None:
    model, judge, x = syncbn.convert(Net().double()), Net().double(), images(3).double()
    with syncbn.local(model):
        y = model(x)
    torch.testing.assert_close(y, judge(x))
    y.sum().backward()
    judge(x).sum().backward()
    for ours, theirs in zip(model.parameters(), judge.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)


# ---- the block itself


def state_of(model: nn.Module) -> list[Any]:
    layers = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    return [(vars(each).get("_exchange"), each.track_running_stats, each.training) for each in layers]


def test_layers_that_are_not_converted_do_not_move_either() -> None:
    model = syncbn.convert(Net(), exclude="pooled.2")
    before, states = state_of(model), copy.deepcopy(model.state_dict())
    with syncbn.local(model):
        model(images(2))
        model.eval()(images(2))
        model.train()
    assert state_of(model) == before
    assert all(torch.equal(each, states[name]) for name, each in model.state_dict().items())
    model(images(2))
    assert int(model.stem[1].num_batches_tracked) == int(model.pooled[2].num_batches_tracked) == 1


def test_blocks_in_blocks_and_exceptions() -> None:
    model = syncbn.convert(Net())
    before, local = state_of(model), syncbn.local(model)

    def nested_and_failing() -> None:
        with local:
            with local, syncbn.local(model.stem):
                pass
            assert state_of(model) != before
            raise KeyError

    with pytest.raises(KeyError):
        nested_and_failing()
    assert state_of(model) == before


def test_blocks_that_do_not_end_in_order() -> None:
    """Two generators, of which the one that began first ends first."""
    model = syncbn.convert(Net())
    before = state_of(model)

    def generator() -> Iterator[None]:
        with syncbn.local(model):
            yield

    first, second = generator(), generator()
    next(first), next(second)
    inside = state_of(model)
    first.close()
    assert state_of(model) == inside
    second.close()
    assert state_of(model) == before


def test_a_compiled_model() -> None:
    model = syncbn.convert(Net())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(images(2))
    with syncbn.local(compiled):
        torch.testing.assert_close(compiled(images(2)), model(images(2)))
        compiled(images(2)).sum().backward()
    assert int(model.stem[1].num_batches_tracked) == 1
    compiled(images(2))
    assert int(model.stem[1].num_batches_tracked) == 2


def test_a_frozen_layer_and_a_fused_one() -> None:
    model = syncbn.fuse(syncbn.convert(Net()))
    with syncbn.local(model):
        syncbn.freeze(model.stem)
        y = model(images(2))
        assert syncbn.describe(model).rows[1].over == "this process"
    syncbn.revert(model)
    torch.testing.assert_close(model(images(2)), y)


def test_what_cannot_be_run_alone_is_refused() -> None:
    before = state_of(model := syncbn.convert(Net(), include="stem"))
    model.pooled[2] = nn.SyncBatchNorm(6)
    with pytest.raises(TypeError, match=r"pooled\.2 \(SyncBatchNorm\): another package synchronizes it"):
        syncbn.local(model).__enter__()
    assert state_of(model)[:1] == before[:1]
    model.pooled[2] = torch.jit.script(nn.BatchNorm2d(6))
    with pytest.raises(TypeError, match=r"pooled\.2 .*compiled or traced already"):
        syncbn.local(model).__enter__()


def _sharded() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(syncbn.convert(Net()), mesh=init_device_mesh("cpu", (2,)))
    with pytest.raises(TypeError, match="sharded over the processes, so that one of them alone cannot run it"):
        syncbn.local(model).__enter__()


def test_a_sharded_model_is_refused(processes: Any) -> None:
    processes(2).run(_sharded)


# ---- pytorch/pytorch#44957: a part of the model that only some ranks need


def block() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    )


class Video(nn.Module):
    """Its second part is for all but a video's first frame."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.a, self.b = block(), block()
        self.double()

    def forward(self, x: Tensor, first: bool) -> Tensor:
        stuff = self.a(x)
        if not first:
            return self.b(stuff)
        nothing = self.b(stuff[:0])  # takes part in what the other ranks exchange
        return stuff + 0 * nothing.sum()


FIRST = [[True, False, True, False], [False, False, True, True]]  # by rank and step


def frames(rank: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(rank + 1, 3, 5, 5, generator=generator, dtype=torch.float64) + step for step in range(4)]


def state_after(model: nn.Module, losses: Callable[[int], Tensor]) -> list[Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(4):
        optimizer.zero_grad()
        losses(step).backward()
        optimizer.step()
    return [each.detach().clone() for each in (*model.parameters(), *model.buffers())]


def _train_on_videos(through_ddp: bool) -> list[Tensor]:
    rank = dist.get_rank()
    net = syncbn.convert(Video())
    model = DistributedDataParallel(net) if through_ddp else net

    def loss(step: int) -> Tensor:
        y = model(frames(rank)[step], FIRST[rank][step])
        return y.sin().sum() * dist.get_world_size()  # over which gradients are averaged

    def without_ddp(step: int) -> Tensor:
        for parameter in net.parameters():
            parameter.register_post_accumulate_grad_hook(_average) if step == 0 else None
        return loss(step)

    return state_after(net, loss if through_ddp else without_ddp)


def _average(parameter: nn.Parameter) -> None:
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def of_the_union(model: Video, step: int) -> Tensor:
    """The first part on all frames, the second one on those that need it."""
    parts = [frames(rank)[step] for rank in range(2)]
    stuff = model.a(torch.cat(parts)).split([len(part) for part in parts])
    first = [each for rank, each in enumerate(stuff) if FIRST[rank][step]]
    others = [each for rank, each in enumerate(stuff) if not FIRST[rank][step]]
    loss = sum(each.sin().sum() for each in first)
    if others:
        return loss + model.b(torch.cat(others)).sin().sum()
    return loss + 0 * sum(each.sum() for each in model.b.parameters())


@pytest.mark.parametrize("through_ddp", [False, True], ids=["all_reduce", "DDP"])
def test_ranks_that_skip_a_part_run_it_on_an_empty_batch(processes: Any, through_ddp: bool) -> None:
    """Forward and backward; in one of the steps all ranks skip it, in another none."""
    judge = Video()
    expected = state_after(judge, lambda step: of_the_union(judge, step))
    states = processes(2).run(_train_on_videos, through_ddp)
    for state in states:
        for ours, theirs, first in zip(state, expected, states[0], strict=True):
            assert_close(ours, theirs.double(), 1e-9)
            assert torch.equal(ours, first), "processes differ"


def test_the_documentation_runs() -> None:
    names: dict[str, Any] = {}
    for block in blocks("docs/partial-ranks.md"):
        exec(block, names)
