"""From items to batches, for segmentation and for detection."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from syncbn.training.errors import did_you_mean

IGNORED = 255  # a pixel of no class: padding, and what an annotator left open

Item = dict[str, Any]
Batch = dict[str, Any]

# What a detector is told about each instance.
_TARGET_KEYS = ("boxes", "labels", "masks", "iscrowd", "area")


class SegmentationBatches:
    """Stacks images and masks; smaller ones are padded at the right and at the bottom.

    Gives `image` float32 [B, 3, H, W] (padding is 0), `semantic` int64 [B, H, W] (padding is 255), `index` int64 [B],
    and, where some image is padded, `valid` bool [B, 1, H, W], true on images. Instances (`boxes`, `labels`, `masks`)
    become lists.

    Args:
        pad_to: H and W are made multiples of this. Fewer different shapes cost padding, and spare cuDNN and the
            memory allocator trouble.
    """

    def __init__(self, pad_to: int = 1) -> None:
        self.pad_to = pad_to

    def __call__(self, items: Sequence[Item]) -> Batch:
        batch: Batch = {key: [item[key] for item in items] for key in items[0]}
        images: list[Tensor] = batch["image"]
        height, width = (_round_up(max(image.shape[d] for image in images), self.pad_to) for d in (-2, -1))
        if any(image.shape[-2:] != (height, width) for image in images):
            batch["valid"] = torch.stack(
                [_padded(torch.ones_like(i[:1], dtype=torch.bool), height, width) for i in images]
            )
        batch["image"] = torch.stack([_padded(image, height, width) for image in images])
        if "semantic" in batch:
            batch["semantic"] = torch.stack([_padded(mask, height, width, IGNORED) for mask in batch["semantic"]])
        batch["index"] = torch.tensor(batch["index"])
        return batch


class DetectionBatches:
    """Lists, as torchvision's detectors take them: they resize and pad by themselves.

    Gives `image`, a list of float32 [3, H, W], `targets`, a list of dicts with what the items have of `boxes`,
    `labels`, `masks`, `iscrowd` and `area`, and `index` int64 [B].
    """

    def __call__(self, items: Sequence[Item]) -> Batch:
        return {
            "image": [item["image"] for item in items],
            "targets": [{key: item[key] for key in _TARGET_KEYS if key in item} for item in items],
            "index": torch.tensor([item["index"] for item in items]),
        }


class AnyBatches:
    """Batches for segmentation if the items have `semantic`, else for detection.

    Args:
        pad_to: as in `SegmentationBatches`.
    """

    def __init__(self, pad_to: int = 1) -> None:
        self._segmentation = SegmentationBatches(pad_to)
        self._detection = DetectionBatches()

    def __call__(self, items: Sequence[Item]) -> Batch:
        return self._segmentation(items) if "semantic" in items[0] else self._detection(items)


def make_collate(kind: str | Callable[[Sequence[Item]], Batch], pad_to: int) -> Callable[[Sequence[Item]], Batch]:
    """ "segmentation", "detection", "auto" (what the items are for), or a function of one's own.

    Raises:
        ValueError: no such kind.
    """
    if callable(kind):
        return kind
    kinds: dict[str, Callable[[], Callable[[Sequence[Item]], Batch]]] = {
        "auto": lambda: AnyBatches(pad_to),
        "segmentation": lambda: SegmentationBatches(pad_to),
        "detection": DetectionBatches,
    }
    if kind not in kinds:
        raise ValueError(f"collate must be one of {', '.join(kinds)}, got {kind!r}.{did_you_mean(str(kind), kinds)}")
    return kinds[kind]()


def _round_up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def _padded(values: Tensor, height: int, width: int, fill: float = 0) -> Tensor:
    """Values [..., h, w] to [..., height, width], with `fill` at the right and at the bottom."""
    below, right = height - values.shape[-2], width - values.shape[-1]
    if not below and not right:
        return values
    return torch.nn.functional.pad(values, (0, right, 0, below), value=fill)
