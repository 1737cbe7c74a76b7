"""``python -m syncbn.doctor``, run by real processes: healthy ones, and ones of which something is wrong."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from syncbn.doctor import machine, network, pings, software
from syncbn.doctor.checks import FAILED, OK, WARNING, Check, ranks_in_words
from syncbn.doctor.messages import judge_arrivals, judge_sums
from syncbn.doctor.options import parse
from syncbn.doctor.report import Report

ROOT = Path(__file__).parent.parent
WITHIN_S = 90.0  # whatever is wrong
CHECKS = ["versions", "environment", "GPUs", "network", "disks", "links", "clocks", "sums", "all-reduce"]
CHECKS += ["slowest rank", "exactness", "mismatches"]
DOCTOR = [sys.executable, "-m", "syncbn.doctor", "--device", "cpu"]
PLAIN = {"OMP_NUM_THREADS": "1"}

pytestmark = pytest.mark.timeout(200)


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, timeout=WITHIN_S, cwd=ROOT, env=os.environ | PLAIN | environment
    )


@contextmanager
def process(rank: int, store: Path | None, *arguments: str, cwd: Path = ROOT, **environment: str) -> Iterator[Any]:
    """One of two processes of the doctor, which meet in a file, if there is one."""
    arguments = arguments if store is None else ("--store", str(store), *arguments)
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    with subprocess.Popen(
        [*DOCTOR, "--json", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env=os.environ | PLAIN | ranks | environment,
    ) as started:
        try:
            yield started
        finally:
            started.kill()  # also one that is stopped


def until_answered(step: str, store: Path) -> None:
    """Until both processes are through with a step: a FileStore holds its keys as they are."""
    deadline = time.monotonic() + WITHIN_S
    keys = [f"{step}/answers/{rank}".encode() for rank in range(2)]
    while not (store.exists() and all(key in store.read_bytes() for key in keys)):
        assert time.monotonic() < deadline, "the doctor does not come so far"
        time.sleep(0.01)


def document(process: Any) -> dict[str, Any]:
    out, err = process.communicate(timeout=WITHIN_S)
    assert out, err
    return json.loads(out)


# ---- healthy


def test_under_torchrun_as_json() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ran = run([*torchrun, "-m", "syncbn.doctor", "--json", "--device", "cpu"])
    assert ran.returncode == 0, ran.stdout + ran.stderr
    found = json.loads(ran.stdout)
    checks = {check["name"]: check for check in found["checks"]}
    assert list(checks) == CHECKS
    assert found["healthy"]
    assert found["verdict"].startswith("healthy: 2 processes on 1 host, a layer's message takes ")
    assert all(len(check["per_rank"]) == 2 for check in checks.values())
    for versions in checks["versions"]["per_rank"]:
        assert versions["torch"] == torch.__version__
        assert versions["gloo"] is True
        assert versions["syncbn"].endswith(f"({software.code_digest()})")
    rows = checks["all-reduce"]["per_rank"][1]
    assert {(row["communicator"], row["bytes"]) for row in rows} == {
        (name, size)
        for name in ("default", "dedicated")
        for size in [*(8 * (2 * C + 3) for C in (64, 128, 256, 512, 1024, 2048)), 25 << 20]
    }
    assert all(0 < row["median_ms"] <= row["p99_ms"] for row in rows)
    assert checks["exactness"]["per_rank"][0]["error"] < 1e-10


def test_alone_it_starts_processes_and_prints_a_page() -> None:
    """Without torchrun's environment; over the loopback interface."""
    ran = run([*DOCTOR, "--processes", "2"])
    lines = ran.stdout.splitlines()
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert lines[0] == "syncbn doctor: 2 processes on 1 host"
    assert lines[-1].startswith("healthy: 2 processes on 1 host")
    assert max(map(len, lines[:-1])) <= 100
    assert [name for name in CHECKS if not any(line[5:].startswith(name) for line in lines)] == []
    assert any("GLOO_SOCKET_IFNAME=lo" in line for line in lines)


# ---- not healthy


def test_another_environment_other_code_and_a_slow_rank(tmp_path: Path) -> None:
    """Rank 1 has another OMP_NUM_THREADS, another checkout, and is stopped three quarters of the time."""
    elsewhere, store = tmp_path / "checkout", tmp_path / "store"
    shutil.copytree(ROOT / "syncbn", elsewhere / "syncbn", ignore=shutil.ignore_patterns("__pycache__"))
    (elsewhere / "syncbn/layer.py").write_text((ROOT / "syncbn/layer.py").read_text() + "\n# another one\n")
    with ExitStack() as stack:
        first = stack.enter_context(process(0, store))
        second = stack.enter_context(process(1, store, cwd=elsewhere, OMP_NUM_THREADS="3"))
        until_answered("all-reduce", store)
        halted = threading.Thread(target=halt_now_and_then, args=(second, store), daemon=True)
        halted.start()
        found = document(first)
        second.wait(timeout=WITHIN_S)
    checks = {check["name"]: check for check in found["checks"]}
    assert (first.returncode, second.returncode) == (1, 1)
    assert not found["healthy"]
    assert found["verdict"].startswith("unhealthy: versions: syncbn differs: ")
    assert checks["environment"]["verdict"] == "failed"
    assert "OMP_NUM_THREADS differs on rank" in checks["environment"]["summary"]
    assert "1 on rank 0, 3 on rank 1" in checks["environment"]["summary"]
    assert checks["slowest rank"]["verdict"] == "failed", checks["slowest rank"]
    assert checks["slowest rank"]["summary"].startswith("rank 1: the others wait for it")
    assert checks["exactness"]["verdict"] == "ok"


def halt_now_and_then(process: Any, store: Path) -> None:
    while process.poll() is None and b"slowest rank/answers/1" not in store.read_bytes():
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.06)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.02)


def test_a_rank_that_never_comes_one_that_stops_and_no_store(tmp_path: Path) -> None:
    """All are named in time, and nobody hangs."""
    nowhere = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with ExitStack() as stack:
        lost = stack.enter_context(process(1, None, "--timeout", "1", **nowhere))
        alone = stack.enter_context(process(0, tmp_path / "alone", "--timeout", "2"))
        first = stack.enter_context(process(0, tmp_path / "both", "--timeout", "4"))
        second = stack.enter_context(process(1, tmp_path / "both", "--timeout", "4"))
        until_answered("links", tmp_path / "both")
        second.send_signal(signal.SIGSTOP)
        never, stopped = document(alone), document(first)
        out, verdict = lost.communicate(timeout=WITHIN_S)
    assert out == ""  # with --json, and it is not the one that writes the document
    assert lost.returncode == alone.returncode == first.returncode == 1
    assert "unhealthy: rendezvous: rank 1 cannot reach the store of rank 0 at 127.0.0.1:1: " in verdict
    assert never["verdict"] == "unhealthy: start: rank 1 did not come to the step 'start' within 2 s"
    assert stopped["verdict"].startswith("unhealthy: all-reduce: rank 1 did not ")


# ---- verdicts of what cannot be had here


def test_versions_that_differ() -> None:
    mine = software.versions()
    check = software.judge_versions([mine, mine, mine | {"NCCL": "2.25.1"}])
    assert check.verdict == FAILED
    assert check.summary == f"NCCL differs: {mine['NCCL']} on ranks 0, 1, 2.25.1 on rank 2"


def test_an_environment_that_slows() -> None:
    check = software.judge_environment([{"SYNCBN_CHECK": "1"}] * 2, "cpu:gloo,cuda:nccl")
    assert check.verdict == WARNING
    for text in "OMP_NUM_THREADS is not set", "NCCL_LAUNCH_ORDER_IMPLICIT is not 1", "SYNCBN_CHECK=1 is for finding":
        assert text in check.summary


def test_what_differs_between_hosts_by_nature() -> None:
    """The launcher's process, and how often this host has started: launch/multinode.sh sets them."""
    one = {"OMP_NUM_THREADS": "1", "SYNCBN_LAUNCHER": "71", "SYNCBN_STARTS_BEFORE": "0"}
    other = one | {"SYNCBN_LAUNCHER": "90", "SYNCBN_STARTS_BEFORE": "2", "NCCL_IB_HCA": "mlx5_1"}
    assert software.judge_environment([one, other], "gloo").verdict == OK
    assert software.judge_environment([one, other | {"SYNCBN_TIMEOUT": "9"}], "gloo").verdict == FAILED


def test_no_secret_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    monkeypatch.setenv("NCCL_DEBUG", "WARN")
    shown = software.environment()
    assert shown["NCCL_DEBUG"] == "WARN"
    assert "WANDB_API_KEY" not in shown


@pytest.mark.parametrize(("seconds", "verdict"), [(0.1, OK), (-3.0, WARNING), (30.0, FAILED)])
def test_clocks(seconds: float, verdict: str) -> None:
    own = [{"with": 1, "ahead_s": 0.0, "round_trip_ms": 1.0}, {"with": 2, "ahead_s": seconds, "round_trip_ms": 1.0}]
    said = [{"host": "a", "pairs": own}, {"host": "a", "pairs": []}, {"host": "b", "pairs": []}]
    check = pings.judge_clocks(said)
    assert check.verdict == verdict
    assert verdict == OK or check.summary.startswith(
        f"rank 2's is {abs(seconds)} s {'behind' if seconds < 0 else 'ahead'}"
    )


def test_interfaces() -> None:
    mine = network.network() | {"GLOO_SOCKET_IFNAME": None, "NCCL_SOCKET_IFNAME": None, "route": None}
    other = mine | {"host_id": "another"}
    assert network.judge_network([mine, mine]).verdict in (OK, WARNING)
    check = network.judge_network([mine, mine | {"NCCL_SOCKET_IFNAME": "eth99"}])
    assert check.verdict == FAILED
    assert "rank 1: NCCL_SOCKET_IFNAME=eth99, but " in check.summary
    check = network.judge_network([mine, other | {"resolves_to": "127.0.1.1"}])
    assert check.verdict == FAILED
    assert "resolves to 127.0.1.1, where other hosts do not reach gloo: set GLOO_SOCKET_IFNAME" in check.summary
    assert "loopback" in network.judge_network([mine, other | {"GLOO_SOCKET_IFNAME": "lo"}]).summary


def test_gpus_and_disks() -> None:
    gpu = {"name": "H200", "free_gb": 139.0, "total_gb": 141.0}
    host = {
        "gpus": [gpu, gpu],
        "own": 0,
        "driver": "570",
        "peers": [[True, True], [True, True]],
        "links": "GPU0 X NV18",
    }
    check = machine.judge_gpus([host, host | {"own": 1}], ["a", "a"], "cuda")
    assert (check.verdict, check.summary) == (OK, "2 x H200 on each host, driver 570")
    assert check.lines[:2] == ["links on a:", "GPU0 X NV18"]
    assert check.lines[2:] == [f"rank {r}: GPU {r}, 139.0 of 141.0 GB free" for r in range(2)]
    assert "not the same" in machine.judge_gpus([host, host | {"gpus": [gpu]}], ["a", "b"], "cuda").summary
    taken = host | {"gpus": [gpu, gpu | {"free_gb": 3.0}], "own": 1}
    assert "taken already on rank 1" in machine.judge_gpus([host, taken], ["a", "a"], "cuda").summary
    disk = machine.disks(Path("/not/there/yet"))
    assert disk["folder"] == "/"
    full = machine.judge_disks([disk | {"free_gb": 50.0, "writable": True}, disk | {"free_gb": 0.1, "writable": True}])
    assert (full.verdict, full.summary) == (FAILED, "rank 1: / has 0.1 GB left: no checkpoint fits")


def test_the_page_of_many_hosts_is_short() -> None:
    """nvidia-smi's table once for all hosts that have the same, as it reads in a terminal; no line for each rank."""
    table = "\t\x1b[4mGPU0\tGPU1\tNIC0\tCPU Affinity\tGPU NUMA ID\x1b[0m\nGPU0\t X \tNV18\tPIX\t0-47\tN/A\n"
    table += "GPU1\tNV18\t X \tSYS\t48-95\tN/A\n\nLegend:\n\n  X    = Self\n"
    gpu = {"name": "H200", "free_gb": 139.0, "total_gb": 141.0}
    of_host = {"gpus": [gpu, gpu], "driver": "570", "peers": [[True, True], [True, True]]}
    said = [of_host | {"own": rank % 2, "links": table if rank % 2 == 0 else None} for rank in range(512)]
    check = machine.judge_gpus(said, [f"node{rank // 2}" for rank in range(512)], "cuda")
    text = Report("512 processes", [check], {}).text()
    assert "links on node0 and 255 more:" in text
    assert "GPU0  X     NV18  PIX\n" in text
    assert not any(word in text for word in ("\x1b", "Affinity", "Legend"))
    assert "more lines; --json has all" in text
    assert len(text.splitlines()) < 50
    disk = machine.disks(Path("/")) | {"free_gb": 2.0, "writable": True}
    assert machine.judge_disks([disk] * 512).summary.startswith("ranks 0 to 511: / has 2.0 GB left")


def test_no_nvidia_smi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert machine._nvidia_smi("topo", "-m") is None
    gpu = {"name": "H200", "free_gb": 139.0, "total_gb": 141.0}
    said = [{"gpus": [gpu], "own": 0, "driver": None, "peers": [[True]], "links": None}]
    assert machine.judge_gpus(said, ["a"], "cuda").verdict == OK


@pytest.mark.parametrize("columns", [40, 80, 300])
def test_a_page_is_as_wide_as_the_terminal(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    check = Check("all-reduce", OK, "a sentence of some words " * 9, lines=["x" * 79, "y" * 200])
    lines = Report("2 processes", [check], {}).text().splitlines()[:-1]
    assert max(map(len, lines)) == min(columns, 100)
    assert [line[-1] for line in lines if "yy" in line] == ["…"]


def test_json_has_no_infinity() -> None:
    """As the error of a layer that gives NaN; other programs do not read it."""
    check = Check("exactness", FAILED, "wrong", [{"error": float("inf")}, {"error": float("nan")}])
    text = Report("2 processes", [check], {}).json()
    assert not any(word in text for word in ("Infinity", "NaN"))
    assert json.loads(text)["checks"][0]["per_rank"] == [{"error": None}, {"error": None}]


def test_ranks_in_words() -> None:
    assert ranks_in_words([3]) == "rank 3"
    assert ranks_in_words([1, 4]) == "ranks 1, 4"
    assert ranks_in_words([*range(8), 12, 13, *range(16, 24)]) == "ranks 0 to 7, 12, 13, 16 to 23"


def test_sums_that_are_wrong() -> None:
    row = {"communicator": "default", "message": "C=64", "bytes": 1048, "median_ms": 1.0, "p99_ms": 1.0}
    said = [{"rows": [row], "wrong": []}, {"rows": [row], "wrong": ["C=64 on the default communicator"]}]
    check = judge_sums(said)
    assert check.verdict == FAILED
    assert check.summary.endswith("rank 1: C=64 on the default communicator")


def test_who_comes_late() -> None:
    """The one that works longest, whatever its collectives take."""
    fast, slow = {"worked_s": [0.01] * 60, "seconds": 6.0}, {"worked_s": [0.1] * 60, "seconds": 6.0}
    check = judge_arrivals([fast, fast, slow, fast])
    assert (check.verdict, check.per_rank) == (FAILED, [0.0, 0.0, 0.9, 0.0])
    assert check.summary.startswith("rank 2: the others wait for it 90% of the time (last in 60 of 60 rounds")
    assert judge_arrivals([fast, fast]).verdict == OK


@pytest.mark.parametrize("wrong", [["--processes", "0"], ["--timeout", "0"], ["--timeout", "x"], ["--device", "tpu"]])
def test_wrong_options(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(wrong)
    assert ended.value.code == 2
    assert f"argument {wrong[0]}" in capsys.readouterr().err
