"""What the console shows besides the progress bar: a line for each epoch, and a table at the end."""

import time
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only


class EpochLines(Callback):
    """One line per epoch, readable in a log file as well as under a progress bar.

    Args:
        metrics: what to show: label -> name of a logged metric. One that was not logged is left out.
    """

    def __init__(self, metrics: Mapping[str, str]) -> None:
        self.metrics = dict(metrics)
        self._epoch_start = 0.0
        self._first_step = 0

    # A run that is resumed within an epoch does not start that epoch once more.
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_start = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._epoch_start = time.monotonic()

    # After validation: Lightning validates within the training epoch.
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        known = any(name in trainer.callback_metrics for name in self.metrics.values())
        if trainer.global_step == self._first_step and not known:
            return  # resumed at the end of an epoch, which Lightning ends once more
        epochs = f"/{trainer.max_epochs}" if trainer.max_epochs and trainer.max_epochs > 0 else ""
        fields = [f"epoch {trainer.current_epoch + 1}{epochs}", f"step {trainer.global_step}"]
        fields += [
            f"{label} {float(trainer.callback_metrics[name]):.4f}"
            for label, name in self.metrics.items()
            if name in trainer.callback_metrics
        ]
        fields.append(f"{time.monotonic() - self._epoch_start:.1f} s")
        say(trainer, "  ".join(fields))


class FinalTable(Callback):
    """A table of metrics when the trained model is validated on its own, after `Trainer.fit`."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.VALIDATING or not trainer.is_global_zero:
            return
        rows = [
            (name.removeprefix("val/"), f"{float(value):.4f}")
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        ]
        say(trainer, table(("validation", "value"), sorted(rows, key=_of_one_class)))


def _of_one_class(row: tuple[str, str]) -> bool:
    # Sorting is stable: metrics of single classes stay in the classes' order, after those of the whole.
    return "/" in row[0]


def table(header: tuple[str, str], rows: list[tuple[str, str]]) -> str:
    """Two columns of text, the second flush right."""
    left = max(len(row[0]) for row in [header, *rows])
    right = max(len(row[1]) for row in [header, *rows])
    rule = "-" * (left + right + 3)
    lines = [f" {name:<{left}} {value:>{right}}" for name, value in [header, *rows]]
    return "\n".join([rule, lines[0], rule, *lines[1:], rule])


@rank_zero_only
def say(trainer: Trainer, *values: Any) -> None:
    """Prints on rank 0, above the progress bar if there is one."""
    bar = trainer.progress_bar_callback
    if bar is None:
        print(*values, flush=True)
    else:
        bar.print(*values)
