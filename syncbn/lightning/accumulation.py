"""The callback that moves running statistics with the optimizer's steps."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ..accumulation import accumulate_statistics


class AccumulateStatisticsCallback(Callback):
    """Moves the running statistics once per optimizer step, for ``Trainer(accumulate_grad_batches=...)``.

    See ``syncbn.accumulate_statistics``. With several optimizers, they move after the step of any of them.
    """

    def __init__(self) -> None:
        self._block: AbstractContextManager[None] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._block = accumulate_statistics(pl_module, *trainer.optimizers)
        self._block.__enter__()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._leave(None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._leave(exception)

    def _leave(self, error: BaseException | None) -> None:
        block, self._block = self._block, None
        if block is not None:
            exit_with: tuple[Any, Any, Any] = (type(error), error, error.__traceback__) if error else (None, None, None)
            block.__exit__(*exit_with)
