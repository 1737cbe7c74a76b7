"""A record of how far each process's batch statistics are from all processes', while a model trains."""

import csv
import io
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from syncbn.strays import Strays, StrayWatch

COLUMNS = ("step", "layer", "channels", "values", "mean_stray", "var_stray")


class StatisticsStrays(Callback):
    """Writes a CSV file: a row for each batch normalization layer and sampled step.

    `mean_stray` and `var_stray` are those of `syncbn.strays.Strays`, whose docstring has the formulas; `step` is the
    number of optimizer steps that were taken before; `values` is how many values a channel had over all processes.
    The batches of training are measured as they go through, whether layers are synchronized or not. A sampled step
    reads each layer's input once more and ends with one small all-reduce; the other steps cost nothing, and no step
    is changed by a bit. With accumulated gradients, a step's first batch is measured.

    Args:
        path: file to write. A run that is resumed keeps the rows of the steps before it.
        every_n_steps: steps 0, n, 2n, ... are measured.

    Raises:
        ValueError: `every_n_steps` is below 1.
    """

    def __init__(self, path: str, every_n_steps: int = 50) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        self.path = Path(path)
        self.every_n_steps = every_n_steps
        self._watch: StrayWatch | None = None
        self._last_step: int | None = None
        # On the device until the epoch ends: no step waits for the host.
        self._measured: list[tuple[int, StrayWatch, Strays]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = None
        self._measured = []
        self._begin_file(trainer.global_step)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if step % self.every_n_steps == 0 and step != self._last_step:
            self._last_step = step
            self._watch = StrayWatch(pl_module)
            self._watch.__enter__()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        watch = self._close()
        if watch is not None and self._last_step is not None:
            self._measured.append((self._last_step, watch, watch.measure()))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()
        self._flush()

    def _flush(self) -> None:
        measured, self._measured = self._measured, []
        if measured:
            self._write(measured)

    def _close(self) -> StrayWatch | None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.__exit__(None, None, None)
        return watch

    @rank_zero_only
    def _begin_file(self, first_step: int) -> None:
        kept: list[dict[str, str]] = []
        if first_step > 0 and self.path.is_file():
            with self.path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) < first_step]
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.partial")
        partial.write_text(text.getvalue())
        os.replace(partial, self.path)

    @rank_zero_only
    def _write(self, measured: list[tuple[int, StrayWatch, Strays]]) -> None:
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            for step, watch, strays in measured:
                numbers = zip(strays.values.tolist(), strays.mean.tolist(), strays.var.tolist(), strict=True)
                for name, channels, (values, mean, var) in zip(watch.names, watch.channels, numbers, strict=True):
                    writer.writerow([step, name, channels, f"{values:g}", f"{mean:.6g}", f"{var:.6g}"])
