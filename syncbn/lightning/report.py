"""The page that ``StatisticsMonitor`` leaves: what synchronization has cost, and what it has seen. Needs matplotlib."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from ..traffic import Row
from .findings import Finding, in_words
from .history import History

_BARS = 12  # layers whose exchanges are drawn one by one
_ROWS = 40  # layers in a picture of all that are still named
_BLUE, _RED, _GRAY, _ORANGE = "#2f6fb2", "#b8443a", "#8a8a8a", "#d98a2b"
_NAME = 30  # characters
_LINE = 0.165  # inches


class Page(NamedTuple):
    """What is on it."""

    title: str
    facts: list[str]
    history: History
    rows: list[Row]  # of all exchanges
    batches: int  # in which these were
    findings: list[Finding]
    far: float  # threshold, drawn as a line


def write(page: Page, path: Path) -> None:
    """Draws the page, in the format that the path's name says, and replaces the file that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    draw(page).savefig(partial, dpi=110)
    partial.replace(path)


def draw(page: Page) -> Figure:
    """A4, upright."""
    figure = Figure(figsize=(8.27, 11.69), layout="constrained")
    head, foot = _text(page), _findings(page.findings)
    heights = [_LINE * (len(head) + 3), 8.4, _LINE * (len(foot) + 2)]
    parts: Any = figure.subfigures(3, 1, height_ratios=heights)
    top, middle, bottom = parts
    top.text(0.02, 0.97, page.title, fontsize=13, fontweight="bold", va="top")
    top.text(0.02, 1 - 2.2 / (len(head) + 3), "\n".join(head), fontsize=8.5, va="top", linespacing=1.35)
    bottom.text(0.02, 0.95, "\n".join(foot), fontsize=8.5, va="top", linespacing=1.35)
    panels = middle.subplots(3, 2)
    _share(panels[0][0], page.history)
    _by_layer(panels[0][1], page)
    _batch(panels[1][0], page.history)
    _strays(panels[1][1], page.history)
    _picture(panels[2][0], page.history, "collapsed", 1.0, "share of channels whose variance has collapsed")
    _picture(panels[2][1], page.history, "mean_lag", 2 * page.far, "running mean off the batch's, standard deviations")
    return figure


def _text(page: Page) -> list[str]:
    return [line for fact in page.facts for line in textwrap.wrap(fact, 118)]


def _findings(findings: Sequence[Finding]) -> list[str]:
    if not findings:
        return ["Nothing wrong was found in the sampled steps."]
    lines = [f"{len(findings)} finding{'s' if len(findings) > 1 else ''}:"]
    for sentence in in_words(findings):
        lines += textwrap.wrap(sentence, 118, initial_indent="– ", subsequent_indent="   ")
    return lines


def _share(axes: Axes, history: History) -> None:
    """Exchange time over the run."""
    axes.set_title("share of a step's time spent exchanging", fontsize=9.5)
    points = [
        (step, 100 * exchange / batch)
        for step, exchange, batch in zip(
            *(history.of_step(name) for name in ("step", "exchange_s", "batch_s")), strict=True
        )
        if not math.isnan(exchange / batch)
    ]
    if not points:
        _nothing(axes, "nothing was exchanged, or nothing timed")
        return
    axes.plot(*zip(*points, strict=True), color=_BLUE, marker=".", markersize=4, linewidth=1)
    axes.set_ylim(0, max(1.15 * max(share for _, share in points), 1))
    axes.set_ylabel("%", fontsize=8)
    _steps(axes)


def _by_layer(axes: Axes, page: Page) -> None:
    """The layers that cost the most."""
    axes.set_title("exchanges, ms a step", fontsize=9.5)
    cost: dict[str, dict[str, float]] = {}
    for row in page.rows:
        if not math.isnan(row.seconds) and page.batches:
            of_layer = cost.setdefault(row.name, {"forward": 0.0, "backward": 0.0})
            of_layer[row.direction] += 1e3 * row.seconds / page.batches
    if not cost:
        _nothing(axes, "nothing was exchanged, or nothing timed")
        return
    ordered = sorted(cost.items(), key=lambda item: -sum(item[1].values()))
    chosen, rest = ordered[:_BARS], ordered[_BARS:]
    places = range(len(chosen))
    forward, backward = ([each[key] for _, each in chosen] for key in ("forward", "backward"))
    axes.barh(places, forward, color=_BLUE, label="forward")
    axes.barh(places, backward, left=forward, color=_ORANGE, label="backward")
    axes.set_yticks(places, [_short(name) for name, _ in chosen], fontsize=6.5)
    axes.invert_yaxis()
    others = f"{len(rest)} others: {sum(sum(each.values()) for _, each in rest):.2g} ms together" if rest else None
    axes.legend(frameon=False, fontsize=7, loc="lower right", title=others, title_fontsize=7)
    axes.set_xlim(0, 1.45 * axes.get_xlim()[1])
    _finish(axes, "ms")


def _batch(axes: Axes, history: History) -> None:
    """Effective batch of each layer, in the model's order."""
    axes.set_title("effective batch: values per channel", fontsize=9.5)
    values = history.latest("values")
    known = [(i, value) for i, value in enumerate(values) if not math.isnan(value) and value > 0]
    if not known:
        _nothing(axes, "not known: no layer's messages could be seen")
        return
    axes.bar([i for i, _ in known], [value for _, value in known], width=0.85, color=_BLUE)
    axes.set_yscale("log")
    axes.set_ylim(bottom=1)
    axes.set_xlim(-0.6, len(values) - 0.4)
    least, fewest = min(known, key=lambda pair: pair[1])
    axes.annotate(
        f"least: {fewest:g} in {_short(history.names[least])}",
        (0.02, 0.95),
        xycoords="axes fraction",
        fontsize=7,
        va="top",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.5},
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish(axes, "layer, in the model's order")


def _strays(axes: Axes, history: History) -> None:
    """How far a process's statistics are from all processes', over the run."""
    axes.set_title("how far one process's statistics are from all's", fontsize=9.5)
    steps = history.of_step("step")
    drawn = False
    for name, color, label in (
        ("mean_stray", _BLUE, "mean, in standard deviations"),
        ("var_stray", _RED, "variance, in factors of e"),
    ):
        column = history.of_layers(name)
        rows = [i for i, row in enumerate(column) if not row.isnan().all()]
        if not rows:
            continue
        drawn = True
        median, most = column[rows].nanmedian(dim=1).values, column[rows].nan_to_num(nan=-1).amax(dim=1)
        at = [steps[i] for i in rows]
        axes.plot(at, median, color=color, linewidth=1.3, marker=".", markersize=4, label=label)
        axes.fill_between(at, median, most, color=color, alpha=0.15, linewidth=0)
    if not drawn:
        _nothing(axes, "one process, or messages that could not be seen")
        return
    axes.set_ylim(0, 1.4 * axes.get_ylim()[1])
    title = "line: the median layer; shade: up to the farthest"
    axes.legend(frameon=False, fontsize=7, loc="upper left", title=title, title_fontsize=7)
    _steps(axes)


def _picture(axes: Axes, history: History, name: str, top: float, title: str) -> None:
    """Layers from top to bottom, steps from left to right."""
    axes.set_title(title, fontsize=9.5)
    column = history.of_layers(name).T
    if column.isnan().all():
        _nothing(axes, "no running statistics")
        return
    steps = history.of_step("step")
    shades = axes.pcolormesh(
        _edges(torch.tensor(steps)),
        range(len(history.names) + 1),
        column,
        vmin=0,
        vmax=top,
        cmap="Reds",
        rasterized=True,
    )
    axes.set_facecolor("#eeeeee")
    axes.invert_yaxis()
    every = max(1, math.ceil(len(history.names) / _ROWS))
    named = range(0, len(history.names), every)
    axes.set_yticks([i + 0.5 for i in named], [_short(history.names[i]) for i in named], fontsize=5)
    axes.figure.colorbar(shades, ax=axes, shrink=0.7, pad=0.02).ax.tick_params(labelsize=6.5)
    _finish(axes, "step")
    axes.grid(False)


def _edges(steps: Tensor) -> list[float]:
    """Borders between the steps: halfway."""
    if len(steps) == 1:
        return [float(steps[0]) - 0.5, float(steps[0]) + 0.5]
    middles = (steps[1:] + steps[:-1]) / 2
    return [float(steps[0] - (middles[0] - steps[0])), *middles.tolist(), float(2 * steps[-1] - middles[-1])]


def _steps(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _finish(axes, "step")


def _finish(axes: Axes, label: str) -> None:
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(axis="x", labelsize=7)
    if axes.get_yticklabels() and not axes.yaxis_inverted():
        axes.tick_params(axis="y", labelsize=7)
    axes.grid(axis="both" if not axes.yaxis_inverted() else "x", alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _nothing(axes: Axes, why: str) -> None:
    axes.text(0.5, 0.5, why, ha="center", va="center", fontsize=8, color=_GRAY, transform=axes.transAxes)
    axes.set_xticks([])
    axes.set_yticks([])


def _short(name: str) -> str:
    return name if len(name) <= _NAME else f"…{name[1 - _NAME :]}"
