"""The world a process was started into: torchrun's variables, and what all processes must agree on."""

import os
from dataclasses import dataclass
from datetime import datetime, timedelta

from syncbn.training.errors import UserError

# Set by the launcher, so that all processes of a run, restarted ones included, share one folder.
RUN_STAMP_VARIABLE = "SYNCBN_RUN_STAMP"
_STORE_TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class World:
    """Processes of this run. Without torchrun: one, of rank 0; those that Lightning itself starts are told later."""

    rank: int = 0
    size: int = 1
    local_size: int = 1

    @classmethod
    def from_environment(cls) -> "World":
        """Reads RANK, WORLD_SIZE and LOCAL_WORLD_SIZE.

        Raises:
            UserError: a variable is no number, or the nodes do not run equally many processes.
        """
        # Lightning's own launcher sets WORLD_SIZE for its children, and nothing else of this.
        if "LOCAL_RANK" in os.environ and "RANK" not in os.environ:
            return cls()
        values = {name: os.environ.get(name, default) for name, default in _DEFAULTS.items()}
        try:
            rank, size, local_size = (int(value) for value in values.values())
        except ValueError:
            raise UserError(f"expected whole numbers from the launcher, got {values}") from None
        if local_size < 1 or size % local_size:
            raise UserError(
                f"WORLD_SIZE={size} is no multiple of LOCAL_WORLD_SIZE={local_size}: "
                "start equally many processes on every node"
            )
        return cls(rank, size, local_size)

    @property
    def num_nodes(self) -> int:
        return self.size // self.local_size


def loader_workers(most: int) -> int:
    """How many processes load data for one that trains: an equal share of this machine's cores, 1 to `most`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(most, cores // World.from_environment().local_size))


_DEFAULTS = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}


def rank_of_this_process() -> int:
    """RANK, whatever else is wrong with the environment; in a process that Lightning has started, LOCAL_RANK."""
    rank = os.environ.get("RANK") or os.environ.get("LOCAL_RANK", "0")
    return int(rank) if rank.isdigit() else 0


def new_run_stamp() -> str:
    """The local time down to milliseconds, as a folder name that sorts by age."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S-%f")[:-3]


def run_stamp() -> str:
    """A stamp that is the same in all processes of this run.

    The launcher's if it set one, and Lightning's child processes inherit their parent's. Under a plain
    torchrun the processes settle on the first proposal in torchrun's own store.
    """
    stamp = os.environ.get(RUN_STAMP_VARIABLE)
    if stamp is None:
        stamp = new_run_stamp()
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            stamp = _first_proposal(stamp)
        os.environ[RUN_STAMP_VARIABLE] = stamp
    return stamp


def _first_proposal(proposal: str) -> str:
    from torch.distributed import TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_STORE_TIMEOUT)
    return store.compare_set("syncbn/run_stamp", "", proposal).decode()
