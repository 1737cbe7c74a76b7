"""What tests of resuming configure by `_target_`: a small network with dropout, and a callback that interrupts."""

import os
import signal
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
