"""The soak that is short enough for every run of the tests; `make soak` is the long one."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "programs" / "soak.py"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="it reads /proc")


def soak(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, str(PROGRAM), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)


def growth_of(descriptors: list[int]) -> float:
    """What the soak makes of so many open files after each round."""
    spec = importlib.util.spec_from_file_location("soak", PROGRAM)
    assert spec is not None
    assert spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    counts = iter(descriptors)
    program.held = lambda: [next(counts), *[0] * (len(program.ALLOWED) - 1)]
    history = program.History(len(descriptors))
    for _ in descriptors:
        history.note()
    return float(history.growth()["descriptors"])


@pytest.mark.parametrize(
    ("descriptors", "grows"),
    [
        ([9, 9, 9, 9, 9, 9, 9, 9, 9, 9], False),
        ([9, 9, 9, 9, 9, 9, 9, 10, 10, 10], False),  # opened once, late
        ([9, 9, 9, 9, 9, 9, 9, 9, 9, 10], False),  # open by chance when the last round is counted
        ([9, 9, 9, 9, 8, 8, 9, 9, 9, 9], False),
        ([9, 10, 11, 12, 13, 14, 15, 16, 17, 18], True),
        ([9, 9, 10, 10, 11, 11, 12, 12, 13, 13], True),
        ([1, 2, 3, 4, 5], True),
    ],
)
def test_what_goes_on_growing_is_told_from_what_comes_once(descriptors: list[int], grows: bool) -> None:
    """On a busy machine a step takes seconds, and the watchdog asks the store just when a round is counted."""
    assert (growth_of(descriptors) > 0) == grows


@pytest.mark.timeout(240)
def test_nothing_grows_and_all_processes_have_the_same_statistics() -> None:
    run = soak("--steps=200")
    assert run.returncode == 0, run.stdout + run.stderr
    assert "flat, and the same statistics on all processes" in run.stdout


@pytest.mark.timeout(240)
def test_what_is_lost_on_one_process_is_noticed() -> None:
    """All kinds at once: a tensor, an object, a file and 16 kB of memory in every step."""
    run = soak("--steps=100", "--leak")
    assert run.returncode == 1, run.stdout + run.stderr
    for what in ("descriptors", "tensors", "objects", "heap"):
        assert f"process 1: {what} grew by" in run.stdout
    assert "process 0: " not in run.stdout.partition("process 1: ")[2].partition("process 1: ")[2]
