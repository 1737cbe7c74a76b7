"""Over whom statistics are formed, where it is not a process group that the user has made: groups of all processes.

What is kept is what the user has asked for (a number of processes, the processes of a node, a number of samples), not
ranks: the same model gets groups of the same kind in a job of another size. The groups are formed at the first
exchange, when all processes meet and can say where they run and how many samples they have.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import operator
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_log = logging.getLogger(__name__)

Groups = tuple[tuple[int, ...], ...]  # the global ranks of each; every process is in one


class Member(NamedTuple):
    """What one process says of itself when the groups are formed."""

    host: int
    samples: int | None  # in its batch; None where nobody has said


@dataclass(frozen=True)
class Grouping:
    """All processes form their statistics together; subclasses divide them into groups."""

    def __str__(self) -> str:
        return "all processes"

    @property
    def kind(self) -> str:
        """The same for somebody who reads which processes a layer is synchronized over."""
        return str(self)

    def require_possible(self, world_size: int) -> None:
        """Raises a ValueError unless so many processes can be divided like this."""

    def divide(self, members: list[Member]) -> Groups:
        """The groups of all processes, each in ascending order, as are their first ranks."""
        return (tuple(range(len(members))),)


ALL = Grouping()


@dataclass(frozen=True)
class OfSize(Grouping):
    """Consecutive ranks, so many in each group."""

    size: int

    def __str__(self) -> str:
        return f"group_size={self.size}"

    @property
    def kind(self) -> str:
        return f"groups of {self.size} processes" if self.size > 1 else "this process"

    def require_possible(self, world_size: int) -> None:
        if world_size == 1 or world_size % self.size == 0:
            return
        sizes = [size for size in range(1, world_size + 1) if world_size % size == 0]
        raise ValueError(
            f"group_size={self.size} does not divide the {world_size} processes into equal groups: choose one of "
            f"{', '.join(map(str, sizes))}, or statistics_batch=, whose groups may differ by one process"
        )

    def divide(self, members: list[Member]) -> Groups:
        world_size = len(members)
        self.require_possible(world_size)
        return _consecutive(world_size, max(world_size // self.size, 1))


@dataclass(frozen=True)
class OfNode(Grouping):
    """The processes of one host, however many it has and in whatever order they are numbered."""

    def __str__(self) -> str:
        return "group_size='node'"

    @property
    def kind(self) -> str:
        return "the processes of each node"

    def divide(self, members: list[Member]) -> Groups:
        by_host: dict[int, list[int]] = {}
        for rank, member in enumerate(members):
            by_host.setdefault(member.host, []).append(rank)
        return tuple(map(tuple, by_host.values()))


@dataclass(frozen=True)
class OfSamples(Grouping):
    """Consecutive ranks, in as many groups as bring the batches of all nearest to this number of samples."""

    samples: int

    def __str__(self) -> str:
        return f"statistics_batch={self.samples}"

    @property
    def kind(self) -> str:
        return f"groups of about {self.samples} samples"

    def divide(self, members: list[Member]) -> Groups:
        if len(members) == 1:
            return ((0,),)
        samples = [self._samples_of(rank, member) for rank, member in enumerate(members)]
        if sum(samples) == 0:
            raise RuntimeError(
                f"{self} forms its groups by the first batch in training, but no process has a sample in it: pass "
                f"group_size= instead, or say how many samples a process has: exchange.connect(device, batch_size)"
            )
        groups = self._nearest(samples)
        self._tell([sum(samples[rank] for rank in ranks) for ranks in groups])
        return groups

    def _samples_of(self, rank: int, member: Member) -> int:
        if member.samples is None:
            raise RuntimeError(
                f"{self} forms its groups by the number of samples that a process has, which rank {rank} does not "
                f"know yet: run one training step as usual (before torch.compile or the capture of a CUDA graph), or "
                f"call exchange.connect(device, batch_size)"
            )
        return member.samples

    def _nearest(self, samples: list[int]) -> Groups:
        """The groups of which the worst is nearest; of several, the fewest, since these have more samples."""
        world_size = len(samples)
        before = torch.tensor([0, *samples], device="cpu").cumsum(0)  # the samples of all lower ranks

        def distance_of_the_worst(groups: int) -> int:
            batches = before[_bounds(world_size, groups)].diff()
            return int((batches - self.samples).abs().max())

        return _consecutive(world_size, min(range(1, world_size + 1), key=distance_of_the_worst))

    def _tell(self, batches: list[int]) -> None:
        if dist.get_rank() == 0:
            near = self.samples / 2 <= min(batches) and max(batches) <= self.samples * 2
            level = logging.INFO if near else logging.WARNING
            _log.log(level, "%s: groups of %s samples", self, _range(min(batches), max(batches)))


def _range(least: int, most: int) -> str:
    return str(most) if least == most else f"{least} to {most}"


def _consecutive(world_size: int, groups: int) -> Groups:
    """So many groups of consecutive ranks, whose sizes differ by one at most."""
    bounds = _bounds(world_size, groups).tolist()
    return tuple(tuple(range(*pair)) for pair in itertools.pairwise(bounds))


def _bounds(world_size: int, groups: int) -> Tensor:
    """Where each group begins, and where the last one ends."""
    return torch.arange(groups + 1, device="cpu") * world_size // groups


def grouping(process_group: Any = None, group_size: Any = None, statistics_batch: Any = None) -> Grouping:
    """What the user's options mean; all processes, where there is none of the latter two.

    Raises:
        ValueError: there is more than one of them, or a number is less than 1.
        TypeError: one is no whole number.
    """
    options = {"process_group": process_group, "group_size": group_size, "statistics_batch": statistics_batch}
    given = [name for name, value in options.items() if value is not None]
    if len(given) > 1:
        raise ValueError(
            f"expected one of process_group, group_size and statistics_batch at most, since each says over whom the "
            f"statistics are formed, got {' and '.join(given)}"
        )
    if statistics_batch is not None:
        return OfSamples(_positive("statistics_batch", statistics_batch))
    if group_size is None:
        return ALL
    return OfNode() if group_size == "node" else OfSize(_positive("group_size", group_size, ", or 'node'"))


def _positive(name: str, value: Any, otherwise: str = "") -> int:
    expected = f"expected {name} to be a whole number of at least 1{otherwise}, got {value!r}"
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(expected) from None
    if isinstance(value, bool):
        raise TypeError(expected)
    if number < 1:
        raise ValueError(expected)
    return number


def meet(asked: str, samples: int | None, device: torch.device) -> list[Member]:
    """What every process says of itself. Collective over all processes, in the default group.

    Args:
        asked: how this process was asked to form groups; all must have been asked alike.
        samples: in this process's batch, if it is known.
        device: that of the tensors to be exchanged.

    Raises:
        RuntimeError: the processes were asked for unlike groups. It is raised on all of them, before any group is made.
    """
    mine = torch.tensor([_digest(asked), _digest(host_identity()), -1 if samples is None else samples], device=device)
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyones, mine)
    said = torch.stack(everyones).tolist()
    if any(asked_there != said[0][0] for asked_there, *_ in said):
        texts: list[Any] = [None] * len(said)
        dist.all_gather_object(texts, asked)
        other = next(rank for rank, text in enumerate(texts) if text != texts[0])
        raise RuntimeError(
            f"the processes do not agree over whom to form their statistics: rank 0 was asked for {texts[0]}, rank "
            f"{other} for {texts[other]}. Pass the same to syncbn.convert on every process"
        )
    return [Member(host, None if samples < 0 else samples) for _, host, samples in said]


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], signed=True)


_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def host_identity() -> str:
    """What tells hosts apart: names alone do not, where all are called localhost. As NCCL does, and at its word."""
    if (given := os.environ.get("NCCL_HOSTID")) is not None:
        return given
    return f"{socket.gethostname()} {_BOOT_ID.read_text() if _BOOT_ID.is_file() else ''}"
