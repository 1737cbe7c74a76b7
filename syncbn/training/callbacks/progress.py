"""The progress bar: where the whole run stands, how fast it is and how long it will take."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from statistics import fmean
from typing import Any

import lightning.pytorch.callbacks as lightning_callbacks
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

_REFRESH_S = 0.5  # each reads the loss from the device
_RECENT_STEPS = 100
_RECENT_VALIDATIONS = 5


class Pace:
    """How long steps and validations take, by the recent ones.

    A step is all that lies between two steps' ends, waiting for data included, but for validations. The first step,
    in which communicators are made and kernels are chosen, is no measure of the others and counts not at all.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._steps: deque[tuple[float, int]] = deque(maxlen=_RECENT_STEPS)  # seconds, images
        self._validations: deque[float] = deque(maxlen=_RECENT_VALIDATIONS)
        self._first = True

    def start(self) -> None:
        """A step, or a validation, begins now."""
        self._since = self._clock()

    def step(self, images: int) -> None:
        """A step with so many images has ended; the next one begins."""
        elapsed = self._elapsed()
        if not self._first:
            self._steps.append((elapsed, images))
        self._first = False

    def validation(self) -> None:
        """A validation has ended; a step begins."""
        self._validations.append(self._elapsed())

    @property
    def images_per_second(self) -> float:
        """0 before the second step has ended."""
        seconds = sum(each[0] for each in self._steps)
        return sum(each[1] for each in self._steps) / seconds if seconds > 0 else 0.0

    def remaining(self, steps: float, validations: float) -> float:
        """Seconds that so many steps and validations will take; infinite where that is not known."""
        if not self._steps or not math.isfinite(steps):
            return math.inf
        of_validation = fmean(self._validations) if self._validations else 0.0
        return steps * fmean(each[0] for each in self._steps) + validations * of_validation

    def _elapsed(self) -> float:
        now = self._clock()
        elapsed, self._since = now - self._since, now
        return elapsed


class ProgressBar(lightning_callbacks.ProgressBar):
    """One bar for the whole run, on a terminal, with images/s of all processes and the time that is left.

    It is drawn on standard output if that is a terminal, else on standard error; what is printed meanwhile appears
    above it. Drawing happens between steps, at most twice a second, in no thread of its own: loader processes may be
    forked at any time.

    The rate is that of this process times the number of processes, which synchronization keeps in step.

    Args:
        metrics: names of metrics that the task logs with ``prog_bar=True``, to be shown with their last values.
    """

    def __init__(self, metrics: Sequence[str] = ("loss",)) -> None:
        super().__init__()
        self.metrics = tuple(metrics)
        self._enabled = True
        self._pace = Pace()
        self._progress: Progress | None = None
        self._bar = TaskID(0)
        self._drawn = 0.0
        self._to_stdout = True

    # ---- what Lightning asks of a progress bar

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False
        self._stop()

    def print(self, *values: Any, **_: Any) -> None:
        """Prints above the bar, or plainly where there is none."""
        if self._progress is None or not self._to_stdout:
            print(*values, flush=True)
        else:
            self._progress.console.print(*values, markup=False, highlight=False, soft_wrap=True)

    # ---- training

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pace = Pace()
        self._start(_total_batches(trainer), _batches_done(trainer), _epoch(trainer))

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pace.start()
        self._draw(trainer, force=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._pace.step(images_of(batch))
        self._draw(trainer, force=trainer.is_last_batch)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    # ---- validation, within training or by itself

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pace.start()
        if trainer.state.fn is TrainerFn.VALIDATING:
            self._start(_batches_to_validate(trainer), 0, "validating")

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        done = batch_idx + 1
        if trainer.state.fn is TrainerFn.VALIDATING:
            self._update(trainer, done, "validating", "")
        elif not trainer.sanity_checking:
            total = _batches_to_validate(trainer)
            share = f" {done / total:4.0%}" if math.isfinite(total) and total else ""
            self._update(trainer, _batches_done(trainer), f"{_epoch(trainer)}, validating{share}", self._left(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn is TrainerFn.VALIDATING:
            self._stop()
        elif not trainer.sanity_checking:
            self._pace.validation()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop()

    # ---- the bar itself

    def _start(self, total: float, done: int, description: str) -> None:
        self._stop()
        if not self._enabled:
            return
        self._to_stdout = sys.stdout.isatty()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}"),
            console=Console(stderr=not self._to_stdout),
            auto_refresh=False,
            transient=True,
            expand=True,
            redirect_stdout=self._to_stdout,
            redirect_stderr=sys.stderr.isatty(),
        )
        known = total if math.isfinite(total) else None
        self._bar = self._progress.add_task(description, total=known, completed=done, said="")
        self._drawn = 0.0
        self._progress.start()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _draw(self, trainer: Trainer, force: bool = False) -> None:
        if self._progress is not None and (force or time.monotonic() - self._drawn >= _REFRESH_S):
            known = trainer.progress_bar_metrics
            said = [f"{name} {known[name]:.4f}" for name in self.metrics if name in known]
            if rate := self._pace.images_per_second:
                said.append(f"{_rounded(rate * trainer.world_size)} images/s")
            said.append(self._left(trainer))
            self._update(trainer, _batches_done(trainer), _epoch(trainer), "  ".join(filter(None, said)), force=True)

    def _update(self, trainer: Trainer, done: int, description: str, said: str, force: bool = False) -> None:
        now = time.monotonic()
        if self._progress is not None and (force or now - self._drawn >= _REFRESH_S):
            self._drawn = now
            self._progress.update(self._bar, completed=done, description=description, said=said, refresh=True)

    def _left(self, trainer: Trainer) -> str:
        steps = _total_batches(trainer) - _batches_done(trainer)
        seconds = min([self._pace.remaining(steps, _validations_left(trainer)), *_time_limits(trainer)])
        return f"{timedelta(seconds=round(seconds))} left" if math.isfinite(seconds) else ""


def images_of(batch: Any) -> int:
    """How many images a batch has; 0 where that cannot be told."""
    images = batch.get("image") if isinstance(batch, Mapping) else batch
    while isinstance(images, (list, tuple)) and images and isinstance(images[0], (list, tuple)):
        images = images[0]
    try:
        return len(images)  # type: ignore[arg-type]
    except TypeError:
        return 0


def _total_batches(trainer: Trainer) -> float:
    """Batches of the whole run on this process, as far as epochs or steps limit it."""
    limits = []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        limits.append(trainer.max_epochs * float(trainer.num_training_batches))
    if trainer.max_steps >= 0:
        limits.append(float(trainer.max_steps * trainer.accumulate_grad_batches))
    return min(limits, default=math.inf)


def _batches_done(trainer: Trainer) -> int:
    return trainer.fit_loop.epoch_loop.total_batch_idx + 1


def _validations_left(trainer: Trainer) -> float:
    """Whole validations before the end of the run, if they come at the ends of epochs."""
    if not trainer.enable_validation or trainer.max_epochs is None or trainer.max_epochs < 0:
        return 0.0
    every = trainer.check_val_every_n_epoch or 1
    return trainer.max_epochs // every - trainer.current_epoch // every


def _batches_to_validate(trainer: Trainer) -> float:
    batches = trainer.num_val_batches
    return sum(batches) if isinstance(batches, list) else batches


def _time_limits(trainer: Trainer) -> list[float]:
    timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]  # type: ignore[attr-defined]
    left = [timer.time_remaining() for timer in timers]
    return [max(seconds, 0.0) for seconds in left if seconds is not None]


def _epoch(trainer: Trainer) -> str:
    of = f"/{trainer.max_epochs}" if trainer.max_epochs is not None and trainer.max_epochs > 0 else ""
    return f"epoch {trainer.current_epoch + 1}{of}"


def _rounded(rate: float) -> str:
    return f"{rate:.0f}" if rate >= 20 else f"{rate:.1f}"
