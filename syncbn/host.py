"""Messages between processes that Python reads: a gloo group of its own, so that no device is ever waited for."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from .communicator import Communicator, _timeout_of, ranks_of


class HostCommunicator(Communicator):
    """A process group for CPU tensors, and how many conversations have been opened on it."""

    conversations = 0
    _unread: Posted | None = None

    @property
    def own_rank(self) -> int:
        return dist.get_rank()

    def open(self) -> int:
        """The number of a new conversation, the same on all processes if they open theirs in the same order."""
        self.conversations += 1
        return self.conversations

    def post(self, row: list[int]) -> Posted:
        """Sends as many whole numbers as the other processes send, without waiting for theirs."""
        rows = torch.empty(len(self.ranks), len(row), dtype=torch.int64)
        own = torch.tensor(row, dtype=torch.int64)
        work = dist.all_gather(list(rows.unbind()), own, group=self.group, async_op=True)
        self._unread = Posted(work, rows)
        return self._unread

    def read(self, posted: Posted | None = None) -> list[list[int]]:
        """The rows of all processes that belong to one; to the last one, if that was not read yet, without any."""
        posted = posted or self._unread
        if posted is self._unread:
            self._unread = None
        return [] if posted is None else posted.wait()

    def tell(self, text: str | None) -> list[str | None]:
        """What every process has to say, by its place in ``ranks``."""
        texts: list[str | None] = [None] * len(self.ranks)
        dist.all_gather_object(texts, text, group=self.group)
        return texts

    def send(self, message: bytes | None, place: int) -> bytes:
        """The message of the process at this place in ``ranks``."""
        box = [message]
        dist.broadcast_object_list(box, src=self.ranks[place], group=self.group)
        assert box[0] is not None
        return box[0]


class Posted(NamedTuple):
    """A row that is under way."""

    work: Any
    rows: Tensor

    def wait(self) -> list[list[int]]:
        """The rows of all processes."""
        self.work.wait()
        return self.rows.tolist()


class HostCommunicators:
    """Those of this process, for as long as the default group lives."""

    def __init__(self) -> None:
        self._by_group: WeakKeyDictionary[Any, HostCommunicator] = WeakKeyDictionary()
        self._made: dict[tuple[int, ...], HostCommunicator] = {}

    def of(self, group: Any) -> HostCommunicator:
        """The communicator for the processes of ``group``; for all processes, if it is None.

        All processes get a group beside the default one, where a message would wait behind gradients. A group that the
        user has made is used as it is if it takes CPU tensors, and has a twin made if not. Where a group is made, every
        process of the program takes part at the same time, each with its own ``group``.
        """
        if group is not None and "cpu" in {device.type for device in group._device_types}:
            if group not in self._by_group:
                self._by_group[group] = HostCommunicator(group)
            return self._by_group[group]
        ranks = tuple(ranks_of(group or dist.group.WORLD))
        found = self._made.get(ranks)
        if found is None or not found.alive:
            self._made = {key: each for key, each in self._made.items() if each.alive}
            found = self._made[ranks] = HostCommunicator(new_group_on_host(group))
        return found


host_communicators = HostCommunicators()


def new_group_on_host(group: Any) -> Any:
    """A gloo group of the processes of ``group``; of all, if it is None."""
    options: dict[str, Any] = {
        "backend": "gloo",
        "timeout": _timeout_of(group or dist.group.WORLD),
        "group_desc": "syncbn host",
    }
    if group is None:
        return dist.new_group(**options)
    return _new_group_of_some(ranks_of(group), options)


_groups_of_some: Counter[tuple[int, ...]] = Counter()


def _new_group_of_some(ranks: list[int], options: dict[str, Any]) -> Any:
    """A group that only its members make.

    torch.distributed names the groups of all processes by a count, which this must leave as it is: members that had
    counted one more would wait for ever in every later ``new_group``. Its own name is by a count of its ranks.
    """
    world = dist.distributed_c10d._world
    counted = world.group_count
    _groups_of_some[tuple(ranks)] += 1
    world.group_count = -_groups_of_some[tuple(ranks)]
    try:
        return dist.new_group(ranks, use_local_synchronization=True, **options)
    finally:
        world.group_count = counted
