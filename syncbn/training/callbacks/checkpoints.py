"""Checkpoints of a run: when `last.ckpt` is written, and how all processes learn that one could not be."""

from pathlib import Path
from typing import Any

from lightning.fabric.utilities.types import _PATH
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from syncbn.training.checkpoints import (
    LAST,
    PREVIOUS,
    RUN,
    cannot_write,
    fingerprint,
    remove_partial,
    write_checkpoint,
)
from syncbn.training.environment import run_stamp
from syncbn.training.errors import UserError
from syncbn.training.processes import gather


class DurableCheckpointIO(TorchCheckpointIO):
    """Lets Lightning, ModelCheckpoint included, write checkpoints by `write_checkpoint`.

    Only process 0 writes. One that cannot must not leave the others waiting for it, so that it notes the `failure`,
    which `save_checkpoint` makes an error on all of them.

    The job that was started last writes a run's `last.ckpt`. One that finds another job's in the place of its own, such
    as one that the scheduler has given up and that is still alive, leaves it there and notes that.
    """

    failure: str | None = None

    def __init__(self) -> None:
        super().__init__()
        self._last: dict[Path, str | None] = {}  # the fingerprints of what this job has written

    def save_checkpoint(self, checkpoint: dict[str, Any], path: _PATH, storage_options: Any = None) -> None:
        if storage_options is not None or "://" in str(path):  # an object store has a new object or the old one
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        if self._is_of_another_job(path):
            self.failure = f"{path}: another job has written it since this one has; this one ends, and that one goes on"
            return
        try:
            write_checkpoint(checkpoint, path)
        except OSError as error:
            self.failure = (
                f"{cannot_write(path, error)}; make room and continue with ckpt_path=last: the checkpoint before is as "
                "it was"
            )
            return
        if path.name == LAST:
            self._last[path] = fingerprint(path)

    def _is_of_another_job(self, path: Path) -> bool:
        there, own = fingerprint(path) if path in self._last else None, self._last.get(path)
        return there is not None and own is not None and there != own


class LastCheckpoint(Checkpoint):
    """Writes `last.ckpt` at the end of each epoch and every few optimizer steps, and keeps the one before.

    A run that is killed repeats at most `every_n_steps` steps. It saves where the run can go on as if nothing had
    happened, so not within an accumulation of gradients, and not between a step and the validation that is due after
    it: then after the validation. Metrics that were logged before a checkpoint are on the disk with it.

    Args:
        path: the file, in a folder for checkpoints.
        every_n_steps: optimizer steps from one checkpoint to the next; None saves at the end of epochs only.

    Raises:
        ValueError: `every_n_steps` is no whole number of at least 1.
        UserError: a checkpoint cannot be written, on all processes; the one before stays.
    """

    def __init__(self, path: str, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and (type(every_n_steps) is not int or every_n_steps < 1):
            raise ValueError(f"every_n_steps must be a whole number of at least 1, or null, got {every_n_steps!r}")
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self._saved_step = 0  # of the last checkpoint
        self._unconfirmed = False  # something was saved, and nobody knows yet whether it could be written
        self._unflushed = False  # what Lightning logs of a step after its checkpoint

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            remove_partial(self.path.parent)

    # Runs on all processes, whoever saves.
    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint[RUN] = run_stamp()
        self._unconfirmed = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = trainer.global_step
        if trainer.is_global_zero:
            self._make_way(trainer)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        self._flush(trainer)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self._is_due(trainer) and not within_accumulation(trainer) and not before_validation_or_epoch_end(trainer):
            self.save(trainer)
        self._confirm(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            # The end of the epoch comes next, if it does.
            if self._is_due(trainer) and not within_accumulation(trainer) and not trainer.is_last_batch:
                self.save(trainer)
            self._confirm(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._confirm(trainer)

    def save(self, trainer: Trainer) -> None:
        """Saves now. To be called by all processes."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        save_checkpoint(trainer, self.path)
        self._unconfirmed = False
        self._unflushed = True
        self._saved_step = trainer.global_step

    def _is_due(self, trainer: Trainer) -> bool:
        return self.every_n_steps is not None and trainer.global_step - self._saved_step >= self.every_n_steps

    def _confirm(self, trainer: Trainer) -> None:
        """Ends the run on all processes if another callback's checkpoint could not be written."""
        if self._unconfirmed:
            require_saved(trainer)
            self._unconfirmed = False

    def _flush(self, trainer: Trainer) -> None:
        if self._unflushed:
            for logger in trainer.loggers:
                flush(logger)
            self._unflushed = False

    def _make_way(self, trainer: Trainer) -> None:
        """Leaves nothing in the folder that does not belong to the run from here on."""
        source = Path(trainer.ckpt_path).resolve() if trainer.ckpt_path else None
        previous = self.path.with_name(PREVIOUS)
        if source == previous.resolve():
            # What was after it is damaged, and must not become the one before.
            previous.replace(self.path)
        elif source != self.path.resolve():
            for path in (self.path, previous):
                path.unlink(missing_ok=True)


def install(trainer: Trainer) -> None:
    """Lets a trainer write checkpoints by `DurableCheckpointIO`, unless the user has chosen how to write them."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = DurableCheckpointIO()


def save_checkpoint(trainer: Trainer, path: Path) -> None:
    """`Trainer.save_checkpoint`. To be called by all processes.

    Raises:
        UserError: on all of them, if process 0 cannot write.
    """
    for logger in trainer.loggers:
        flush(logger)
    trainer.save_checkpoint(path)
    require_saved(trainer)


def require_saved(trainer: Trainer) -> None:
    """Asks process 0 about all that was saved so far. To be called by all processes.

    Raises:
        UserError: on all of them, if it could not write something.
    """
    used = trainer.strategy.checkpoint_io
    failure = gather(used.failure if isinstance(used, DurableCheckpointIO) else None)[0]
    if failure is not None:
        raise UserError(failure)


def flush(logger: Logger) -> None:
    """Brings what was logged before a checkpoint to the disk: a run that goes on from there does not log it again."""
    logger.save()
    to_disk = getattr(getattr(logger, "experiment", None), "flush", None)
    if callable(to_disk):
        to_disk()


def within_accumulation(trainer: Trainer) -> bool:
    """Whether there are gradients that no optimizer step has used: a checkpoint does not keep them."""
    return trainer.fit_loop._should_accumulate()


def before_validation_or_epoch_end(trainer: Trainer) -> bool:
    """Whether a run resumed from here would leave out the validation, or the end of the epoch, that comes next."""
    loop = trainer.fit_loop.epoch_loop
    fetcher = trainer.fit_loop._data_fetcher
    return trainer.is_last_batch or (fetcher is not None and loop._should_check_val_fx(fetcher))
