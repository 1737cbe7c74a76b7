"""Processes on this machine, where torchrun has started none. They meet in a file, and talk over the loopback."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from .options import Options

_LEAST = 2
_AFTER_THE_FIRST_S = 10.0  # what a process has to end, when another one has


def launched() -> bool:
    """Whether torchrun (or another launcher) has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start(options: Options) -> int:
    """Runs the doctor in as many processes as asked for. Returns the exit status: 0 if all are healthy."""
    count = options.processes or max(_LEAST, torch.cuda.device_count())
    with tempfile.TemporaryDirectory(prefix="syncbn-doctor-") as folder:
        command = [sys.executable, "-m", "syncbn.doctor", *options.command(), "--store", str(Path(folder) / "store")]
        children = [subprocess.Popen(command, env=os.environ | _environment(rank, count)) for rank in range(count)]
        try:
            return _status(children, options.timeout)
        except KeyboardInterrupt:
            return 130
        finally:
            for child in children:
                child.kill()
                child.wait()


def _environment(rank: int, count: int) -> dict[str, str]:
    # gloo and NCCL listen on the interface of the host's name unless they are told otherwise.
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    given = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    return {name: value for name, value in given.items() if name not in os.environ} | {
        name: str(value) for name, value in own.items()
    }


def _status(children: list[subprocess.Popen[bytes]], timeout: float) -> int:
    """Of all processes; a process that does not end soon after the first is killed."""
    deadline = None
    while any(child.poll() is None for child in children):
        if deadline is None and any(child.poll() is not None for child in children):
            deadline = time.monotonic() + timeout + _AFTER_THE_FIRST_S
        if deadline is not None and time.monotonic() > deadline:
            return 1
        time.sleep(0.02)
    return int(any(child.returncode for child in children))
