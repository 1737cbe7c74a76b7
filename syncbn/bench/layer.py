"""Forward and backward of one layer over the shapes of real networks."""

from __future__ import annotations

import statistics
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import processes, report
from .cases import TINY, Case, suite
from .errors import UserError
from .implementations import Implementation, implementations
from .options import DTYPES, Options
from .report import Column, Report, Row, Table, row
from .timing import Clock, HostTime, Turn, host_time, interleave, spread
from .traffic import copy_bandwidth, gigabytes_per_second, passes

LARGE = 64e6  # bytes of a tensor from which on it should run at the speed of memory
REFERENCES = ("torch-sync", "fairscale", "naive", "local")

TABLE = Table(
    Column("case", 26),
    Column("layout", 13),
    Column("dtype", 8),
    Column("impl", 19),
    Column("fwd ms", 8, 3),
    Column("bwd ms", 8, 3),
    Column("total ms", 8, 3),
    Column("GB/s", 7, 1),
    Column("copy", 6, 2),
)


def run(options: Options) -> Report | None:
    """Measures, prints the tables; the report on rank 0, None elsewhere."""
    require_known(options)
    header = report.header("layer", options.command)
    if processes.is_first():
        report.show_header(header)
    result: Report | None = processes.run(measure, options.processes, options.device, options)
    if result is None:
        return None
    result.header = header | result.header
    result.summary = summarize(result.rows, result.header["host_time_us"])
    show_summary(result.summary)
    return result


def require_known(options: Options) -> None:
    """Raises UserError for names that are no implementations, or if none of those named can run."""
    known = implementations(torch.device(options.device), options.processes)
    names = [each.name for each in known]
    for name in options.implementations:
        if name not in names:
            raise UserError(f"--implementations: {name!r} is none of {', '.join(names)}")
    named = [each for each in known if each.name in options.implementations]
    if named and all(each.missing is not None for each in named):
        raise UserError("--implementations: " + "; ".join(f"{each.name} cannot run: {each.missing}" for each in named))


def measure(device: torch.device, options: Options) -> Report:
    """On every process."""
    first = dist.get_rank() == 0
    clock = Clock(device)
    chosen, missing = choose(device, options, "layer")
    on_gpu = device.type == "cuda"
    copy_gbs = copy_bandwidth(clock, (512 if on_gpu else 64) << 20, 20 if on_gpu else 5)
    header = report.world(device) | {
        "shrink": options.shrink,
        "rounds": options.rounds,
        "caches": "L2 overwritten before each phase" if on_gpu else "left as they are",
        "clock": "CUDA events" if on_gpu else "wall, the slowest process",
        "copy_gbs": copy_gbs,
        "missing": missing,
    }
    if first:
        report.show_world(header)
        for name, why in missing.items():
            print(f"not run: {name}: {why}")
        if dist.get_world_size() == 1:
            print(
                "one process: exchanges are called as among many, but there is nobody to wait for; the library may\n"
                "launch nothing for an all-reduce in place; compare kernels here, not exchanges"
            )
        print(
            f"copy: {copy_gbs:.1f} GB/s a process. GB/s: of the least that must be moved (syncbn/bench/traffic.py).\n"
            f"Images 1/{options.shrink} of their size, {options.rounds} rounds, medians.\n"
        )
        TABLE.head()
    rows = []
    for case in suite(options.networks, options.shrink, ends_only=options.quick):
        for dtype in options.dtypes:
            for layout in options.layouts:
                measured = measure_case(case, layout, dtype, chosen, clock, options, copy_gbs, missing)
                if first:
                    show(measured)
                rows += measured
    header["host_time_us"] = measure_host_time(chosen, clock, options)
    return Report(header, rows)


def choose(device: torch.device, options: Options, part: str) -> tuple[list[Implementation], dict[str, str]]:
    """Those that have the ``part`` ("layer" or "convert") and can run; and why the others cannot."""
    wanted = [
        each
        for each in implementations(device, dist.get_world_size())
        if getattr(each, part) is not None
        and (each.name in options.implementations if options.implementations else not each.on_request)
    ]
    return [each for each in wanted if each.missing is None], {
        each.name: each.missing for each in wanted if each.missing is not None
    }


def measure_case(
    case: Case,
    layout: str,
    dtype: str,
    chosen: list[Implementation],
    clock: Clock,
    options: Options,
    copy_gbs: float,
    missing: dict[str, str],
) -> list[Row]:
    """A row for every implementation; what fails is added to ``missing``."""
    x, residual = (_input(case.shape, layout, DTYPES[dtype], clock.device) for _ in range(2))
    turns = {}
    for each in chosen:
        if layout not in each.layouts:
            missing.setdefault(f"{each.name} ({layout})", "takes no such tensors")
            continue
        try:
            turns[each.name] = _turn(each, x, residual)
        except Exception as error:
            # Each process finds the same. Ours must not fail, nor PyTorch; others may have limits of their own.
            if not each.foreign:
                raise
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            missing[f"{each.name} ({case.name}, {layout}, {dtype})"] = reason
    times = interleave(turns, clock, options.rounds, options.warm_up)
    size = x.nbytes
    rows = []
    for each in chosen:
        if each.name in times:
            total = spread(times[each.name].sum(dim=1))
            moved = passes(each.adds).total * size
            gbs = gigabytes_per_second(moved, total.median)
            rows.append(
                row(
                    case=case.name,
                    impl=each.name,
                    layout=layout,
                    dtype=dtype,
                    fwd_ms=spread(times[each.name][:, 0]).median,
                    bwd_ms=spread(times[each.name][:, 1]).median,
                    total_ms=total.median,
                    total_ms_q1=total.q1,
                    total_ms_q3=total.q3,
                    count=case.count,
                    tensor_bytes=size,
                    moved_bytes=moved,
                    gbs=gbs,
                    of_copy=gbs / copy_gbs,
                )
            )
    return rows


def _input(shape: tuple[int, ...], layout: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.randn(shape, dtype=dtype, device=device)
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.channels_last_3d)
    return x.requires_grad_()


def _turn(each: Implementation, x: Tensor, residual: Tensor) -> Turn:
    """Its forward and backward as phases; the first call, which may fail, is made here."""
    layer = _layer(each, x)
    inputs = (x, residual) if each.adds else (x,)
    wanted = [*inputs, *layer.parameters()]
    held: dict[str, Any] = {}

    def prepare() -> None:
        held["inputs"] = (x.clone(), *inputs[1:]) if each.overwrites_input else inputs

    def forward() -> None:
        held["y"] = layer(*held.pop("inputs"))

    def backward() -> None:
        torch.autograd.grad(held.pop("y"), wanted, dy)

    prepare()
    forward()
    dy = torch.randn_like(x, requires_grad=False).to(held["y"].dtype)
    backward()
    return Turn(prepare, (forward, backward))


def _layer(each: Implementation, x: Tensor) -> nn.Module:
    assert each.layer is not None  # chosen for having one
    return each.layer(x.shape[1], x.dim() - 2).to(x.device)


def measure_host_time(chosen: list[Implementation], clock: Clock, options: Options) -> dict[str, HostTime]:
    """By implementation, at the shape where a layer is all overhead. Rank 0's clock."""
    x, residual = (_input(TINY, "contiguous", DTYPES[options.dtypes[0]], clock.device) for _ in range(2))
    dy = torch.randn_like(x, requires_grad=False)
    times = {}
    for each in chosen:
        if each.overwrites_input or each.foreign:
            continue
        layer = _layer(each, x)
        inputs = (x, residual) if each.adds else (x,)
        wanted = [*inputs, *layer.parameters()]
        times[each.name] = _host_time(layer, inputs, wanted, dy, clock, 5 if options.quick else 25)
    return times


def _host_time(
    layer: nn.Module, inputs: tuple[Tensor, ...], wanted: list[Tensor], dy: Tensor, clock: Clock, repeats: int
) -> HostTime:
    return host_time(lambda: layer(*inputs), lambda y: torch.autograd.grad(y, wanted, dy), clock, 20, repeats)


def show(rows: list[Row]) -> None:
    for index, each in enumerate(rows):
        where = (each["case"], each["layout"], each["dtype"]) if index == 0 else ("", "", "")
        TABLE.line(*where, *(each[key] for key in ("impl", "fwd_ms", "bwd_ms", "total_ms", "gbs", "of_copy")))


def summarize(rows: list[Row], host_times: dict[str, HostTime]) -> list[Row]:
    """The few figures for which the benchmark exists, from its rows."""
    summary = []
    for dtype in dict.fromkeys(each["dtype"] for each in rows):
        of_dtype = [each for each in rows if each["dtype"] == dtype]
        for ours, ending in (("syncbn", ""), ("syncbn+add+relu", "+add+relu")):
            for reference in REFERENCES:
                summary += _speed_up(of_dtype, ours, reference + ending, dtype)
        for ours in ("syncbn", "syncbn+add+relu"):
            summary += _of_copy(of_dtype, ours, dtype)
    torchs = host_times.get("torch-sync")
    for name, times in host_times.items():
        summary.append(
            {
                "figure": "host time",
                "impl": name,
                "forward_us": times[0],
                "backward_us": times[1],
                "of_torch_sync": sum(times) / sum(torchs) if torchs else None,
            }
        )
    return summary


def _speed_up(rows: list[Row], ours: str, reference: str, dtype: str) -> list[Row]:
    """How many times as long the reference takes: over the cases, and for all layers of the networks together."""
    by_case: dict[tuple[str, str], dict[str, Row]] = {}
    for each in rows:
        by_case.setdefault((each["case"], each["layout"]), {})[each["impl"]] = each
    pairs = [(case[reference], case[ours]) for case in by_case.values() if reference in case and ours in case]
    if not pairs:
        return []
    ratios = [other["total_ms"] / our["total_ms"] for other, our in pairs]
    of_all = [sum(each["count"] * each["total_ms"] for each in side) for side in zip(*pairs, strict=True)]
    return [
        {
            "figure": "speed-up",
            "dtype": dtype,
            "impl": ours,
            "against": reference,
            "cases": len(ratios),
            "median": statistics.median(ratios),
            "least": min(ratios),
            "greatest": max(ratios),
            "all_layers": of_all[0] / of_all[1],
        }
    ]


def _of_copy(rows: list[Row], ours: str, dtype: str) -> list[Row]:
    fractions = [each["of_copy"] for each in rows if each["impl"] == ours and each["tensor_bytes"] > LARGE]
    if not fractions:
        return []
    return [
        {
            "figure": "of copy bandwidth",
            "dtype": dtype,
            "impl": ours,
            "cases": len(fractions),
            "median": statistics.median(fractions),
            "least": min(fractions),
        }
    ]


def show_summary(summary: list[Row]) -> None:
    by_figure = {
        figure: [each for each in summary if each["figure"] == figure]
        for figure in ("speed-up", "of copy bandwidth", "host time")
    }
    print("\nForward + backward: how many times as long the other takes")
    ours, against, dtype = Column("impl", 19), Column("against", 19), Column("dtype", 8)
    cases = Column("cases", 5, 0)
    table = Table(
        ours,
        against,
        dtype,
        cases,
        *(Column(title, 10, 2) for title in ("median", "least", "greatest", "all layers")),
    )
    table.head()
    keys = ("impl", "against", "dtype", "cases", "median", "least", "greatest", "all_layers")
    for each in by_figure["speed-up"]:
        table.line(*(each[key] for key in keys))

    print(f"\nFraction of the copy's bandwidth, forward + backward, tensors over {LARGE / 1e6:.0f} MB")
    if by_figure["of copy bandwidth"]:
        table = Table(ours, dtype, cases, Column("median", 10, 2), Column("least", 10, 2))
        table.head()
        for each in by_figure["of copy bandwidth"]:
            table.line(*(each[key] for key in ("impl", "dtype", "cases", "median", "least")))
    else:
        print("no tensor in this run is that large")

    print(
        f"\nHost time of a call at {'x'.join(map(str, TINY))}, on rank 0: on a GPU without waiting for it,\n"
        "on a CPU all of it, with the exchange"
    )
    table = Table(ours, Column("fwd us", 10, 1), Column("bwd us", 10, 1), Column("of torch-sync", 13, 2))
    table.head()
    for each in by_figure["host time"]:
        table.line(*(each[key] for key in ("impl", "forward_us", "backward_us", "of_torch_sync")))
