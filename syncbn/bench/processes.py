"""The processes of a measurement: this program's own, or those that torchrun has started.

Own processes meet in a file of a temporary folder and talk over the loopback interface: nobody outside the machine can
reach them. Each has one thread on a CPU, or a GPU. If one fails, all end and the failure is told.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from .errors import UserError

_TIMEOUT = timedelta(minutes=5)
_CPU_PROCESSES = 2
_NCCL_WITH_SHARED_GPUS = (2, 30)


def torchrun_world_size() -> int | None:
    """How many processes torchrun (or another launcher) has started; None if it has not."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    return None


def default_count(device: str) -> int:
    """One process per GPU, or two on a CPU; where torchrun has started them, as many as it did."""
    return torchrun_world_size() or (torch.cuda.device_count() if device == "cuda" else _CPU_PROCESSES)


def require(count: int, device: str) -> None:
    """Raises UserError unless ``count`` processes can run on ``device``."""
    started = torchrun_world_size()
    if started is not None and started != count:
        raise UserError(f"--processes {count}, but torchrun has started {started}: leave --processes away")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", count)) if started is not None else count
    if not fits(here, device) and not _gpus_can_be_shared():
        raise UserError(
            f"--processes {count} on {torch.cuda.device_count()} GPU(s): sharing one needs NCCL >= "
            f"{'.'.join(map(str, _NCCL_WITH_SHARED_GPUS))}, here is {'.'.join(map(str, torch.cuda.nccl.version()))}"
        )


def fits(count: int, device: str) -> bool:
    """Whether each of ``count`` processes has a GPU of its own; on a CPU they take turns, if need be."""
    return device == "cpu" or count <= torch.cuda.device_count()


def cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus_can_be_shared() -> bool:
    return tuple(torch.cuda.nccl.version())[:2] >= _NCCL_WITH_SHARED_GPUS


def is_first() -> bool:
    """Whether this process is the one that speaks: rank 0, or the one that starts the others."""
    return os.environ.get("RANK", "0") == "0"


def run(function: Callable[..., Any], count: int, device: str, *args: Any) -> Any:
    """``function(device, *args)`` on ``count`` processes in one process group; what it returned on rank 0.

    Under torchrun it runs in this process, and all but rank 0 get None. ``function`` must stand at the top level of a
    module; the arguments and the result are pickled.
    """
    if torchrun_world_size() is not None:
        if not dist.is_initialized():
            _join(int(os.environ["RANK"]), count, device, None)
        result = function(_device(device), *args)
        return result if dist.get_rank() == 0 else None
    # The server of the forked processes has imported torch once for all of them.
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed", __name__])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # It reports each process that it ends after another one's failure.
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="syncbn-bench-") as folder:
        try:
            torch.multiprocessing.start_processes(
                _work, (count, device, folder, function, args), nprocs=count, start_method="forkserver"
            )
        except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException) as error:
            raise SystemExit(_first_failure(folder) or f"error: {error}") from None
        return pickle.loads(_result_file(folder).read_bytes())


def leave() -> None:
    """Ends this process's part in torchrun's process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _work(rank: int, count: int, device: str, folder: str, function: Callable[..., Any], args: Any) -> None:
    """The life of an own process."""
    # gloo and NCCL listen on the interface of the host's name unless they are told otherwise.
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)
    os.environ.setdefault("NCCL_SOCKET_IFNAME", loopback)
    _join(rank, count, device, dist.FileStore(str(Path(folder) / "store"), count))
    try:
        result = function(_device(device), *args)
        if rank == 0:
            _result_file(folder).write_bytes(pickle.dumps(result))
    except Exception:
        # Before the others lose the connection to this one, and fail of that.
        failure = f"{traceback.format_exc()}error: process {rank} of {count} has failed"
        (Path(folder) / f"failure-{time.monotonic_ns():020}").write_text(failure)
        raise
    finally:
        leave()


def _join(rank: int, count: int, device: str, store: Any) -> None:
    """Makes the default process group; ``store`` None for the one that torchrun's environment names."""
    where: dict[str, Any] = {} if store is None else {"store": store, "rank": rank, "world_size": count}
    if device == "cpu":
        torch.set_num_threads(1)
        dist.init_process_group("gloo", timeout=_TIMEOUT, **where)
        return
    if store is not None and not fits(count, device):
        os.environ.setdefault("NCCL_MULTI_RANK_GPU_ENABLE", "1")
        os.environ.setdefault("NCCL_MAX_CTAS", "4")  # or the processes' kernels wait for each other's multiprocessors
    torch.cuda.set_device(_device(device))
    dist.init_process_group("nccl", timeout=_TIMEOUT, device_id=_device(device), **where)


def _device(device: str) -> torch.device:
    if device == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def _first_failure(folder: str) -> str | None:
    """What the process has said that failed first; the others' failures are its consequences."""
    failures = sorted(Path(folder).glob("failure-*"))
    return failures[0].read_text() if failures else None


def _result_file(folder: str) -> Path:
    return Path(folder) / "result"
