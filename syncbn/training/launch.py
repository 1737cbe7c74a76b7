"""torchrun for one node: checks the configuration once, then starts one training process per device.

`launch/train.sh` runs this. It is `torchrun` with three additions: a wrong override ends before any process
starts, the rendezvous stays on the loopback interface, and a failure is told by the process that failed and
by nobody else.
"""

import logging
import os
import signal
import sys
import uuid
from typing import NoReturn

import torch
import torch.distributed.run as torchrun
from omegaconf import DictConfig, OmegaConf
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from syncbn.training import rendezvous
from syncbn.training.config import check, compose_config
from syncbn.training.environment import RUN_STAMP_VARIABLE, new_run_stamp
from syncbn.training.errors import UserError, fail

_CPU_PROCESSES = 2
# Hydra's options that only print something, or start several jobs one after the other.
_ONE_PROCESS = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--multirun", "-m"}


def main() -> NoReturn:
    """Starts `python -m syncbn.training.train` with this command's arguments in each process."""
    arguments = sys.argv[1:]
    os.environ.setdefault(RUN_STAMP_VARIABLE, new_run_stamp())
    if not _ONE_PROCESS.isdisjoint(argument.split("=")[0] for argument in arguments):
        from syncbn.training import train

        train.main()
        raise SystemExit(0)
    try:
        cfg = compose_config(arguments_for_hydra(arguments))
        check(cfg)
        processes = process_count(cfg)
    except UserError as error:
        fail(str(error))
    raise SystemExit(run(processes, arguments))


def arguments_for_hydra(arguments: list[str]) -> list[str]:
    """The overrides among the arguments: what is no option of Hydra's, nor such an option's value."""
    return [argument for argument in arguments if "=" in argument and not argument.startswith("-")]


def process_count(cfg: DictConfig) -> int:
    """As many as `trainer.devices` says; left alone, one per GPU, or two where there is none.

    Raises:
        UserError: a GPU is asked for and there is none, or `trainer.devices` is no count.
    """
    accelerator = cfg.trainer.accelerator
    gpus = torch.cuda.device_count() if accelerator in ("auto", "gpu", "cuda") else 0
    if accelerator in ("gpu", "cuda") and gpus == 0:
        raise UserError(f"trainer.accelerator={accelerator}: this machine has no GPU; choose trainer=cpu")
    if OmegaConf.is_interpolation(cfg.trainer, "devices"):
        return gpus or _CPU_PROCESSES
    devices = cfg.trainer.devices
    if not isinstance(devices, int) or devices < 1:
        raise UserError(f"trainer.devices must be a number of processes of at least 1, got {devices!r}")
    return devices


def stay_on_this_machine() -> None:
    """All processes are on this machine: their sockets need not be reachable from another one."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    # Processes that each start a thread per core would fight over the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def run(processes: int, arguments: list[str], module: str = "syncbn.training.train") -> int:
    """Runs torchrun in this process until all processes of `module` have ended; returns the exit status."""
    rendezvous.register()
    # Its log repeats, at length, what the processes themselves have said. Theirs is not affected.
    logging.disable(logging.CRITICAL)
    options = torchrun.parse_args(
        [
            f"--nproc-per-node={processes}",
            f"--rdzv-backend={rendezvous.BACKEND}",
            f"--rdzv-id={uuid.uuid4()}",
            "-m",
            module,
            *arguments,
        ]
    )
    try:
        torchrun.run(options)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode >= 0:
            return failure.exitcode
        # A signal leaves a process no time for a word of its own.
        name = signal.Signals(-failure.exitcode).name
        print(f"error: process {rank} was ended by {name}", file=sys.stderr)
        return 128 - failure.exitcode
    return 0


if __name__ == "__main__":
    main()
