"""What the launcher does about the processes it has started: restarts, signals, its own death."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from jobs import Job

LAUNCH = (
    "import os, sys; from syncbn.training.launch import run; "
    "sys.exit(run(2, sys.argv[2:], 'episodes', max_restarts=int(sys.argv[1])))"
)


@pytest.fixture
def launch(tmp_path):
    """``launch(restarts, *what)``: two processes of episodes.py, and the folder in which they say that they live."""
    running = []

    def start(restarts, *what):
        here, folder = f"PYTHONPATH={Path(__file__).parent}", tmp_path / str(len(running))
        folder.mkdir()
        running.append(Job(["env", here, sys.executable, "-c", LAUNCH, str(restarts), str(folder), *what], tmp_path))
        return running[-1], folder

    yield start
    for job in running:
        job.kill()


def processes(folder, start=0):
    """The process ids of a start, once all have begun."""
    deadline = time.monotonic() + 60
    while True:
        files = [folder / f"{start}.{rank}" for rank in (0, 1)]
        if all(file.exists() and file.read_text() for file in files):
            return [int(file.read_text()) for file in files]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def lives(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{process}/status").read_text()


def test_all_are_started_again_after_a_death_but_not_after_a_users_mistake(launch):
    job, folder = launch(3, "9", "exit 7", "exit 2")
    assert job.finish(100) == 2
    assert job.error_output == (
        "process 1 was ended by SIGKILL: starting all processes again, restart 1 of 3\n"
        "process 1 ended with status 7: starting all processes again, restart 2 of 3\n"
    )
    assert {file.name for file in folder.iterdir()} == {f"{start}.{rank}" for start in (0, 1, 2) for rank in (0, 1)}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's word of a parent's death is Linux's")
def test_two_jobs_on_a_node_leave_each_other_alone(launch):
    """Each has a port of its own, beyond the node's reach for neither; one is killed, the other is told to stop."""
    (first, firsts), (second, seconds) = launch(3), launch(3)
    killed, others = processes(firsts), processes(seconds)
    assert first.listening_addresses() == second.listening_addresses() == {"127.0.0.1"}
    first.process.kill()
    deadline = time.monotonic() + 5
    while any(map(lives, killed)):  # no process outlives its launcher
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert all(map(lives, others))
    second.process.send_signal(signal.SIGUSR1)
    assert second.finish(60) == 128 + signal.SIGUSR1
    assert sorted(second.lines) == ["rank 0: SIGTERM\n", "rank 1: SIGTERM\n"]
