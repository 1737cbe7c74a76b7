"""What a trained model finds in a folder of images: pictures to look at, and a file to work with.

    python -m syncbn.training.predict ckpt=runs/digits-seg/<run> images=holiday/

Needs the run's folder and nothing of its data.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn import functional as F

from syncbn.training.afterwards import Trained, command, device_named, load_trained, parse, refuse_others, shown
from syncbn.training.data.augmentation import unchanged
from syncbn.training.data.faults import BrokenItem
from syncbn.training.data.reading import IMAGE_SUFFIXES, read_image
from syncbn.training.drawing import boxes_over, describe_boxes, legend, mask_over, palette
from syncbn.training.errors import UserError, one_line
from syncbn.training.tasks import SegmentationTask

USAGE = """\
usage: python -m syncbn.training.predict ckpt=FILE|RUN_FOLDER images=FOLDER|FILE [out=FOLDER] [score=0.5] [device=auto]
  draws what the model finds in each image; boxes that score less than `score` are left out"""
_ARGUMENTS = {"ckpt": "", "images": "", "out": "", "score": 0.5, "device": "auto"}
_RESULTS = "predictions.json"
_TOLD = 10  # skipped images that are named on the console


def main(arguments: list[str]) -> None:
    """Console command."""
    values, others = parse(arguments, _ARGUMENTS, required=["ckpt", "images"])
    refuse_others(others, _ARGUMENTS)
    if not 0 <= values["score"] <= 1:
        raise UserError(f"score must be from 0 to 1, got {values['score']}")
    device = device_named(values["device"])
    trained = load_trained(values["ckpt"])
    out = Path(values["out"]) if values["out"] else trained.run_dir / "predict"
    source = Path(values["images"]).expanduser()
    files = images_in(source, out)
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file; give the name of a folder")
    print(f"{shown(trained.checkpoint)}: {trained.weights}, on {device.type}", flush=True)
    results, skipped = predict(
        trained, files, source if source.is_dir() else source.parent, out, values["score"], device
    )
    for file, why in list(skipped.items())[:_TOLD]:
        print(f"skipped {file}: {why}", file=sys.stderr)
    if len(skipped) > _TOLD:
        print(f"and {len(skipped) - _TOLD} more, see {shown(out / _RESULTS)}", file=sys.stderr)
    if not results:
        raise UserError(f"images: none of the {len(files)} in {source} could be used")
    told = f", {len(skipped)} skipped" if skipped else ""
    print(f"{len(results)} image{'s' if len(results) > 1 else ''}{told}: pictures and {_RESULTS} in {shown(out)}")


def images_in(source: Path, out: Path) -> list[Path]:
    """All images of a folder and the folders in it, but for what was written before; or the one file.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise UserError(f"images: there is no folder {source}")
    written = out.resolve()
    found = sorted(path for path in source.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    files = [path for path in found if written not in path.resolve().parents]
    if not files:
        raise UserError(f"images: no image in {source} (looked for {', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def predict(
    trained: Trained, files: list[Path], root: Path, out: Path, min_score: float, device: torch.device
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Writes a picture for each image and a file of results.

    Returns:
        What the file holds of each image; and the images that were skipped, each with the reason.
    """
    task = trained.task.to(device)
    finder: Any = _Masks(trained) if isinstance(task, SegmentationTask) else _Boxes(trained, min_score)
    transforms = _transforms(trained)
    out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    names = _names(files, root)
    for file in _tracked(files):
        try:
            image = read_image(file, orientation="exif")
            found = finder(task, image, transforms, device)
        except BrokenItem as broken:
            skipped[str(file)] = broken.why
            continue
        except (RuntimeError, ValueError) as error:  # too small for this model, or too large for this machine
            skipped[str(file)] = f"the model does not take it: {one_line(str(error))[:200]}"
            continue
        picture = out / names[file]
        picture.parent.mkdir(parents=True, exist_ok=True)
        results.append({"image": str(file), "picture": names[file], **finder.write(image, found, picture)})
    legend(trained.class_names).save(out / "legend.png")
    summary = {
        "checkpoint": str(trained.checkpoint),
        "weights": trained.weights,
        "class_names": list(trained.class_names),
        "images": results,
        "skipped": [{"image": file, "why": why} for file, why in skipped.items()],
    }
    (out / _RESULTS).write_text(json.dumps(summary, indent=1) + "\n")
    return results, skipped


class _Masks:
    """Semantic segmentation: the class of every pixel, in the image's own size."""

    def __init__(self, trained: Trained) -> None:
        self.class_names = trained.class_names

    def __call__(
        self, task: LightningModule, image: Tensor, transforms: Callable[[Any], Any], device: torch.device
    ) -> Tensor:
        seen = transforms({"image": image})["image"].to(device)
        with torch.inference_mode():
            classes: Tensor = task.predict_step({"image": torch.as_tensor(seen)[None]}, 0)
        resized = F.interpolate(classes[:, None].float(), size=image.shape[-2:], mode="nearest")
        return resized[0, 0].long().cpu()

    def write(self, image: Tensor, classes: Tensor, picture: Path) -> dict[str, Any]:
        count = len(self.class_names)
        mask_over(image, classes, count).save(picture)
        numbers = Image.fromarray(classes.to(torch.uint8).numpy(), mode="P")
        numbers.putpalette([channel for colour in palette(min(count, 256)) for channel in colour])
        mask = picture.with_name(f"{picture.stem}_classes.png")
        numbers.save(mask)
        pixels = classes.flatten().bincount(minlength=count)
        share = {self.class_names[i]: round(float(pixels[i]) / classes.numel(), 6) for i in range(count) if pixels[i]}
        return {"classes_picture": mask.name, "share_of_pixels": share}


class _Boxes:
    """Detection: boxes in the image's own pixels."""

    def __init__(self, trained: Trained, min_score: float) -> None:
        self.class_names = trained.class_names
        self.min_score = min_score

    def __call__(
        self, task: LightningModule, image: Tensor, transforms: Callable[[Any], Any], device: torch.device
    ) -> dict[str, Tensor]:
        seen = torch.as_tensor(transforms({"image": image})["image"]).to(device)
        with torch.inference_mode():
            (found,) = task.predict_step({"image": [seen]}, 0)
        result = {name: found[name].detach().float().cpu() for name in ("boxes", "labels", "scores")}
        height, width = (own / new for own, new in zip(image.shape[-2:], seen.shape[-2:], strict=True))
        return {
            **result,
            "labels": result["labels"].long(),
            "boxes": result["boxes"] * torch.tensor([width, height] * 2),
        }

    def write(self, image: Tensor, boxes: dict[str, Tensor], picture: Path) -> dict[str, Any]:
        boxes_over(image, boxes, self.class_names, self.min_score).save(picture)
        return {"objects": describe_boxes(boxes, self.class_names, self.min_score)}


def _transforms(trained: Trained) -> Callable[[Any], Any]:
    """Those of the run's validation."""
    node = trained.cfg.get("data", {}).get("val_transforms")
    transforms: Callable[[Any], Any] = instantiate(node) if node else unchanged()
    return transforms


def _names(files: list[Path], root: Path) -> dict[Path, str]:
    """A picture's name for each image: its own with the suffix .png, or both suffixes where two would be the same."""
    names: dict[Path, str] = {}
    stems = [file.relative_to(root).with_suffix("") for file in files]
    for file, stem in zip(files, stems, strict=True):
        names[file] = f"{stem}.png" if stems.count(stem) == 1 else f"{file.relative_to(root)}.png"
    return names


def _tracked(files: list[Path]) -> Iterator[Path]:
    if not sys.stdout.isatty():
        return iter(files)
    return iter(track(files, description="predicting", console=Console(), transient=True))


def cli() -> None:
    """The same with the arguments of this process."""
    command(USAGE, main)


if __name__ == "__main__":
    cli()
