"""What Lightning leaves out of a checkpoint, or counts twice, when a run is resumed."""

from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loops.loop import _Loop
from lightning.pytorch.trainer.states import TrainerFn
from torch.nn.parallel import DistributedDataParallel

from syncbn.training.processes import gather

# Of each metric that one process has logged in this epoch: the arguments of `log`, its sum and its count.
_Sums = list[dict[str, Any]]

_KEY = "epoch_sums"


class ExactResume(Callback):
    """Lets a resumed run count epochs, and take means over them, as the uninterrupted one does.

    - What `self.log(..., on_epoch=True)` has accumulated of an unfinished epoch is kept in checkpoints; without it,
      the epoch's mean loss would be that of the steps after resuming. Means and sums of numbers are kept; metric
      objects, least and greatest values are not. The sums are each process's own; another number of processes divides
      them anew, with the same mean.
    - With `max_steps`, Lightning ends an epoch once more whose end had saved the checkpoint, and would go on with the
      order of the epoch after the next.
    - DistributedDataParallel arranges its gradients anew after its first step, and where a gradient lies decides in
      which order gloo adds those of more than two processes. On CPUs they are added in the order of the ranks instead.
    """

    def __init__(self) -> None:
        self._to_add: _Sums = []

    # Runs on all processes; rank 0 writes what it returns.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            checkpoint[_KEY] = gather(_accumulated(trainer))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._to_add = _share(checkpoint.get(_KEY, []), trainer.global_rank, trainer.world_size)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = trainer.strategy.model
        if isinstance(model, DistributedDataParallel) and trainer.strategy.root_device.type == "cpu":
            add_in_order_of_ranks(model)
        fit_loop, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
        if fit_loop.restarted_on_epoch_end:
            fit_loop.epoch_progress.increment_completed()
            _begin_next_epoch(fit_loop)
        if loop.batch_progress.is_last_batch:
            if loop.val_loop.restarted_mid_evaluation:
                self._add(trainer)  # no step is left that could do it
            self._to_add = []

    # Not earlier: Lightning resets all sums at the first step.
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._add(trainer)

    def _add(self, trainer: Trainer) -> None:
        results = trainer.fit_loop.epoch_loop._results
        for entry in self._to_add:
            arguments = entry["arguments"]
            key = f"{arguments['fx']}.{arguments['name']}"
            if key not in results:
                zero = torch.zeros((), device=trainer.strategy.root_device)
                results.log(value=zero, batch_size=0, sync_dist_fn=trainer.strategy.reduce, **arguments)
            metric = results[key]
            metric.value = metric.value + entry["sum"]
            if entry["count"] is not None:
                metric.cumulated_batch_size = metric.cumulated_batch_size + entry["count"]
        self._to_add = []


def add_in_order_of_ranks(model: DistributedDataParallel) -> None:
    """Makes the mean of the processes' gradients independent of their place in a bucket, for CPU tensors.

    Each process receives all gradients, so that it costs more than an all-reduce. Of two processes there is one order
    only, and nothing changes.
    """
    if dist.get_world_size(model.process_group) > 2:
        model.register_comm_hook(model.process_group, _mean_in_order_of_ranks)


def _mean_in_order_of_ranks(group: dist.ProcessGroup, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    own = bucket.buffer()
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]

    def mean(received: torch.futures.Future[Any]) -> torch.Tensor:
        received.value()  # raises what went wrong
        return sum(gathered[1:], gathered[0]).div_(len(gathered))

    return dist.all_gather(gathered, own, group=group, async_op=True).get_future().then(mean)


def _begin_next_epoch(loop: _Loop) -> None:
    """What Lightning itself does after an epoch's end, if the run's length is given in epochs."""
    loop._restarting = False
    loop.reset_restart_stage()
    for child in vars(loop).values():
        if isinstance(child, _Loop):
            _begin_next_epoch(child)


def _accumulated(trainer: Trainer) -> _Sums:
    entries = []
    for metric in trainer.fit_loop.epoch_loop._results.values():
        meta = metric.meta
        additive = meta.is_mean_reduction or meta.is_sum_reduction
        if not metric.is_tensor or not meta.on_epoch or not additive or metric.has_reset:
            continue
        arguments = {
            "fx": meta.fx,
            "name": meta.name,
            "prog_bar": meta.prog_bar,
            "logger": meta.logger,
            "on_step": meta.on_step,
            "on_epoch": True,
            "reduce_fx": "mean" if meta.is_mean_reduction else "sum",
            "sync_dist": meta.sync.should,
        }
        count = int(metric.cumulated_batch_size) if meta.is_mean_reduction else None
        entries.append({"arguments": arguments, "sum": float(metric.value), "count": count})
    return entries


def _share(gathered: list[_Sums], rank: int, world_size: int) -> _Sums:
    """What one of `world_size` processes adds of what all processes had."""
    if len(gathered) == world_size:
        return gathered[rank]
    if rank > 0:
        return []
    merged: dict[str, dict[str, Any]] = {}
    for entry in (entry for process in gathered for entry in process):
        known = merged.setdefault(entry["arguments"]["name"], {**entry, "sum": 0.0, "count": entry["count"] and 0})
        known["sum"] += entry["sum"]
        if known["count"] is not None:
            known["count"] += entry["count"]
    return list(merged.values())
