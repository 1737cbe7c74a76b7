"""torchrun for one node: checks the configuration once, then starts one training process per device.

`launch/train.sh` runs this. It is `torchrun` with three additions: a wrong override ends before any process
starts, the rendezvous stays on the loopback interface, and a failure is told by the process that failed and
by nobody else.
"""

import os
import sys
import uuid
from typing import NoReturn

import torch
from omegaconf import DictConfig, OmegaConf

from syncbn.training.agent import run_agent
from syncbn.training.config import check, compose_config
from syncbn.training.environment import RUN_STAMP_VARIABLE, new_run_stamp
from syncbn.training.errors import UserError, fail
from syncbn.training.rendezvous import LoopbackRendezvous

_CPU_PROCESSES = 2
# Hydra's options that only print something, or start several jobs one after the other.
_ONE_PROCESS = {"--help", "-h", "--hydra-help", "--version", "--cfg", "-c", "--info", "-i", "--multirun", "-m"}


def main() -> NoReturn:
    """Starts `python -m syncbn.training.train` with this command's arguments in each process."""
    arguments = sys.argv[1:]
    os.environ.setdefault(RUN_STAMP_VARIABLE, new_run_stamp())
    if needs_one_process(arguments):
        run_here(arguments)
    try:
        cfg = checked_config(arguments)
        processes = process_count(cfg)
        restarts = restart_count(cfg)
    except UserError as error:
        fail(str(error))
    raise SystemExit(run(processes, arguments, max_restarts=restarts))


def needs_one_process(arguments: list[str]) -> bool:
    """Whether Hydra is asked to print something, or to run several jobs one after the other."""
    return not _ONE_PROCESS.isdisjoint(argument.split("=")[0] for argument in arguments)


def run_here(arguments: list[str]) -> NoReturn:
    """Runs the command in this process."""
    from syncbn.training import train

    sys.argv = [sys.argv[0], *arguments]
    train.main()
    raise SystemExit(0)


def checked_config(arguments: list[str]) -> DictConfig:
    """The configuration that the processes will find.

    Raises:
        UserError: it cannot be used.
    """
    cfg = compose_config(arguments_for_hydra(arguments))
    check(cfg)
    return cfg


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


def default_process_count() -> int:
    """One per GPU, or two where there is none."""
    return torch.cuda.device_count() or _CPU_PROCESSES


def restart_count(cfg: DictConfig) -> int:
    """How often all processes are started again after one has failed: `max_restarts`.

    Raises:
        UserError: it is no count.
    """
    restarts = cfg.max_restarts
    if not isinstance(restarts, int) or restarts < 0:
        raise UserError(f"max_restarts must be a whole number of at least 0, got {restarts!r}")
    return restarts


def stay_on_this_machine() -> None:
    """All processes are on this machine: their sockets need not be reachable from another one."""
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    # Processes that each start a thread per core would fight over the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def run(processes: int, arguments: list[str], module: str = "syncbn.training.train", max_restarts: int = 0) -> int:
    """Runs `module` in several processes on this node until all have ended; returns the exit status."""
    return run_agent(LoopbackRendezvous(str(uuid.uuid4())), processes, module, arguments, max_restarts)


if __name__ == "__main__":
    main()
