"""``even_batches`` under a Lightning Trainer, which may fetch a batch before it trains the one before that."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils._pytree import tree_leaves

from ..uneven import EvenBatches


class EvenBatchesCallback(Callback):
    """Lets each step of ``even_batches`` begin when the Trainer begins it, and end when the Trainer ends it.

    A Trainer fetches one batch ahead of the step if the loader has no length (an IterableDataset), and asks for no
    batch after the last one if it has. With this callback, ``weigh`` and the numbers are those of the batch that the
    step is given, and what counts in no statistics is that step alone.

    Where syncbn is installed, every Trainer has it. It does nothing for other loaders.
    """

    def __init__(self) -> None:
        self._loaders: dict[str, list[Any]] = {}

    def _epoch_starts(self, trainer: Trainer, stage: str, loaders: Any) -> None:
        first = next(callback for callback in trainer.callbacks if isinstance(callback, EvenBatchesCallback))  # type: ignore[attr-defined]
        self._loaders[stage] = tree_leaves(loaders) if first is self else []
        for loader in self._even(stage):
            loader.steps.defer()

    def _even(self, stage: str, index: int | None = None) -> list[EvenBatches[Any]]:
        """Those of a stage; of several loaders that follow one another, the one at ``index``."""
        loaders = self._loaders.get(stage, [])
        return [loader for loader in (loaders if index is None else loaders[index : index + 1]) if _is_even(loader)]

    def _step_starts(self, stage: str, index: int | None = None) -> None:
        for loader in self._even(stage, index):
            loader.steps.begin_next()

    def _step_ends(self, stage: str, index: int | None = None) -> None:
        for loader in self._even(stage, index):
            loader.steps.end()

    def _release(self) -> None:
        for stage in self._loaders:
            for loader in self._even(stage):
                loader.steps.release()
        self._loaders = {}

    # ---- the Trainer's hooks

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_starts(trainer, "train", trainer.train_dataloader)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._step_starts("train")

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self._step_ends("train")

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_starts(trainer, "validation", trainer.val_dataloaders)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._step_starts("validation", dataloader_idx)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._step_ends("validation", dataloader_idx)

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_starts(trainer, "test", trainer.test_dataloaders)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._step_starts("test", dataloader_idx)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._step_ends("test", dataloader_idx)

    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_starts(trainer, "predict", trainer.predict_dataloaders)

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._step_starts("predict", dataloader_idx)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._step_ends("predict", dataloader_idx)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()


def _is_even(loader: Any) -> bool:
    return isinstance(loader, EvenBatches)
