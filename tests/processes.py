"""Real processes for the tests: pools of gloo workers that are started once per session and run any test's function."""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import tempfile
import traceback
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVE_TIMEOUT = timedelta(seconds=30)
ANSWER_TIMEOUT = 90.0  # seconds; longer than a collective's, so that a worker can say that it timed out


class WorkerError(RuntimeError):
    """A function failed on at least one worker. ``errors`` has each worker's exception as text, or None."""

    def __init__(self, errors: list[str | None]) -> None:
        self.errors = errors
        super().__init__("\n".join(f"--- rank {r}\n{e}" for r, e in enumerate(errors) if e is not None))


class Processes:
    """``world_size`` processes in one gloo group, each with one thread, and these environment variables."""

    def __init__(self, world_size: int, environment: dict[str, str] | None = None) -> None:
        self.world_size = world_size
        self._environment = environment or {}
        self._workers: list[tuple[Any, Connection]] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Any, *args: Any, per_rank: list[tuple[Any, ...]] | None = None) -> list[Any]:
        """``function(*args)`` on every worker (``function(*per_rank[rank], *args)``); the results by rank.

        The function must stand at the top level of a module. Tensors are copied.

        Raises:
            WorkerError: it raised on any worker. Workers that did not answer are killed; the next run starts new ones.
        """
        if not self._workers:
            self._start()
        for rank, (_, pipe) in enumerate(self._workers):
            first = per_rank[rank] if per_rank is not None else ()
            pipe.send_bytes(pickle.dumps((function, (*first, *args))))
        answers = [self._answer(pipe) for _, pipe in self._workers]
        if any(answer is None for answer in answers):
            self.stop()
        errors = ["no answer" if a is None else a[1] for a in answers]
        if any(error is not None for error in errors):
            raise WorkerError(errors)
        return [answer[0] for answer in answers if answer is not None]

    def stop(self) -> None:
        for process, pipe in self._workers:
            pipe.close()
            process.kill()
            process.join()
        self._workers = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = str(Path(self._folder.name) / "store")
        context = mp.get_context("forkserver")  # which has imported torch once for all of them
        context.set_forkserver_preload(["syncbn"])
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_work, args=(rank, self.world_size, store, theirs, self._environment), daemon=True
            )
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    @staticmethod
    def _answer(pipe: Connection) -> tuple[Any, str | None] | None:
        try:
            return pickle.loads(pipe.recv_bytes()) if pipe.poll(ANSWER_TIMEOUT) else None
        except EOFError:
            return None


def _work(rank: int, world_size: int, store: str, pipe: Connection, environment: dict[str, str]) -> None:
    """A worker's life: join the group, run what comes, answer with (result, error)."""
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    join_gloo(rank, world_size, store)
    while True:
        try:
            function, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer = pickle.dumps((function(*args), None))
        except Exception:
            answer = pickle.dumps((None, traceback.format_exc()))
        pipe.send_bytes(answer)


def join_gloo(rank: int, world_size: int, store: str) -> None:
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=COLLECTIVE_TIMEOUT,
    )
