"""Semantic segmentation as a LightningModule."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data.distributed import DistributedSampler
from torchmetrics.classification import MulticlassJaccardIndex

from syncbn.training.errors import UserError, built
from syncbn.training.tasks.optimization import parameter_groups

_IGNORED = 255  # a target value outside the classes; the metric skips such pixels


class SegmentationTask(LightningModule):
    """Trains any model that maps images [B, 3, H, W] to class scores [B, C, H, W].

    A model may also return a dict with the scores under "out", as torchvision's do. Logged are `train/loss`,
    `val/loss`, `val/miou` and `val/iou/<class>`. `val/miou` is the mean of the intersections over union of
    all classes, the background included, each taken over all pixels of the whole validation set and all
    processes. A class that occurs neither in truth nor in prediction is left out.

    Args:
        model: the network.
        loss: maps scores [B, C, H, W] and target int64 [B, H, W] to a scalar.
        class_names: one name for each of the C classes, the background first.
        optimizer: called with parameter groups, makes the optimizer.
        scheduler: called with (optimizer, total_steps=...), makes the schedule, which advances every step;
        None
            keeps the learning rate.
        image_mean, image_std: the model sees (image - image_mean) / image_std, in training and after it.
        channels_last: memory format of the model and its input; faster on CPUs and on tensor cores.

    Raises:
        ValueError: fewer than two classes, or no positive `image_std`; in training, scores that do not have C channels.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        class_names: Sequence[str],
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
        channels_last: bool = True,
        image_mean: float = 0.5,
        image_std: float = 0.25,
    ) -> None:
        super().__init__()
        if len(class_names) < 2:
            raise ValueError(f"class_names must name at least two classes, got {list(class_names)}")
        if image_std <= 0:
            raise ValueError(f"image_std must be above 0, got {image_std}")
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        # Before DistributedDataParallel lays out its gradient buckets, which follow the parameters' strides.
        self.model = model.to(memory_format=self.memory_format)
        self.loss = loss
        self.image_mean = image_mean
        self.image_std = image_std
        self.class_names = tuple(str(name) for name in class_names)
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.val_iou = MulticlassJaccardIndex(
            len(class_names), average="none", ignore_index=_IGNORED, validate_args=False
        )
        self.val_miou = MulticlassJaccardIndex(
            len(class_names), average="macro", ignore_index=_IGNORED, validate_args=False
        )

    def forward(self, image: Tensor) -> Tensor:
        """Images float [B, 3, H, W] in 0 to 1 to class scores float [B, C, H, W]."""
        image = (image - self.image_mean) / self.image_std
        output = self.model(image.contiguous(memory_format=self.memory_format))
        scores: Tensor = output["out"] if isinstance(output, dict) else output
        if scores.ndim != 4 or scores.shape[1] != len(self.class_names):
            raise ValueError(
                f"the model must return scores [B, {len(self.class_names)}, H, W], a channel for each class, "
                f"got {list(scores.shape)}: set model.num_classes (or the like) to {len(self.class_names)}"
            )
        return scores

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss: Tensor = self.loss(self(batch["image"]), batch["semantic"])
        # For the bar, of this process alone; the file gets the epoch's mean over all processes.
        self.log("loss", loss, prog_bar=True, logger=False)
        self.log(
            "train/loss",
            loss.detach(),
            on_step=False,
            on_epoch=True,
            sync_dist=True,
            batch_size=len(batch["image"]),
        )
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        scores = self(batch["image"])
        target = batch["semantic"]
        self.log("val/loss", self.loss(scores, target), sync_dist=True, batch_size=len(target))
        repeated = repeated_items(batch["index"], self.trainer.val_dataloaders)
        target = target.masked_fill(repeated[:, None, None], _IGNORED)
        prediction = scores.argmax(1)
        self.val_iou.update(prediction, target)
        self.val_miou.update(prediction, target)
        self.log("val/miou", self.val_miou, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        for name, iou in zip(self.class_names, self.val_iou.compute(), strict=True):
            # Already the same on all processes: the metric has added up their counts.
            self.log(f"val/iou/{name}", iou)
        self.val_iou.reset()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Class of every pixel, int64 [B, H, W]."""
        return self(batch["image"]).argmax(1)

    def configure_optimizers(self) -> Optimizer | OptimizerLRSchedulerConfig:
        optimizer: Optimizer = built("optimizer", self.make_optimizer, parameter_groups(self))
        if self.make_scheduler is None:
            return optimizer
        total_steps = self.trainer.estimated_stepping_batches
        if math.isinf(total_steps):
            raise UserError(
                "the schedule needs an end: set trainer.max_epochs or trainer.max_steps, or task.scheduler=null"
            )
        scheduler = built("scheduler", self.make_scheduler, optimizer, total_steps=int(total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def repeated_items(index: Tensor, loader: Any) -> Tensor:
    """Which items bool [B] of a batch the loader repeats only to give every process equally many.

    A DistributedSampler that does not shuffle gives process r the items r, r + P, r + 2P, ... and fills up
    from the start, so an item of another remainder is a repetition. Counting it twice would bias a metric.

    Args:
        index: the items' positions in the data set, int64 [B].
        loader: the DataLoader that they come from.
    """
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DistributedSampler) or sampler.shuffle:
        return torch.zeros_like(index, dtype=torch.bool)
    return index % sampler.num_replicas != sampler.rank
