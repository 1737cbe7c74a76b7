"""The callback that shows what normalization over all processes costs, and what it sees."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from ..samples import count, layout_of
from ..traffic import Row, Snapshot, total_seconds
from .findings import Finding, Findings, Thresholds, Window, in_words
from .history import History
from .readings import Reading, Readings

_PREFIX = "statistics"
_PICTURES = (".png", ".svg", ".pdf")


class StatisticsMonitor(Callback):
    """Logs what a model's batch normalization costs and sees, warns of what is wrong, and leaves a report.

    Every so many steps it looks: at how long the exchanges have taken since the last time, at the messages of this
    step, and at the running statistics. The other steps cost two readings of a clock; a sampled one some small
    operations for all layers together, a small all-reduce and one transfer to the host. Nothing that is computed
    changes. With accumulated gradients the first batch of a step is looked at.

    To every logger of the Trainer go, named ``statistics/...``:

    - ``exchange_share``, ``exchange_ms``: of a batch, as sampled (see ``syncbn.traffic``); of this process, the first
    - ``samples``: in the batches of all processes; ``skipped_updates``: by batches that were not finite, so far
    - of each layer: ``values`` per channel that it normalizes by; ``mean_stray`` and ``var_stray``, how far a process's
      statistics are from all processes'; ``collapsed``, the share of channels whose variance is below a threshold;
      ``mean_lag`` and ``var_lag``, how far the running statistics are from the batch's (see ``readings``)

    What is found to be wrong is told in a warning, once for each layer: a collapsed variance, running statistics that
    do not move, are far off or not finite, batches that were not finite, and layers that cannot be seen (see
    ``findings``).

    Args:
        every_n_steps: how often to look: at the first step of a fit, and at each multiple.
        report: file for the page that is written when training ends, also by an exception: .png, .svg or .pdf. It is
            relative to the Trainer's ``default_root_dir``. None for none; it needs matplotlib.
        per_layer: whether to log the layers' numbers, too.
        collapsed_below: a channel has collapsed where its variance is less, in units of the layer's ε.
        collapsed_share: of a layer's channels: from there on the layer has.
        far: how far off running statistics may be: in standard deviations for the mean, in factors of e for the
            variance.

    Raises:
        ValueError: a number is outside its range, or the report's name ends in something else.
    """

    def __init__(
        self,
        every_n_steps: int = 50,
        report: str | Path | None = "statistics.png",
        *,
        per_layer: bool = True,
        collapsed_below: float = 1.0,
        collapsed_share: float = 0.5,
        far: float = 1.0,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"every_n_steps must be at least 1, got {every_n_steps}")
        for name, value in {"collapsed_below": collapsed_below, "collapsed_share": collapsed_share, "far": far}.items():
            if not value > 0:
                raise ValueError(f"{name} must be greater than 0, got {value}")
        if report is not None and Path(report).suffix not in _PICTURES:
            raise ValueError(f"expected a report that ends in {', '.join(_PICTURES)}, got {str(report)!r}")
        self.every_n_steps = every_n_steps
        self.report = None if report is None else Path(report)
        self.per_layer = per_layer
        self.thresholds = Thresholds(collapsed_below, collapsed_share, far)
        self._readings: Readings | None = None
        self._sampling = False
        self._loaded: dict[str, Any] | None = None

    @property
    def findings(self) -> list[Finding]:
        """What has been found in this fit."""
        return self._findings.all if self._readings is not None else []

    # ---- the Trainer's hooks

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        readings = Readings(pl_module, pl_module.device, self.thresholds.collapsed_below)
        self._readings = readings
        self._history = History(readings.names)
        loaded, self._loaded = self._loaded, None
        if loaded is not None:
            self._history.load_state_dict(loaded)
        self._findings = Findings(readings.names, readings.layers, self.thresholds)
        self._start = self._traffic()
        self._batches = 0
        self._due = trainer.global_step
        self._last: _Since | None = None
        self._sampling = False
        self._ended = False
        self._since = time.perf_counter()  # a run that is resumed within an epoch does not start it
        self._tell_at_once()

    def _tell_at_once(self) -> None:
        """What would be a pity to learn when weeks of training have ended."""
        assert self._readings is not None
        if not self._readings.layers:
            rank_zero_warn(
                "StatisticsMonitor has nothing to look at: the model has no batch normalization, or only lazy layers"
            )
        if self.report is not None and find_spec("matplotlib") is None:
            rank_zero_warn(
                "StatisticsMonitor writes no report without matplotlib: pip install matplotlib, or report=None"
            )

    # A step is all that lies between two steps' ends, waiting for data included, but for validations.
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_step < self._due or self._readings is None or not self._readings.layers:
            return
        self._due = (trainer.global_step // self.every_n_steps + 1) * self.every_n_steps
        self._sampling = True
        self._at_start = self._traffic()
        self._readings.begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        if self._last is not None:
            self._last.batches += 1
            self._last.seconds += time.perf_counter() - self._since
        if self._sampling:
            self._sample(trainer, batch)
        self._since = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._readings is not None and self._last is not None and self._last.batches:
            windows = self._windows(self._last, self._traffic(), self._readings.updates())
            self._warn(self._findings.of_windows(trainer.global_step, windows))
        self._end(trainer, None)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._end(trainer, exception)

    def state_dict(self) -> dict[str, Any]:
        return self._history.state_dict() if self._readings is not None else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict or None

    # ---- a sampled step

    def _sample(self, trainer: Trainer, batch: Any) -> None:
        """Collective."""
        assert self._readings is not None
        self._sampling = False
        readings = self._readings.end(_samples(trainer.train_dataloader, batch))
        now, step = self._traffic(), trainer.global_step
        updates = [reading.updates for reading in readings]
        batch_s = exchange_s = math.nan
        found = []
        if (last := self._last) is not None:
            batch_s = last.seconds / last.batches
            exchange_s = total_seconds(self._rows(last.traffic)) / last.batches
            found += self._findings.of_windows(step, self._windows(last, now, updates))
        found += self._findings.of_step(step, readings, self._forward(now, self._at_start))
        self._warn(found)
        samples = max(reading.samples for reading in readings)
        skipped = sum(self._findings.skipped)
        self._history.add([step, batch_s, exchange_s, samples, skipped], readings)
        self._log(trainer, batch_s, exchange_s, samples, skipped, readings)
        self._last = _Since(now, updates)

    def _windows(self, last: _Since, now: list[Snapshot], updates: list[float]) -> list[Window]:
        """What has been in each layer since the last sampled step."""
        triples = zip(self._forward(now, last.traffic), updates, last.updates, strict=True)
        return [Window(last.batches, exchanged, after - before) for exchanged, after, before in triples]

    def _traffic(self) -> list[Snapshot]:
        assert self._readings is not None
        return [exchange.traffic.snapshot() for exchange in self._readings.exchanges]

    def _rows(self, since: list[Snapshot]) -> list[Row]:
        assert self._readings is not None
        exchanges = zip(self._readings.exchanges, since, strict=True)
        return [row for each, before in exchanges for row in each.traffic.rows(each.layer_name, before)]

    def _forward(self, now: list[Snapshot], before: list[Snapshot]) -> list[int]:
        """How often each layer has exchanged in forward between two moments."""
        assert self._readings is not None
        numbers = [0] * len(self._readings.layers)
        for place, (exchange, index) in self._readings.users.items():
            at = self._readings.exchanges.index(exchange)
            numbers[place] = _calls(now[at], index) - _calls(before[at], index)
        return numbers

    def _log(
        self,
        trainer: Trainer,
        batch_s: float,
        exchange_s: float,
        samples: float,
        skipped: float,
        readings: list[Reading],
    ) -> None:
        assert self._readings is not None
        numbers = {
            "exchange_share": exchange_s / batch_s if batch_s else math.nan,
            "exchange_ms": 1e3 * exchange_s,
            "samples": samples,
            "skipped_updates": skipped,
        }
        if self.per_layer:
            for name, reading in zip(self._readings.names, readings, strict=True):
                for each in ("values", "mean_stray", "var_stray", "collapsed", "mean_lag", "var_lag"):
                    numbers[f"{each}/{name}"] = getattr(reading, each)
        known = {f"{_PREFIX}/{name}": value for name, value in numbers.items() if math.isfinite(value)}
        for logger in trainer.loggers:
            logger.log_metrics(known, step=trainer.fit_loop.epoch_loop._batches_that_stepped)

    @staticmethod
    def _warn(findings: Iterable[Finding]) -> None:
        for sentence in in_words(list(findings)):
            rank_zero_warn(f"batch normalization, {sentence}")

    # ---- the end

    def _end(self, trainer: Trainer, error: BaseException | None) -> None:
        if self._readings is None or self._ended:
            return
        self._ended = True
        self._readings.abandon()
        self._sampling = False
        if self.report is None or not trainer.is_global_zero or not len(self._history):
            return
        if find_spec("matplotlib") is None:
            return
        from .report import Page, write

        path = Path(trainer.default_root_dir) / self.report
        try:
            rows = self._rows(self._start)
            write(
                Page(
                    "Batch normalization over all processes",
                    self._facts(trainer, rows, error),
                    self._history,
                    rows,
                    self._batches,
                    self._findings.all,
                    self.thresholds.far,
                ),
                path,
            )
        except Exception as failure:  # a full disk, a broken device, matplotlib: it must not hide what has happened
            rank_zero_warn(f"the report of StatisticsMonitor could not be written to {path}: {failure}")

    def _facts(self, trainer: Trainer, rows: list[Row], error: BaseException | None) -> list[str]:
        assert self._readings is not None
        ended = "" if error is None else f", ended by {type(error).__name__}"
        processes = f"{trainer.world_size} process{'es' if trainer.world_size > 1 else ''}"
        layers = f"{len(self._readings.users)} of {len(self._readings.layers)} batch normalization layers synchronized"
        facts = [
            f"{trainer.global_step} steps{ended}; {processes}; {layers}; looked at every {self.every_n_steps} steps, "
            f"{len(self._history)} times here."
        ]
        exchange, batch = (
            [value for value in self._history.of_step(name) if not math.isnan(value)]
            for name in ("exchange_s", "batch_s")
        )
        if exchange and batch:
            ms, of = 1e3 * sum(exchange) / len(exchange), 1e3 * sum(batch) / len(batch)
            calls, size = sum(row.calls for row in rows), sum(row.bytes for row in rows)
            facts.append(
                f"Exchanging took {ms:.2f} of {of:.1f} ms a step ({100 * ms / of:.1f}%) on this process, waiting for "
                f"the others included: {calls / max(self._batches, 1):.0f} all-reduces of "
                f"{size / max(calls, 1) / 1e3:.1f} kB on average."
            )
        samples = [value for value in self._history.of_step("samples") if not math.isnan(value)]
        if samples:
            facts.append(f"{samples[-1]:g} samples a step, all processes together.")
        return facts


def _calls(snapshot: Snapshot, index: int) -> int:
    counts = snapshot.get((index, "forward"))
    return 0 if counts is None else counts.calls


class _Since:
    """What has been since the last sampled step."""

    def __init__(self, traffic: list[Snapshot], updates: list[float]) -> None:
        self.traffic = traffic
        self.updates = updates
        self.batches = 0
        self.seconds = 0.0


def _samples(loader: Any, batch: Any) -> float:
    """How many samples a batch has; NaN where nothing tells."""
    try:
        return count(batch, layout_of(loader, batch))
    except (ValueError, TypeError):
        return math.nan
