"""`python -m syncbn.training.study`: trains, validates and draws all of it; see docs/study.md."""

import argparse
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch

from syncbn.training.errors import UserError, fail, one_line
from syncbn.training.study.commit import commit_of_this_code
from syncbn.training.study.jobs import JobError, train
from syncbn.training.study.plan import BATCHES, GLOBAL_BATCH, Run, plan
from syncbn.training.study.results import Row, is_done, is_of, read_rows, table, without, write_rows

_INTERRUPTED_STATUS = 130
_VAL_SIZE = 400
# Seconds rather than minutes: shows that all of it works, and nothing else.
_QUICK = ["model.widths=[4,8]", "data.train_size=16", "trainer.max_epochs=2", "callbacks.strays.every_n_steps=1"]
_QUICK_BATCHES = (4, 8)
_QUICK_VAL_SIZE = 8


def main() -> NoReturn:
    """Exit status: 0, 1 if a run has failed, 2 after a user's mistake, 130 after Ctrl-C."""
    # A scheduler's end is like Ctrl-C: training jobs must not be left behind. A shell's background jobs ignore SIGINT.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    options = _options(sys.argv[1:])
    try:
        study = Study(options)
    except UserError as error:
        fail(str(error))
    try:
        failed = study.run()
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", flush=True)
        raise SystemExit(_INTERRUPTED_STATUS) from None
    raise SystemExit(1 if failed else 0)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/study.sh",
        description=f"Trains digits-seg with {GLOBAL_BATCH} images a step, spread over 8, 4, 2 and 1 processes, with "
        f"local and with synchronized normalization. Runs that are in the results already are skipped.",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/study"), help="folder of the results (%(default)s)")
    parser.add_argument("--seeds", type=int, default=None, help="how many: 0, 1, ... (3)")
    parser.add_argument(
        "--batches", type=int, nargs="+", choices=BATCHES, default=None, help="images per process (all)"
    )
    parser.add_argument("--quick", action="store_true", help="tiny, in less than a minute; its figures mean nothing")
    parser.add_argument("overrides", nargs="*", help="for Hydra, in every run: trainer.max_epochs=12")
    options = parser.parse_args(arguments)
    if options.seeds is None:
        options.seeds = 1 if options.quick else 3
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1, got {options.seeds}")
    return options


class Study:
    """All runs, their rows and where these are.

    Raises:
        UserError: the folder holds a study with other settings.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.out: Path = options.out.resolve()
        batches = options.batches or (_QUICK_BATCHES if options.quick else BATCHES)
        self.runs = plan(options.seeds, tuple(batches))
        self.overrides = [*(_QUICK if options.quick else []), *options.overrides]
        self.val_size = _QUICK_VAL_SIZE if options.quick else _VAL_SIZE
        self.commit = commit_of_this_code()
        self.out.mkdir(parents=True, exist_ok=True)
        self._require_same_settings({"overrides": self.overrides, "val_size": self.val_size})
        self.rows = read_rows(self.results)
        self._seconds: dict[Run, float] = {}  # of the runs that were made now

    @property
    def results(self) -> Path:
        return self.out / "results.csv"

    def folder(self, run: Run) -> Path:
        """Where a run's configuration, checkpoint, strays and log are."""
        return self.out / "runs" / run.name

    def run(self) -> list[Run]:
        """Makes what is missing, then table and pictures; returns the runs that have failed."""
        missing = [run for run in self.runs if not is_done(run, self.rows)]
        if len(missing) < len(self.runs):
            print(f"{len(self.runs) - len(missing)} of {len(self.runs)} runs are in {self.results} already", flush=True)
        failed = [run for position, run in enumerate(missing) if not self._make(run, position, missing)]
        self._report()
        if failed:
            print(f"failed: {', '.join(run.name for run in failed)}", file=sys.stderr, flush=True)
        return failed

    def _make(self, run: Run, position: int, missing: list[Run]) -> bool:
        """Trains and validates one run; False if that has failed."""
        from syncbn.training.study.evaluation import evaluate  # seconds to import: not to skip runs

        folder = self.folder(run)
        start = time.monotonic()
        place = f"[{position + 1}/{len(missing)}] {run.name}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            train(run, folder, self.overrides)
            trained = time.monotonic() - start
            found = evaluate(run, folder, self.val_size)
        except JobError as error:
            print(f"{place}  FAILED: {error}", flush=True)
            return False
        except Exception as error:  # one run's trouble is not the study's
            print(f"{place}  FAILED: {type(error).__name__}: {one_line(str(error))} (see {folder})", flush=True)
            return False
        common: dict[str, Any] = {
            "seed": run.seed,
            "batch": run.batch,
            "processes": run.processes,
            "norm": run.norm,
            "steps": found.steps,
            "images": found.images,
            "seconds": round(trained, 1),
            "torch": torch.__version__,
            "commit": self.commit,
        }
        rows = [
            Row(statistics=kind, miou=round(score.miou, 5), val_loss=round(score.val_loss, 5), **common)
            for kind, score in found.scores.items()
        ]
        self.rows = [*without(run, self.rows), *rows]
        write_rows(self.results, self.rows)
        self._seconds[run] = time.monotonic() - start
        shown = "  ".join(f"{row.statistics} {row.miou:.3f}" for row in rows)
        left = _duration(self._seconds_left(missing[position + 1 :]))
        print(f"{place}  mIoU {shown}  {self._seconds[run]:.0f} s  {left} left", flush=True)
        return True

    def _seconds_left(self, runs: Sequence[Run]) -> float:
        """An estimate: a run takes as long as another of its kind did, else as its number of processes suggests."""
        known = {(run.batch, run.norm): seconds for run, seconds in self._seconds.items()}
        per_weight = sum(self._seconds.values()) / sum(_weight(run) for run in self._seconds)
        return sum(known.get((run.batch, run.norm), per_weight * _weight(run)) for run in runs)

    def _report(self) -> None:
        planned = [row for row in self.rows if any(is_of(row, run) for run in self.runs)]
        if not planned:
            return
        from syncbn.training.study.plots import draw_scores, draw_strays, read_strays

        text = table(planned)
        (self.out / "table.md").write_text(f"{text}\n")
        print(f"\n{text}\n", flush=True)
        draw_scores(planned, self.out / "miou.png")
        done = [run for run in self.runs if is_done(run, planned)]
        strays = [stray for run in done for stray in read_strays(run, self.folder(run) / "strays.csv")]
        if any(stray.run.processes > 1 for stray in strays):
            draw_strays(strays, self.out / "strays.png")
        print(f"results: {self.out}", flush=True)

    def _require_same_settings(self, settings: dict[str, Any]) -> None:
        path = self.out / "study.json"
        if not path.is_file():
            path.write_text(json.dumps(settings, indent=1) + "\n")
            return
        if (before := json.loads(path.read_text())) != settings:
            raise UserError(f"{self.out} holds a study with {before}, this one has {settings}: choose another --out")


def _weight(run: Run) -> float:
    """How long a run takes, in some unit: each process imports its libraries, and they share the cores."""
    return 4 + run.processes * (1.5 if run.norm == "sync" else 1.0)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


if __name__ == "__main__":
    main()
