"""The study's two pictures."""

import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from syncbn.training.study.plan import GLOBAL_BATCH, LOCAL, POPULATION, RUNNING, SYNC, Run
from syncbn.training.study.results import KINDS, Row, label, mean_and_deviation, scores

_COLOURS = {LOCAL: "tab:red", SYNC: "tab:blue"}
_DODGE = 1.035  # factor between neighbouring kinds on the logarithmic axis, so that their points do not hide each other
_QUANTITIES = {
    "mean_stray": "means apart, in standard deviations",
    "var_stray": "logarithm of the variances' ratio",
}


def draw_scores(rows: Sequence[Row], path: Path) -> None:
    """Mean IoU against the images per process: mean and standard deviation over seeds, and every seed as a point."""
    figure = Figure(figsize=(7.6, 4.8), dpi=120, layout="constrained")
    axes: Axes = figure.subplots()
    batches = sorted({row.batch for row in rows})
    _draw_reference(axes, rows)
    for place, (norm, kind) in enumerate(KINDS):
        values = {batch: list(scores(rows, batch, norm, kind).values()) for batch in batches if batch < GLOBAL_BATCH}
        values = {batch: found for batch, found in values.items() if found}
        if not values:
            continue
        shift = _DODGE ** (place - (len(KINDS) - 1) / 2)
        _draw_kind(axes, norm, kind, {batch * shift: found for batch, found in values.items()})
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [f"{batch} × {GLOBAL_BATCH // batch}" for batch in batches])
    axes.minorticks_off()
    axes.set_xlabel("images per process × processes")
    axes.set_ylabel("mean IoU")
    axes.grid(alpha=0.3)
    axes.set_title(
        f"Digit scenes, {rows[0].steps} steps of {GLOBAL_BATCH} images, however these are spread", fontsize=11
    )
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(path)


def _draw_reference(axes: Axes, rows: Sequence[Row]) -> None:
    """One process with the whole batch: a line and a band across, since nothing is there to be spread."""
    values = list(scores(rows, GLOBAL_BATCH, LOCAL, RUNNING).values())
    if not values:
        return
    mean, deviation = mean_and_deviation(values)
    axes.axhspan(mean - deviation, mean + deviation, color="black", alpha=0.08, linewidth=0)
    axes.axhline(mean, color="black", linewidth=1, linestyle=":", label="one process, whole batch")
    axes.plot([GLOBAL_BATCH] * len(values), values, "o", color="black", markersize=4, alpha=0.3, markeredgewidth=0)
    axes.plot([GLOBAL_BATCH], [mean], "D", color="black", markersize=6)
    recalibrated = list(scores(rows, GLOBAL_BATCH, LOCAL, POPULATION).values())
    if recalibrated:
        mean, deviation = mean_and_deviation(recalibrated)
        axes.errorbar(
            [GLOBAL_BATCH * _DODGE],
            [mean],
            yerr=[deviation],
            color="black",
            marker="D",
            markerfacecolor="white",
            linestyle="none",
            capsize=3,
            label="one process, recalibrated",
        )


def _draw_kind(axes: Axes, norm: str, kind: str, values: dict[float, list[float]]) -> None:
    colour, running = _COLOURS[norm], kind == RUNNING
    for place, found in values.items():
        axes.plot([place] * len(found), found, "o", color=colour, markersize=4, alpha=0.3, markeredgewidth=0)
    summaries = [mean_and_deviation(found) for found in values.values()]
    axes.errorbar(
        list(values),
        [mean for mean, _ in summaries],
        yerr=[deviation for _, deviation in summaries],
        color=colour,
        linestyle="-" if running else "--",
        marker="o" if running else "s",
        markerfacecolor=colour if running else "white",
        markersize=6,
        linewidth=1.5,
        capsize=3,
        label=label(norm, kind),
    )


class Stray(NamedTuple):
    """One layer at one sampled step of one run."""

    run: Run
    step: int
    layer: str
    mean_stray: float
    var_stray: float


def read_strays(run: Run, path: Path) -> list[Stray]:
    """What the run's `StatisticsStrays` callback has left; nothing if there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [
            Stray(run, int(row["step"]), row["layer"], float(row["mean_stray"]), float(row["var_stray"]))
            for row in csv.DictReader(file)
        ]


def draw_strays(strays: Sequence[Stray], path: Path) -> None:
    """How far a process's statistics are from all processes', by layer: while training, and on average.

    A column for each batch per process has the course in the norm=local runs, a line for each layer, the first one
    darkest; the last column has the averages over all steps against the depth, for both norms. Means over the seeds.
    """
    batches = sorted({stray.run.batch for stray in strays if stray.run.processes > 1})
    layers = list(dict.fromkeys(stray.layer for stray in strays))
    colours = [colormaps["viridis"](0.95 * i / max(len(layers) - 1, 1)) for i in range(len(layers))]
    figure = Figure(figsize=(3.3 * len(batches) + 5.2, 6.6), dpi=110, layout="constrained")
    panels: Any = figure.subplots(
        2, len(batches) + 1, squeeze=False, sharey="row", width_ratios=[3] * len(batches) + [4]
    )
    for row, (quantity, title) in zip(panels, _QUANTITIES.items(), strict=True):
        for axes, batch in zip(row, batches, strict=False):
            for layer, colour in zip(layers, colours, strict=True):
                course = _course(strays, quantity, batch, LOCAL, layer)
                axes.plot(list(course), list(course.values()), color=colour, linewidth=1.2)
            axes.set_title(f"{batch} image{'s' if batch > 1 else ''} per process, local", fontsize=10)
        _draw_depths(row[-1], strays, quantity, batches, layers)
        row[0].set_ylabel(title)
        row[0].set_yscale("log")
        row[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        row[0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        row[0].yaxis.set_minor_formatter(NullFormatter())
        for axes in row:
            axes.grid(alpha=0.3, which="both")
    for axes in panels[-1][:-1]:
        axes.set_xlabel("step")
    panels[0][-1].tick_params(labelbottom=False)  # the same layers stand below
    panels[0][-1].legend(fontsize=7, frameon=False, ncols=2)
    names = [_short(layer) for layer in layers]
    handles = [Line2D([], [], color=colour, linewidth=2) for colour in colours]
    figure.legend(handles, names, loc="outside right upper", fontsize=8, frameon=False, title="layer")
    figure.suptitle("How far a process's batch statistics are from those of the whole batch", fontsize=11)
    figure.savefig(path)


def _course(strays: Sequence[Stray], quantity: str, batch: int, norm: str, layer: str) -> dict[int, float]:
    """Mean over the seeds at each step."""
    found: dict[int, list[float]] = {}
    for stray in strays:
        if (stray.run.batch, stray.run.norm, stray.layer) == (batch, norm, layer):
            found.setdefault(stray.step, []).append(getattr(stray, quantity))
    return {step: statistics.fmean(values) for step, values in sorted(found.items())}


def _draw_depths(axes: Axes, strays: Sequence[Stray], quantity: str, batches: list[int], layers: list[str]) -> None:
    for batch, marker in zip(batches, "osD^v", strict=False):
        for norm, style in ((LOCAL, "-"), (SYNC, "--")):
            courses = [_course(strays, quantity, batch, norm, layer) for layer in layers]
            if any(courses):
                axes.plot(
                    range(len(layers)),
                    [statistics.fmean(course.values()) if course else float("nan") for course in courses],
                    linestyle=style,
                    marker=marker,
                    markersize=4,
                    linewidth=1.2,
                    color=_COLOURS[norm],
                    label=f"{batch} per process, {norm}",
                )
    axes.set_title("mean over all steps, by layer", fontsize=10)
    axes.set_xticks(range(len(layers)), [_short(layer) for layer in layers], rotation=90, fontsize=7)


def _short(layer: str) -> str:
    return layer.removeprefix("model.").removesuffix(".norm")
