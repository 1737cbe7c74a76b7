"""Object detection as a LightningModule."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from syncbn.training.models import count_valid_region
from syncbn.training.tasks.average_precision import AveragePrecision
from syncbn.training.tasks.task import Task

Target = dict[str, Tensor]
Prediction = dict[str, Tensor]


class DetectionTask(Task):
    """Trains any detector with torchvision's protocol.

    In training, model(images, targets) is a dict of losses; in eval, model(images) is a list with a dict of `boxes`,
    `labels` and `scores` for each image. Images are a list of [3, H, W] in 0 to 1, each of its own size; the model
    normalizes, resizes and pads them. What torchvision's own detectors pad counts in no synchronized layer's
    statistics. Where Faster R-CNN and its relatives would learn from no region at all, which is NaN (no object, and
    `rpn_score_thresh` has left no proposal), the images as wholes are background.

    Logged are `train/loss`, which is the sum, each of the losses as `train/<its name>`, and COCO's average precision
    over all processes: `val/map`, `val/map_50`, `val/map_75`, and, where there are such objects, `val/map_small`,
    `val/map_medium`, `val/map_large` and `val/ap/<class>`.

    Args:
        model: the detector.
        class_names: the background first, which is no object: boxes' labels count from 1.
        optimizer, scheduler, base_batch_size, backbone_lr_factor: as in `Task`.
        channels_last: memory format of the model.
        ap_per_class: whether to log `val/ap/<class>`.

    Raises:
        ValueError: fewer than two classes, or a number out of its range.
        TypeError: in training, the model returns no dict of losses.
    """

    best_metric = "val/map"

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        optimizer: Callable[..., Optimizer],
        scheduler: Callable[..., LRScheduler] | None = None,
        base_batch_size: int | None = None,
        backbone_lr_factor: float = 1.0,
        channels_last: bool = False,
        ap_per_class: bool = True,
    ) -> None:
        super().__init__(model, class_names, optimizer, scheduler, base_batch_size, backbone_lr_factor, channels_last)
        if isinstance(getattr(model, "transform", None), GeneralizedRCNNTransform):
            count_valid_region(model)
        if isinstance(getattr(model, "roi_heads", None), RoIHeads):
            model.roi_heads.register_forward_pre_hook(_never_without_regions)  # type: ignore[union-attr]
        self.ap_per_class = ap_per_class
        self.val_ap = AveragePrecision()

    def forward(self, images: list[Tensor]) -> list[Prediction]:
        """Images float [3, H, W] in 0 to 1 to boxes float [n, 4], labels int64 [n] and scores float [n] of each."""
        predictions: list[Prediction] = self.model(images)
        return predictions

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        targets = [_without_crowds(target) for target in batch["targets"]]
        losses = self.model(batch["image"], targets)
        if not isinstance(losses, dict) or not losses:
            raise TypeError(
                f"a detector must return a dict of losses in training, as torchvision's do, got {type(losses).__name__}"
            )
        loss: Tensor = sum(losses.values())  # type: ignore[assignment]
        self.log_loss(loss, losses, len(targets))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.val_ap.update(self(batch["image"]), batch["targets"], batch["index"])

    # Not in the step: a process that has no step to do takes part all the same.
    def on_validation_epoch_end(self) -> None:
        found = self.val_ap.compute(self.class_names if self.ap_per_class else ())
        # Already the same on all processes, and of all images.
        self.log("val/map", found.pop("map"), prog_bar=True)
        self.log_dict({f"val/{name}": value for name, value in found.items()})
        self.val_ap.reset()

    # A validation that was broken off leaves images behind.
    def on_validation_epoch_start(self) -> None:
        self.val_ap.reset()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[Prediction]:
        return self(batch["image"])


def _without_crowds(target: Target) -> Target:
    """What a detector learns from: crowds only excuse detections in evaluation."""
    if "iscrowd" not in target:
        return target
    # One wait for the device, not one for each key.
    single = torch.nonzero(target["iscrowd"] == 0).squeeze(1)
    return {key: value[single] for key, value in target.items()}


def _never_without_regions(roi_heads: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """torchvision's box losses are means over regions: NaN of none, and one process's NaN is NaN in all weights."""
    features, proposals, image_shapes, targets = (*args, None)[:4]
    if not roi_heads.training or any(len(each) for each in (*proposals, *(t["boxes"] for t in targets or ()))):
        return None
    whole = [each.new_tensor([[0, 0, w, h]]) for each, (h, w) in zip(proposals, image_shapes, strict=True)]
    return features, whole, image_shapes, targets
