"""Process groups: which one is meant, the one that only normalization uses, and what may go wrong with them."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from .groups import Groups
from .progress import Progress

_LAUNCH_ORDER = "NCCL_LAUNCH_ORDER_IMPLICIT"
_NCCL_WITH_LAUNCH_ORDER = (2, 26)
_LAUNCH_ORDER_NEEDS = (
    f"NCCL >= {'.'.join(map(str, _NCCL_WITH_LAUNCH_ORDER))} and {_LAUNCH_ORDER}=1 from the start. Set it in the job's "
    f"environment, or import syncbn before torch.distributed.init_process_group."
)
_DESCRIPTION = "syncbn"  # of the process groups that are made here
# Such a group gives up so much later than its watchdog, which can say more.
SLACK = timedelta(seconds=30)
_NCCL_MAX_CTAS = 4  # a message of a few kilobytes needs no more, and leaves the GPU to the model


def initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


def world() -> Any:
    """The default group; None where there is none."""
    return dist.GroupMember.WORLD if dist.is_available() else None


# NCCL reads the variable once, before its first collective, and a program imports this module before that. Where the
# process group is there already it may be too late, so it is left alone and `_launch_order_is_fixed` says no.
if not initialized():
    os.environ.setdefault(_LAUNCH_ORDER, "1")


# Process groups are referred to weakly, here and below: torch.distributed keeps them until destroy_process_group, and a
# gloo group that somebody keeps for longer aborts the process at exit ("terminate called without an active exception").
Reference = Callable[[], Any]


def nothing() -> None:
    return None


def reference(group: Any) -> Reference:
    return nothing if group is None else weakref.ref(group)


class Holder(NamedTuple):
    """Who has the numbers from ``first`` to before ``end``."""

    first: int
    end: int
    names: weakref.WeakMethod[Callable[[int], str]]


class Communicator:
    """A process group, the layers that have tags on it, and how far this process has come on it."""

    def __init__(self, group: Any) -> None:
        self._group = reference(group)
        self._world = reference(dist.group.WORLD)
        self.ranks = ranks_of(group)
        self.devices = frozenset(device.type for device in group._device_types)
        self.progress = Progress()
        self.next_tag = 1  # the first number that no layer has
        self._holders: list[Holder] = []
        self.guarded = False

    def take_tags(self, names: Callable[[int], str], count: int) -> int:
        """Numbers for so many layers; returns the first. ``names`` is a method: whose object it is may go away."""
        first = self.next_tag
        self.next_tag += count
        # A program may have models without end, of which few are there at a time.
        alive = [holder for holder in self._holders if holder.names() is not None]
        self._holders = [*alive, Holder(first, self.next_tag, weakref.WeakMethod(names))]
        return first

    def layer_name(self, number: int) -> str:
        """What the layer with this number is called in its model."""
        for holder in self._holders:
            if holder.first <= number < holder.end and (names := holder.names()) is not None:
                return names(number - holder.first)
        return f"layer {number}"

    @property
    def made_here(self) -> bool:
        """Whether the process group is not the user's."""
        return bool(self.group.group_desc == _DESCRIPTION)

    @property
    def timeout(self) -> timedelta:
        """The process group's own."""
        return _timeout_of(self.group)

    @property
    def alive(self) -> bool:
        """Whether the group exists, in the torch.distributed in which it was made."""
        world = dist.group.WORLD
        return world is not None and self._world() is world and self._group() is not None

    @property
    def group(self) -> Any:
        return self._group()


class Communicators:
    """The communicators of this process: one per process group, for as long as the default group lives."""

    def __init__(self) -> None:
        self._by_group: WeakKeyDictionary[Any, Communicator] = WeakKeyDictionary()
        self._dedicated: Communicator | None = None
        self._of_groups: dict[Groups, Communicator] = {}

    def of(self, group: Any) -> Communicator:
        """The communicator that uses ``group`` as it is."""
        if group not in self._by_group:
            self._by_group[group] = Communicator(group)
        return self._by_group[group]

    def dedicated(self, timeout: timedelta | None) -> Communicator:
        """The communicator for all processes beside the default group. Collective: every process makes it."""
        if self._dedicated is None or not self._dedicated.alive:
            self._dedicated = self.of(_new_group_of_all(timeout))
        return self._dedicated

    def of_own_among(self, groups: Groups, timeout: timedelta | None) -> Communicator:
        """The communicator for this process's own of ``groups``. Collective: every process makes all of them."""
        found = self._of_groups.get(groups)
        if found is None or not found.alive:
            self._of_groups = {key: each for key, each in self._of_groups.items() if each.alive}
            found = self._of_groups[groups] = self.of(_new_groups(groups, timeout))
        return found


communicators = Communicators()


def _uses_nccl(group: Any) -> bool:
    return "nccl" in dist.get_backend_config(group)


def _launch_order_is_fixed() -> bool:
    """Whether NCCL launches the kernels of concurrent communicators in one order on every process.

    Without it, two communicators that are busy at the same time can wait for each other's kernels for ever
    (NCCL documentation, "Using multiple NCCL communicators concurrently").
    """
    version = torch.cuda.nccl.version()
    return os.environ.get(_LAUNCH_ORDER) == "1" and tuple(version)[:2] >= _NCCL_WITH_LAUNCH_ORDER


def _new_group_of_all(timeout: timedelta | None) -> Any:
    """A process group of all processes beside the default one, or the default one where two would not be safe."""
    world = dist.group.WORLD
    if _uses_nccl(world) and not _launch_order_is_fixed():
        warnings.warn(
            f"syncbn shares the default process group with DistributedDataParallel: a communicator of its own needs "
            f"{_LAUNCH_ORDER_NEEDS}",
            stacklevel=2,
        )
        return world
    return dist.new_group(**_options(timeout))


def _new_groups(groups: Groups, timeout: timedelta | None) -> Any:
    """This process's one of several new process groups.

    A group of some processes cannot be the default one, so that there is nothing to fall back to on NCCL.
    """
    if _uses_nccl(dist.group.WORLD) and not _launch_order_is_fixed():
        warnings.warn(
            f"syncbn's groups have communicators of their own beside DistributedDataParallel's. NCCL might launch both "
            f"in different orders on different processes, which then wait for each other: prevented by "
            f"{_LAUNCH_ORDER_NEEDS}",
            stacklevel=2,
        )
    own, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in groups], **_options(timeout))
    return own


def _options(timeout: timedelta | None) -> dict[str, Any]:
    """What a communicator for small messages beside large ones is made with."""
    world = dist.group.WORLD
    timeout = (timeout or _timeout_of(world)) + SLACK
    if not _uses_nccl(world):
        return {"timeout": timeout, "group_desc": _DESCRIPTION}
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = _NCCL_MAX_CTAS
    options._timeout = timeout
    return {"timeout": timeout, "pg_options": options, "group_desc": _DESCRIPTION}


def _timeout_of(group: Any) -> timedelta:
    """The timeout that the user gave the default group. A new group would get its backend's default instead."""
    backend = group._get_backend(group._device_types[0])
    options = getattr(backend, "options", None)  # not every vendor's backend has them
    return default_pg_timeout if options is None else options._timeout


def ranks_of(group: Any) -> list[int]:
    return dist.get_process_group_ranks(group)


def resolve(process_group: Any) -> Any:
    """The ProcessGroup meant by what the user passed; None for all processes.

    The default group (which a mesh of all processes has, too) means all processes, not that very group: DDP uses it.
    """
    if process_group is None or not dist.is_available():
        return None
    if process_group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(
            f"this process (rank {dist.get_rank()}) is not a member of the process group it was given: pass each "
            f"process a group that it belongs to"
        )
    if isinstance(process_group, dist.DeviceMesh):
        if process_group.ndim != 1:
            raise ValueError(
                f"expected a one-dimensional DeviceMesh, got {process_group.ndim} dimensions "
                f"{process_group.mesh_dim_names or ''}: pass the slice over which statistics are to be formed, such as "
                f"mesh['dp']"
            )
        return _unless_default(process_group.get_group())
    if not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"expected process_group to be a ProcessGroup, a one-dimensional DeviceMesh or None for all processes, "
            f"got {type(process_group).__name__}"
        )
    if dist.get_rank(process_group) < 0:
        raise ValueError(
            f"this process (rank {dist.get_rank()}) is not a member of the process group it was given, ranks "
            f"{ranks_of(process_group)}: pass each process a group that it belongs to"
        )
    return _unless_default(process_group)


def _unless_default(group: Any) -> Any:
    return None if group is dist.group.WORLD else group


def exists(group: Any) -> bool:
    """Whether torch.distributed has the group, still or again."""
    try:
        ranks_of(group)
    except (KeyError, ValueError):
        return False
    return True


def find_group(name: Any, ranks: tuple[int, ...]) -> Any:
    """The group of this name and these ranks; None, for all processes, if these are all."""
    try:
        group = dist.distributed_c10d._resolve_process_group(name)
    except RuntimeError:
        group = None
    if group is not None and exists(group) and tuple(ranks_of(group)) == ranks:
        return None if group is dist.group.WORLD else group
    if ranks == tuple(range(dist.get_world_size())):
        return None
    raise RuntimeError(
        f"this model forms its statistics over a process group of ranks {list(ranks)}, which does not exist here: call "
        f"syncbn.convert(model, process_group=...) with the group that it shall use"
    )


def require_device(communicator: Communicator, device: torch.device) -> None:
    if device.type in communicator.devices:
        return
    raise RuntimeError(
        f"the process group reduces tensors on {' and '.join(sorted(communicator.devices))} "
        f"({dist.get_backend_config(communicator.group)}), but this layer's input is on {device}: move "
        f"the model and its input there, or initialize torch.distributed with a backend for both, such as "
        f"'cpu:gloo,cuda:nccl'"
    )
