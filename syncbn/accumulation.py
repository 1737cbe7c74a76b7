"""``accumulate_statistics``: one update of the running statistics for several micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.optim import Optimizer

from .layer import SyncBatchNorm
from .pooled_moments import Pooling, running_statistics


@contextmanager
def accumulate_statistics(model: nn.Module, *optimizers: Optimizer) -> Iterator[None]:
    """A block in which the running statistics move once for all micro-batches, not with each of them.

    Around the micro-batches of one step, they move where the block ends::

        with syncbn.accumulate_statistics(model):
            for x, target in micro_batches:
                (loss_of(model(x), target) / len(micro_batches)).backward()
        optimizer.step()

    Around a whole training loop, with the optimizer, they move after each of its steps, and at the end for the rest::

        with syncbn.accumulate_statistics(model, optimizer):
            train(model, optimizer)

    They move toward the mean and the unbiased variance over all values of all micro-batches and processes: for the
    first layer, what one forward with the whole batch would move them toward. ``num_batches_tracked`` counts one.
    Micro-batches that are not finite in a layer are left out there. Nothing more is exchanged, and nothing is read on
    the host.

    Each micro-batch is normalized by its own mean and variance, over all processes, as it is without this block: the
    next ones are not known yet. Layers that are not synchronized move with each micro-batch, as always.

    Args:
        model: whose SyncBatchNorm layers accumulate, in calls on this thread.
        optimizers: after whose steps the running statistics move; none for the end of the block.

    Raises:
        ValueError: there is no SyncBatchNorm with running statistics in the model.
        RuntimeError: the model was moved to another device or dtype inside of the block.
    """
    layers = [each for each in model.modules() if isinstance(each, SyncBatchNorm) and each.running_mean is not None]
    if not layers:
        raise ValueError(
            "there is no SyncBatchNorm with running statistics in the model: call syncbn.convert(model) first, also "
            "where there is one process"
        )
    pooling = Pooling(layers, of_union=True)
    with ExitStack() as hooks:
        for optimizer in optimizers:
            hooks.callback(optimizer.register_step_post_hook(lambda *_: _move(pooling)).remove)
        with pooling:
            yield
        _move(pooling)


@torch.no_grad()
def _move(pooling: Pooling) -> None:
    """The running statistics move toward what is pooled, if there is anything; the pools are empty again."""
    pooling.require_same_buffers()
    for layer, pool in pooling.pools.items():
        pool.move(running_statistics(layer))
        pool.sums.zero_()
