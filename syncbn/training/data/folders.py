"""The plainest format: a folder of images, a folder of masks, and a list of class names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from syncbn.training.data.faults import OBJECT, BrokenItem, Fault
from syncbn.training.data.files import (
    IGNORED,
    SegmentationFiles,
    find_class_names,
    require_folder,
)
from syncbn.training.data.reading import IMAGE_SUFFIXES, read_numbers
from syncbn.training.errors import UserError

_MASK_SUFFIXES = (".png", ".bmp", ".tif", ".tiff")  # none that compresses with loss
_LOOKED_AT = 64  # masks at most; the first one with a class is enough


class FolderSegmentation(SegmentationFiles):
    """Images and their masks, paired by their names: `images/a/1.jpg` goes with `masks/a/1.png`.

    A mask has one channel of class numbers, or a palette, whose indices are the class numbers. 255 is ignored.

    Args:
        root: the folder that `split` and `classes.txt` are in.
        split: the folder in it that `images` and `masks` are in; "": they are in `root` itself.
        images, masks: these folders' names.
        classes: names, the background first, or a file with one name a line; None: `classes.txt` in the split's
            folder or in `root`.
        values: from a mask's value to class number, such as {255: 1} where masks are black and white; other values
            than these, 0 and 255 are then faults. None: masks hold class numbers.
        orientation: whether masks were drawn on the stored or the upright picture; see
            `syncbn.training.data.reading`.

    Raises:
        UserError: a folder or the class names are missing, two images have one name, or masks are black and white
            and nothing says what white means.
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        root: str | Path,
        split: str = "",
        images: str = "images",
        masks: str = "masks",
        classes: Sequence[str] | str | None = None,
        values: Mapping[int, int] | None = None,
        orientation: str = "auto",
    ) -> None:
        base = require_folder("root", root)
        folder = require_folder("split", base / split)
        image_folder = require_folder("images", folder / images)
        mask_folder = require_folder("masks", folder / masks)
        names = find_class_names(classes, folder, base)
        if names is None:
            raise UserError(
                f"classes: give a list of names, the background first, or write them into {base / 'classes.txt'}, "
                "one a line"
            )
        image_of = _by_name("images", image_folder, sorted(IMAGE_SUFFIXES))
        mask_of = _by_name("masks", mask_folder, _MASK_SUFFIXES)
        if not image_of:
            raise UserError(f"images: there is no image in {image_folder}")
        super().__init__(
            [str(file) for file in image_of.values()],
            [str(mask_of.get(name, mask_folder / f"{name}.png")) for name in image_of],
            names,
            None if values is None else _checked(values, len(names)),
            orientation,
        )
        self._loose = [
            Fault(0, str(file), f"has no image in {image_folder}", OBJECT)
            for name, file in mask_of.items()
            if name not in image_of
        ]
        if values is None:
            self._refuse_black_and_white()

    def _file_faults(self) -> list[Fault]:
        return self._loose

    def _refuse_black_and_white(self) -> None:
        """White, 255, would be ignored, and a model would learn that everything is background."""
        seen: set[int] = set()
        for mask in self.masks[:_LOOKED_AT]:
            try:
                seen.update(np.unique(read_numbers(mask)).tolist())
            except BrokenItem:  # found and told by the survey
                continue
            if not seen <= {0, IGNORED}:
                return
        if seen == {0, IGNORED}:
            raise UserError(
                f"masks: they hold 0 and {IGNORED} only, and {IGNORED} means ignored. Where white is class 1, say "
                f"values={{{IGNORED}:1}}; the first is {self.masks[0]}"
            )


def _by_name(key: str, folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """The files by their path in the folder without suffix, sorted by it."""
    found: dict[str, Path] = {}
    for file in sorted(folder.rglob("*")):
        if file.name.startswith(".") or file.suffix.lower() not in suffixes or not file.is_file():
            continue
        name = file.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise UserError(f"{key}: {found[name]} and {file} have the same name")
        found[name] = file
    return dict(sorted(found.items()))


def _checked(values: Mapping[Any, Any], classes: int) -> dict[int, int]:
    """`values` as plain numbers, with 0 and 255 as what they are unless they are among them.

    Raises:
        ValueError: a value or a class is outside its range.
    """
    for value, number in values.items():
        if not isinstance(value, int) or not 0 <= value < 2**16:
            raise ValueError(f"values: a mask's value is a whole number from 0 to 65535, got {value!r}")
        if not isinstance(number, int) or not (0 <= number < classes or number == IGNORED):
            raise ValueError(f"values: {value} must stand for a class from 0 to {classes - 1} or 255, got {number!r}")
    return {0: 0, IGNORED: IGNORED} | dict(values)
