"""COCO's format: a folder of images and an instances json (https://cocodataset.org/#format-data).

The file is read once, checked, and kept as one array of bytes: Python objects for a million annotations take
gigabytes, and every loader process would get a copy of its own as their reference counts change. Outlines are drawn
by pycocotools.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from syncbn.training.data.faults import OBJECT, Fault
from syncbn.training.data.files import (
    BACKGROUND,
    IGNORED,
    DetectionFiles,
    FileDataset,
    Object,
    require_choice,
    require_file,
    require_folder,
    require_room,
)
from syncbn.training.data.reading import Size, read_header, read_image, require_orientation, size_of
from syncbn.training.errors import UserError, did_you_mean

# torchvision's name for the class numbers that COCO's category ids leave out.
_NO_NAME = "N/A"
_CATEGORY_IDS = ("contiguous", "file")
_EMPTY = ("keep", "drop")
_MOST_GROUPS = 7  # of five bits: run lengths have 32
_SHORTEST_POLYGON = 6  # numbers: three corners


class CocoDetection(DetectionFiles):
    """Objects of an instances json.

    Args:
        root: the folder that the other paths start from.
        images: folder of the images.
        annotations: the instances json.
        classes: names of the categories to keep, in the order of their class numbers; None: all, by their ids.
        category_ids: "contiguous" numbers classes 1, 2, 3, ...; "file" keeps the file's ids, so that models fit that
            were trained so, such as torchvision's with 91 classes; ids that are left out are called "N/A".
        crowd: "drop" or "keep" objects with iscrowd=1.
        empty: "drop" leaves out images without any object to train on, as torchvision's reference recipe does in
            training; "keep" has them.
        masks: items have `masks`.
        orientation: whether annotations are for the stored or the upright picture; see
            `syncbn.training.data.reading`.

    Raises:
        UserError: a folder or file is missing, or the json is none of this format.
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        root: str | Path,
        images: str,
        annotations: str,
        classes: Sequence[str] | None = None,
        category_ids: str = "contiguous",
        crowd: str = "keep",
        empty: str = "keep",
        masks: bool = False,
        orientation: str = "auto",
    ) -> None:
        super().__init__(crowd, masks, orientation)
        require_choice("empty", empty, _EMPTY)
        keep = self._trains if empty == "drop" else None
        self._instances = _Instances(root, images, annotations, classes, category_ids, masks, keep, _why_no_box)
        self.class_names = self._instances.class_names

    def __len__(self) -> int:
        return len(self._instances)

    def name(self, index: int) -> str:
        return self._instances.image_file(index)

    def _trains(self, annotations: list[dict[str, Any]]) -> bool:
        return any(
            _why_no_box(annotation) is None and not (self.crowd == "drop" and annotation.get("iscrowd"))
            for annotation in annotations
        )

    def _file_faults(self) -> list[Fault]:
        return self._instances.loose

    def _annotation_file(self, index: int) -> str:
        return self._instances.file

    def _objects(self, index: int) -> tuple[Size | None, list[Object], list[Fault]]:
        size, annotations = self._instances[index]
        good, bad = [], []
        for annotation in annotations:
            where = _where(annotation)
            label = self._instances.label(annotation)
            box = _box(annotation)
            if label is None:
                bad.append(Fault(index, self._instances.file, _unknown_class(annotation), OBJECT))
            elif box is None:
                why = f"{where}: has no bbox of four numbers ({self.name(index)})"
                bad.append(Fault(index, self._instances.file, why, OBJECT))
            else:
                area = annotation.get("area")
                good.append(
                    Object(
                        box,
                        label,
                        int(bool(annotation.get("iscrowd", 0))),
                        float(area) if _is_number(area) else None,  # type: ignore[arg-type]
                        annotation.get("segmentation"),
                        where,
                    )
                )
        return size, good, bad

    def _shape_fault(self, thing: Object, size: Size) -> str | None:
        return outline_fault(thing.shape, size)

    def _mask(self, thing: Object, size: Size) -> NDArray[np.bool_]:
        return draw(thing.shape, size)


class CocoSegmentation(FileDataset):
    """Class of each pixel, from the outlines of an instances json.

    What no object covers is background; where objects of different classes overlap, the pixel is ignored. Regions
    with iscrowd=1 count as their class.

    Args:
        root, images, annotations, classes, category_ids, orientation: as in `CocoDetection`. `classes` with the names
            of Pascal VOC's categories gives what torchvision's segmentation models are trained on.
        empty: "drop" leaves out images whose objects have no more than `min_area` pixels together, "keep" has them.
        min_area: torchvision's reference recipe trains on images with more than 1000.

    Raises:
        UserError: a folder or file is missing, or the json is none of this format.
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        root: str | Path,
        images: str,
        annotations: str,
        classes: Sequence[str] | None = None,
        category_ids: str = "contiguous",
        empty: str = "keep",
        min_area: float = 0,
        orientation: str = "auto",
    ) -> None:
        require_orientation(orientation)
        require_choice("empty", empty, _EMPTY)
        if not _is_number(min_area) or min_area < 0:
            raise ValueError(f"min_area must be 0 or more pixels, got {min_area!r}")
        self.orientation = orientation
        self.min_area = min_area
        keep = self._trains if empty == "drop" else None
        self._instances = _Instances(
            root, images, annotations, classes, category_ids, True, keep, lambda annotation: None
        )
        require_room(self._instances.class_names)
        self.class_names = self._instances.class_names

    def __len__(self) -> int:
        return len(self._instances)

    def name(self, index: int) -> str:
        return self._instances.image_file(index)

    def _trains(self, annotations: list[dict[str, Any]]) -> bool:
        return sum(map(_area, annotations)) > self.min_area

    def _file_faults(self) -> list[Fault]:
        return self._instances.loose

    def _look(self, index: int) -> list[Fault]:
        stated, annotations = self._instances[index]
        file = self.name(index)
        return self._sift(index, annotations, size_of(file, read_header(file), stated, self.orientation))[1]

    def _load(self, index: int) -> tuple[dict[str, Any], list[Fault]]:
        from torchvision import tv_tensors

        stated, annotations = self._instances[index]
        image = read_image(self.name(index), stated, self.orientation)
        height, width = image.shape[-2:]
        good, bad = self._sift(index, annotations, (width, height))
        semantic = np.zeros((height, width), np.int64)
        for label, annotation in good:
            try:
                mask = draw(annotation["segmentation"], (width, height))
            except ValueError as error:
                bad.append(self._bad(index, annotation, str(error)))
                continue
            clash = mask & (semantic != 0) & (semantic != label)
            semantic[mask] = label
            semantic[clash] = IGNORED
        item = {"image": image, "semantic": tv_tensors.Mask(torch.from_numpy(semantic)), "index": int(index)}
        return item, bad

    def _sift(
        self, index: int, annotations: list[dict[str, Any]], size: Size
    ) -> tuple[list[tuple[int, dict[str, Any]]], list[Fault]]:
        good, bad = [], []
        for annotation in annotations:
            label = self._instances.label(annotation)
            why = outline_fault(annotation.get("segmentation"), size)
            if label is None:
                bad.append(Fault(index, self._instances.file, _unknown_class(annotation), OBJECT))
            elif why is not None:
                bad.append(self._bad(index, annotation, why))
            else:
                good.append((label, annotation))
        return good, bad

    def _bad(self, index: int, annotation: Mapping[str, Any], why: str) -> Fault:
        return Fault(index, self._instances.file, f"{_where(annotation)}: {why} ({self.name(index)})", OBJECT)


class _Instances:
    """An instances json: for each image its size and annotations, those of other classes than asked for left out.

    Args:
        root, images, annotations, classes, category_ids: as in `CocoDetection`.
        outlines: `segmentation` is needed.
        keep: whether an image with these annotations stays; None: all do.
        why_bad: what is told of an annotation that goes with its image, or None.

    Attributes:
        file: the json.
        class_names: by class number.
        loose: faulty annotations of no image in the dataset.
    """

    def __init__(
        self,
        root: str | Path,
        images: str,
        annotations: str,
        classes: Sequence[str] | None,
        category_ids: str,
        outlines: bool,
        keep: Callable[[list[dict[str, Any]]], bool] | None,
        why_bad: Callable[[Mapping[str, Any]], str | None],
    ) -> None:
        require_choice("category_ids", category_ids, _CATEGORY_IDS)
        base = require_folder("root", root)
        self._folder = require_folder("images", base / images)
        self.file = str(require_file("annotations", base / annotations))
        self.loose: list[Fault] = []
        content = _load_json(self.file)
        self._categories = _names_by_id(self.file, content["categories"])
        self._class_of, self.class_names = number_classes(self._categories, classes, category_ids)
        images_by_id = _images_by_id(self.file, content["images"])
        annotations_of = self._annotations_of(images_by_id, content["annotations"], outlines)
        if keep is not None:
            images_by_id = self._kept(images_by_id, annotations_of, keep, why_bad)
        texts = [json.dumps(annotations_of[key], separators=(",", ":")).encode() for key in images_by_id]
        self._bytes = np.frombuffer(b"".join(texts), np.uint8)
        self._ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
        self._files = np.array([image["file_name"] for image in images_by_id.values()])
        self._sizes = np.array([_stated_size(image) or (0, 0) for image in images_by_id.values()], np.int64)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> tuple[Size | None, list[dict[str, Any]]]:
        start, end = self._ends[index], self._ends[index + 1]
        width, height = (int(side) for side in self._sizes[index])
        return (width, height) if width else None, json.loads(self._bytes[start:end].tobytes())

    def image_file(self, index: int) -> str:
        return str(self._folder / str(self._files[index]))

    def label(self, annotation: Mapping[str, Any]) -> int | None:
        """The class number, or None if the file has no such category."""
        number = annotation.get("category_id")
        return self._class_of.get(number) if isinstance(number, int) else None

    def _annotations_of(
        self, images: Mapping[Any, Any], annotations: list[Any], outlines: bool
    ) -> dict[Any, list[dict[str, Any]]]:
        """Each image's annotations, by its id, with what is needed of them."""
        found: dict[Any, list[dict[str, Any]]] = {key: [] for key in images}
        needed = ("id", "category_id", "bbox", "area", "iscrowd", *(("segmentation",) if outlines else ()))
        for position, annotation in enumerate(annotations):
            where = f"annotations[{position}]"
            if not isinstance(annotation, dict):
                self._let_go(f"{where}: is no object but {_few(annotation)}")
            elif not _is_key(annotation.get("image_id")) or annotation["image_id"] not in images:
                why = f"there is no image with the id {_few(annotation.get('image_id'))}"
                self._let_go(f"{_where(annotation, where)}: {why}")
            elif self.label(annotation) is not None or not self._is_category(annotation):
                found[annotation["image_id"]].append({key: annotation[key] for key in needed if key in annotation})
        return found

    def _kept(
        self,
        images: Mapping[Any, dict[str, Any]],
        annotations_of: Mapping[Any, list[dict[str, Any]]],
        keep: Callable[[list[dict[str, Any]]], bool],
        why_bad: Callable[[Mapping[str, Any]], str | None],
    ) -> dict[Any, dict[str, Any]]:
        """The images that stay. One that goes takes its faulty objects along: they are told here, or nowhere."""
        kept = {}
        for key, image in images.items():
            if keep([annotation for annotation in annotations_of[key] if self.label(annotation) is not None]):
                kept[key] = image
                continue
            for annotation in annotations_of[key]:
                if self.label(annotation) is None:
                    self._let_go(_unknown_class(annotation))
                elif (why := why_bad(annotation)) is not None:
                    self._let_go(f"{_where(annotation)}: {why} ({self._folder / image['file_name']})")
        if not kept:
            raise UserError(f"annotations: {self.file} has no image with an object of these classes")
        return kept

    def _is_category(self, annotation: Mapping[str, Any]) -> bool:
        """Whether the file has the annotation's category, asked for or not."""
        number = annotation.get("category_id")
        return isinstance(number, int) and number in self._categories

    def _let_go(self, why: str) -> None:
        self.loose.append(Fault(0, self.file, why, OBJECT))


def number_classes(
    categories: Mapping[int, str], classes: Sequence[str] | None, category_ids: str
) -> tuple[dict[int, int], tuple[str, ...]]:
    """Class numbers by category id, and class names by class number, the background first.

    Raises:
        ValueError: there is no category of a name, or a category has the background's number.
    """
    if classes is None:
        chosen = sorted(categories)
    else:
        id_of = {name: number for number, name in categories.items()}
        for name in classes:
            if name not in id_of:
                raise ValueError(f"classes: there is no category {name!r}.{did_you_mean(name, id_of)}")
        chosen = [id_of[name] for name in classes]
    if category_ids == "contiguous":
        return (
            {number: i for i, number in enumerate(chosen, 1)},
            (BACKGROUND, *(categories[number] for number in chosen)),
        )
    if min(chosen) < 1:
        raise ValueError(
            f"category_ids=file: the category {categories[min(chosen)]!r} has the id {min(chosen)}, but 0 is the "
            "background's: use category_ids=contiguous"
        )
    names = [BACKGROUND, *(_NO_NAME for _ in range(max(chosen)))]
    for number in chosen:
        names[number] = categories[number]
    return {number: number for number in chosen}, tuple(names)


def outline_fault(outline: Any, size: Size) -> str | None:
    """Why COCO's `segmentation` cannot be drawn, as far as that shows without drawing it, or None."""
    width, height = size
    if isinstance(outline, dict):
        if outline.get("size") != [height, width]:
            return f"mask of size {_few(outline.get('size'))} in an image of [{height}, {width}]"
        counts = outline.get("counts")
        if isinstance(counts, str):
            counts = unpack_runs(counts)
        if not isinstance(counts, list) or not all(isinstance(n, int) and n >= 0 for n in counts):
            return "segmentation has no run lengths"
        covered = sum(counts)
        return None if covered == width * height else f"run lengths of {covered} pixels in an image of {width * height}"
    if not isinstance(outline, list) or not outline:
        return "has no segmentation"
    for polygon in outline:
        if not isinstance(polygon, list) or not all(map(_is_number, polygon)):
            return "has a polygon that is no list of numbers"
        if len(polygon) < _SHORTEST_POLYGON or len(polygon) % 2:
            return f"has a polygon of {len(polygon)} numbers; three corners take {_SHORTEST_POLYGON}"
    return None


def unpack_runs(packed: str) -> list[int] | None:
    """The run lengths in COCO's packed string, or None if it is none (pycocotools, common/maskApi.c, rleFrString).

    pycocotools unpacks them as well, but where they cover too few pixels its mask ends in unset memory.
    """
    characters = np.frombuffer(packed.encode(errors="replace"), np.uint8).astype(np.int64) - 48
    # A number is written in groups of five bits, the lowest first; a sixth bit says that more follow.
    ends = (characters & 0x20) == 0
    if not len(characters) or characters.min() < 0 or characters.max() > 0x3F or not ends[-1]:
        return None
    starts = np.flatnonzero(np.concatenate(([True], ends[:-1])))
    lengths = np.diff(starts, append=len(characters))
    if lengths.max() > _MOST_GROUPS:
        return None
    places = np.arange(len(characters)) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((characters & 0x1F) << 5 * places, starts)
    numbers -= np.where(characters[ends] & 0x10, 1 << 5 * lengths, 0)  # two's complement
    # From the fourth on, numbers are differences to the one before the last.
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers.tolist()


def draw(outline: Any, size: Size) -> NDArray[np.bool_]:
    """The pixels bool [H, W] of COCO's `segmentation`, which has no `outline_fault`.

    Raises:
        ValueError: it cannot be drawn.
    """
    from pycocotools import mask as coco_mask

    width, height = size
    try:
        if isinstance(outline, list):
            runs = coco_mask.merge(coco_mask.frPyObjects(outline, height, width))
        else:
            packed = isinstance(outline["counts"], str)
            runs = outline if packed else coco_mask.frPyObjects(outline, height, width)
        return coco_mask.decode(runs).astype(np.bool_)
    except Exception as error:  # run lengths that do not add up; which class it raises is pycocotools' affair
        raise ValueError(f"segmentation cannot be decoded: {error}") from error


def _load_json(file: str) -> dict[str, Any]:
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:  # of which JSON's and Unicode's own errors are subclasses
        raise UserError(f"annotations: {file} is no json: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise UserError(f"annotations: {file} is no instances json: it has no list {key!r}")
    return content


def _names_by_id(file: str, categories: list[Any]) -> dict[int, str]:
    names: dict[int, str] = {}
    for position, category in enumerate(categories):
        where = f"annotations: {file}: categories[{position}]"
        if not isinstance(category, dict) or not isinstance(category.get("id"), int) or "name" not in category:
            raise UserError(f"{where} has no id or no name: {_few(category)}")
        if category["id"] in names:
            raise UserError(f"{where} has the id {category['id']} of another one")
        names[category["id"]] = str(category["name"])
    if not names:
        raise UserError(f"annotations: {file} lists no categories")
    return names


def _images_by_id(file: str, images: list[Any]) -> dict[Any, dict[str, Any]]:
    by_id: dict[Any, dict[str, Any]] = {}
    for position, image in enumerate(images):
        where = f"annotations: {file}: images[{position}]"
        if not isinstance(image, dict) or not _is_key(image.get("id")) or not isinstance(image.get("file_name"), str):
            raise UserError(f"{where} has no id or no file_name: {_few(image)}")
        if image["id"] in by_id:
            raise UserError(f"{where} has the id {image['id']} of another one")
        by_id[image["id"]] = image
    if not by_id:
        raise UserError(f"annotations: {file} lists no images")
    # torchvision's order, whatever the file's.
    return dict(sorted(by_id.items(), key=lambda pair: (isinstance(pair[0], str), pair[0])))


def _stated_size(image: Mapping[str, Any]) -> Size | None:
    width, height = image.get("width"), image.get("height")
    if width is None or height is None or not (_is_number(width) and _is_number(height)) or min(width, height) < 1:
        return None
    return int(width), int(height)


def _box(annotation: Mapping[str, Any]) -> tuple[float, float, float, float] | None:
    """XYWH to XYXY."""
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(isinstance(v, int | float) for v in box):
        return None
    x, y, width, height = (float(value) for value in box)
    return x, y, x + width, y + height


def _why_no_box(annotation: Mapping[str, Any]) -> str | None:
    box = _box(annotation)
    if box is None:
        return "has no bbox of four numbers"
    return None if box[2] > box[0] and box[3] > box[1] else "its bbox has no area"


def _area(annotation: Mapping[str, Any]) -> float:
    area = annotation.get("area")
    if _is_number(area):
        return float(area)  # type: ignore[arg-type]
    box = _box(annotation)
    return 0.0 if box is None else max(box[2] - box[0], 0) * max(box[3] - box[1], 0)


def _unknown_class(annotation: Mapping[str, Any]) -> str:
    return f"{_where(annotation)}: there is no category with the id {_few(annotation.get('category_id'))}"


def _where(annotation: Mapping[str, Any], otherwise: str = "an annotation without id") -> str:
    return f"annotation {annotation['id']}" if "id" in annotation else otherwise


def _few(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_key(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)
