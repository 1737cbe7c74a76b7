"""This process among those that train, and what all of them know; one alone where there is no process group."""

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


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
