"""The rows of the study: kept in a CSV file, shown as a table."""

import csv
import io
import os
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from syncbn.training.errors import UserError
from syncbn.training.study.plan import GLOBAL_BATCH, LOCAL, RUNNING, STATISTICS, SYNC, Run


@dataclass(frozen=True)
class Row:
    """One trained model, validated with one kind of statistics."""

    seed: int
    batch: int  # images per process
    processes: int
    norm: str  # in training: local or sync
    statistics: str  # in validation: running or population
    miou: float
    val_loss: float
    steps: int
    images: int  # seen in training, over all processes
    seconds: float  # of the training job, from its start to its end
    torch: str
    commit: str


# A column in the table and a line in the plot: how it was trained, and what it was validated with.
KINDS = tuple((norm, kind) for norm in (LOCAL, SYNC) for kind in STATISTICS)


def label(norm: str, kind: str) -> str:
    return norm if kind == RUNNING else f"{norm}, recalibrated"


def read_rows(path: Path) -> list[Row]:
    """The rows of the file; none if there is no file.

    Raises:
        UserError: the file holds something else.
    """
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        try:
            return [_row(values) for values in csv.DictReader(file)]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} does not hold a study's rows ({error!r}): choose another --out") from error


def _row(values: dict[str, str]) -> Row:
    return Row(**{field.name: field.type(values[field.name]) for field in fields(Row)})  # type: ignore[operator]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Replaces the file as a whole: whatever happens, there is a valid one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text.getvalue())
    os.replace(partial, path)


def is_done(run: Run, rows: Sequence[Row]) -> bool:
    """Whether the file has all that is to be measured of a run."""
    return {row.statistics for row in rows if is_of(row, run)} == set(STATISTICS)


def without(run: Run, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if not is_of(row, run)]


def is_of(row: Row, run: Run) -> bool:
    """Whether the row is of this run."""
    return (row.seed, row.batch, row.norm) == (run.seed, run.batch, run.norm)


def scores(rows: Sequence[Row], batch: int, norm: str, kind: str) -> dict[int, float]:
    """Mean IoU by seed. One process is its own reference, whatever ``norm`` is asked for."""
    trained = LOCAL if batch == GLOBAL_BATCH else norm
    return {row.seed: row.miou for row in rows if (row.batch, row.norm, row.statistics) == (batch, trained, kind)}


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of n - 1) of the seeds; the deviation of a single one is 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def table(rows: Sequence[Row]) -> str:
    """Mean IoU in Markdown: a line for each batch per process, mean ± standard deviation over the seeds."""
    batches = sorted({row.batch for row in rows})
    lines = [
        f"| images per process | processes | {' | '.join(label(*kind) for kind in KINDS)} |",
        "| ---: | ---: |" + " ---: |" * len(KINDS),
    ]
    for batch in batches:
        cells = [_cell(list(scores(rows, batch, *kind).values())) for kind in KINDS]
        if batch == GLOBAL_BATCH:  # one process: nothing to synchronize
            cells[2:] = ["", ""]
        lines.append(f"| {batch} | {GLOBAL_BATCH // batch} | {' | '.join(cells)} |")
    seeds = {row.seed for row in rows}
    commits = ", ".join(sorted({row.commit for row in rows}))
    versions = ", ".join(sorted({row.torch for row in rows}))
    steps = ", ".join(str(count) for count in sorted({row.steps for row in rows}))
    about = (
        f"Mean IoU, {len(seeds)} seed(s), {steps} steps of {GLOBAL_BATCH} images; torch {versions}, commit {commits}"
    )
    return "\n".join([about, "", *lines])


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.3f} ± {deviation:.3f}" if len(values) > 1 else f"{mean:.3f}"
