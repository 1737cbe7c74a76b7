"""Semantic segmentation as a LightningModule."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import SumMetric
from torchmetrics.classification import MulticlassConfusionMatrix

import syncbn
from syncbn.training.data.batches import IGNORED
from syncbn.training.tasks.task import Task, repeated_items


class SegmentationTask(Task):
    """Trains any model that maps images [B, 3, H, W] to class scores [B, C, H, W].

    A model may also return a dict with the scores under "out", as torchvision's do, and those of an auxiliary head
    under "aux", which is trained along. Pixels of the value 255 count in no loss and no metric. Where a batch has
    `valid`, what is padding counts in no synchronized layer's statistics.

    Logged are `train/loss`, `val/loss`, `val/miou` and `val/iou/<class>`. `val/miou` is the mean of the intersections
    over union of all classes, the background included, each taken over all pixels of the whole validation set and all
    processes. A class that occurs neither in truth nor in prediction is left out. `val/loss` is that of "out" alone.

    Args:
        model: the network.
        loss: maps scores [B, C, H, W] and target int64 [B, H, W] to a scalar; leaves out pixels of the value 255.
        class_names: one name for each of the C classes, the background first.
        optimizer, scheduler, base_batch_size, backbone_lr_factor: as in `Task`.
        channels_last: memory format of the model and its input; faster on CPUs and on tensor cores.
        image_mean, image_std: the model sees (image - image_mean) / image_std, in training and after it; a number, or
            one for each channel.
        aux_weight: of the auxiliary head's loss, in training.

    Raises:
        ValueError: fewer than two classes, or a number out of its range; in training, scores of another shape.
    """

    best_metric = "val/miou"
    image_mean: Tensor
    image_std: Tensor

    def __init__(
        self,
        model: nn.Module,
        loss: nn.Module,
        class_names: Sequence[str],
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
        base_batch_size: int | None = None,
        backbone_lr_factor: float = 1.0,
        channels_last: bool = True,
        image_mean: float | Sequence[float] = 0.5,
        image_std: float | Sequence[float] = 0.25,
        aux_weight: float = 0.5,
    ) -> None:
        super().__init__(model, class_names, optimizer, scheduler, base_batch_size, backbone_lr_factor, channels_last)
        if aux_weight < 0:
            raise ValueError(f"aux_weight must be 0 or more, got {aux_weight}")
        self.loss = loss
        self.aux_weight = aux_weight
        # Not in the state_dict, which is the model's alone.
        self.register_buffer("image_mean", _per_channel("image_mean", image_mean), persistent=False)
        self.register_buffer("image_std", _per_channel("image_std", image_std), persistent=False)
        if not bool((self.image_std > 0).all()):
            raise ValueError(f"image_std must be above 0, got {image_std}")
        # Not a MeanMetric: those of torchmetrics 1.9 forget the weights where they let NaN pass.
        self.val_loss = SumMetric(nan_strategy="disable")
        self.val_images = SumMetric(nan_strategy="disable")
        self.val_pixels = MulticlassConfusionMatrix(len(class_names), ignore_index=IGNORED, validate_args=False)

    def forward(self, image: Tensor) -> Tensor:
        """Images float [B, 3, H, W] in 0 to 1 to class scores float [B, C, H, W]."""
        return self._scores(image)["out"]

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        with _valid(batch):
            scores = self._scores(batch["image"])
        parts: dict[str, Tensor] = {}
        loss: Tensor = self.loss(scores["out"], batch["semantic"])
        if "aux" in scores:
            parts["loss_aux"] = self.loss(scores["aux"], batch["semantic"])
            loss = loss + self.aux_weight * parts["loss_aux"]
        self.log_loss(loss, parts, len(batch["image"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        scores = self(batch["image"])
        repeated = repeated_items(batch["index"], self.trainer.val_dataloaders)
        target = batch["semantic"].masked_fill(repeated[:, None, None], IGNORED)
        images = (~repeated).sum()
        # 0 where all are repeated: of no pixel, torch's own losses are NaN.
        self.val_loss.update(self.loss(scores, target).masked_fill(repeated.all(), 0) * images)
        self.val_images.update(images)
        self.val_pixels.update(scores.argmax(1), target)

    # Not in the step: a process that has no step to do takes part all the same.
    def on_validation_epoch_end(self) -> None:
        iou_C, occurs_C = _iou(self.val_pixels.compute())
        self.log("val/loss", self.val_loss.compute() / self.val_images.compute())
        self.log("val/miou", iou_C[occurs_C].mean(), prog_bar=True)
        for name, iou, occurs in zip(self.class_names, iou_C, occurs_C, strict=True):
            if occurs:
                # Already the same on all processes: the metric has added up their counts.
                self.log(f"val/iou/{name}", iou)

    # A validation that was broken off leaves counts behind.
    def on_validation_epoch_start(self) -> None:
        self.val_loss.reset()
        self.val_images.reset()
        self.val_pixels.reset()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Class of every pixel, int64 [B, H, W]."""
        return self(batch["image"]).argmax(1)

    def _scores(self, image: Tensor) -> dict[str, Tensor]:
        """The model's scores, "out" and, if it has an auxiliary head, "aux"."""
        image = (image - self.image_mean) / self.image_std
        output = self.model(image.contiguous(memory_format=self.memory_format))
        scores = output if isinstance(output, dict) else {"out": output}
        expected = (len(image), len(self.class_names), *image.shape[2:])
        for name in ("out", "aux"):
            if name in scores and scores[name].shape != expected:
                raise ValueError(
                    f"the model must return scores [B, {expected[1]}, H, W], here {list(expected)}, a channel for each "
                    f"class and a place for each pixel, got {list(scores[name].shape)}: set model.num_classes (or the "
                    f"like) to {expected[1]}, or enlarge the scores in the model"
                )
        return {name: scores[name] for name in ("out", "aux") if name in scores}


def _valid(batch: dict[str, Any]) -> AbstractContextManager[Any]:
    return syncbn.valid_region(batch["valid"]) if "valid" in batch else nullcontext()


def _iou(pixels_CC: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union of each class, and which classes occur, from counts [truth, prediction]."""
    both_C = pixels_CC.diagonal()
    either_C = pixels_CC.sum(0) + pixels_CC.sum(1) - both_C
    return both_C / either_C.clamp(min=1), either_C > 0


def _per_channel(name: str, value: float | Sequence[float]) -> Tensor:
    values = [float(v) for v in value] if isinstance(value, Sequence) else [float(value)]
    if len(values) not in (1, 3):
        raise ValueError(f"{name} must be a number, or one for each of the three channels, got {list(values)}")
    return torch.tensor(values).view(-1, 1, 1)
