"""A whole training step of torchvision models under DistributedDataParallel, with each implementation."""

from __future__ import annotations

import copy
import statistics
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from . import processes, report
from .implementations import Implementation
from .layer import choose, require_known
from .options import DTYPES, Options
from .report import Column, Report, Row, Table, row
from .timing import Clock, Turn, interleave, spread

CLASSES = 21
FORWARD_BACKWARD_STEP = ("fwd_ms", "bwd_ms", "optimizer_ms")

TABLE = Table(
    Column("model and input", 32),
    Column("layout", 13),
    Column("dtype", 8),
    Column("impl", 16),
    Column("fwd ms", 8, 1),
    Column("bwd ms", 8, 1),
    Column("total ms", 8, 1),
    Column("peak MB", 9, 1),
)


class Recipe(NamedTuple):
    """A model, its batch and image on a GPU, and its loss."""

    batch: int
    image: tuple[int, int]
    build: Callable[[tuple[int, int]], nn.Module]
    loss: Callable[[nn.Module, Tensor], Tensor]


class Kind(NamedTuple):
    """What a mode that measures training steps measures and shows of each."""

    table: Table
    keys: tuple[str, ...]  # of a row, one for each column
    notes: tuple[str, ...]  # above the table
    measure_model: Callable[[str, str, str, list[Implementation], Clock, Options], list[Row]]


def run(options: Options, kind: Kind | None = None) -> Report | None:
    """Measures, prints the table; the report on rank 0, None elsewhere."""
    require_known(options)
    header = report.header(options.mode, options.command)
    if processes.is_first():
        report.show_header(header)
    result: Report | None = processes.run(measure, options.processes, options.device, options, kind or STEP)
    if result is not None:
        result.header = header | result.header
    return result


def measure(device: torch.device, options: Options, kind: Kind) -> Report:
    """On every process."""
    first = dist.get_rank() == 0
    clock = Clock(device)
    chosen, missing = choose(device, options, "convert")
    header = report.world(device) | {"shrink": options.shrink, "rounds": options.rounds, "missing": missing}
    if first:
        report.show_world(header)
        for name, why in missing.items():
            print(f"not run: {name}: {why}")
        print(f"Images 1/{options.shrink} of their size, {options.rounds} rounds, medians. total: with the optimizer.")
        print("\n".join(kind.notes) + "\n")
        kind.table.head()
    rows = []
    for model in options.models:
        for dtype in options.dtypes:
            for layout in options.layouts:
                measured = kind.measure_model(model, layout, dtype, chosen, clock, options)
                for each in measured if first else []:
                    kind.table.line(*(each[key] for key in kind.keys))
                rows += measured
    return Report(header, rows)


def measure_model(
    name: str, layout: str, dtype: str, chosen: list[Implementation], clock: Clock, options: Options
) -> list[Row]:
    """A row for every implementation."""
    recipe = RECIPES[name]
    plain, images = model_and_images(name, layout, clock.device, options.shrink)
    peaks: dict[str, list[float]] = {each.name: [] for each in chosen}
    turns = {}
    for each in chosen:
        assert each.convert is not None  # chosen for having one
        model = DistributedDataParallel(each.convert(copy.deepcopy(plain)), gradient_as_bucket_view=True)
        loss = partial(recipe.loss, model, images)
        turns[each.name] = _turn(model, loss, DTYPES[dtype], clock.device, peaks[each.name])
    times = interleave(turns, clock, options.rounds, options.warm_up, align_each_phase=False)
    rows = []
    for each in chosen:
        total = spread(times[each.name].sum(dim=1))
        rows.append(
            row(
                case=f"{name} {'x'.join(map(str, images.shape))}",
                impl=each.name,
                layout=layout,
                dtype=dtype,
                fwd_ms=spread(times[each.name][:, 0]).median,
                bwd_ms=spread(times[each.name][:, 1]).median,
                optimizer_ms=spread(times[each.name][:, 2]).median,
                total_ms=total.median,
                total_ms_q1=total.q1,
                total_ms_q3=total.q3,
                peak_mb=statistics.median(peaks[each.name][options.warm_up :]) if peaks[each.name] else None,
            )
        )
    return rows


STEP = Kind(
    TABLE,
    ("case", "layout", "dtype", "impl", "fwd_ms", "bwd_ms", "total_ms", "peak_mb"),
    ("peak: device memory beyond what was held before the step, above all activations; not known on a CPU.",),
    measure_model,
)


def model_and_images(name: str, layout: str, device: torch.device, shrink: int) -> tuple[nn.Module, Tensor]:
    """With random weights, and values between 0 and 1."""
    recipe = RECIPES[name]
    batch = max(2, recipe.batch // shrink**2)
    height, width = (max(32, round(side / shrink / 32) * 32) for side in recipe.image)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, on arguments that have no effect without weights
        model = recipe.build((height, width))
    images = torch.rand(batch, 3, height, width, device=device)
    return model.to(device).to(memory_format=memory_format), images.to(memory_format=memory_format)


def _turn(
    model: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype, device: torch.device, peaks: list[float]
) -> Turn:
    """Forward with loss, backward, and the optimizer's step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    held: dict[str, Any] = {}

    def prepare() -> None:
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held["before"] = torch.cuda.memory_allocated()

    def forward() -> None:
        with autocast(device, dtype):
            held["loss"] = loss()

    def backward() -> None:
        held.pop("loss").backward()

    def step() -> None:
        optimizer.step()
        if device.type == "cuda":  # the allocator's books need no waiting for the device
            peaks.append((torch.cuda.max_memory_allocated() - held["before"]) / 1e6)

    return Turn(prepare, (forward, backward, step))


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """How a step runs in ``dtype``: parameters are float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)


# The models. Without weights torchvision builds all of them with trainable BatchNorm2d, the detector, too.


def _resnet50(image: tuple[int, int]) -> nn.Module:
    from torchvision.models import resnet50

    return resnet50(weights=None, num_classes=CLASSES)


def _deeplabv3_resnet50(image: tuple[int, int]) -> nn.Module:
    from torchvision.models.segmentation import deeplabv3_resnet50

    return deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES)


def _fcos_resnet50_fpn(image: tuple[int, int]) -> nn.Module:
    from torchvision.models.detection import fcos_resnet50_fpn

    # It resizes its images itself: here, to what they are.
    return fcos_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=min(image), max_size=max(image)
    )


def _conv_bn_relu(image: tuple[int, int]) -> nn.Module:
    """Three times what most of every network is made of, with something to be learned from at the end."""
    blocks = [[nn.Conv2d(i, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(True)] for i in (3, 64, 64)]
    return nn.Sequential(*(layer for block in blocks for layer in block), nn.Conv2d(64, CLASSES, 1))


def _unet(image: tuple[int, int]) -> nn.Module:
    from ..training.models.unet import UNet

    return UNet(CLASSES, widths=(64, 128, 256, 512))


def _classification(model: nn.Module, images: Tensor) -> Tensor:
    return F.cross_entropy(model(images).float(), torch.zeros(len(images), dtype=torch.long, device=images.device))


def _segmentation(model: nn.Module, images: Tensor) -> Tensor:
    scores = model(images)
    labels = torch.zeros(len(images), *images.shape[2:], dtype=torch.long, device=images.device)
    return F.cross_entropy((scores["out"] if isinstance(scores, dict) else scores).float(), labels)


def _detection(model: nn.Module, images: Tensor) -> Tensor:
    height, width = images.shape[2:]
    boxes = torch.tensor([[0.1, 0.1, 0.6, 0.7], [0.3, 0.2, 0.9, 0.9]], device=images.device)
    boxes = boxes * torch.tensor([width, height, width, height], device=images.device)
    target = {"boxes": boxes, "labels": torch.ones(2, dtype=torch.long, device=images.device)}
    return sum(model(list(images), [target] * len(images)).values(), start=torch.zeros((), device=images.device))


RECIPES = {
    "resnet50": Recipe(32, (224, 224), _resnet50, _classification),
    "conv_bn_relu": Recipe(8, (256, 256), _conv_bn_relu, _segmentation),
    "unet": Recipe(4, (512, 512), _unet, _segmentation),
    "deeplabv3_resnet50": Recipe(2, (512, 1024), _deeplabv3_resnet50, _segmentation),
    "fcos_resnet50_fpn": Recipe(2, (800, 1344), _fcos_resnet50_fpn, _detection),
}
