"""What the datasets of files have in common: segmentation from pairs of files, detection from lists of objects.

Formats differ in where files lie and how annotations are written; what makes an item good is the same for all and
stands here. See `syncbn.training.data.faults` for the protocol.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from syncbn.training.data.faults import ITEM, OBJECT, BrokenItem, Fault, OnFault
from syncbn.training.data.reading import (
    Size,
    read_header,
    read_image,
    read_numbers,
    require_numbers,
    require_orientation,
    size_of,
)
from syncbn.training.errors import UserError

IGNORED = 255
BACKGROUND = "background"

_NO_CLASS = -1
_OVERHANG = 1.0  # pixels by which rounding may carry a box beyond its image
# Pixels of a side; less would be nothing in float32, at a coordinate of thousands or after resizing, and torchvision's
# detectors stop at a box of no width.
_NARROWEST = 0.01
_CROWD = ("keep", "drop")


class FileDataset(Dataset[dict[str, Any]], ABC):
    """Items that are read from files, and what is wrong with them.

    Attributes:
        class_names: one for each class number.
        bad_objects: "raise": an item with a faulty object raises `BrokenItem`; "skip": it comes without it.
    """

    class_names: tuple[str, ...] = ()
    bad_objects: OnFault = "raise"

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str:
        """The item's image file."""

    @abstractmethod
    def _look(self, index: int) -> list[Fault]:
        """Faulty objects, without decoding; raises BrokenItem where the whole item is at fault."""

    @abstractmethod
    def _load(self, index: int) -> tuple[dict[str, Any], list[Fault]]:
        """The item without its faulty objects, and these."""

    def faults(self, index: int) -> list[Fault]:
        """What is wrong with this item, as far as annotations and headers tell."""
        self._require(index)
        try:
            found = self._look(index)
        except BrokenItem as broken:
            found = [Fault(index, broken.file, broken.why, ITEM)]
        return [*self._file_faults(), *found] if index == 0 else found

    def check(self, index: int) -> str | None:
        """Why this item cannot be used, or None; the file comes first."""
        return next((str(fault) for fault in self.faults(index) if fault.kind == ITEM), None)

    def read(self, index: int) -> dict[str, Any]:
        """The item without its faulty objects.

        Raises:
            BrokenItem: it cannot be used at all.
        """
        self._require(index)
        return self._load(index)[0]

    def __getitem__(self, index: int) -> dict[str, Any]:
        self._require(index)
        item, bad = self._load(index)
        if bad and self.bad_objects == "raise":
            raise BrokenItem(bad[0].file, bad[0].why)
        return item

    def _file_faults(self) -> Iterable[Fault]:
        """Faulty objects that belong to no item; told with the first one, so that a survey meets them once."""
        return ()

    def _require(self, index: int) -> None:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")


class SegmentationFiles(FileDataset):
    """Pairs of an image and a mask whose pixel values stand for classes.

    An item is {image: uint8 [3, H, W], semantic: int64 [H, W], index}. Pixel value 255 is ignored unless it stands
    for a class.

    Args:
        images, masks: the files, in the same order; they need not exist yet.
        class_names: one for each class number.
        classes: from pixel value to class number or 255; None: they are the same.
        orientation: "auto", "stored" or "exif"; see `syncbn.training.data.reading`.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        images: Sequence[str],
        masks: Sequence[str],
        class_names: Sequence[str],
        classes: Mapping[int, int] | None = None,
        orientation: str = "auto",
    ) -> None:
        require_orientation(orientation)
        require_room(class_names)
        self.images = list(images)
        self.masks = list(masks)
        self.class_names = tuple(str(name) for name in class_names)
        self.orientation = orientation
        pairs = dict(enumerate(range(len(class_names)))) if classes is None else dict(classes)
        # Indexed by pixel value.
        self._class_of = np.full(2**16, _NO_CLASS, np.int64)
        self._class_of[IGNORED] = IGNORED
        for value, number in pairs.items():
            self._class_of[value] = number

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return self.images[index]

    def _look(self, index: int) -> list[Fault]:
        mask = read_header(self.masks[index])
        require_numbers(self.masks[index], mask.mode)
        self._fit(index, mask.size)
        return []

    def _load(self, index: int) -> tuple[dict[str, Any], list[Fault]]:
        from torchvision import tv_tensors

        numbers = read_numbers(self.masks[index])
        height, width = numbers.shape
        self._fit(index, (width, height))
        item = {
            "image": read_image(self.images[index], (width, height), self.orientation),
            "semantic": tv_tensors.Mask(torch.from_numpy(self._classes(self.masks[index], numbers))),
            "index": int(index),
        }
        return item, []

    def _fit(self, index: int, size: Size) -> None:
        image = self.images[index]
        header = read_header(image)
        try:
            size_of(image, header, size, self.orientation)
        except BrokenItem as error:
            # The mask is the one that is told: it was made for an image, not the other way round.
            raise BrokenItem(
                self.masks[index],
                f"is {size[0]}x{size[1]} pixels, but its image {image} is {header.size[0]}x{header.size[1]}",
            ) from error

    def _classes(self, mask: str, numbers: NDArray[Any]) -> NDArray[np.int64]:
        numbers = numbers.astype(np.int64)
        if numbers.min() >= 0 and numbers.max() < len(self._class_of):
            classes = self._class_of[numbers]
            if classes.min() != _NO_CLASS:
                return classes
        known = np.flatnonzero(self._class_of != _NO_CLASS)
        strange = sorted(set(np.unique(numbers).tolist()) - set(known.tolist()))
        shown = ", ".join(map(str, strange[:5])) + (", ..." if len(strange) > 5 else "")
        raise BrokenItem(mask, f"holds {shown}; its classes are {_ranges(known.tolist())}")


class Object(NamedTuple):
    """One annotated object.

    Attributes:
        box: x1, y1, x2, y2 in pixels, x2 and y2 exclusive; None where nobody needs it.
        label: its class number.
        iscrowd: 1: not a single thing, or not for training and evaluation.
        area: in pixels; None: the box's.
        shape: its outline as the format writes it, for `DetectionFiles._mask`.
        where: how to find it in its file.
    """

    box: tuple[float, float, float, float] | None
    label: int
    iscrowd: int
    area: float | None
    shape: Any
    where: str


class DetectionFiles(FileDataset):
    """Images with boxes of objects.

    An item is {image: uint8 [3, H, W], boxes: XYXY float32 [n, 4], labels: int64 [n], iscrowd: int64 [n],
    area: float32 [n], index}, with `masks` bool [n, H, W] if asked for.

    Args:
        crowd: "drop" leaves out objects with iscrowd=1, as training should; "keep" has them, as COCO's metric wants.
        masks: items have `masks`.
        orientation: "auto", "stored" or "exif"; see `syncbn.training.data.reading`.

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(self, crowd: str, masks: bool, orientation: str) -> None:
        require_choice("crowd", crowd, _CROWD)
        require_orientation(orientation)
        self.crowd = crowd
        self.masks = masks
        self.orientation = orientation

    @abstractmethod
    def _objects(self, index: int) -> tuple[Size | None, list[Object], list[Fault]]:
        """The image's size if the annotation says it, its objects, and those that are no objects at all."""

    @abstractmethod
    def _annotation_file(self, index: int) -> str:
        """Where the item's objects stand."""

    def _mask(self, thing: Object, size: Size) -> NDArray[np.bool_]:
        """The object's pixels [H, W]; raises ValueError if its outline cannot be drawn."""
        raise NotImplementedError(f"{type(self).__name__} has no masks of single objects")

    def _shape_fault(self, thing: Object, size: Size) -> str | None:
        """Why the outline cannot be used, as far as that shows without drawing it."""
        return None

    def _look(self, index: int) -> list[Fault]:
        stated, objects, bad = self._objects(index)
        file = self.name(index)
        size = size_of(file, read_header(file), stated, self.orientation)
        return bad + self._sift(index, objects, size)[1]

    def _load(self, index: int) -> tuple[dict[str, Any], list[Fault]]:
        from torchvision import tv_tensors

        stated, objects, bad = self._objects(index)
        image = read_image(self.name(index), stated, self.orientation)
        height, width = image.shape[-2:]
        good, sifted = self._sift(index, objects, (width, height))
        bad = bad + sifted
        if self.crowd == "drop":
            good = [thing for thing in good if not thing.iscrowd]
        item: dict[str, Any] = {"image": image}
        if self.masks:
            good, masks, undrawn = self._draw(index, good, (width, height))
            bad = bad + undrawn
            item["masks"] = tv_tensors.Mask(torch.from_numpy(masks))
        boxes = torch.tensor([thing.box for thing in good], dtype=torch.float32).reshape(-1, 4)
        areas = [_area(thing) if thing.area is None else thing.area for thing in good]
        item |= {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
            "labels": torch.tensor([thing.label for thing in good], dtype=torch.int64),
            "iscrowd": torch.tensor([thing.iscrowd for thing in good], dtype=torch.int64),
            "area": torch.tensor(areas, dtype=torch.float32),
            "index": int(index),
        }
        return item, bad

    def _sift(self, index: int, objects: list[Object], size: Size) -> tuple[list[Object], list[Fault]]:
        """The usable objects, their boxes clamped to the image, and the faults of the others."""
        good, bad = [], []
        for thing in objects:
            assert thing.box is not None
            why = box_fault(thing.box, size) or (self._shape_fault(thing, size) if self.masks else None)
            if why is None:
                good.append(thing._replace(box=_clamped(thing.box, size)))
            else:
                bad.append(self._bad(index, thing, why))
        return good, bad

    def _draw(self, index: int, objects: list[Object], size: Size) -> tuple[list[Object], NDArray[Any], list[Fault]]:
        drawn, masks, bad = [], [], []
        for thing in objects:
            try:
                masks.append(self._mask(thing, size))
                drawn.append(thing)
            except ValueError as error:
                bad.append(self._bad(index, thing, str(error)))
        width, height = size
        return drawn, np.stack(masks) if masks else np.zeros((0, height, width), np.bool_), bad

    def _bad(self, index: int, thing: Object, why: str) -> Fault:
        return Fault(index, self._annotation_file(index), f"{thing.where}: {why} ({self.name(index)})", OBJECT)


def box_fault(box: Sequence[float], size: Size) -> str | None:
    """Why a box x1, y1, x2, y2 cannot be used in an image of this width and height, or None."""
    x1, y1, x2, y2 = box
    width, height = size
    shown = ", ".join(f"{value:g}" for value in box)
    if not all(math.isfinite(value) for value in box):
        return f"box [{shown}] is not finite"
    if x2 - x1 < _NARROWEST or y2 - y1 < _NARROWEST:
        return f"box [{shown}] has no area"
    if min(x1, y1) < -_OVERHANG or x2 > width + _OVERHANG or y2 > height + _OVERHANG:
        return f"box [{shown}] is outside its image of {width}x{height} pixels"
    # It may lie in the overhang alone.
    x1, y1, x2, y2 = _clamped((x1, y1, x2, y2), size)
    inside = x2 - x1 >= _NARROWEST and y2 - y1 >= _NARROWEST
    return None if inside else f"box [{shown}] is outside its image of {width}x{height} pixels"


def _clamped(box: tuple[float, float, float, float], size: Size) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box
    width, height = size
    return max(x1, 0.0), max(y1, 0.0), min(x2, float(width)), min(y2, float(height))


def _area(thing: Object) -> float:
    assert thing.box is not None
    x1, y1, x2, y2 = thing.box
    return (x2 - x1) * (y2 - y1)


def _ranges(numbers: Sequence[int]) -> str:
    """ "0 to 3, 7, 255" for sorted numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs)


def require_choice(key: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{key} must be one of {', '.join(choices)}, got {value!r}")


def require_room(class_names: Sequence[str]) -> None:
    """Raises:
    ValueError: a class would have the number of ignored pixels.
    """
    if len(class_names) > IGNORED:
        raise ValueError(
            f"segmentation takes at most {IGNORED} classes, since {IGNORED} is ignored; got {len(class_names)}"
        )


def require_folder(key: str, path: str | Path) -> Path:
    """The folder.

    Raises:
        UserError: there is none.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise UserError(f"{key}: there is no folder {folder}")
    return folder


def require_file(key: str, path: str | Path) -> Path:
    """The file.

    Raises:
        UserError: there is none.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{key}: there is no file {file}")
    return file


def read_lines(key: str, path: str | Path) -> list[str]:
    """A text file's lines that are not empty.

    Raises:
        UserError: there is no such file, or it is no text.
    """
    file = require_file(key, path)
    try:
        return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {file} cannot be read: {error}") from error


def find_class_names(classes: Sequence[str] | str | None, *folders: Path) -> list[str] | None:
    """The names given, or those of the file given, or of the first of these folders that has a `classes.txt`.

    Raises:
        UserError: there is no such file, or the names are fewer than two or not all different.
    """
    if isinstance(classes, str):
        names = read_lines("classes", classes)
    elif classes is not None:
        names = [str(name) for name in classes]
    else:
        found = next((file for folder in folders if (file := folder / "classes.txt").is_file()), None)
        if found is None:
            return None
        names = read_lines("classes", found)
    if len(names) < 2:
        raise UserError(f"classes: at least two names are needed, the background first, got {names}")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"classes: {twice!r} is named twice")
    return names
