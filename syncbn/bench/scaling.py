"""A model of what synchronization costs in a training step from 2 to 4096 processes, fitted to ``exchange``.

A collective over P processes, of a message of m bytes from each, takes

    overhead + hops(P) · latency + moved(P, m) · seconds per byte

                                hops                    moved
    all-reduce, ring            2·(P − 1)               2·m·(P − 1)/P
    all-reduce, tree            2·⌈log₂ P⌉              2·m
    all-gather, ring            P − 1                   m·(P − 1)
    all-gather, fewest hops     ⌈log₂ P⌉                m·(P − 1)

(Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", 2005; which hops of a
tree or ring cross the network as in NCCL's own tuning, src/graph/tuning.cc.) Overhead, latency and bandwidth within a
host are fitted to the idle rows of an ``exchange`` run. What a single host cannot tell, those of the network, is an
option, and called assumed. A hop or a byte over the network is never cheaper than one within the host.

The prediction takes the tree for all-reduces, as NCCL does for messages this small, and adds up the layers one after
the other; it knows nothing of waiting for slower processes, of congestion, nor of what a GPU could do meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch

from . import exchange, processes, report
from .cases import RESNET50_FPN, channel_counts
from .errors import UserError
from .options import Options
from .report import Column, Report, Row, Table, row

PROCESSES = tuple(2**exponent for exponent in range(1, 13))
PARTS = ("overhead_us", "latency_us", "us_per_byte")


class Work(NamedTuple):
    """What a collective does: hops one after the other, and how many times the message's bytes."""

    hops: float
    messages: float


def ring_all_reduce(count: int) -> Work:
    return Work(2 * (count - 1), 2 * (count - 1) / count)


def tree_all_reduce(count: int) -> Work:
    return Work(2 * _log2(count), 2 if count > 1 else 0)


def ring_all_gather(count: int) -> Work:
    return Work(count - 1, count - 1)


def _log2(count: int) -> int:
    """⌈log₂ count⌉"""
    return math.ceil(math.log2(count))


# What the backends do with messages of this size.
FITTED = {
    "gloo": {"all-reduce": ring_all_reduce, "all-gather": ring_all_gather},
    "nccl": {"all-reduce": tree_all_reduce, "all-gather": ring_all_gather},
}


class Parameters(NamedTuple):
    """A collective's constant part, a hop, and a byte; microseconds."""

    overhead_us: float
    latency_us: float
    us_per_byte: float

    def microseconds(self, work: Work, message_bytes: float) -> float:
        return self.overhead_us + work.hops * self.latency_us + work.messages * message_bytes * self.us_per_byte


@dataclass(frozen=True)
class Machine:
    """Hosts of ``processes_per_node`` each, and the network between them."""

    host: Parameters
    network: Parameters
    processes_per_node: int

    def link(self, count: int) -> Parameters:
        """What a hop costs that might go anywhere: through the network, once there is more than one node."""
        slower = self.network if count > self.processes_per_node else self.host
        return slower._replace(overhead_us=self.host.overhead_us)

    def split(self, count: int) -> tuple[int, int]:
        """Processes in a node, and nodes."""
        return min(count, self.processes_per_node), math.ceil(count / self.processes_per_node)


# Microseconds of a collective over ``count`` processes of a machine, with ``size`` bytes from each.


def all_reduce_flat(machine: Machine, count: int, size: int) -> float:
    return machine.link(count).microseconds(tree_all_reduce(count), size)


def all_reduce_by_node(machine: Machine, count: int, size: int) -> float:
    """Up a tree in every node, a tree over the nodes, and back."""
    inside, nodes = machine.split(count)
    within = machine.host.microseconds(tree_all_reduce(inside), size)
    return within + machine.network.microseconds(tree_all_reduce(nodes), size)


def ring_all_gather_flat(machine: Machine, count: int, size: int) -> float:
    return machine.link(count).microseconds(ring_all_gather(count), size)


def ring_all_gather_by_node(machine: Machine, count: int, size: int) -> float:
    """A ring that enters every node once. All bytes pass the slowest link."""
    _, nodes = machine.split(count)
    saved = (count - nodes) * (machine.link(count).latency_us - machine.host.latency_us)
    return ring_all_gather_flat(machine, count, size) - saved


def all_gather_in_fewest_hops(machine: Machine, count: int, size: int) -> float:
    return machine.link(count).microseconds(Work(_log2(count), count - 1), size)


Cost = Callable[[Machine, int, int], float]


class Scheme(NamedTuple):
    """How a layer synchronizes: the collective of each direction, and the bytes per process for C channels."""

    forward: Cost
    forward_bytes: Callable[[int], int]
    backward: Cost
    backward_bytes: Callable[[int], int]


def _ours(cost: Cost) -> Scheme:
    return Scheme(cost, lambda C: 8 * (2 * C + 3), cost, lambda C: 8 * (2 * C + 2))


def _torchs(gather: Cost, reduce: Cost) -> Scheme:
    return Scheme(gather, lambda C: 4 * (2 * C + 1), reduce, lambda C: 4 * 2 * C)


SCHEMES = {
    "all-reduce, flat": _ours(all_reduce_flat),
    "all-reduce, node then network": _ours(all_reduce_by_node),
    "all-gather ring, flat": _torchs(ring_all_gather_flat, all_reduce_flat),
    "all-gather ring, node then network": _torchs(ring_all_gather_by_node, all_reduce_by_node),
    "all-gather, fewest hops": _torchs(all_gather_in_fewest_hops, all_reduce_flat),
}


def run(options: Options) -> Report | None:
    """Fits, predicts and prints; the report on rank 0, None elsewhere."""
    header = report.header("scaling", options.command)
    measured = _measured(options)
    if measured is None:
        return None
    backend = fitted_backend(measured.rows)
    cores = measured.header["machine"]["cores"]
    idle = [
        each
        for each in measured.rows
        if (each["situation"], each["backend"]) == (exchange.IDLE, backend) and each["processes"] > 1
    ]
    if not idle:
        raise UserError(f"--from {options.from_}: has no idle exchange between at least 2 processes; measure one")
    fitted_rows = [each for each in idle if backend != "gloo" or each["processes"] <= max(2, cores)]
    fitted = fit(fitted_rows, backend)
    machine = machine_of(fitted, options)
    facts = {
        "network": RESNET50_FPN.name,
        "layers": sum(channel_counts(RESNET50_FPN).values()),
        "fitted_to": _source(measured, fitted_rows, backend),
        "host": _described(machine.host, given_host(options)),
        "between_nodes": _described(machine.network, PARTS[1:]) | {"raised": raised(machine, options)},
        "processes_per_node": machine.processes_per_node,
        "exchange": measured.header,
    }
    # Points measured on another machine than the one that the user assumes would only mislead.
    rows = predictions(machine) + (sums_of_measurements(idle, cores) if not given_host(options) else [])
    result = Report(header | facts, rows, residuals(idle, fitted, backend, fitted_rows))
    if options.from_ is not None:
        report.show_header(result.header)
    show(result)
    return result


def _measured(options: Options) -> Report | None:
    if options.from_ is None:
        return exchange.run(options)
    if not processes.is_first():
        return None
    try:
        measured = report.read(options.from_)
    except ValueError as error:
        raise UserError(f"--from: {error}") from error
    if measured.header.get("benchmark") != "exchange" or not measured.rows:
        raise UserError(f"--from {options.from_}: expected rows of `python -m syncbn.bench exchange --json PATH`")
    return measured


def fitted_backend(rows: list[Row]) -> str:
    """NCCL's rows where there are enough of them: with one process nothing is exchanged."""
    return "nccl" if any(each["backend"] == "nccl" and each["processes"] > 1 for each in rows) else "gloo"


def fit(rows: list[Row], backend: str) -> Parameters:
    """The parameters, none of them negative, with the least squares of relative errors."""
    factors = torch.tensor([_factors(each, backend) for each in rows], dtype=torch.float64)
    times = torch.tensor([1e3 * each["total_ms"] for each in rows], dtype=torch.float64)
    # Relative errors, and columns of equal size: a byte's microseconds are a millionth of a hop's.
    relative = factors / times[:, None]
    scale = relative.norm(dim=0)
    best, best_error = torch.zeros(3, dtype=torch.float64), math.inf
    # A parameter that would be negative is 0; with three of them, all ways to choose these can be tried.
    for chosen in (subset for size in (1, 2, 3) for subset in combinations(range(3), size)):
        columns = (relative / scale)[:, list(chosen)]
        solution = torch.linalg.lstsq(columns, torch.ones(len(rows), 1, dtype=torch.float64), driver="gelsd").solution
        error = float((columns @ solution - 1).square().sum())
        if bool((solution >= 0).all()) and error < best_error:
            best, best_error = torch.zeros(3, dtype=torch.float64), error
            best[list(chosen)] = solution[:, 0]
    return Parameters(*(best / scale).tolist())


def _factors(measured: Row, backend: str) -> tuple[float, float, float]:
    work = FITTED[backend][measured["impl"]](measured["processes"])
    return 1.0, work.hops, work.messages * measured["message_bytes"]


def machine_of(fitted: Parameters, options: Options) -> Machine:
    """The fitted host, where the user does not assume another one, and the assumed network."""
    host = fitted._replace(**given_host(options))
    network = Parameters(
        0.0,  # a collective has its overhead once, in the host
        max(options.network_latency_us, host.latency_us),
        max(_us_per_byte(options.network_gbs), host.us_per_byte),
    )
    return Machine(host, network, options.processes_per_node)


def raised(machine: Machine, options: Options) -> str:
    """What of the network would otherwise be faster than within the host; empty if nothing."""
    assumed = {"latency_us": options.network_latency_us, "gbs": _us_per_byte(options.network_gbs)}
    taken = {"latency_us": machine.network.latency_us, "gbs": machine.network.us_per_byte}
    return ", ".join(name for name in assumed if taken[name] != assumed[name])


def given_host(options: Options) -> dict[str, float]:
    """What the user assumes of the host."""
    given = {
        "overhead_us": options.host_overhead_us,
        "latency_us": options.host_latency_us,
        "us_per_byte": None if options.host_gbs is None else _us_per_byte(options.host_gbs),
    }
    return {name: value for name, value in given.items() if value is not None}


def _us_per_byte(gbs: float) -> float:
    return 1e-3 / gbs


def predictions(machine: Machine) -> list[Row]:
    """A row for every scheme and number of processes: all layers of the network, one training step."""
    layers = channel_counts(RESNET50_FPN).items()
    rows = []
    for name, scheme in SCHEMES.items():
        for count in PROCESSES:
            forward = sum(layer * scheme.forward(machine, count, scheme.forward_bytes(C)) for C, layer in layers) / 1e3
            backward = (
                sum(layer * scheme.backward(machine, count, scheme.backward_bytes(C)) for C, layer in layers) / 1e3
            )
            rows.append(
                row(
                    case=RESNET50_FPN.name,
                    impl=name,
                    fwd_ms=forward,
                    bwd_ms=backward,
                    total_ms=forward + backward,
                    processes=count,
                    kind="model",
                )
            )
    return rows


def _all_layers_ms(cost: Cost, size: Callable[[int], int], machine: Machine, count: int) -> float:
    return sum(layers * cost(machine, count, size(C)) for C, layers in channel_counts(RESNET50_FPN).items()) / 1e3


def sums_of_measurements(idle: list[Row], cores: int) -> list[Row]:
    """What the measured collectives of one layer each add up to over the network's layers.

    Backward's all-reduce is taken to last as long as the measured one, forward's, which is one number longer.
    """
    layers = channel_counts(RESNET50_FPN)
    rows = []
    for count in sorted({each["processes"] for each in idle}):
        times = {(each["impl"], each["channels"]): each["total_ms"] for each in idle if each["processes"] == count}
        backward = sum(layer * times["all-reduce", C] for C, layer in layers.items())
        for impl in ("all-reduce", "all-gather"):
            forward = sum(layer * times[impl, C] for C, layer in layers.items())
            rows.append(
                row(
                    case=RESNET50_FPN.name,
                    impl=impl,
                    fwd_ms=forward,
                    bwd_ms=backward,
                    total_ms=forward + backward,
                    processes=count,
                    kind="measured",
                    crowded=idle[0]["backend"] == "gloo" and count > cores,
                )
            )
    return rows


def residuals(idle: list[Row], fitted: Parameters, backend: str, fitted_rows: list[Row]) -> list[Row]:
    """For every number of processes and collective: how far the fitted model is from what was measured."""
    groups: dict[tuple[int, str], list[Row]] = {}
    for each in idle:
        groups.setdefault((each["processes"], each["impl"]), []).append(each)
    found = []
    for (count, impl), rows in groups.items():
        work = FITTED[backend][impl](count)
        modelled = [fitted.microseconds(work, each["message_bytes"]) / 1e3 for each in rows]
        pairs = list(zip(modelled, (each["total_ms"] for each in rows), strict=True))
        found.append(
            {
                "figure": "residual",
                "processes": count,
                "impl": impl,
                "fitted": rows[0] in fitted_rows,
                "measured_ms": sum(measured for _, measured in pairs) / len(pairs),
                "model_ms": sum(modelled) / len(pairs),
                "rms_error": math.sqrt(sum((model / measured - 1) ** 2 for model, measured in pairs) / len(pairs)),
            }
        )
    return found


def _source(measured: Report, fitted_rows: list[Row], backend: str) -> str:
    counts = ", ".join(str(count) for count in sorted({each["processes"] for each in fitted_rows}))
    return f"{backend} over {counts} processes, {measured.header['machine']['cpu']}, {measured.header['date'][:10]}"


def _described(parameters: Parameters, assumed: object) -> dict[str, float | str | None]:
    """For the header: the values, and which of them nobody has measured."""
    names = {"overhead_us": "overhead_us", "latency_us": "latency_us", "us_per_byte": "gbs"}
    per_byte = parameters.us_per_byte
    values = (parameters.overhead_us, parameters.latency_us, 1e-3 / per_byte if per_byte else None)
    missing = [names[part] for part in PARTS if part in assumed]  # type: ignore[operator]
    return dict(zip(names.values(), values, strict=True)) | {"assumed": ", ".join(missing)}


def show(result: Report) -> None:
    header = result.header
    print(f"\nThe model (syncbn/bench/scaling.py) fitted to {header['fitted_to']}")
    table = Table(
        Column("where", 14),
        Column("overhead us", 11, 1),
        Column("us a hop", 9, 2),
        Column("GB/s", 9, 2),
        Column("assumed, not measured", 60),
    )
    table.head()
    for where in ("host", "between_nodes"):
        values = header[where]
        table.line(
            where.replace("_", " "),
            *(values[key] if values[key] is not None else "no limit" for key in ("overhead_us", "latency_us", "gbs")),
            (values["assumed"] or "-") + (f" ({values['raised']} set to the host's)" if values.get("raised") else ""),
        )
    print("\nThe fit: a collective's mean over the channel counts, and the relative error of the single ones")
    table = Table(
        Column("processes", 9, 0),
        Column("collective", 11),
        Column("fitted", 6),
        Column("measured ms", 11, 3),
        Column("model ms", 9, 3),
        Column("rms error", 9, 2),
    )
    table.head()
    for each in result.summary:
        table.line(
            each["processes"],
            each["impl"],
            "yes" if each["fitted"] else "no",
            *(each[key] for key in ("measured_ms", "model_ms", "rms_error")),
        )
    _show_predictions(result)


def _show_predictions(result: Report) -> None:
    header = result.header
    print(
        f"\nPredicted, not measured: ms of synchronization in a training step of {header['network']} "
        f"({header['layers']} layers), {header['processes_per_node']} processes a node"
    )
    titles = {
        "all-reduce, flat": "all-reduce flat",
        "all-reduce, node then network": "all-reduce node",
        "all-gather ring, flat": "gather flat",
        "all-gather ring, node then network": "gather node",
        "all-gather, fewest hops": "gather few hops",
    }
    measured = ("all-reduce", "all-gather")
    table = Table(
        Column("processes", 9, 0),
        *(Column(title, 15, 2) for title in titles.values()),
        *(Column(title, 8, 1) for title in ("meas. ar", "meas. ag")),
    )
    table.head()
    totals = {(each["kind"], each["impl"], each["processes"]): each["total_ms"] for each in result.rows}
    for count in PROCESSES:
        table.line(
            count,
            *(totals["model", name, count] for name in titles),
            *(totals.get(("measured", impl, count)) for impl in measured),
        )
    print("meas.: all-reduces (ar), or all-gathers and all-reduces (ag), of this host added up; see `fitted` above.")
    crossing = [
        count
        for count in PROCESSES
        if totals["model", "all-gather ring, node then network", count]
        > totals["model", "all-reduce, node then network", count]
    ]
    if crossing:
        print(f"By the model, a ring all-gather costs more than the all-reduce from {crossing[0]} processes on.")
