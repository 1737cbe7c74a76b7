"""Lightning's loggers, for runs that are started more than once: no row is lost, and no step is logged twice."""

import csv
import io
import os
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch import loggers
from lightning.pytorch.core.saving import save_hparams_to_yaml
from lightning.pytorch.loggers.logger import rank_zero_experiment

from syncbn.training.checkpoints import cannot_write, write_text

_METRICS = "metrics.csv"
_HPARAMS = "hparams.yaml"
_VERSION = "version_"


class CSVLogger(loggers.CSVLogger):
    """Writes `metrics.csv`; a run that is continued goes on in the same file.

    Lightning's deletes the file that it finds. This one keeps its rows up to the step that the run goes on from, and
    those after it are written anew. What belongs to another run stays in its own `version_<n>`. A full disk does not
    end the run: rows wait in memory for the next time.
    """

    _continue_at: int | None = None

    def continue_from(self, step: int | None) -> None:
        """To be called before the first row: the optimizer steps taken so far; None for another run."""
        self._continue_at = step
        versions = [path.name.removeprefix(_VERSION) for path in Path(self.root_dir).glob(f"{_VERSION}*")]
        latest = max((int(number) for number in versions if number.isdigit()), default=None)
        if step is not None and self._version is None and latest is not None:
            self._version = latest

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        if self._experiment is None:
            self._experiment = _Rows(Path(self.log_dir), self._continue_at)  # type: ignore[assignment]
        return self._experiment


class TensorBoardLogger(loggers.TensorBoardLogger):
    """Tells TensorBoard which step a run goes on from, so that curves do not turn back on themselves."""

    def continue_from(self, step: int | None) -> None:
        """To be called before anything is logged: the optimizer steps taken so far; None for another run."""
        self._kwargs["purge_step"] = step or 0


class _Rows:
    """What `loggers.CSVLogger` writes with: `metrics` are rows that are not in the file yet."""

    def __init__(self, folder: Path, continue_at: int | None) -> None:
        self.folder = folder
        self.path = folder / _METRICS
        self.metrics: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.hparams: dict[str, Any] = {}
        self._warned = False
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.is_file() and continue_at is not None:
            with self.path.open(newline="") as file:
                reader = csv.DictReader(file)
                rows = [row for row in reader if _precedes(row, continue_at)]
                self.keys = list(reader.fieldnames or ())
            self._replace(rows)
        elif self.path.is_file():
            self.path.unlink()

    def log_metrics(self, metrics: dict[str, Any], step: int) -> None:
        self.metrics.append({name: getattr(value, "item", lambda v=value: v)() for name, value in metrics.items()})
        self.metrics[-1]["step"] = step

    def log_hparams(self, params: dict[str, Any] | Namespace) -> None:
        self.hparams.update(params if isinstance(params, dict) else vars(params))
        save_hparams_to_yaml(self.folder / _HPARAMS, self.hparams)

    def save(self) -> None:
        if not self.metrics:
            return
        try:
            self._append()
        except OSError as error:
            if not self._warned:
                warnings.warn(f"{cannot_write(self.path, error)}; its rows are kept until they can be", stacklevel=2)
                self._warned = True

    def _append(self) -> None:
        keys = sorted({*self.keys, *(key for row in self.metrics for key in row)})
        if keys != self.keys:
            rows: list[dict[str, Any]] = []
            if self.path.is_file():
                with self.path.open(newline="") as file:
                    rows = list(csv.DictReader(file))
            before, self.keys = self.keys, keys
            try:
                self._replace([*rows, *self.metrics])
            except OSError:
                self.keys = before
                raise
        else:
            end = self.path.stat().st_size
            try:
                with self.path.open("a", newline="") as file:
                    file.write(self._text(self.metrics))
            except OSError:
                os.truncate(self.path, end)  # no half row
                raise
        self.metrics = []

    def _replace(self, rows: list[dict[str, Any]]) -> None:
        write_text(self._text(rows, header=True), self.path)

    def _text(self, rows: list[dict[str, Any]], header: bool = False) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.keys)
        if header:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def _precedes(row: dict[str, Any], step: int) -> bool:
    # A process that is killed may leave half a row, of a step that comes again.
    whole = None not in row.values() and str(row.get("step")).isdigit()
    return whole and int(row["step"]) < step
