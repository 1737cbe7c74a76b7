"""A run's training job: the normal training command in processes of its own."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from syncbn.training.environment import RUN_STAMP_VARIABLE
from syncbn.training.study.plan import Run

_STOP_S = 30  # in which a job that is told to stop saves its work
# What launch/train.sh sets, beside the threads: sockets that stay on this machine.
_ENVIRONMENT = {"NCCL_LAUNCH_ORDER_IMPLICIT": "1"}
_ON_LINUX = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}


class JobError(Exception):
    """A training job ended with another status than 0. The message is one line."""


def train(run: Run, folder: Path, overrides: Sequence[str]) -> None:
    """Trains one run; what it says goes to `log.txt` in its folder.

    Raises:
        JobError: it did not end well.
        KeyboardInterrupt: this process was interrupted; the job has been, too, and has ended.
    """
    command = [
        sys.executable,
        "-m",
        "syncbn.training.launch",
        "experiment=study",
        *overrides,
        f"norm={run.norm}",
        f"seed={run.seed}",
        f"data.batch_size={run.batch}",
        f"trainer.devices={run.processes}",
        f"run_dir={_quoted(folder)}",
    ]
    log = folder / "log.txt"
    with log.open("w") as output:
        # A session of its own: Ctrl-C reaches this process alone, which passes it on once.
        job = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(run.processes),
            start_new_session=True,
        )
        try:
            status = job.wait()
        except BaseException:
            _stop(job)
            raise
    if status != 0:
        raise JobError(f"exit status {status}: {_last_line(log)} (see {log})")


def _quoted(path: Path) -> str:
    """For Hydra, to which commas and brackets in a value mean something."""
    return "'" + str(path).replace("'", "\\'") + "'"


def _environment(processes: int) -> dict[str, str]:
    # Processes that each start a thread per core would fight over the cores; one alone may have them all.
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
    defaults = _ENVIRONMENT | threads | (_ON_LINUX if sys.platform == "linux" else {})
    # Each job is a run with a stamp of its own.
    return defaults | {name: value for name, value in os.environ.items() if name != RUN_STAMP_VARIABLE}


def _stop(job: "subprocess.Popen[bytes]") -> None:
    """As Ctrl-C would; what has not ended by then is ended."""
    job.send_signal(signal.SIGINT)
    try:
        job.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        job.wait()


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
