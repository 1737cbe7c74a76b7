"""Pascal VOC's format: `JPEGImages`, `Annotations` and `SegmentationClass`, and lists of names in `ImageSets`.

torchvision's readers know VOC's own years and lists only; here the folders may be anybody's.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from syncbn.training.data.faults import OBJECT, BrokenItem, Fault
from syncbn.training.data.files import (
    BACKGROUND,
    DetectionFiles,
    Object,
    SegmentationFiles,
    find_class_names,
    read_lines,
    require_folder,
)
from syncbn.training.data.reading import IMAGE_SUFFIXES, Size
from syncbn.training.errors import UserError, did_you_mean

VOC_CLASSES = (
    BACKGROUND,
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)

_SIDES = ("xmin", "ymin", "xmax", "ymax")


class VOCDetection(DetectionFiles):
    """Objects of `Annotations/*.xml`.

    VOC counts pixels from 1 and includes the last one; items count from 0 and exclude it, so that a box from 1 to
    the image's width is the whole width. Objects marked `difficult` have iscrowd=1: VOC trains on none of them and
    its evaluation passes them over.

    Args:
        root: the folder with `JPEGImages` in it, or the one with `VOCdevkit/VOC<year>` in it.
        image_set: which list of `ImageSets/Main`, such as "train".
        year: which of VOCdevkit's folders.
        classes: names, the background first, or a file with one name a line; None: those of `classes.txt` in the
            folder, or VOC's own 21.
        crowd: "drop" or "keep" difficult objects.
        one_based: False if boxes count from 0 and exclude the last pixel, as some tools write them.
        orientation: whether annotations are for the stored or the upright picture; see
            `syncbn.training.data.reading`.

    Raises:
        UserError: a folder, the list or the file of classes is missing.
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        root: str | Path,
        image_set: str,
        year: str | int = "2012",
        classes: Sequence[str] | str | None = None,
        crowd: str = "keep",
        one_based: bool = True,
        orientation: str = "auto",
    ) -> None:
        super().__init__(crowd, masks=False, orientation=orientation)
        folder = _voc_folder(root, year)
        names = _names(folder, "Main", image_set)
        self.images = _images(folder, names)
        annotations = require_folder("root", folder / "Annotations")
        self.annotations = [str(annotations / f"{name}.xml") for name in names]
        self.class_names = tuple(find_class_names(classes, folder) or VOC_CLASSES)
        self._number = {name: i for i, name in enumerate(self.class_names) if i > 0}
        self._first_pixel = 1 if one_based else 0

    def __len__(self) -> int:
        return len(self.images)

    def name(self, index: int) -> str:
        return self.images[index]

    def _annotation_file(self, index: int) -> str:
        return self.annotations[index]

    def _objects(self, index: int) -> tuple[Size | None, list[Object], list[Fault]]:
        file = self.annotations[index]
        annotation = read_annotation(file)
        good, bad = [], []
        for position, entry in enumerate(annotation["object"]):
            found = self._object(entry, f"object[{position}]")
            if isinstance(found, str):
                bad.append(Fault(index, file, found, OBJECT))
            else:
                good.append(found)
        return _stated_size(annotation), good, bad

    def _object(self, entry: Any, where: str) -> Object | str:
        """The object, or why it is none."""
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str):
            return f"{where} has no name"
        if name not in self._number:
            return f"{where}: unknown class {name!r}.{did_you_mean(name, self._number)}"
        sides = entry.get("bndbox")
        numbers = [_number(sides.get(side)) for side in _SIDES] if isinstance(sides, dict) else []
        if not numbers or any(math.isnan(number) for number in numbers):
            return f"{where} ({name}) has no bndbox of four numbers"
        x1, y1, x2, y2 = numbers
        box = (x1 - self._first_pixel, y1 - self._first_pixel, x2, y2)
        return Object(box, self._number[name], int(entry.get("difficult") == "1"), None, None, f"{where} ({name})")


class VOCSegmentation(SegmentationFiles):
    """Masks of `SegmentationClass/*.png`; VOC's borders between objects, value 255, are ignored.

    Args:
        root, year, classes: as in `VOCDetection`.
        image_set: which list of `ImageSets/Segmentation`, such as "train".
        orientation: as in `VOCDetection`.

    Raises:
        UserError: a folder, the list or the file of classes is missing.
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        root: str | Path,
        image_set: str,
        year: str | int = "2012",
        classes: Sequence[str] | str | None = None,
        orientation: str = "auto",
    ) -> None:
        folder = _voc_folder(root, year)
        names = _names(folder, "Segmentation", image_set)
        masks = require_folder("root", folder / "SegmentationClass")
        super().__init__(
            _images(folder, names),
            [str(masks / f"{name}.png") for name in names],
            find_class_names(classes, folder) or VOC_CLASSES,
            orientation=orientation,
        )


def read_annotation(file: str | Path) -> dict[str, Any]:
    """The content of an `<annotation>`, as torchvision's `VOCDetection` gives it; "object" is always a list.

    Raises:
        BrokenItem: there is no such file, or it is no annotation.
    """
    from xml.etree.ElementTree import ParseError

    from torchvision.datasets import VOCDetection as Reader
    from torchvision.datasets.voc import ET_parse  # defusedxml's where that is installed

    try:
        node = ET_parse(str(file)).getroot()
    except FileNotFoundError as error:
        raise BrokenItem(str(file), "there is no such file") from error
    except (ParseError, OSError, ValueError) as error:
        raise BrokenItem(str(file), f"is no xml: {error}") from error
    if node is None or node.tag != "annotation":
        raise BrokenItem(str(file), "is no VOC annotation: it has no <annotation>")
    content = Reader.parse_voc_xml(node).get("annotation")
    content = dict(content) if isinstance(content, dict) else {}
    # Without any object, torchvision has an empty list or none at all.
    objects = content.get("object", [])
    return content | {"object": objects if isinstance(objects, list) else [objects]}


def _stated_size(annotation: dict[str, Any]) -> Size | None:
    size = annotation.get("size")
    if not isinstance(size, dict):
        return None
    width, height = _number(size.get("width")), _number(size.get("height"))
    # Some tools write zeros where they did not know.
    return (int(width), int(height)) if width > 0 and height > 0 else None


def _number(text: Any) -> float:
    """The number, or NaN."""
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _voc_folder(root: str | Path, year: str | int) -> Path:
    base = require_folder("root", root)
    inside = base / "VOCdevkit" / f"VOC{year}"
    for folder in (base, inside, base / f"VOC{year}"):
        if (folder / "ImageSets").is_dir():
            return folder
    raise UserError(f"root: there is no ImageSets in {base} nor in {inside}")


def _names(folder: Path, kind: str, image_set: str) -> list[str]:
    lists = folder / "ImageSets" / kind
    if not (lists / f"{image_set}.txt").is_file():
        there = ", ".join(sorted(file.stem for file in lists.glob("*.txt"))[:10]) or "none"
        raise UserError(f"image_set: there is no file {lists / f'{image_set}.txt'}; there are: {there}")
    names = read_lines("image_set", lists / f"{image_set}.txt")
    # Lists for one class have a second column.
    if all(line.rpartition(" ")[2] in ("-1", "0", "1") and " " in line for line in names):
        names = [line.rpartition(" ")[0].strip() for line in names]
    if not names:
        raise UserError(f"image_set: {lists / f'{image_set}.txt'} is empty")
    return names


def _images(folder: Path, names: Sequence[str]) -> list[str]:
    """The image of each name: a .jpg, or another kind where there is no .jpg."""
    images = require_folder("root", folder / "JPEGImages")
    others = {file.stem: file for file in sorted(images.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES - {".jpg"}}
    jpgs = {file.stem for file in images.glob("*.jpg")}
    return [str(images / f"{name}.jpg" if name in jpgs or name not in others else others[name]) for name in names]
