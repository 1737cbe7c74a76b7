"""Ctrl-C, a scheduler's signal and broken data end a run between two steps and leave a checkpoint to continue from."""

import signal
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from syncbn.training.callbacks.checkpoints import (
    before_validation_or_epoch_end,
    save_checkpoint,
    within_accumulation,
)
from syncbn.training.callbacks.console import say
from syncbn.training.errors import UserError
from syncbn.training.processes import vote_group

# SIGUSR1 is what Slurm is usually told to send before the time is over.
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))
# torchrun passes Ctrl-C on to processes that already had it from the terminal: only a later one is a second
# one.
_SAME_PRESS_S = 3.0


class GracefulStop(Callback):
    """Saves `path` and ends the run at the first step after SIGINT, SIGTERM or SIGUSR1. A second Ctrl-C ends it at
    once.

    Signals reach the processes of a run at different moments, and a process that left alone would leave the
    others waiting in a collective. So they vote: after each step every process contributes whether it was
    asked to stop, and all leave after the same step. The vote runs on CPU sockets of its own and is read
    one step later, when it has long arrived, so neither the device nor the communication of training waits
    for it.

    The data module can ask as well, on any process, with a reason as its `stop_reason`. Then the run ends with a
    `UserError` that tells all processes' reasons.

    The run ends where the checkpoint is exact: after an optimizer step, so not within an accumulation of gradients,
    and not between a step and the validation that is due after it, but in that validation, which then starts over.
    torchrun waits 30 seconds for that, or as many as TORCH_ELASTIC_SHUTDOWN_TIMEOUT in the environment says.

    Args:
        path: checkpoint file to write.

    Attributes:
        signal: the number of the signal that has ended the run, the same on all processes; None before.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self._requested_at: float | None = None
        self._requested_by = 0  # the signal's number
        self._reason: str | None = None
        self.signal: int | None = None
        self._agreed = False
        self._group: Any = None  # a gloo ProcessGroup, if there are other processes
        self._vote: tuple[torch.Tensor, dist.Work] | None = None
        self._previous_handlers: dict[int, Any] = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._requested_at = None
        self._reason = None
        self._vote = None
        self.signal = None
        self._agreed = False
        self._group = vote_group()

    # Not earlier: Lightning would call a handler that it finds after its own, which for SIGTERM talks to the
    # other processes in the middle of whatever they are doing.
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {s: signal.signal(s, self._on_signal) for s in SIGNALS}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._agreed = self._agreed or self._count_votes(trainer)
        if self._agreed and not within_accumulation(trainer) and not before_validation_or_epoch_end(trainer):
            self._stop(trainer)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._agreed = self._agreed or self._count_votes(trainer)
            if self._agreed and not within_accumulation(trainer):
                _rewind_validation(trainer)
                self._stop(trainer)

    # After an exception they stay, so that the second of two signals does not cut Lightning's clean-up short.
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}
        self._group = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._requested_at is None:
            self._requested_at, self._requested_by = now, number
        # To a second Ctrl-C torchrun's answer is SIGTERM to the processes, which are in sessions of their own.
        elif signal.SIGINT in (number, self._requested_by) and now - self._requested_at > _SAME_PRESS_S:
            raise KeyboardInterrupt

    def _stop(self, trainer: Trainer) -> None:
        reasons = self._all_reasons()
        save_checkpoint(trainer, self.path)
        say(trainer, f"interrupted after step {trainer.global_step}: saved {self.path}")
        if reasons:
            raise UserError("; ".join(reasons))
        raise KeyboardInterrupt

    def _count_votes(self, trainer: Trainer) -> bool:
        """Whether any process was asked to stop before its last step but one."""
        self._reason = self._reason or getattr(trainer.datamodule, "stop_reason", None)  # type: ignore[attr-defined]
        requested = self._requested_at is not None or self._reason is not None
        if self._group is None:
            return requested
        last_vote = self._vote
        ballot = torch.tensor([int(requested)])
        work = dist.all_reduce(ballot, dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._vote = (ballot, work)
        if last_vote is None:
            return False
        last_vote[1].wait()
        return bool(last_vote[0].item())

    def _all_reasons(self) -> list[str]:
        """The processes' reasons, each once. To be called by all of them after the same step."""
        asked: list[Any] = [(self._reason, self._requested_by)]
        if self._group is not None:
            asked *= dist.get_world_size(self._group)
            dist.all_gather_object(asked, (self._reason, self._requested_by), group=self._group)
        # A signal may have reached some of the processes only.
        self.signal = max(number for _, number in asked) or None
        return list(dict.fromkeys(reason for reason, _ in asked if reason is not None))


def _rewind_validation(trainer: Trainer) -> None:
    """Makes the checkpoint one from which validation starts over.

    Metrics keep no counts in a checkpoint. Left alone, Lightning would take the broken-off validation for
    done.
    """
    progress = trainer.fit_loop.epoch_loop.val_loop.batch_progress
    progress.reset_on_run()
    # The counts of a validation whose first step has begun and not ended.
    total: Any = progress.total
    total.processed = total.completed = total.started - 1
