"""COCO's average precision over all processes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

# COCO's own thresholds. torchmetrics' defaults are float32, by which an IoU of exactly 0.6 falls short of 0.6.
_IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()
_RECALL_THRESHOLDS = np.linspace(0.0, 1.0, 101).tolist()

_OVERALL = ("map", "map_50", "map_75")
_BY_SIZE = ("map_small", "map_medium", "map_large")
_PREDICTED = ("boxes", "scores", "labels")
_TRUE = ("boxes", "labels", "iscrowd", "area")

_Item = dict[str, Tensor]
_Items = dict[int, tuple[_Item, _Item]]  # by index: what is predicted, what is true


class AveragePrecision:
    """Collects what detectors predict, and computes what `pycocotools` would for the union of all processes.

    torchmetrics computes the numbers, with pycocotools itself (its other backend, faster-coco-eval, took 1.8 times as
    long for 1000 images of 100 detections), and leaves the exchange to this class: its own takes a collective for every
    image, so that processes with different numbers of images wait for each other forever. Here each process sends all
    it has in one exchange, none included, to the first one, which computes for all: COCO's 5000 images with 100
    detections each take some 2.5 GB of memory and a minute meanwhile. Images are told apart by their index: one that
    several processes have seen counts once, and their order, on which equal scores depend, is that of the data set.
    """

    def __init__(self) -> None:
        self._items: _Items = {}

    def update(self, predictions: Sequence[_Item], targets: Sequence[_Item], index: Tensor) -> None:
        """Adds images.

        Args:
            predictions: a dict for each image: boxes float [n, 4] (x1 y1 x2 y2), scores float [n], labels int64 [n].
            targets: likewise: boxes, labels, and optionally iscrowd int64 [m] and area float32 [m] (by which objects
                are small, medium or large; without it, that of the box).
            index: the images' positions in the data set, int64 [B]; -1: stands in for a broken one and is left out.
        """
        for number, prediction, target in zip(index.tolist(), predictions, targets, strict=True):
            if number >= 0:
                self._items[number] = _on_cpu(prediction, _PREDICTED), _on_cpu(target, _TRUE)

    def compute(self, class_names: Sequence[str] = ()) -> dict[str, float]:
        """`map`, `map_50`, `map_75`; `map_small`, `map_medium`, `map_large` and `ap/<class>` where there are objects.

        To be called by all processes. Without any object, the first three are -1, as in `pycocotools`.

        Raises:
            RuntimeError: on all processes, if it cannot be computed.
        """
        parts = _gathered(self._items)
        values: dict[str, float] | None = None
        failure: Exception | None = None
        if parts is not None:
            try:
                values = _average_precision(_union(parts), class_names)
            except Exception as error:  # told to the others, who wait
                failure = error
        values, reason = _from_first((values, repr(failure)))
        if values is None:
            raise RuntimeError(f"average precision could not be computed on process 0: {reason}") from failure
        return values

    def reset(self) -> None:
        self._items = {}


def _average_precision(items: Sequence[tuple[_Item, _Item]], class_names: Sequence[str]) -> dict[str, float]:
    """What `AveragePrecision.compute` gives, of these images."""
    metric = MeanAveragePrecision(
        iou_type="bbox",
        iou_thresholds=_IOU_THRESHOLDS,
        rec_thresholds=_RECALL_THRESHOLDS,
        extended_summary=bool(class_names),
        backend="pycocotools",
        sync_on_compute=False,
    )
    metric.warn_on_many_detections = False  # COCO counts the 100 best of an image
    if not any(len(target["labels"]) for _, target in items):
        return dict.fromkeys(_OVERALL, -1.0)
    metric.update([prediction for prediction, _ in items], [target for _, target in items])
    found = metric.compute()
    values = {name: float(found[name]) for name in (*_OVERALL, *_BY_SIZE) if name in _OVERALL or found[name] >= 0}
    if class_names:
        values |= _of_classes(found, class_names)
    return values


def _on_cpu(item: _Item, keys: Sequence[str]) -> _Item:
    # Copies: what is sent of a slice would be all that it is a slice of.
    kept = {key: item[key].detach().cpu().clone() for key in keys if key in item}
    # Half precision has no exact sizes; and NumPy no bfloat16.
    return {key: value.float() if value.is_floating_point() else value for key, value in kept.items()}


def _gathered(own: _Items) -> list[_Items] | None:
    """Each process's, on the first one; None on the others."""
    if not _several():
        return [own]
    everybodys: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(own, everybodys)
    return everybodys


def _from_first(value: Any) -> Any:
    """The first process's, on all."""
    values = [value]
    if _several():
        dist.broadcast_object_list(values)
    return values[0]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _union(parts: Sequence[_Items]) -> list[tuple[_Item, _Item]]:
    """All processes' items in the data set's order."""
    union = {number: item for part in parts for number, item in part.items()}
    return [union[number] for number in sorted(union)]


def _of_classes(found: dict[str, Tensor], class_names: Sequence[str]) -> dict[str, float]:
    """Average precision of each class with objects, from precision [threshold, recall, class, size, detections]."""
    values = {}
    precision_TRK = found["precision"][..., 0, -1]  # all sizes, 100 detections
    for position, number in enumerate(found["classes"].view(-1).tolist()):
        precision_TR = precision_TRK[..., position]
        if 0 <= number < len(class_names) and bool((precision_TR >= 0).any()):
            values[f"ap/{class_names[number]}"] = float(precision_TR.mean())
    return values
