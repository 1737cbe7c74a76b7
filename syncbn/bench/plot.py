"""Pictures of reports. The only file that needs matplotlib."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from . import exchange
from .report import Report, Row
from .step import FORWARD_BACKWARD_STEP

COLORS = {
    "syncbn": "tab:blue",
    "local": "tab:gray",
    "torch-sync": "tab:red",
    "fairscale": "tab:green",
    "naive": "tab:orange",
    "inplace-abn": "tab:purple",
    "apex": "tab:brown",
    "all-reduce": "tab:blue",
    "all-gather": "tab:red",
}
FUSED = "+add+relu"
PEAK = "peak_mb", "of device memory beyond what was held before the step"


def draw(report: Report, path: Path) -> None:
    """Draws the rows of a mode, in the format that the path's name says."""
    drawings: dict[str, Callable[[Report], Figure]] = {
        "layer": draw_layer,
        "step": draw_step,
        "memory": draw_step,
        "monitor": draw_monitor,
        "exchange": draw_exchange,
        "scaling": draw_scaling,
    }
    figure = drawings[report.header["benchmark"]](report)
    figure.savefig(path, dpi=110)


def _figure(width: float, height: float, title: str, columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=11)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _where(header: Row) -> str:
    """Machine, versions and date in a line."""
    machine, versions = header["machine"], header["versions"]
    what = header.get("gpu") or f"{machine['cpu']}, {machine['cores']} cores"
    return f"{what}, torch {versions['torch']}, {header['date'][:10]}"


def _color(name: str) -> str:
    return COLORS[name.split("+")[0]]


def _plain_numbers(axis: Any) -> None:
    """1, 10, 0.1 rather than powers of ten."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _powers_of_two(axes: Axes, counts: Iterable[int]) -> None:
    counts = sorted(set(counts))
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()


def draw_layer(report: Report) -> Figure:
    """The bandwidth that each implementation makes of the ideal bytes, over the tensor's size."""
    header, rows = report.header, report.rows
    layouts = list(dict.fromkeys(row["layout"] for row in rows))
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, panels = _figure(
        6 * len(layouts) + 1.5,
        4.2 * len(dtypes) + 0.6,
        f"One normalization layer, forward + backward, {header['world_size']} process(es)\n{_where(header)}",
        len(layouts),
        len(dtypes),
    )
    for line, dtype in zip(panels, dtypes, strict=True):
        for axes, layout in zip(line, layouts, strict=True):
            _draw_bandwidths(axes, [row for row in rows if (row["layout"], row["dtype"]) == (layout, dtype)])
            axes.axhline(header["copy_gbs"], color="black", linestyle=":", linewidth=1.2, label="copy, measured")
            axes.set_title(f"{dtype}, {layout}", fontsize=10)
        line[0].set_ylabel("GB/s of the bytes that must be moved")
    for axes in panels[-1]:
        axes.set_xlabel("size of the layer's input, MB")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _draw_bandwidths(axes: Axes, rows: list[Row]) -> None:
    """A point for every case; a line through the medians of the cases of about one size."""
    for name in dict.fromkeys(row["impl"] for row in rows):
        chosen = [row for row in rows if row["impl"] == name]
        fused = name.endswith(FUSED)
        color, marker, face = _color(name), "s" if fused else "o", "white" if fused else _color(name)
        axes.plot(
            [row["tensor_bytes"] / 1e6 for row in chosen],
            [row["gbs"] for row in chosen],
            linestyle="none",
            color=color,
            marker=marker,
            markerfacecolor=face,
            markersize=3,
            alpha=0.35,
        )
        sizes, medians = _by_octave(chosen)
        axes.plot(
            sizes,
            medians,
            color=color,
            linestyle="--" if fused else "-",
            marker=marker,
            markerfacecolor=face,
            markersize=5,
            linewidth=1.3,
            label=name,
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    axes.grid(which="major", alpha=0.3)


def _by_octave(rows: list[Row]) -> tuple[list[float], list[float]]:
    """The median size in MB, and the median GB/s, of the cases within a factor of two."""
    octaves: dict[int, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row["tensor_bytes"]):
        octaves.setdefault(int(math.log2(row["tensor_bytes"])), []).append(row)
    groups = list(octaves.values())
    sizes = [statistics.median(row["tensor_bytes"] / 1e6 for row in group) for group in groups]
    return sizes, [statistics.median(row["gbs"] for row in group) for group in groups]


def draw_step(report: Report) -> Figure:
    """A bar for every implementation: forward, backward, optimizer; beside it what it saves, or its peak if known."""
    header, rows = report.header, report.rows
    memory, of_what = ("saved_mb", "kept for backward") if header["benchmark"] == "memory" else PEAK
    with_memory = any(row[memory] is not None for row in rows)
    groups = list(dict.fromkeys((row["case"], row["layout"], row["dtype"]) for row in rows))
    figure, panels = _figure(
        6.5 * (2 if with_memory else 1) + 2,
        0.9 + 0.3 * (len(rows) + 2 * len(groups)),
        f"One DistributedDataParallel training step, {header['world_size']} process(es)\n{_where(header)}",
        2 if with_memory else 1,
    )
    bars, headings = _places(rows)
    _draw_phases(panels[0][0], bars)
    if with_memory:
        for place, row in bars:
            panels[0][1].barh(place, row[memory] or 0, color=_color(row["impl"]), height=0.8)
        panels[0][1].set_xlabel(f"MB {of_what}")
    for axes in panels[0]:
        axes.set_yticks([place for place, _ in bars], [row["impl"] for _, row in bars], fontsize=8)
        axes.set_ylim(bars[-1][0] + 0.8, -0.7)
        axes.set_xlim(0, 1.12 * axes.get_xlim()[1])
        axes.grid(axis="x", alpha=0.3)
        for place, heading in headings:
            axes.text(0, place, heading, fontsize=9, fontweight="bold", va="center")
    return figure


def draw_monitor(report: Report) -> Figure:
    """A step with and without the monitor: medians and quartiles of the blocks' means."""
    rows = report.rows
    bars, headings = _places(rows)
    figure, panels = _figure(
        9, 1.6 + 0.35 * (len(bars) + len(headings)), f"A training step with StatisticsMonitor\n{_where(report.header)}"
    )
    axes = panels[0][0]
    for place, row in bars:
        sides = [[row["total_ms"] - row["total_ms_q1"]], [row["total_ms_q3"] - row["total_ms"]]]
        color = "tab:orange" if row["hooks_ms"] is not None else _color(row["impl"])
        axes.barh(place, row["total_ms"], xerr=sides, capsize=3, color=color, height=0.8)
        if row["hooks_ms"] is not None:
            text = f"  ratio {row['ratio']:.4f}; in the hooks {row['hooks_percent']:.2f}%"
            axes.text(row["total_ms_q3"], place, text, va="center", fontsize=8)
    axes.set_yticks([place for place, _ in bars], [row["impl"] for _, row in bars], fontsize=8)
    axes.set_ylim(bars[-1][0] + 0.8, -0.7)
    axes.set_xlim(0, 1.6 * max(row["total_ms_q3"] for row in rows))
    axes.set_xlabel("ms a step: median and quartiles of the blocks")
    axes.grid(axis="x", alpha=0.3)
    for place, heading in headings:
        axes.text(0, place, heading, fontsize=9, fontweight="bold", va="center")
    return figure


def _places(rows: list[Row]) -> tuple[list[tuple[float, Row]], list[tuple[float, str]]]:
    """From top to bottom: a heading for each model, layout and dtype, and under it its bars."""
    bars, headings = [], []
    place, previous = -1.6, ""
    for row in rows:
        heading = f"{row['case']}, {row['layout']}, {row['dtype']}"
        if heading != previous:
            place += 1.6
            headings.append((place, heading))
            previous = heading
        place += 1
        bars.append((place, row))
    return bars, headings


def _draw_phases(axes: Axes, bars: list[tuple[float, Row]]) -> None:
    for place, row in bars:
        end = 0.0
        for part, shade in zip(FORWARD_BACKWARD_STEP, (1.0, 0.65, 0.35), strict=True):
            axes.barh(place, row[part], left=end, color=_color(row["impl"]), alpha=shade, height=0.8)
            end += row[part]
        axes.text(end, place, f" {row['total_ms']:.1f}", va="center", fontsize=8)
    axes.set_xlabel("ms; dark to light: forward, backward, optimizer (medians)")


def draw_exchange(report: Report) -> Figure:
    """Left: idle and behind buckets. Right: the all-reduce against the all-gather over more processes."""
    rows = report.rows
    figure, panels = _figure(
        12, 5.2, f"Latency of one exchange of a layer's statistics\n{_where(report.header)}", columns=2
    )
    _draw_situations(panels[0][0], rows)
    _draw_counts(panels[0][1], rows, report.header["machine"]["cores"])
    return figure


def _draw_situations(axes: Axes, rows: list[Row]) -> None:
    behind = next(row for row in rows if row["situation"] != exchange.IDLE)
    count = behind["processes"]
    for situation, color in (
        (exchange.SHARED, "tab:red"),
        (exchange.DEDICATED, "tab:blue"),
        (exchange.IDLE, "tab:gray"),
    ):
        chosen = [
            row for row in rows if (row["situation"], row["processes"], row["impl"]) == (situation, count, "all-reduce")
        ]
        _draw_with_quartiles(axes, [row["channels"] for row in chosen], chosen, color, situation, "o")
    _powers_of_two(axes, [row["channels"] for row in rows])
    axes.set_title(f"all-reduce of 2C+3 float64, {count} process(es), {behind['backend']}", fontsize=10)
    axes.set_xlabel("channels C")
    _finish_latencies(axes)


def _draw_counts(axes: Axes, rows: list[Row], cores: int) -> None:
    idle = [row for row in rows if row["situation"] == exchange.IDLE and row["processes"] > 1]
    if not idle:
        axes.set_axis_off()  # one process alone
        return
    backends = "/".join(sorted({row["backend"] for row in idle}))
    counts = sorted({row["processes"] for row in idle})
    for impl in ("all-reduce", "all-gather"):
        for C, marker, style in ((64, "o", "-"), (2048, "s", "--")):
            chosen = sorted(
                (row for row in idle if (row["impl"], row["channels"]) == (impl, C)), key=lambda row: row["processes"]
            )
            places = [row["processes"] for row in chosen]
            _draw_with_quartiles(axes, places, chosen, COLORS[impl], f"{impl}, C={C}", marker, style)
    _powers_of_two(axes, counts)
    if backends == "gloo" and max(counts) > cores:
        axes.axvspan(max(cores, min(counts)) * 1.2, max(counts) * 1.2, color="black", alpha=0.06, linewidth=0)
        axes.text(max(counts) * 1.12, 0.03, "processes share cores", transform=axes.get_xaxis_transform(), ha="right")
    axes.set_title(f"idle: 2C+3 float64 reduced, 2C+1 float32 gathered, {backends}", fontsize=10)
    axes.set_xlabel("processes")
    _finish_latencies(axes)


def _draw_with_quartiles(
    axes: Axes, places: list[int], rows: list[Row], color: str, label: str, marker: str, style: str = "-"
) -> None:
    middle = [row["total_ms"] for row in rows]
    below = [row["total_ms"] - row["total_ms_q1"] for row in rows]
    above = [row["total_ms_q3"] - row["total_ms"] for row in rows]
    axes.errorbar(
        places,
        middle,
        yerr=[below, above],
        color=color,
        label=label,
        marker=marker,
        linestyle=style,
        markersize=4.5,
        linewidth=1.2,
        capsize=2.5,
    )


def _finish_latencies(axes: Axes) -> None:
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    axes.set_ylabel("ms: median and quartiles")
    axes.grid(which="major", alpha=0.3)
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)


def _source_of_host(header: Row) -> str:
    host = header["host"]
    if not host["assumed"]:
        return f"fitted to {header['fitted_to']}"
    values = f"{host['overhead_us']:.3g} µs + {host['latency_us']:.3g} µs a hop, {host['gbs'] or float('inf'):.3g} GB/s"
    return f"{values} ({host['assumed']} assumed; else fitted to {header['fitted_to']})"


def draw_scaling(report: Report) -> Figure:
    """The model's lines, and what was measured."""
    header = report.header
    between = header["between_nodes"]
    figure, panels = _figure(
        10,
        6.5,
        f"A MODEL, not a measurement: synchronization in a training step of {header['network']} "
        f"({header['layers']} layers)\n"
        f"host {_source_of_host(header)}\n"
        f"network assumed: {between['latency_us']:.3g} µs a hop, {between['gbs']:.3g} GB/s"
        f"{' (' + between['raised'] + ' as in the host)' if between['raised'] else ''}, "
        f"{header['processes_per_node']} processes a node",
    )
    axes = panels[0][0]
    styles = {"flat": "-", "node then network": "--", "fewest hops": ":"}
    for name in dict.fromkeys(row["impl"] for row in report.rows if row["kind"] == "model"):
        rows = [row for row in report.rows if row["kind"] == "model" and row["impl"] == name]
        collective, way = name.split(", ")
        axes.plot(
            [row["processes"] for row in rows],
            [row["total_ms"] for row in rows],
            color=COLORS[collective.removesuffix(" ring")],
            linestyle=styles[way],
            linewidth=1.6 if way == "flat" else 2.2,
            alpha=0.9,
            label=f"model: {name}",
        )
    for impl in ("all-reduce", "all-gather"):
        for crowded, face in ((False, COLORS[impl]), (True, "white")):
            rows = [
                row
                for row in report.rows
                if (row["kind"], row["impl"], row.get("crowded")) == ("measured", impl, crowded)
            ]
            if rows:
                axes.plot(
                    [row["processes"] for row in rows],
                    [row["total_ms"] for row in rows],
                    linestyle="none",
                    marker="o",
                    markersize=7,
                    markeredgecolor=COLORS[impl],
                    markerfacecolor=face,
                    label=f"measured: {impl}" + (", processes share cores (not fitted)" if crowded else ""),
                )
    _powers_of_two(axes, [row["processes"] for row in report.rows])
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    axes.set_xlabel("processes")
    axes.set_ylabel("ms per training step, forward + backward")
    axes.grid(which="major", alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure
