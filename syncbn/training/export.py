"""A trained model for use without this package: its plain weights, and an ONNX file.

    python -m syncbn.training.export ckpt=runs/digits-seg/<run> out=exported/

`model.pt` is the state_dict of the model by itself, with plain batch normalization. `model.onnx` takes images
0 to 1 and normalizes them as in training; its output is compared with PyTorch's before it is called done.
"""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from syncbn.training.afterwards import Trained, command, load_trained, parse, plain_state_dict, refuse_others, shown
from syncbn.training.errors import UserError, one_line
from syncbn.training.tasks import SegmentationTask

USAGE = """\
usage: python -m syncbn.training.export ckpt=FILE|RUN_FOLDER [out=FOLDER] [size=HEIGHTxWIDTH] [onnx=True]
  writes model.pt, a state_dict without this package, and model.onnx; `size` is the example image's"""
_ARGUMENTS = {"ckpt": "", "out": "", "size": "", "onnx": True}
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
_TOLERANCE = 1e-3  # of the largest output: ONNX Runtime adds in another order, and folds normalization
_OPSET = 18


def main(arguments: list[str]) -> None:
    """Console command."""
    values, others = parse(arguments, _ARGUMENTS, required=["ckpt"])
    refuse_others(others, _ARGUMENTS)
    size = _size(values["size"]) if values["size"] else None
    trained = load_trained(values["ckpt"])
    out = Path(values["out"]) if values["out"] else trained.run_dir / "export"
    if out.exists() and not out.is_dir():
        raise UserError(f"out: {out} is a file; give the name of a folder")
    out.mkdir(parents=True, exist_ok=True)
    print(f"{shown(trained.checkpoint)}: {trained.weights}", flush=True)
    number = write_weights(trained, out)
    print(f"{shown(out / 'model.pt')}: state_dict of the plain {_model_name(trained)}, {number} tensors", flush=True)
    if not values["onnx"]:
        return
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(f"no ONNX file was written: pip install {' '.join(missing)}, or say onnx=False")
    told = write_onnx(trained, out / "model.onnx", size)
    print(f"{shown(out / 'model.onnx')}: {told}", flush=True)


def write_weights(trained: Trained, out: Path) -> int:
    """Writes `model.pt`, and `model.json`, which says what it is for; returns the number of tensors."""
    state = plain_state_dict(trained)
    torch.save(state, out / "model.pt")
    task = trained.task
    about = {
        "model": OmegaConf.to_container(trained.cfg.task.get("model", OmegaConf.create({})), resolve=True),
        "class_names": list(trained.class_names),
        "image_mean": _plain(getattr(task, "image_mean", None)),
        "image_std": _plain(getattr(task, "image_std", None)),
        "checkpoint": str(trained.checkpoint),
        "weights": trained.weights,
    }
    (out / "model.json").write_text(json.dumps(about, indent=2) + "\n")
    return len(state)


def write_onnx(trained: Trained, path: Path, size: tuple[int, int] | None = None) -> str:
    """Writes an ONNX file and compares what it computes with PyTorch; returns what the file takes and gives.

    Raises:
        UserError: the model cannot be exported, or the outputs differ.
    """
    if isinstance(trained.task, SegmentationTask):
        return _write_segmenter(Segmenter(trained.task).eval(), path, size or (160, 224))
    return _write_detector(Detector(trained.task).eval(), path, size or (320, 416))


class Segmenter(nn.Module):
    """Images float [B, 3, H, W] in 0 to 1 to class scores float [B, C, H, W]."""

    mean: Tensor
    std: Tensor

    def __init__(self, task: SegmentationTask) -> None:
        super().__init__()
        self.model = task.model
        self.register_buffer("mean", torch.as_tensor(task.image_mean).clone())
        self.register_buffer("std", torch.as_tensor(task.image_std).clone())

    def forward(self, image: Tensor) -> Tensor:
        output = self.model((image - self.mean) / self.std)
        scores: Tensor = output["out"] if isinstance(output, dict) else output
        return scores


class Detector(nn.Module):
    """One image float [3, H, W] in 0 to 1 to boxes [n, 4], labels [n] and scores [n]; normalizes by itself."""

    def __init__(self, task: nn.Module) -> None:
        super().__init__()
        self.model: nn.Module = task.model  # type: ignore[assignment]

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.model([image])[0]
        return found["boxes"], found["labels"], found["scores"]


def _write_segmenter(model: Segmenter, path: Path, size: tuple[int, int]) -> str:
    image = torch.rand(2, 3, *size)
    free = torch.export.Dim.DYNAMIC
    names: dict[str, Any] = {"input_names": ["image"], "output_names": ["scores"], "dynamo": True}
    sizes = [size, (size[0] + 32, size[1] - 32)]
    try:
        _export(model, image, path, dynamic_shapes=({0: free, 2: free, 3: free},), **names)
    except UserError:  # a model may ask for its input's size in ways that only a number answers
        _export(model, image, path, **names)
        sizes = [size]
    examples = [torch.rand(len(image), 3, *each) for each in sizes]
    worst = max(_difference(model, path, example) for example in examples)
    what = "of any size" if len(sizes) > 1 else f"of {size[0]}x{size[1]}, {len(image)} at a time"
    return f"images 0 to 1 {what} to scores; equals PyTorch within {worst:.0e} of the largest score"


def _write_detector(model: Detector, path: Path, size: tuple[int, int]) -> str:
    outputs = ["boxes", "labels", "scores"]
    axes: dict[str, dict[int, str]] = {name: {0: "n"} for name in outputs}
    axes["image"] = {1: "height", 2: "width"}
    image = torch.rand(3, *size)
    # Not dynamo's: how many boxes there are depends on the image, which torchvision's detectors ask TorchScript.
    _export(
        model,
        image,
        path,
        input_names=["image"],
        output_names=outputs,
        dynamic_axes=axes,
        opset_version=_OPSET,
        dynamo=False,
    )
    compared = sum(_same_boxes(model, path, example) for example in (image, torch.rand(3, size[1], size[0])))
    return f"an image 0 to 1 of any size to boxes, labels and scores; {compared} boxes of noise equal PyTorch's"


def _export(model: nn.Module, image: Tensor, path: Path, **options: Any) -> None:
    try:
        with _silence(), torch.no_grad():
            if options["dynamo"]:
                options["verbose"] = False
                torch.onnx.export(model, (image,), external_data=False, **options).save(path)  # type: ignore[union-attr]
            else:
                torch.onnx.export(model, (image,), str(path), **options)
    except Exception as error:  # whatever a model does that an exporter cannot follow
        reason = f"{type(error).__name__}: {one_line(str(error)).split('; ')[0][:200]}"
        raise UserError(
            f"torch.onnx.export cannot follow this model, so that there is no ONNX file: {reason}"
        ) from error


def _run(path: Path, image: Tensor) -> list[Any]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    results: list[Any] = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    return results


def _difference(model: nn.Module, path: Path, image: Tensor) -> float:
    with torch.inference_mode():
        expected = model(image)
    (found,) = _run(path, image)
    difference = float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    if not difference <= _TOLERANCE:
        _discard(path, f"scores differ by {difference:.1e} of the largest one")
    return difference


def _same_boxes(model: nn.Module, path: Path, image: Tensor) -> int:
    with torch.inference_mode():
        boxes, labels, scores = model(image)
    found_boxes, found_labels, found_scores = map(torch.from_numpy, _run(path, image))
    if len(found_boxes) != len(boxes):
        _discard(path, f"{len(found_boxes)} boxes where PyTorch finds {len(boxes)}")
    if not len(boxes):
        return 0
    # Boxes of equal scores may come in another order: each must have its like.
    apart = torch.cdist(found_boxes, boxes, p=torch.inf)
    apart = apart.masked_fill(found_labels[:, None] != labels[None], torch.inf).amin(1)
    if not bool((apart <= _TOLERANCE * max(image.shape)).all()) or not torch.allclose(
        found_scores.sort().values, scores.sort().values, atol=_TOLERANCE
    ):
        _discard(path, "boxes differ from PyTorch's")
    return len(boxes)


def _discard(path: Path, why: str) -> None:
    path.unlink()
    raise UserError(f"the ONNX file computes something else than PyTorch and is not kept: {why}")


@contextmanager
def _silence() -> Iterator[None]:
    """Keeps the exporters' notes to their developers from a user's console."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _size(text: str) -> tuple[int, int]:
    parts = text.lower().split("x")
    if len(parts) != 2 or not all(part.isdigit() and int(part) >= 64 for part in parts):
        raise UserError(f"size must be such as 480x640, height and width of at least 64, got {text!r}")
    return int(parts[0]), int(parts[1])


def _plain(value: Any) -> Any:
    return torch.as_tensor(value).flatten().tolist() if value is not None else None


def _model_name(trained: Trained) -> str:
    return type(getattr(trained.task, "model", trained.task)).__name__


def cli() -> None:
    """The same with the arguments of this process."""
    command(USAGE, main)


if __name__ == "__main__":
    cli()
