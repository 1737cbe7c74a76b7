"""What ``StatisticsMonitor`` adds to a training step under a Lightning Trainer.

Blocks of as many steps as lie between two of its samples take turns, with the monitor and without it, in one fit: each
block with it has one sampled step. So what a step takes is a block's mean; the ratio is that of the blocks' medians.
Since blocks on a shared machine differ by more than the monitor costs, the time in its own hooks stands beside it: all
that it does but the copies of the sampled steps' messages.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ..lightning import StatisticsMonitor, SyncBatchNormPlugin
from . import step
from .implementations import Implementation
from .options import Options
from .report import Column, Report, Row, Table, row
from .timing import Clock, slowest, spread

WITHOUT, WITH = "syncbn", "syncbn+monitor"
TABLE = Table(
    Column("model and input", 26),
    Column("dtype", 8),
    Column("impl", 14),
    Column("step ms", 9, 2),
    Column("q1", 8, 2),
    Column("q3", 8, 2),
    Column("ratio", 7, 4),
    Column("hooks ms", 9, 3),
    Column("hooks %", 8, 2),
)
KEYS = ("case", "dtype", "impl", "total_ms", "total_ms_q1", "total_ms_q3", "ratio", "hooks_ms", "hooks_percent")


def run(options: Options) -> Report | None:
    """Measures, prints the table; the report on rank 0, None elsewhere."""
    return step.run(options, MONITOR)


def measure_model(
    name: str, layout: str, dtype: str, chosen: list[Implementation], clock: Clock, options: Options
) -> list[Row]:
    """A row without the monitor and one with it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")  # on so few batches, and of Lightning's own making
    recipe = step.RECIPES[name]
    precision: Any = {"float32": "32-true", "bfloat16": "bf16-mixed", "float16": "16-mixed"}[dtype]
    model, images = step.model_and_images(name, layout, torch.device("cpu"), options.shrink)
    every = 5 if options.quick else StatisticsMonitor().every_n_steps
    turns = _Turns(StatisticsMonitor(every, report=None), every, clock)
    steps = every * 2 * (options.rounds + 1)  # a pair of blocks to warm up
    with tempfile.TemporaryDirectory(prefix="syncbn-bench-") as folder:
        trainer = pl.Trainer(
            accelerator=clock.device.type if clock.device.type == "cpu" else "gpu",
            devices=dist.get_world_size(),
            strategy="ddp",
            precision=precision,
            plugins=[SyncBatchNormPlugin(), LightningEnvironment()],
            callbacks=[turns],
            logger=CSVLogger(folder),
            max_steps=steps,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=folder,
        )
        trainer.fit(_Task(model, recipe.loss), DataLoader(_Same(images, steps), batch_size=None))
    hooks_ms = statistics.median(turns.hooks_ms[1:])
    times = {impl: slowest(torch.tensor(turns.step_ms[impl][1:]).double(), clock.device) for impl in (WITHOUT, WITH)}
    medians = {impl: spread(each) for impl, each in times.items()}
    return [
        row(
            case=f"{name} {'x'.join(map(str, images.shape))}",
            impl=impl,
            layout=layout,
            dtype=dtype,
            total_ms=found.median,
            total_ms_q1=found.q1,
            total_ms_q3=found.q3,
            every_n_steps=every,
            ratio=found.median / medians[WITHOUT].median,
            hooks_ms=hooks_ms if impl == WITH else None,
            hooks_percent=100 * hooks_ms / medians[WITHOUT].median if impl == WITH else None,
        )
        for impl, found in medians.items()
    ]


MONITOR = step.Kind(
    TABLE,
    KEYS,
    (
        "step: mean over a block with one sampled step, medians of the blocks; ratio: of these.",
        "hooks: the host's time in the monitor, a step, medians of the blocks.",
    ),
    measure_model,
)


class _Same(torch.utils.data.Dataset[Tensor]):
    """One batch, again and again: loading is not what is measured."""

    def __init__(self, images: Tensor, times: int) -> None:
        self.images, self.times = images, times

    def __len__(self) -> int:
        return self.times

    def __getitem__(self, index: int) -> Tensor:
        return self.images


class _Task(pl.LightningModule):
    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def training_step(self, images: Tensor) -> Tensor:
        return self.loss(self.model, images)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-4, momentum=0.9)


class _Turns(pl.Callback):
    """Calls the monitor in every other block of steps, and takes the time of all blocks."""

    def __init__(self, monitor: StatisticsMonitor, every: int, clock: Clock) -> None:
        self.step_ms: dict[str, list[float]] = {WITHOUT: [], WITH: []}
        self.hooks_ms: list[float] = []
        self._monitor, self._every, self._clock = monitor, every, clock
        self._in_hooks = 0.0

    def on_train_start(self, *args: Any) -> None:
        self._monitor.on_train_start(*args)

    def on_train_epoch_start(self, *args: Any) -> None:
        self._monitor.on_train_epoch_start(*args)

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        block, within = divmod(batch_idx, self._every)
        if within == 0:
            self._clock.align()
            self._with = block % 4 in (1, 2)  # which of a pair comes first alternates
            self._start = time.perf_counter()
            self._in_hooks = 0.0
        if self._with:
            self._timed(self._monitor.on_train_batch_start, trainer, pl_module, batch, batch_idx)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._with:
            self._timed(self._monitor.on_train_batch_end, trainer, pl_module, outputs, batch, batch_idx)
        if (batch_idx + 1) % self._every == 0:
            self._clock.wait()
            per_step = 1e3 / self._every
            self.step_ms[WITH if self._with else WITHOUT].append((time.perf_counter() - self._start) * per_step)
            if self._with:
                self.hooks_ms.append(self._in_hooks * per_step)

    def _timed(self, hook: Callable[..., None], *args: Any) -> None:
        start = time.perf_counter()
        hook(*args)
        self._in_hooks += time.perf_counter() - start
