"""Every mode of the benchmark, run as a user would."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from syncbn.bench.implementations import implementations
from syncbn.bench.report import KEYS, WIDTH

pytest.importorskip("matplotlib")
pytest.importorskip("torchvision")

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
PNG = b"\x89PNG\r\n\x1a\n"


@dataclass
class Run:
    """What a run has left."""

    lines: list[str]
    header: dict[str, Any]
    rows: list[dict[str, Any]]
    summary: list[dict[str, Any]]
    folder: Path


def run(folder: Path, *arguments: str, launcher: tuple[str, ...] = ()) -> Run:
    """``python -m syncbn.bench`` with JSON and plot, and what must hold of every mode."""
    mode = arguments[0]
    json_path, plot_path = folder / f"{mode}.json", folder / f"{mode}.png"
    command = [sys.executable, *launcher, "-m", "syncbn.bench", *arguments]
    done = subprocess.run(
        [*command, "--json", str(json_path), "--plot", str(plot_path)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == f"Written: {json_path}, {plot_path}"
    # The command and the machine's line are as long as they are.
    assert [line for line in lines[4:-1] if len(line) > WIDTH] == []
    written = json.loads(json_path.read_text())
    assert list(written) == ["header", "rows", "summary"]
    header, rows = written["header"], written["rows"]
    assert header["benchmark"] == mode
    assert header["command"].startswith(f"python -m syncbn.bench {mode}")
    assert {"date", "machine", "versions"} <= set(header)
    assert {"cpu", "cores", "load_average"} <= set(header["machine"])
    assert header["versions"]["torch"]
    for row in rows:
        assert tuple(row)[: len(KEYS)] == KEYS
        assert row["total_ms"] > 0
    picture = plot_path.read_bytes()
    assert picture.startswith(PNG)
    assert 10_000 < len(picture) < 300_000
    return Run(lines, header, rows, written["summary"], folder)


@pytest.fixture(scope="module")
def exchange_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run(tmp_path_factory.mktemp("exchange"), "exchange", "--quick")


def test_layer(tmp_path: Path) -> None:
    result = run(tmp_path, "layer", "--quick")
    known = implementations(torch.device(result.header["device"]), result.header["world_size"])
    cases = {(row["case"], row["layout"], row["dtype"]) for row in result.rows}
    assert len(cases) == 4 * 2 * 2
    for each in known:
        if each.layer is None:
            continue
        if each.missing is None:
            measured = [row for row in result.rows if row["impl"] == each.name]
            assert {(row["case"], row["layout"], row["dtype"]) for row in measured} == cases or each.foreign
        else:
            assert result.header["missing"][each.name] == each.missing
            assert f"not run: {each.name}: {each.missing}" in result.lines
    for row in result.rows:
        assert min(row["fwd_ms"], row["bwd_ms"]) > 0
        assert row["total_ms_q1"] <= row["total_ms"] <= row["total_ms_q3"]
        passes = 11 if row["impl"].endswith("+add+relu") else 8
        assert row["moved_bytes"] == passes * row["tensor_bytes"]
        assert row["gbs"] == pytest.approx(row["moved_bytes"] / row["total_ms"] / 1e6, rel=1e-4)
        assert row["of_copy"] == pytest.approx(row["gbs"] / result.header["copy_gbs"], rel=1e-4)
    pairs = [(each["impl"], each["against"]) for each in result.summary if each["figure"] == "speed-up"]
    assert ("syncbn", "naive") in pairs
    assert ("syncbn+add+relu", "local+add+relu") in pairs
    host = {each["impl"]: each for each in result.summary if each["figure"] == "host time"}
    assert {"syncbn", "syncbn+add+relu", "local", "naive"} <= set(host)
    assert min(each["forward_us"] for each in host.values()) > 0


def test_step(tmp_path: Path) -> None:
    result = run(tmp_path, "step", "--quick", "--models", "resnet50")
    names = [row["impl"] for row in result.rows]
    missing = result.header["missing"]
    for name in ("syncbn", "syncbn+fuse", "local", "torch-sync", "fairscale", "naive"):
        assert (name in names) != (name in missing)
    for row in result.rows:
        assert min(row["fwd_ms"], row["bwd_ms"], row["optimizer_ms"]) > 0
        assert (row["peak_mb"] is None) == (result.header["device"] == "cpu")


def test_memory(tmp_path: Path) -> None:
    result = run(tmp_path, "memory", "--quick", "--models", "unet")
    saved = {row["impl"]: row["saved_mb"] for row in result.rows}
    assert set(saved) == {"local", "syncbn+fuse", "syncbn+recompute"}
    assert saved["syncbn+recompute"] < 0.75 * saved["local"]
    assert 0 < saved["syncbn+fuse"] < 1.05 * saved["local"]


def test_exchange(exchange_run: Run) -> None:
    rows = exchange_run.rows
    idle = [row for row in rows if row["situation"] == "idle"]
    for count in (2, 4, 8, 16):
        of_count = {(row["impl"], row["channels"]): row for row in idle if row["processes"] == count}
        assert len(of_count) == 2 * 6
        for (impl, C), row in of_count.items():
            assert row["message_bytes"] == (8 * (2 * C + 3) if impl == "all-reduce" else 4 * (2 * C + 1))
            assert row["case"] == f"C={C}"
            assert row["total_ms_q1"] <= row["total_ms"] <= row["total_ms_q3"]
    situations = {row["situation"] for row in rows}
    assert situations == {"idle", "behind buckets, shared", "behind buckets, dedicated"}
    worlds = [world["world_size"] for world in exchange_run.header["worlds"]]
    assert set(worlds) >= {2, 4, 8, 16}


def test_scaling_from_an_exchange(exchange_run: Run, tmp_path: Path) -> None:
    result = run(tmp_path, "scaling", "--quick", "--from", str(exchange_run.folder / "exchange.json"))
    model = [row for row in result.rows if row["kind"] == "model"]
    assert {row["processes"] for row in model} == {2**exponent for exponent in range(1, 13)}
    assert any(row["kind"] == "measured" for row in result.rows)
    assert "latency_us" in result.header["between_nodes"]["assumed"]  # a single host cannot tell
    assert result.header["host"]["assumed"] == ""
    assert result.header["exchange"]["command"] == exchange_run.header["command"]
    assert any(line.startswith("Predicted, not measured") for line in result.lines)
    assert {each["fitted"] for each in result.summary} >= {True}


def test_layer_under_torchrun(tmp_path: Path) -> None:
    arguments = ("layer", "--quick", "--device", "cpu", "--networks", "unet-3d", "--rounds", "2")
    result = run(tmp_path, *arguments, "--implementations", "syncbn,local", launcher=tuple(TORCHRUN))
    assert result.header["world_size"] == 2
    assert len(result.rows) == 2 * 2 * 2
    assert sum(line.startswith("$ python -m syncbn.bench") for line in result.lines) == 1  # one process speaks


def test_scaling_under_torchrun_measures_first(tmp_path: Path) -> None:
    result = run(tmp_path, "scaling", "--quick", "--device", "cpu", launcher=tuple(TORCHRUN))
    assert {row["processes"] for row in result.rows if row["kind"] == "measured"} == {2}
    assert "gloo over 2 processes" in result.header["fitted_to"]
    assert result.header["exchange"]["notes"]


def test_monitor(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    result = run(tmp_path, "monitor", "--quick")
    assert [row["impl"] for row in result.rows] == ["syncbn", "syncbn+monitor"]
    assert result.rows[1]["hooks_ms"] > 0
