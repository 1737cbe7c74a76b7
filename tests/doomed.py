"""Processes that are expected to end: started fresh for each test, with their status and what they have printed."""

from __future__ import annotations

import atexit
import multiprocessing as mp
import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

GROUP_TIMEOUT = timedelta(seconds=60)


class Outcome(NamedTuple):
    """How a process has ended: its exit status, -9 for SIGKILL; its standard error; how many seconds it has lived."""

    status: int
    errors: str
    seconds: float


def run_until_they_end(
    function: Callable[..., Any],
    folder: Path,
    *args: Any,
    world_size: int = 2,
    within: float,
    environment: dict[str, str] | None = None,
    but: int | None = None,
) -> list[Outcome]:
    """``function(rank, *args)`` in processes of one gloo group. This process hosts its store, as torchrun's agent does.

    Fails if any of them, ``but`` that rank, has not ended within so many seconds. What still runs is killed.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["syncbn"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    begin = time.monotonic()
    processes = []
    with ExitStack() as stack:
        for rank in range(world_size):
            arguments = (rank, world_size, store.port, folder / f"{rank}.err", environment or {}, function, args)
            process = context.Process(target=_live, args=arguments, daemon=True)
            process.start()
            stack.callback(process.kill)
            processes.append(process)
        seconds = [0.0] * world_size
        expected = [process for rank, process in enumerate(processes) if rank != but]
        while any(process.is_alive() for process in expected) and time.monotonic() - begin < within:
            for rank, process in enumerate(processes):
                if process.is_alive():
                    seconds[rank] = time.monotonic() - begin
            time.sleep(0.05)
        errors = [(folder / f"{rank}.err").read_text() for rank in range(world_size)]
        alive = [rank for rank, process in enumerate(processes) if process in expected and process.is_alive()]
        assert not alive, f"ranks {alive} still run after {within} s:\n" + "\n---\n".join(errors)
        return [Outcome(p.exitcode, e, s) for p, e, s in zip(processes, errors, seconds, strict=True)]


def _live(
    rank: int, world_size: int, port: int, errors: Path, environment: dict[str, str], function: Any, args: Any
) -> None:
    with errors.open("w") as file:
        os.dup2(file.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(environment, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    dist.set_debug_level_from_env()  # torch, which is imported already, has read it once
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=GROUP_TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=GROUP_TIMEOUT)
    status = 0
    try:
        function(rank, *args)
    except BaseException as error:  # as a script's would end: multiprocessing's own way does not ask sys.excepthook
        sys.excepthook(type(error), error, error.__traceback__)
        status = 1
    # What an interpreter does at its end, and multiprocessing does not.
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stderr.flush()
    os._exit(status)
