"""The soak that is short enough for every run of the tests; `make soak` is the long one."""

from __future__ import annotations

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
