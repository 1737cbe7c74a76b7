"""Cityscapes' format: `leftImg8bit/<split>/<city>` and `gtFine/<split>/<city>` with label ids."""

from pathlib import Path

from syncbn.training.data.files import IGNORED, SegmentationFiles, require_choice, require_folder
from syncbn.training.errors import UserError

_MODES = {"fine": "gtFine", "coarse": "gtCoarse"}
_SPLITS = {"fine": ("train", "val", "test"), "coarse": ("train", "train_extra", "val")}
_IMAGE_END = "_leftImg8bit.png"


class CityscapesSegmentation(SegmentationFiles):
    """The 19 classes that Cityscapes evaluates, by their train ids; all others are ignored.

    There is no background: class 0 is the road.

    Args:
        root: the folder that holds `leftImg8bit` and `gtFine` (or `gtCoarse`).
        split: "train" or "val"; "train_extra" with mode "coarse". The masks of "test" are empty.
        mode: "fine" or "coarse".
        orientation: see `syncbn.training.data.reading`.

    Raises:
        UserError: a folder is missing, or there are no images.
        ValueError: an argument is outside its range.
    """

    def __init__(self, root: str | Path, split: str, mode: str = "fine", orientation: str = "auto") -> None:
        from torchvision.datasets import Cityscapes

        require_choice("mode", mode, tuple(_MODES))
        require_choice("split", split, _SPLITS[mode])
        base = require_folder("root", root)
        images = require_folder("root", base / "leftImg8bit" / split)
        masks = require_folder("root", base / _MODES[mode] / split)
        # Sorted: torchvision's own listing is in the file system's order, which other machines do not share, stumbles
        # over stray files, and unpacks archives that it finds, each process over the other's.
        listed = sorted(file for file in images.glob(f"*/*{_IMAGE_END}") if not file.name.startswith("."))
        if not listed:
            raise UserError(f"root: there is no <city>/*{_IMAGE_END} in {images}")
        mask_end = f"_{_MODES[mode]}_labelIds.png"
        trained = [label for label in Cityscapes.classes if 0 <= label.train_id < IGNORED]
        super().__init__(
            [str(file) for file in listed],
            [str(masks / file.parent.name / f"{file.name.removesuffix(_IMAGE_END)}{mask_end}") for file in listed],
            [label.name for label in sorted(trained, key=lambda label: label.train_id)],
            {
                label.id: label.train_id if label in trained else IGNORED
                for label in Cityscapes.classes
                if label.id >= 0
            },
            orientation,
        )
