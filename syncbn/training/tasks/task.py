"""What all tasks share: the model with its memory format, the optimizer, the schedule, metrics of the union."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data.distributed import DistributedSampler

from syncbn.training.errors import UserError, built
from syncbn.training.tasks.optimization import linear_scale, make_schedule, parameter_groups, scale_learning_rates

_IMAGES_PER_STEP = "images_per_step"


class Task(LightningModule):
    """A model that is trained: base of the tasks, which add steps and metrics.

    Args:
        model: the network.
        class_names: one name for each class, the background first.
        optimizer: called with parameter groups, makes the optimizer.
        scheduler: called with the optimizer and with those of `total_steps`, `steps_per_epoch` (optimizer steps; None
            if unknown) and `lr_scale` that it has parameters for, makes the schedule, which advances every step; None
            keeps the learning rate.
        base_batch_size: the global batch, in images, that the optimizer's learning rate was found with. The rate is
            multiplied by global batch / base batch; the global batch is that of all processes and accumulated steps.
            None: the rate is used as it is. A run that is resumed keeps the rate of its checkpoint, and warns if the
            global batch is another one now.
        backbone_lr_factor: times the learning rate for the parameters of `model.backbone`.
        channels_last: memory format of the model; faster on CPUs and on tensor cores.

    Raises:
        ValueError: fewer than two classes, or a number out of its range.
    """

    best_metric: str | None = None  # the logged metric that says which checkpoint is the best: the greatest

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
        base_batch_size: int | None = None,
        backbone_lr_factor: float = 1.0,
        channels_last: bool = True,
    ) -> None:
        super().__init__()
        if len(class_names) < 2:
            raise ValueError(f"class_names must name at least two classes, got {list(class_names)}")
        if base_batch_size is not None and base_batch_size < 1:
            raise ValueError(f"base_batch_size must be at least 1 image, or null, got {base_batch_size}")
        if backbone_lr_factor < 0:
            raise ValueError(f"backbone_lr_factor must be 0 or more, got {backbone_lr_factor}")
        if backbone_lr_factor != 1 and not isinstance(getattr(model, "backbone", None), nn.Module):
            raise ValueError(f"backbone_lr_factor must be 1 for a {type(model).__name__}, which has no `backbone`")
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        # Before DistributedDataParallel lays out its gradient buckets, which follow the parameters' strides.
        self.model = model.to(memory_format=self.memory_format)
        self.class_names = tuple(str(name) for name in class_names)
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.base_batch_size = base_batch_size
        self.backbone_lr_factor = backbone_lr_factor
        self._images_per_step: int | None = None
        self._images_per_step_before: int | None = None  # in the checkpoint that the run goes on from

    @property
    def global_batch_size(self) -> int:
        """Images per optimizer step, over all processes and accumulated steps. Needs a Trainer with its data.

        Raises:
            UserError: the data do not say how many images a batch has.
        """
        trainer = self.trainer
        _load_data(trainer)
        for source in (getattr(trainer, "datamodule", None), trainer.train_dataloader):
            batch_size = getattr(source, "batch_size", None)
            if isinstance(batch_size, int):
                return batch_size * trainer.world_size * trainer.accumulate_grad_batches
        raise UserError(
            "task.base_batch_size: neither the data nor its loader says in `batch_size` how many images a process "
            "takes at a time; set task.base_batch_size=null and optimizer.lr for the global batch"
        )

    @property
    def lr_scale(self) -> float:
        """By what the optimizer's learning rate is multiplied for the global batch."""
        return 1.0 if self.base_batch_size is None else linear_scale(self.global_batch_size, self.base_batch_size)

    def configure_optimizers(self) -> Optimizer | OptimizerLRSchedulerConfig:
        backbone = getattr(self.model, "backbone", None)
        groups = parameter_groups(self, backbone, self.backbone_lr_factor)
        optimizer: Optimizer = built("optimizer", self.make_optimizer, groups)
        lr_scale = self.lr_scale
        scale_learning_rates(optimizer, lr_scale)
        if self.make_scheduler is None:
            return optimizer
        total_steps = self.trainer.estimated_stepping_batches
        # -1: max_steps of a Trainer that is to stop for another reason.
        if math.isinf(total_steps) or total_steps < 0:
            raise UserError(
                "the schedule needs an end: set trainer.max_epochs or trainer.max_steps, or task.scheduler=null"
            )
        scheduler = built(
            "scheduler",
            make_schedule,
            self.make_scheduler,
            optimizer,
            total_steps=int(total_steps),
            steps_per_epoch=_steps_per_epoch(self.trainer),
            lr_scale=lr_scale,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def setup(self, stage: str) -> None:
        self._images_per_step_before = None  # a checkpoint that is loaded comes after this

    @property
    def resumed_with_other_batch(self) -> bool:
        """Whether the checkpoint that the run goes on from is of another number of images per step."""
        before = self._images_per_step_before
        return before is not None and self._known_global_batch_size() not in (None, before)

    def _known_global_batch_size(self) -> int | None:
        try:
            return self.global_batch_size
        except UserError:
            return None

    def on_train_start(self) -> None:
        self._images_per_step = now = self._known_global_batch_size()
        before = self._images_per_step_before
        if self.resumed_with_other_batch:
            rank_zero_warn(
                f"the checkpoint is of a run with {before} images per step, over all processes, and this one has {now}:"
                " the learning rate goes on as the checkpoint has it, and the schedule at its number of steps; with "
                f"data.batch_size and trainer.accumulate_grad_batches it can be {before} again"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[_IMAGES_PER_STEP] = self._images_per_step

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._images_per_step_before = checkpoint.get(_IMAGES_PER_STEP)

    def log_loss(self, loss: Tensor, parts: Mapping[str, Tensor], batch_size: int) -> None:
        """Logs the training loss as `train/loss` and its parts as `train/<name>`.

        The bar gets this process's own at each step; the file gets the epoch's means over all processes.
        """
        self.log("loss", loss, prog_bar=True, logger=False)
        self.log_dict(
            {f"train/{name}": value.detach() for name, value in {**parts, "loss": loss}.items()},
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=batch_size,
        )


def _steps_per_epoch(trainer: Any) -> int | None:
    _load_data(trainer)
    batches = trainer.num_training_batches
    return None if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)


def _load_data(trainer: Any) -> None:
    # Optimizers are configured before Lightning asks for the data; estimated_stepping_batches does the same.
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()


def repeated_items(index: Tensor, loader: Any) -> Tensor:
    """Which items bool [B] of a batch the loader repeats only to give every process equally many.

    A DistributedSampler that does not shuffle gives process r the items r, r + P, r + 2P, ... and fills up
    from the start, so an item of another remainder is a repetition. Counting it twice would bias a metric. So would
    an item that stands in for a broken one: its index is -1.

    Args:
        index: the items' positions in the data set, int64 [B].
        loader: the DataLoader that they come from.
    """
    stands_in = index < 0
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.shuffle:
        return stands_in
    return stands_in | (index % sampler.num_replicas != sampler.rank)
