"""What tests of resuming configure by `_target_`: a small network with dropout, and a callback that interrupts."""

import os
import signal
import struct
import zipfile
from contextlib import suppress
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor, nn


class Net(nn.Module):
    """Images [B, 3, H, W] to scores [B, num_classes, H, W], with normalization and dropout in between."""

    def __init__(self, num_classes: int, **_: Any) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Conv2d(6, num_classes, 1)
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.layers(image)


class InterruptAt(Callback):
    """SIGINT to the last process alone, before it does a batch of training, or a batch of validation thereafter."""

    def __init__(self, batch: int, validation: bool = False) -> None:
        self.batch = batch  # of training, counted from 0 over all epochs
        self.validation = validation

    def on_train_batch_start(self, trainer, *_: Any) -> None:
        if not self.validation:
            self._interrupt(trainer)

    def on_validation_batch_start(self, trainer, *_: Any) -> None:
        if self.validation:
            self._interrupt(trainer)

    def _interrupt(self, trainer) -> None:
        reached = trainer.fit_loop.epoch_loop.total_batch_idx >= self.batch
        if reached and trainer.global_rank == trainer.world_size - 1:
            os.kill(os.getpid(), signal.SIGINT)
            self.batch = 1 << 30


class Fault(Callback):
    """Something goes wrong before a batch, on one process, in one of the starts that a launcher makes of a job.

    Args:
        kind: "kill" is SIGKILL to the process itself; "corrupt" changes a bit of the checkpoint `path` before that;
            "fill" writes a file `path` until there is no more room; "preempt" is SIGTERM to the launcher.
        batch: of training, counted from 0 over all epochs.
        rank: the process.
        attempt: the start, counted from 0.
        path: a file.
    """

    def __init__(self, kind: str, batch: int, rank: int, attempt: int = 0, path: str = "") -> None:
        self.kind = kind
        self.batch = batch
        self.process = (rank, attempt)
        self.path = path

    def on_train_batch_start(self, trainer, *_: Any) -> None:
        here = trainer.global_rank, int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        if here != self.process or trainer.fit_loop.epoch_loop.total_batch_idx != self.batch:
            return
        if self.kind == "fill":
            fill(self.path)
        elif self.kind == "preempt":
            os.kill(os.getppid(), signal.SIGTERM)
        else:
            if self.kind == "corrupt":
                flip_a_bit(self.path)
            os.kill(os.getpid(), signal.SIGKILL)


class StepRecord(Callback):
    """Appends a line for each optimizer step that process 0 has taken."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._steps = 0

    def on_train_start(self, trainer, *_: Any) -> None:
        self._steps = trainer.global_step

    def on_train_batch_end(self, trainer, *_: Any) -> None:
        if trainer.is_global_zero and trainer.global_step > self._steps:
            self._steps = trainer.global_step
            with open(self.path, "a") as file:
                file.write(f"{self._steps}\n")


def flip_a_bit(path: str) -> None:
    """One bit of the largest tensor in a checkpoint."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    with open(path, "r+b") as file:
        file.seek(largest.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
        file.seek(name + extra + largest.file_size // 2, os.SEEK_CUR)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def fill(path: str | os.PathLike[str]) -> None:
    """Writes a file until there is no more room."""
    with suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(bytes(512)):
            pass
