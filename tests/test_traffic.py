"""What an Exchange counts, and what a profiler's trace shows of its layers: on two processes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.profiler import ProfilerActivity, profile

import syncbn
from syncbn import Exchange, observed
from syncbn.traffic import OF_NO_LAYER, Traffic, total_seconds

NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="events are of a GPU")
STEPS = 4


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.BatchNorm1d(3)
        self.head = nn.ModuleDict({"a": nn.BatchNorm1d(5), "b": nn.BatchNorm1d(7)})

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b = syncbn.normalize_together(self.head.values(), [x[:, :1].expand(-1, 5), x[:, :1].expand(-1, 7)])
        return a.square().sum() + b.sum()


def trained(steps: int) -> Net:
    torch.manual_seed(dist.get_rank() if dist.is_initialized() else 0)
    net = syncbn.convert(Net()).double()
    for _ in range(steps):
        net(torch.randn(4, 3, dtype=torch.float64, requires_grad=True)).backward()
    return net


def counted() -> dict[str, Any]:
    net = trained(STEPS)
    exchange = net.stem._exchange
    first = exchange.traffic.snapshot()
    rows = exchange.traffic.rows(exchange.layer_name)
    net(torch.randn(4, 3, dtype=torch.float64))
    since = exchange.traffic.rows(exchange.layer_name, first)
    again = exchange.traffic.rows(exchange.layer_name, exchange.traffic.snapshot())
    exchange.all_reduce(torch.zeros(6, dtype=torch.float64))
    return {
        "rows": [tuple(row)[1:6] for row in rows],
        "seconds": [(row.mean_s, row.longest_s) for row in rows],
        "total": total_seconds(rows),
        "since": [(row.name, row.direction, row.calls, row.samples) for row in since],
        "again": [row.calls for row in again],
        "last": exchange.traffic.rows(exchange.layer_name)[-1][:5],
        "sums": (exchange.calls, exchange.bytes),
    }


def test_calls_bytes_and_time_by_layer_and_direction(processes: Any) -> None:
    """A message is 2C+3 numbers forward and 2C+2 backward; that of two layers together counts for the first."""
    for told in processes(2).run(counted):
        assert told["rows"] == [
            ("stem", "forward", STEPS, STEPS * 8 * 9, STEPS - 1),
            ("head.a", "forward", STEPS, STEPS * 8 * (13 + 17), STEPS - 1),
            ("head.a", "backward", STEPS, STEPS * 8 * (12 + 16), STEPS - 1),
            ("stem", "backward", STEPS, STEPS * 8 * 8, STEPS - 1),
        ]
        assert all(0 < mean <= longest < 10 for mean, longest in told["seconds"])
        assert told["total"] == pytest.approx(STEPS * sum(mean for mean, _ in told["seconds"]))


def test_readers_do_not_disturb_each_other(processes: Any) -> None:
    for told in processes(2).run(counted):
        assert told["since"][:2] == [("stem", "forward", 1, 1), ("head.a", "forward", 1, 1)]
        assert [calls for _, _, calls, _ in told["since"][2:]] == [0, 0]
        assert told["again"] == [0, 0, 0, 0]
        assert told["last"] == (OF_NO_LAYER, "no layer", "forward", 1, 48)
        forward, backward = 8 * (9 + 30), 8 * (8 + 28)
        assert told["sums"] == (4 * STEPS + 3, STEPS * (forward + backward) + forward + 48)


def test_an_exchange_that_fails_does_not_count() -> None:
    traffic, message = Traffic(), torch.zeros(2)
    for fails in (False, True, False):
        try:
            with traffic.counted(0, "forward", message):
                if fails:
                    raise RuntimeError
        except RuntimeError:
            pass
    assert traffic.calls == 2
    assert traffic.bytes == 16


def test_without_a_sample_the_time_is_unknown_or_the_earlier_one() -> None:
    traffic, message = Traffic(), torch.zeros(2)

    def exchange(times: int) -> None:
        for _ in range(times):
            with traffic.counted(0, "forward", message):
                pass

    exchange(1)
    [first] = traffic.rows()
    assert math.isnan(first.seconds)
    assert math.isnan(total_seconds([first]))
    with torch.no_grad():
        exchange(3)
    before = traffic.snapshot()
    exchange(2)  # where gradients are recorded a collective is only begun
    [row] = traffic.rows(since=before)
    assert (row.calls, row.samples) == (2, 0)
    assert row.mean_s == traffic.rows()[0].mean_s > 0


@NEEDS_CUDA
def test_on_a_gpu_events_are_read_when_they_have_been_passed() -> None:
    traffic, message = Traffic(every=2), torch.zeros(2, device="cuda")
    with torch.no_grad():
        for _ in range(9):
            with traffic.counted(0, "forward", message):
                message.add_(1)
            torch.cuda.synchronize()
        [row] = traffic.rows()
        assert row.samples == 4
        assert 0 < row.mean_s < 1
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(3):
                with traffic.counted(0, "forward", message):
                    message.add_(1)
    assert traffic.rows()[0].samples == 4
    graph.replay()
    assert traffic.calls == 12


# ---- ranges


def traced(folder: str) -> None:
    net = trained(1)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        net(x).backward()
    profiler.export_chrome_trace(str(Path(folder) / f"{dist.get_rank()}.json"))


@pytest.fixture(scope="module")
def traces(processes: Any, tmp_path_factory: Any) -> list[list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("traces")
    processes(2).run(traced, str(folder))
    traces = [json.loads((folder / f"{rank}.json").read_text())["traceEvents"] for rank in (0, 1)]
    return [[event for event in trace if event.get("ph") == "X"] for trace in traces]


def within(events: list[dict[str, Any]], name: str) -> list[str]:
    """The names of all events inside of the one of this name, on its thread."""
    [outer] = [event for event in events if event["name"] == name]
    end = outer["ts"] + outer["dur"]
    return [
        event["name"]
        for event in events
        if event is not outer and event["tid"] == outer["tid"] and outer["ts"] <= event["ts"] < end
    ]


def test_a_trace_bears_the_layers_names(traces: Any) -> None:
    for events in traces:
        names = [event["name"] for event in events if event["name"].startswith("syncbn ")]
        assert sorted(names) == sorted([
            "syncbn stem forward",
            "syncbn stem forward exchange",
            "syncbn head.a, head.b forward",
            "syncbn head.a, head.b forward exchange",
            "syncbn head.a, head.b backward",
            "syncbn head.a, head.b backward exchange",
            "syncbn stem backward",
            "syncbn stem backward exchange",
        ])  # fmt: skip


@pytest.mark.parametrize("layer", ["stem", "head.a, head.b"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_range_has_the_kernels_and_the_exchange_inside(traces: Any, layer: str, direction: str) -> None:
    for events in traces:
        inside = within(events, f"syncbn {layer} {direction}")
        assert f"syncbn {layer} {direction} exchange" in inside
        assert any("allreduce" in name.lower() for name in within(events, f"syncbn {layer} {direction} exchange"))
        assert any(name.startswith("aten::") for name in inside)


def test_a_backward_range_stands_in_autograds(traces: Any) -> None:
    for events in traces:
        assert "syncbn stem backward" in within(events, "_NormalizeBackward")
        assert "syncbn head.a, head.b backward" in within(events, "_NormalizeTogetherBackward")


def test_without_a_profiler_there_is_nothing() -> None:
    """Not even a name is made."""

    class Nobody:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    frame: Any = Nobody()
    assert observed.named("forward", frame) is observed.named("backward", frame)
    with profile(activities=[ProfilerActivity.CPU]), pytest.raises(AssertionError, match="source"):
        observed.named("forward", frame)


def test_of_one_process_there_are_ranges_without_an_exchange() -> None:
    net = syncbn.convert(Net())
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        net(torch.randn(4, 3, requires_grad=True)).backward()
        syncbn.sync_batch_norm(torch.randn(4, 3), None, None, training=True)
    names = {event.key for event in profiler.key_averages() if event.key.startswith("syncbn ")}
    assert names == {
        "syncbn stem forward",
        "syncbn head.a, head.b forward",
        "syncbn head.a, head.b backward",
        "syncbn stem backward",
        "syncbn sync_batch_norm forward",
    }


def compiled() -> tuple[int, int]:
    torch.compiler.reset()
    net = syncbn.convert(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))).double()
    counter = CompileCounter()
    run = torch.compile(net, fullgraph=True, backend=counter)
    x = torch.randn(4, 3, dtype=torch.float64)

    class Watcher:
        def saw(self, *_: Any) -> None:
            raise AssertionError("in a compiled graph")

    run(x).sum().backward()
    with profile(activities=[ProfilerActivity.CPU]) as profiler, observed.watched_by(Watcher()):
        run(x).sum().backward()
    run(x).sum().backward()
    ranges = sum(event.key.startswith("syncbn ") for event in profiler.key_averages())
    torch.compiler.reset()
    return counter.frame_count, ranges


def test_neither_a_profiler_nor_a_watcher_makes_a_graph_anew(processes: Any) -> None:
    assert processes(2).run(compiled) == [(1, 0), (1, 0)]


def test_a_copied_model_counts_for_itself() -> None:
    import copy

    exchange = Exchange()
    with exchange.traffic.counted(0, "forward", torch.zeros(2)):
        pass
    assert (exchange.calls, copy.deepcopy(exchange).calls) == (1, 0)
