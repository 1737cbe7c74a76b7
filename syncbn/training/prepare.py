"""Writes the digit scenes as files, in the formats that people have: real data to try a pipeline on.

    python -m syncbn.training.prepare OUT                      # all formats, each in a folder of OUT
    python -m syncbn.training.prepare OUT --format coco --train 400 --val 100

Scenes are cropped to different sizes, never through a digit, so that a batch of them needs padding.
"""

import argparse
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from xml.etree import ElementTree

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from syncbn.training.data.digits import CLASS_NAMES, DigitScenes
from syncbn.training.errors import UserError, fail

SPLITS = ("train", "val")

# COCO's ids of categories have gaps, and so have these.
CATEGORY_IDS = {label: label if label <= 5 else label + 1 for label in range(1, len(CLASS_NAMES))}

_SMALLEST_SCENE, _SMALLEST_SIDE = 72, 48  # six digits need some room
_QUALITY = 95  # of JPEG
_INTERRUPTED_STATUS = 130  # what a shell reports after Ctrl-C
_PALETTE = [value for i in range(256) for value in ((i * 53) % 256, (i * 101) % 256, (i * 197) % 256)]


class Scenes:
    """Digit scenes as what is written of them: images of 8 bits, cropped.

    Args:
        split, size, seed, image_size: as in `DigitScenes`.
        smallest: the least height and width after cropping; `image_size` crops nothing.
    """

    def __init__(self, split: str, size: int, seed: int = 0, image_size: int = 96, smallest: int = 64) -> None:
        if size < 1:
            raise ValueError(f"{split} must be at least 1 scene, got {size}")
        if image_size < _SMALLEST_SCENE:
            raise ValueError(f"size must be at least {_SMALLEST_SCENE} pixels, got {image_size}")
        if not _SMALLEST_SIDE <= smallest <= image_size:
            raise ValueError(f"smallest must be from {_SMALLEST_SIDE} to the size of {image_size}, got {smallest}")
        digit_size = (28 * image_size // 96, 44 * image_size // 96)
        self.scenes = DigitScenes(split, size, seed=seed, image_size=image_size, digit_size=digit_size)
        self.split = split
        self.seed = seed
        self.smallest = smallest

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A scene as `DigitScenes` gives it, with `image` as uint8."""
        scene = self.scenes[index]
        rng = np.random.default_rng([self.seed, SPLITS.index(self.split), index, 1])
        height, width = scene["semantic"].shape
        left, right = self._cut(rng, width, scene["boxes"][:, 0].min(), scene["boxes"][:, 2].max())
        top, bottom = self._cut(rng, height, scene["boxes"][:, 1].min(), scene["boxes"][:, 3].max())
        return scene | {
            "image": (scene["image"][:, top:bottom, left:right] * 255).round().to(torch.uint8),
            "semantic": scene["semantic"][top:bottom, left:right],
            "masks": scene["masks"][:, top:bottom, left:right],
            "boxes": scene["boxes"] - torch.tensor([left, top, left, top], dtype=torch.float32),
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def _cut(self, rng: np.random.Generator, side: int, first: Tensor, last: Tensor) -> tuple[int, int]:
        """Where a side starts and ends, around all digits and no shorter than `smallest`."""
        length = int(rng.integers(self.smallest, side + 1))
        first_pixel, last_pixel = int(first), int(last)
        length = max(length, last_pixel - first_pixel)
        low, high = max(0, last_pixel - length), min(first_pixel, side - length)
        start = int(rng.integers(low, high + 1))
        return start, start + length


def write_coco(out: Path, split: str, scenes: Scenes) -> None:
    """COCO 2017's layout: `train2017/`, `val2017/` and `annotations/`; outlines as run lengths, since digits have
    holes."""
    from pycocotools import mask as coco_mask

    folder = _folder(out / f"{split}2017")
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes, 1):
        file = f"{number:012}.jpg"
        _image(scene).save(folder / file, quality=_QUALITY)
        height, width = scene["semantic"].shape
        images.append({"id": number, "file_name": file, "width": width, "height": height})
        for box, label, mask in zip(scene["boxes"].tolist(), scene["labels"].tolist(), scene["masks"], strict=True):
            runs = coco_mask.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": CATEGORY_IDS[label],
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": {"size": runs["size"], "counts": runs["counts"].decode()},
                }
            )
    content = {
        "info": {"description": "Scenes of handwritten digits"},
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": CATEGORY_IDS[label], "name": CLASS_NAMES[label], "supercategory": "digit"} for label in CATEGORY_IDS
        ],
    }
    (_folder(out / "annotations") / f"instances_{split}2017.json").write_text(json.dumps(content))


def write_folders(out: Path, split: str, scenes: Scenes) -> None:
    """`train/images`, `train/masks` and so on, and `classes.txt`; masks have one channel of class numbers."""
    images, masks = _folder(out / split / "images"), _folder(out / split / "masks")
    for number, scene in enumerate(scenes):
        _image(scene).save(images / f"{number:05}.png")
        Image.fromarray(_numbers(scene)).save(masks / f"{number:05}.png")
    _write_class_names(out)


def write_voc(out: Path, split: str, scenes: Scenes) -> None:
    """VOCdevkit's layout with `classes.txt`: xmls for detection, palette masks with a border of 255 around digits."""
    folder = out / "VOCdevkit" / "VOC2012"
    images, annotations = _folder(folder / "JPEGImages"), _folder(folder / "Annotations")
    masks = _folder(folder / "SegmentationClass")
    names = [f"{split}_{number:06}" for number in range(len(scenes))]
    for name, scene in zip(names, scenes, strict=True):
        _image(scene).save(images / f"{name}.jpg", quality=_QUALITY)
        numbers = _numbers(scene)
        mask = Image.fromarray(np.where(_border(numbers), np.uint8(255), numbers), mode="P")
        mask.putpalette(_PALETTE)
        mask.save(masks / f"{name}.png")
        _voc_annotation(name, scene).write(annotations / f"{name}.xml")
    for kind in ("Main", "Segmentation"):
        (_folder(folder / "ImageSets" / kind) / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    _write_class_names(folder)


def write_cityscapes(out: Path, split: str, scenes: Scenes) -> None:
    """Cityscapes' layout and its label ids, which are borrowed: the background is road, the digit 0 sidewalk, ..."""
    from torchvision.datasets import Cityscapes

    label_ids = np.array([label.id for label in Cityscapes.classes if 0 <= label.train_id < len(CLASS_NAMES)], np.uint8)
    for number, scene in enumerate(scenes):
        city = ("ada", "bern")[number % 2]
        name = f"{city}_{number:06}_000019"
        _image(scene).save(_folder(out / "leftImg8bit" / split / city) / f"{name}_leftImg8bit.png")
        label_mask = Image.fromarray(label_ids[_numbers(scene)])
        label_mask.save(_folder(out / "gtFine" / split / city) / f"{name}_gtFine_labelIds.png")


# What to write, and what to add to the command that trains on it.
FORMATS: dict[str, tuple[Callable[[Path, str, Scenes], None], str]] = {
    "coco": (write_coco, "experiment=digits-det data=coco"),
    "folders": (write_folders, "data=folders"),
    "voc": (write_voc, "data=voc"),
    "cityscapes": (write_cityscapes, "data=cityscapes"),
}


def prepare(
    out: Path,
    formats: Sequence[str] = tuple(FORMATS),
    train: int = 400,
    val: int = 100,
    size: int = 96,
    smallest: int = 64,
    seed: int = 0,
) -> list[Path]:
    """Writes each format into a folder of its name in `out`; returns these folders.

    Raises:
        UserError: one of them is there already and not empty, or cannot be written.
        ValueError: a number is outside its range.
    """
    sizes = dict(zip(SPLITS, (train, val), strict=True))
    scenes = {split: Scenes(split, number, seed, size, smallest) for split, number in sizes.items()}
    folders = [out / name for name in formats]
    for folder in folders:
        if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
            raise UserError(f"{folder} is there already and not empty; give another folder, or delete this one")
    try:
        for name, folder in zip(formats, folders, strict=True):
            with _written_whole(folder) as part:
                for split in SPLITS:
                    FORMATS[name][0](part, split, scenes[split])
    except OSError as error:
        raise UserError(f"cannot write: {error}") from error
    return folders


@contextmanager
def _written_whole(folder: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name at the end: half of a data set would train without a complaint."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    try:
        yield _folder(part)
        part.replace(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    formats = tuple(FORMATS) if options.format == "all" else (options.format,)
    try:
        folders = prepare(
            options.out, formats, options.train, options.val, options.size, options.smallest, options.seed
        )
    except (UserError, ValueError) as error:
        fail(str(error))
    except KeyboardInterrupt:
        raise SystemExit(_INTERRUPTED_STATUS) from None
    print(f"{options.train} scenes to train on, {options.val} to validate with, in each of:")
    for name, folder in zip(formats, folders, strict=True):
        print(f"  {folder}")
        print(f"    train on it: launch/train.sh {FORMATS[name][1]} data.train.root={shlex.quote(str(folder))}")


class _Parser(argparse.ArgumentParser):
    """One line for a mistake, as from all commands here."""

    def error(self, message: str) -> NoReturn:
        fail(f"{message}; see {self.prog} --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m syncbn.training.prepare", description=__doc__.splitlines()[0])
    parser.add_argument("out", metavar="OUT", type=Path, help="each format gets a folder of its name in it")
    parser.add_argument("--format", choices=(*FORMATS, "all"), default="all", help="default: all")
    parser.add_argument("--train", type=int, default=400, metavar="N", help="scenes to train on; default: 400")
    parser.add_argument("--val", type=int, default=100, metavar="N", help="scenes to validate with; default: 100")
    parser.add_argument("--size", type=int, default=96, metavar="PIXELS", help="largest side; default: 96")
    parser.add_argument(
        "--smallest", type=int, default=64, metavar="PIXELS", help="smallest side; default: 64; --size crops nothing"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="another seed draws other scenes; default: 0")
    return parser


def _image(scene: dict[str, Any]) -> Image.Image:
    return Image.fromarray(scene["image"].permute(1, 2, 0).numpy())


def _numbers(scene: dict[str, Any]) -> NDArray[np.uint8]:
    numbers: NDArray[np.uint8] = scene["semantic"].numpy().astype(np.uint8)
    return numbers


def _border(numbers: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """The background pixels beside a digit."""
    inked = np.pad(numbers > 0, 1)
    beside = inked[:-2, 1:-1] | inked[2:, 1:-1] | inked[1:-1, :-2] | inked[1:-1, 2:]
    border: NDArray[np.bool_] = beside & (numbers == 0)
    return border


def _voc_annotation(name: str, scene: dict[str, Any]) -> ElementTree.ElementTree:
    height, width = scene["semantic"].shape
    root = ElementTree.Element("annotation")
    _add(root, filename=f"{name}.jpg", segmented=1)
    _add(ElementTree.SubElement(root, "size"), width=width, height=height, depth=3)
    for box, label in zip(scene["boxes"].tolist(), scene["labels"].tolist(), strict=True):
        thing = ElementTree.SubElement(root, "object")
        _add(thing, name=CLASS_NAMES[label], pose="Unspecified", truncated=0, difficult=0)
        x1, y1, x2, y2 = (int(value) for value in box)
        # VOC counts from 1 and includes the last pixel.
        _add(ElementTree.SubElement(thing, "bndbox"), xmin=x1 + 1, ymin=y1 + 1, xmax=x2, ymax=y2)
    ElementTree.indent(root)
    return ElementTree.ElementTree(root)


def _add(parent: ElementTree.Element, **children: Any) -> None:
    for tag, value in children.items():
        ElementTree.SubElement(parent, tag).text = str(value)


def _write_class_names(folder: Path) -> None:
    (folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASS_NAMES))


def _folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


if __name__ == "__main__":
    main(sys.argv[1:])
