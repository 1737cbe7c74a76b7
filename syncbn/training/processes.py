"""This process among those that train, and what all of them know; one alone where there is no process group."""

from typing import Any, TypeVar

import torch.distributed as dist

from syncbn.host import HostCommunicator, new_group_on_host

T = TypeVar("T")
_votes: HostCommunicator | None = None


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def gather(value: T) -> list[T]:
    """Everybody's value by rank, on all processes; all must call. Values travel as pickles."""
    gathered = [value] * world_size()
    if len(gathered) > 1:
        dist.all_gather_object(gathered, value)
    return gathered


def vote_group() -> Any:
    """A gloo group of all processes for what callbacks ask after each step; None for one process. All must call.

    One for all callbacks: it costs each process a socket for every other one. It carries nothing else, so that what
    goes wrong elsewhere is told there.
    """
    global _votes
    if world_size() == 1:
        return None
    if _votes is None or not _votes.alive:
        _votes = HostCommunicator(new_group_on_host(None))
    return _votes.group
