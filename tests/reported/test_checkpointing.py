"""Activation checkpointing, which runs a part of the model twice.

- pytorch/pytorch#96136: torch.utils.checkpoint moves the running statistics twice, reentrant or not.
- pytorch/pytorch#43946: loss.backward() hangs with torch.nn.SyncBatchNorm in a checkpointed model.
- facebookresearch/fairscale#694: a checkpointed SyncBatchNorm runs its all-reduces a second time.
- facebookresearch/fairscale#1035: a wrapper that avoids the second update moves the running statistics in backward
  alone, so that after a forward they are not those of the model without checkpointing.
- facebookresearch/fairscale#660: converting a model that is wrapped for checkpointing already fails.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from judge import assert_close
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from union import parts

import syncbn
from syncbn.checkpoint import checkpoint_contexts


def body() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    ).double()


class Checkpointed(nn.Module):
    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.body = body()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x, **self.how)


WITH_CONTEXTS = {"use_reentrant": False, "context_fn": checkpoint_contexts}
PARTS = parts((2, 3, 9, 8), (3, 3, 9, 8))


def train(model: nn.Module, x: Tensor, steps: int = 3) -> nn.Module:
    for _ in range(steps):
        model(x.detach().requires_grad_()).sin().sum().backward()
    return model


def expected_grads(steps: int = 3) -> list[Tensor]:
    return [p.grad for p in train(body(), torch.cat(PARTS), steps).parameters()]


# ---- without the contexts


def _plain_checkpoint(x: Tensor, use_reentrant: bool) -> tuple[list[Tensor], int, int]:
    """pytorch#43946 as it is reported."""
    model = syncbn.convert(Checkpointed(use_reentrant=use_reentrant))
    train(DistributedDataParallel(model), x)
    layer = model.body[1]
    return [2 * p.grad for p in model.parameters()], layer._exchange.calls, layer.num_batches_tracked.item()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_plain_checkpoint_has_the_right_gradients(processes: Any, use_reentrant: bool) -> None:
    """It does not hang, either. What it runs twice is exchanged and moved twice."""
    expected = expected_grads()
    for grads, calls, moved in processes(2).run(_plain_checkpoint, use_reentrant, per_rank=[(x,) for x in PARTS]):
        for grad, theirs in zip(grads, expected, strict=True):
            assert_close(grad, theirs, 1e-9)
        assert (calls, moved) == (3 * 2 * 3, 2 * 3)


# ---- with them


def _with_contexts(x: Tensor) -> tuple[list[Tensor], int]:
    model = syncbn.convert(Checkpointed(**WITH_CONTEXTS))
    train(DistributedDataParallel(model), x)
    return [2 * p.grad for p in model.parameters()], model.body[1]._exchange.calls


def test_nothing_is_exchanged_again(processes: Any) -> None:
    """fairscale#694: one all-reduce in each direction and layer, as without checkpointing."""
    expected = expected_grads()
    for grads, calls in processes(2).run(_with_contexts, per_rank=[(x,) for x in PARTS]):
        for grad, theirs in zip(grads, expected, strict=True):
            assert_close(grad, theirs, 1e-9)
        assert calls == 3 * 2 * 2


def test_running_statistics_are_moved_once() -> None:
    """pytorch#96136, with layers that are not spread over processes: the same bits as without checkpointing."""
    model = train(syncbn.convert(Checkpointed(**WITH_CONTEXTS)), PARTS[0])
    plain = train(syncbn.convert(body()), PARTS[0])
    for (name, mine), theirs in zip(model.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(mine, theirs), name
    assert model.body[1].num_batches_tracked == 3


def test_running_statistics_are_moved_in_the_forward() -> None:
    """fairscale#1035."""
    model, plain = syncbn.convert(Checkpointed(**WITH_CONTEXTS)), syncbn.convert(body())
    model(PARTS[0])
    plain(PARTS[0])
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(model.buffers(), plain.buffers(), strict=True))


@pytest.mark.parametrize(
    "wrap",
    [
        functools.partial(checkpoint_wrapper, context_fn=checkpoint_contexts),
        functools.partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT),
    ],
    ids=["not reentrant", "reentrant"],
)
def test_a_wrapped_model_is_converted(wrap: Any) -> None:
    """fairscale#660."""
    model = train(syncbn.convert(wrap(body())), PARTS[0])
    for mine, theirs in zip(model.parameters(), train(body(), PARTS[0]).parameters(), strict=True):
        assert_close(mine.grad, theirs.grad, 1e-9)
