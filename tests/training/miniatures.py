"""Miniatures of each format for the tests: a few scenes, written once a session and copied from then on.

`coco(path)`, `voc(path)`, `cityscapes(path)` and `folders(path)` give the folder that a dataset takes as `root`; it
is a copy, which a test may break.
"""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from syncbn.training.prepare import Scenes, prepare

TRAIN, VAL = 6, 4
SMALLEST, LARGEST = 64, 96


def coco(path: Path) -> Path:
    return _copy("coco", path)


def voc(path: Path) -> Path:
    return _copy("voc", path)


def cityscapes(path: Path) -> Path:
    return _copy("cityscapes", path)


def folders(path: Path) -> Path:
    return _copy("folders", path)


def scenes(split: str = "train") -> Scenes:
    """What the files of a split were made from."""
    return Scenes(split, {"train": TRAIN, "val": VAL}[split], image_size=LARGEST, smallest=SMALLEST)


def _copy(name: str, path: Path) -> Path:
    return Path(shutil.copytree(_original(name), Path(path) / name))


@functools.cache
def _original(name: str) -> Path:
    out = Path(tempfile.mkdtemp(prefix="syncbn-miniatures-"))
    atexit.register(shutil.rmtree, out, ignore_errors=True)
    (folder,) = prepare(out, (name,), train=TRAIN, val=VAL, size=LARGEST, smallest=SMALLEST)
    return folder
