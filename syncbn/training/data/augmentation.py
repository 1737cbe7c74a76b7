"""Augmentation as in torchvision's reference recipes, from torchvision's transforms v2.

Each function makes a transform of whole items: what happens to the image happens to boxes and masks. A transform draws
its random numbers from torch's generator, which the DataModule sets for each (seed, epoch, item).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

Item = dict[str, Any]


def unchanged() -> v2.Transform:
    """Float images in 0 to 1, nothing else."""
    return v2.Compose([*_as_floats()])


def segmentation_training(
    base_size: int = 520,
    crop_size: int | Sequence[int] = 480,
    scale: Sequence[float] = (0.5, 2.0),
    flip: float = 0.5,
    distort: float = 0.0,
) -> v2.Transform:
    """Random resize, flip and crop.

    An image smaller than the crop stays whole; the batch pads it, and knows what is padding.

    Args:
        base_size: the shorter side becomes this, times a factor drawn from `scale`.
        crop_size: height and width, or one number for both.
        scale: least and greatest factor.
        flip: probability of mirroring left and right.
        distort: probability of a photometric distortion (brightness, contrast, saturation, hue).

    Raises:
        ValueError: a value is outside its range.
    """
    _require_range("scale", scale)
    _require_at_least_1(base_size=base_size)
    return v2.Compose(
        [
            v2.RandomResize(int(scale[0] * base_size), max(int(scale[1] * base_size), int(scale[0] * base_size) + 1)),
            *_flip_and_distort(flip, distort),
            CropAtMost(crop_size),
            *_as_floats(),
        ]
    )


def segmentation_validation(size: int | None = None) -> v2.Transform:
    """The whole image, its shorter side resized to `size` if one is given."""
    return v2.Compose([*([] if size is None else [v2.Resize(size)]), *_as_floats()])


def detection_training(flip: float = 0.5, distort: float = 0.0) -> v2.Transform:
    """Flip, and optionally a photometric distortion. Crowds and boxes without area are left out."""
    return v2.Compose([*_flip_and_distort(flip, distort), DropUnusable(), *_as_floats()])


def detection_multiscale(
    shorter_sides: Sequence[int] = (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800),
    longest_side: int = 1333,
    flip: float = 0.5,
    distort: float = 0.0,
) -> v2.Transform:
    """The shorter side becomes one of `shorter_sides`, but the longer one at most `longest_side`; flip."""
    return v2.Compose(
        [
            v2.RandomShortestSize(list(shorter_sides), longest_side),
            *_flip_and_distort(flip, distort),
            DropUnusable(),
            *_as_floats(),
        ]
    )


def detection_scale_jitter(
    size: Sequence[int] = (1024, 1024),
    scale: Sequence[float] = (0.1, 2.0),
    flip: float = 0.5,
    distort: float = 0.0,
) -> v2.Transform:
    """Large-scale jitter: the image is fitted into `size`, times a factor drawn from `scale`, and cropped to `size`."""
    _require_range("scale", scale)
    return v2.Compose(
        [
            _ScaleJitter((size[0], size[1]), (scale[0], scale[1])),
            CropAtMost(size),
            *_flip_and_distort(flip, distort),
            DropUnusable(),
            *_as_floats(),
        ]
    )


def detection_validation() -> v2.Transform:
    """The image as it is: detectors resize by themselves, and give their boxes in the image's own pixels."""
    return unchanged()


class _ScaleJitter(v2.ScaleJitter):
    """torchvision's, which makes nothing of a very long and thin image at a small scale."""

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = super().make_params(flat_inputs)["size"]
        return {"size": (max(height, 1), max(width, 1))}


class CropAtMost(v2.Transform):
    """A random crop of at most this size; a smaller image keeps its side.

    torchvision's RandomCrop pads a smaller image, after which nothing tells padding from image.
    """

    def __init__(self, size: int | Sequence[int]) -> None:
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else (size[0], size[1])
        _require_at_least_1(crop_size=min(self.size))

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        new_height, new_width = min(height, self.size[0]), min(width, self.size[1])
        top = int(torch.randint(0, height - new_height + 1, ()))
        left = int(torch.randint(0, width - new_width + 1, ()))
        return {"top": top, "left": left, "height": new_height, "width": new_width}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        return self._call_kernel(F.crop, inpt, **params)


class DropUnusable(torch.nn.Module):
    """Leaves out the instances of an item that a detector cannot be trained with: crowds, and what is cropped away.

    torchvision's SanitizeBoundingBoxes knows of boxes and labels; an item's masks go with them here. `iscrowd` and
    `area` serve evaluation and are left out.

    Args:
        min_size: smallest width and height of a box that stays, in pixels.
    """

    def __init__(self, min_size: float = 1.0) -> None:
        super().__init__()
        self.min_size = min_size

    def forward(self, item: Item) -> Item:
        if "boxes" not in item:
            return item
        boxes, kept = F.sanitize_bounding_boxes(item["boxes"], min_size=self.min_size, min_area=self.min_size**2)
        crowds = item.get("iscrowd")
        if crowds is not None:
            boxes, kept = boxes[crowds[kept] == 0], kept & (crowds == 0)
        out = {key: value for key, value in item.items() if key not in ("iscrowd", "area")}
        out["boxes"] = tv_tensors.wrap(boxes, like=item["boxes"])
        for key in ("labels", "masks"):
            if key in item:
                out[key] = tv_tensors.wrap(item[key][kept], like=item[key])
        return out


class AsTensors(torch.nn.Module):
    """The item's own dict with plain tensors, boxes inside the image."""

    def forward(self, item: Item) -> Item:
        return {key: value.as_subclass(Tensor) if isinstance(value, Tensor) else value for key, value in item.items()}


def typed(item: Mapping[str, Any]) -> Item:
    """The item with the types of torchvision's, by which transforms know an image from a mask. Copies nothing."""
    out = dict(item)
    for key, value in item.items():
        if not isinstance(value, Tensor) or isinstance(value, tv_tensors.TVTensor):
            continue
        if key == "image":
            out[key] = tv_tensors.Image(value)
        elif key in ("semantic", "masks"):
            out[key] = tv_tensors.Mask(value)
        elif key == "boxes":
            size = item["image"].shape[-2:]
            out[key] = tv_tensors.BoundingBoxes(value, format="XYXY", canvas_size=tuple(size))
    return out


def _flip_and_distort(flip: float, distort: float) -> list[v2.Transform]:
    for name, probability in {"flip": flip, "distort": distort}.items():
        if not 0 <= probability <= 1:
            raise ValueError(f"{name} must be a probability from 0 to 1, got {probability}")
    chosen: list[v2.Transform] = [v2.RandomHorizontalFlip(flip)] if flip else []
    return [*chosen, *([v2.RandomPhotometricDistort(p=distort)] if distort else [])]


def _as_floats() -> list[torch.nn.Module]:
    return [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), AsTensors()]


def _require_range(name: str, values: Sequence[float]) -> None:
    if len(values) != 2 or not 0 < values[0] <= values[1]:
        raise ValueError(f"{name} must be [least, greatest] with 0 < least <= greatest, got {list(values)}")


def _require_at_least_1(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1 pixel, got {size}")
