"""Latency of the collectives that synchronize a layer: idle, behind gradient buckets, and over more processes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from . import processes, report
from .cases import RESNET50_FPN, channel_counts
from .implementations import AlwaysExchange
from .options import Options
from .report import Column, Report, Row, Table, row
from .timing import Clock, slowest, spread

BUCKETS = 4
BUCKET_BYTES = 25 << 20  # DistributedDataParallel's default
IDLE = "idle"
SHARED = "behind buckets, shared"
DEDICATED = "behind buckets, dedicated"

TABLE = Table(
    Column("processes", 9, 0),
    Column("backend", 7),
    Column("situation", 26),
    Column("case", 7),
    Column("impl", 10),
    Column("bytes", 8, 0),
    Column("median ms", 10, 4),
    Column("q1 ms", 10, 4),
    Column("q3 ms", 10, 4),
)


def run(options: Options) -> Report | None:
    """Measures, prints the table; the report on rank 0, None elsewhere."""
    header = report.header("exchange", options.command) | {"rounds": options.rounds, "notes": notes(options)}
    if processes.is_first():
        report.show_header(header)
        print("\n".join(header["notes"]), end="\n\n")
        TABLE.head()
    result: Report | None = None
    for count, device, situations in plan(options):
        part: Report | None = processes.run(measure, count, device, options, situations)
        if part is None:
            continue
        if result is None:
            result = Report(header | {"worlds": []})
        result.header["worlds"].append(part.header)
        result.rows += part.rows
    return result


def plan(options: Options) -> list[tuple[int, str, tuple[str, ...]]]:
    """Which sets of processes to measure: how many, on what device, in which situations."""
    buckets = (SHARED, DEDICATED)
    if processes.torchrun_world_size() is not None:
        return [(options.processes, options.device, (IDLE, *buckets))]
    sets: list[tuple[int, str, tuple[str, ...]]] = []
    for count in sorted({options.processes, *options.counts}):
        situations = (IDLE, *buckets) if count == options.processes and count > 1 else (IDLE,)
        if count == options.processes or processes.fits(count, options.device):
            sets.append((count, options.device, situations))
    missing = [count for count in options.counts if count not in [known for known, _, _ in sets]]
    return sets + [(count, "cpu", (IDLE,)) for count in missing]


def notes(options: Options) -> list[str]:
    """What a reader must know of the machine to judge the figures."""
    if processes.torchrun_world_size() is not None:
        return [f"torchrun has started {options.processes} processes: only that number is measured."]
    said = []
    if options.processes == 1:
        said.append("One process has nobody to wait for: its collectives may launch nothing. No gradient buckets then.")
    on_cpu = [count for count, device, _ in plan(options) if device == "cpu"]
    if options.device == "cuda" and on_cpu:
        said.append(f"{_list(on_cpu)} processes are more than there are GPUs: they run gloo on the CPU instead.")
    crowded = [count for count in on_cpu if count > processes.cores()]
    if crowded:
        said.append(f"{_list(crowded)} processes share {processes.cores()} CPU cores: they mostly wait for a core.")
    return said


def _list(counts: list[int]) -> str:
    return ", ".join(map(str, counts))


def measure(device: torch.device, options: Options, situations: tuple[str, ...]) -> Report:
    """On every process of one set."""
    clock = Clock(device)
    channels = list(channel_counts(RESNET50_FPN))
    rows = []
    for situation in situations:
        few = situation != IDLE and options.quick
        for C in [256] if few else channels:
            for impl in ("all-reduce", "all-gather") if situation == IDLE else ("all-reduce",):
                measured = measure_one(C, impl, situation, clock, options)
                if dist.get_rank() == 0:
                    keys = ("processes", "backend", "situation", "case", "impl", "message_bytes")
                    TABLE.line(*(measured[key] for key in (*keys, "total_ms", "total_ms_q1", "total_ms_q3")))
                rows.append(measured)
    return Report(report.world(device), rows)


def measure_one(C: int, impl: str, situation: str, clock: Clock, options: Options) -> Row:
    """One collective in one situation."""
    message, collective = _collective(C, impl, situation, clock.device)
    crowded = clock.device.type == "cpu" and dist.get_world_size() > processes.cores()
    rounds = max(4, options.rounds // (10 if crowded else 8 if situation != IDLE else 1))
    buckets = [torch.zeros(BUCKET_BYTES // 4, device=clock.device) for _ in range(BUCKETS if situation != IDLE else 0)]
    total = spread(latencies(collective, buckets, clock, rounds))
    return row(
        case=f"C={C}",
        impl=impl,
        dtype=str(message.dtype).removeprefix("torch."),
        total_ms=total.median,
        total_ms_q1=total.q1,
        total_ms_q3=total.q3,
        processes=dist.get_world_size(),
        situation=situation,
        backend=dist.get_backend(),
        channels=C,
        message_bytes=message.nbytes,
    )


def _collective(C: int, impl: str, situation: str, device: torch.device) -> tuple[Tensor, Callable[[], object]]:
    """What each process contributes, and the call.

    all-reduce is this project's forward exchange, 2C+3 float64. all-gather is what torch.nn.SyncBatchNorm does in
    forward: 2C+1 float32 of every process for every process.
    """
    if impl == "all-reduce":
        message = torch.zeros(2 * C + 3, dtype=torch.float64, device=device)
        exchange = AlwaysExchange(dedicated=situation != SHARED)
        return message, partial(exchange.all_reduce, message)
    message = torch.zeros(2 * C + 1, device=device)
    if dist.get_backend() == "gloo":
        everyones = [torch.empty_like(message) for _ in range(dist.get_world_size())]
        return message, partial(dist.all_gather, everyones, message)
    together = torch.empty(dist.get_world_size() * message.numel(), device=device)
    return message, partial(dist.all_gather_into_tensor, together, message)


def latencies(collective: Callable[[], object], buckets: list[Tensor], clock: Clock, rounds: int) -> Tensor:
    """[rounds] milliseconds from the call until its result is there, with ``buckets`` under way on the default group.

    Without buckets the calls follow each other, as a collective itself makes the processes meet.
    """
    marks = []
    for _ in range(rounds + 3):
        if buckets:
            clock.align()
        works = [dist.all_reduce(bucket, async_op=True) for bucket in buckets]
        start = clock.mark()
        collective()
        marks.append((start, clock.mark()))
        for work in works:
            work.wait()
    clock.wait()
    milliseconds = torch.tensor([clock.milliseconds(*pair) for pair in marks[3:]], dtype=torch.float64)
    return slowest(milliseconds, clock.device)
