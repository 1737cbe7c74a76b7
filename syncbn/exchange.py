"""How processes talk: one sum over all of them, on a communicator that nothing else uses.

``Exchange`` is shared by all layers of a model. It finds (or makes) the process group at the first exchange, proves
once that every process brings the same layers, and then sums messages.
"""

from __future__ import annotations

import hashlib
import os
import warnings
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.constants import default_pg_timeout

_LAUNCH_ORDER = "NCCL_LAUNCH_ORDER_IMPLICIT"
_NCCL_WITH_LAUNCH_ORDER = (2, 26)
_NCCL_MAX_CTAS = 4  # a message of a few kilobytes needs no more, and leaves the GPU to the model


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


# NCCL reads the variable once, before its first collective, and a program imports this module before that. Where the
# process group is there already it may be too late, so it is left alone and `_launch_order_is_fixed` says no.
if not _initialized():
    os.environ.setdefault(_LAUNCH_ORDER, "1")


# Process groups are referred to weakly, here and below: torch.distributed keeps them until destroy_process_group, and a
# gloo group that somebody keeps for longer aborts the process at exit ("terminate called without an active exception").
Reference = Callable[[], Any]


def _nothing() -> None:
    return None


def _reference(group: Any) -> Reference:
    return _nothing if group is None else weakref.ref(group)


class _Communicator:
    """A process group and the tags that are taken on it."""

    def __init__(self, group: Any) -> None:
        self._group = _reference(group)
        self._world = _reference(dist.group.WORLD)
        self.ranks = _ranks_of(group)
        self.devices = frozenset(device.type for device in group._device_types)
        self.next_tag = 1

    @property
    def alive(self) -> bool:
        """Whether the group exists, in the torch.distributed in which it was made."""
        world = dist.group.WORLD
        return world is not None and self._world() is world and self._group() is not None

    @property
    def group(self) -> Any:
        return self._group()


class _Communicators:
    """The communicators of this process: one per process group, for as long as the default group lives."""

    def __init__(self) -> None:
        self._by_group: WeakKeyDictionary[Any, _Communicator] = WeakKeyDictionary()
        self._dedicated: _Communicator | None = None

    def of(self, group: Any) -> _Communicator:
        """The communicator that uses ``group`` as it is."""
        if group not in self._by_group:
            self._by_group[group] = _Communicator(group)
        return self._by_group[group]

    def dedicated(self, timeout: timedelta | None) -> _Communicator:
        """The communicator for all processes beside the default group. Collective: every process makes it."""
        if self._dedicated is None or not self._dedicated.alive:
            self._dedicated = self.of(_new_group_of_all(timeout))
        return self._dedicated


_communicators = _Communicators()


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
    timeout = timeout or _timeout_of(world)
    if not _uses_nccl(world):
        return dist.new_group(timeout=timeout, group_desc="syncbn")
    if not _launch_order_is_fixed():
        warnings.warn(
            f"syncbn shares the default process group with DistributedDataParallel: a communicator of its own needs "
            f"NCCL >= {'.'.join(map(str, _NCCL_WITH_LAUNCH_ORDER))} and {_LAUNCH_ORDER}=1 from the start. Set it in "
            f"the job's environment, or import syncbn before torch.distributed.init_process_group.",
            stacklevel=2,
        )
        return world
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = _NCCL_MAX_CTAS
    options._timeout = timeout
    return dist.new_group(timeout=timeout, pg_options=options, group_desc="syncbn")


def _timeout_of(group: Any) -> timedelta:
    """The timeout that the user gave the default group. A new group would get its backend's default instead."""
    options = getattr(
        group._get_backend(group._device_types[0]), "options", None
    )  # not every vendor's backend has them
    return default_pg_timeout if options is None else options._timeout


class Exchange:
    """What all layers of a model share to talk to the other processes.

    Args:
        process_group: a ``ProcessGroup`` or a one-dimensional ``DeviceMesh``, used as it is; None for all processes.
        dedicated: for all processes, whether to use a communicator beside the default group, so that a layer's few
            kilobytes do not wait behind DistributedDataParallel's gradient buckets. It is made once per process, at
            the first exchange of any model, in which all processes take part.
        timeout: how long an exchange on the dedicated communicator may take; None for the default group's timeout. It
            is that of the model which makes the communicator.

    Raises:
        ValueError: ``process_group`` has more than one dimension, or this process is not a member of it.
        TypeError: ``process_group`` is none of the above.

    Attributes:
        calls: how many all-reduces this process has taken part in.
        bytes: how many bytes these had.
    """

    def __init__(self, process_group: Any = None, dedicated: bool = True, timeout: timedelta | None = None) -> None:
        group = _resolve(process_group)
        self._own_group = _reference(group)
        # By its name and ranks a group is found again: after pickling, and after torch.distributed was set up anew.
        self._identity = None if group is None else (str(group.group_name), tuple(_ranks_of(group)))
        self.dedicated = dedicated
        self.timeout = timeout
        self.calls = 0
        self.bytes = 0
        self._layers: list[str] = []
        self._communicator: _Communicator | None = None
        self._first_tag = 0

    @property
    def process_group(self) -> Any:
        """The process group that the user passed, where it still exists; None for all processes."""
        return self._own_group()

    @property
    def ranks(self) -> tuple[int, ...] | None:
        """The global ranks of the processes that the user chose; None for all processes."""
        return None if self._identity is None else self._identity[1]

    def register(self, description: str) -> int:
        """Adds a layer; ``description`` must be the same on all processes. Returns the layer's index."""
        self._layers.append(description)
        self._communicator = None
        return len(self._layers) - 1

    def describe_again(self, index: int, description: str) -> None:
        """Replaces the description of a layer that has changed, so that the processes compare it anew."""
        self._layers[index] = description
        self._communicator = None

    @property
    def world_size(self) -> int:
        """Over how many processes the statistics are formed: 1 without torch.distributed."""
        if self._communicator is not None and self._communicator.alive:
            return len(self._communicator.ranks)
        return dist.get_world_size(self._group()) if _initialized() else 1

    def tag(self, index: int, backward: bool) -> int:
        """The number that says who is exchanging: unlike for any other layer or direction on the communicator.

        Known once the processes are connected; 0 before, and where there is only one.
        """
        return 2 * (self._first_tag + index) + backward

    def connect(self, device: torch.device) -> None:
        """Makes the communicator and compares this model's layers with those of the other processes.

        Collective over the group (over all processes, where the dedicated communicator is to be made). It happens by
        itself at the first exchange; call it before capturing a CUDA graph. A second call does nothing.

        Raises:
            RuntimeError: the layers differ between processes, the group cannot reduce tensors of ``device``, or a CUDA
                graph is being captured.
        """
        if self._communicator is not None and self._communicator.alive:
            return
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the first exchange of a model makes its communicator, which a CUDA graph cannot capture: run one "
                "training step, or call exchange.connect(device), before the capture"
            )
        group = self._group()
        if group is None and self.dedicated:
            communicator = _communicators.dedicated(self.timeout)
        else:
            communicator = _communicators.of(group or dist.group.WORLD)
        _require_device(communicator, device)
        if len(communicator.ranks) > 1:
            _require_same_layers(communicator, self._layers, device)
        self._first_tag = communicator.next_tag
        communicator.next_tag += len(self._layers)
        self._communicator = communicator

    def all_reduce(self, message: Tensor) -> None:
        """Sums ``message`` over all processes, in place.

        Raises:
            RuntimeError: the group cannot reduce tensors on the message's device.
        """
        communicator = self._connected(message)
        dist.all_reduce(message, group=communicator.group)
        self.calls += 1
        self.bytes += message.nbytes

    def differentiable_all_reduce(self, message: Tensor) -> Tensor:
        """The sum of ``message`` over all processes as a new tensor; its gradient is summed over them, too."""
        from torch.distributed import _functional_collectives

        communicator = self._connected(message)
        self.calls += 1
        self.bytes += message.nbytes
        return _functional_collectives.all_reduce(message, "sum", communicator.group)

    def _connected(self, message: Tensor) -> _Communicator:
        self.connect(message.device)
        communicator = self._communicator
        assert communicator is not None  # connect() has set it, or raised
        _require_device(communicator, message.device)
        return communicator

    def _group(self) -> Any:
        """The user's process group, or None for all processes.

        Raises:
            RuntimeError: it does not exist in this program, or not any more.
        """
        if self._identity is None:
            return None
        group = self._own_group()
        if group is None or not _exists(group):
            group = _find_group(*self._identity)
            self._own_group = _reference(group)
        return group

    def __getstate__(self) -> dict[str, Any]:
        """All but what lives in this process only."""
        return self.__dict__ | {"_own_group": _nothing, "_communicator": None, "_first_tag": 0}

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        """A copied model is another model: it shares the communicator, but proves its layers and counts for itself."""
        copy = self.renewed()
        copy._layers = list(self._layers)
        memo[id(self)] = copy
        return copy

    def renewed(self) -> Exchange:
        """An Exchange with the same options and no layers yet."""
        renewed = Exchange(None, self.dedicated, self.timeout)
        renewed._own_group, renewed._identity = self._own_group, self._identity
        return renewed

    @property
    def options(self) -> tuple[Any, ...]:
        """What two Exchanges have in common if one can stand for the other; hashable."""
        return self._identity, self.dedicated, self.timeout

    def __repr__(self) -> str:
        return f"Exchange({'all processes' if self.ranks is None else f'ranks {list(self.ranks)}'})"


def _ranks_of(group: Any) -> list[int]:
    return dist.get_process_group_ranks(group)


def _resolve(process_group: Any) -> Any:
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
            f"{_ranks_of(process_group)}: pass each process a group that it belongs to"
        )
    return _unless_default(process_group)


def _unless_default(group: Any) -> Any:
    return None if group is dist.group.WORLD else group


def _exists(group: Any) -> bool:
    """Whether torch.distributed has the group, still or again."""
    try:
        _ranks_of(group)
    except (KeyError, ValueError):
        return False
    return True


def _find_group(name: Any, ranks: tuple[int, ...]) -> Any:
    """The group of this name and these ranks; None, for all processes, if these are all."""
    try:
        group = dist.distributed_c10d._resolve_process_group(name)
    except RuntimeError:
        group = None
    if group is not None and _exists(group) and tuple(_ranks_of(group)) == ranks:
        return None if group is dist.group.WORLD else group
    if ranks == tuple(range(dist.get_world_size())):
        return None
    raise RuntimeError(
        f"this model forms its statistics over a process group of ranks {list(ranks)}, which does not exist here: call "
        f"syncbn.convert(model, process_group=...) with the group that it shall use"
    )


def _require_device(communicator: _Communicator, device: torch.device) -> None:
    if device.type in communicator.devices:
        return
    raise RuntimeError(
        f"the process group reduces tensors on {' and '.join(sorted(communicator.devices))} "
        f"({dist.get_backend_config(communicator.group)}), but this layer's input is on {device}: move "
        f"the model and its input there, or initialize torch.distributed with a backend for both, such as "
        f"'cpu:gloo,cuda:nccl'"
    )


def _require_same_layers(communicator: _Communicator, layers: list[str], device: torch.device) -> None:
    """Raises on every process, naming the first difference, unless all processes bring the same layers.

    A digest is compared first, so that large models cost no more than small ones.
    """
    digest = hashlib.sha256("\n".join([str(communicator.next_tag), *layers]).encode()).digest()
    mine = torch.frombuffer(bytearray(digest), dtype=torch.int64).to(device)
    everyones = [torch.empty_like(mine) for _ in communicator.ranks]
    dist.all_gather(everyones, mine, group=communicator.group)
    if all(torch.equal(mine, other) for other in everyones):
        return
    descriptions: list[Any] = [None] * len(communicator.ranks)
    dist.all_gather_object(descriptions, (communicator.next_tag, layers), group=communicator.group)
    raise RuntimeError(_difference(communicator.ranks, descriptions))


def _difference(ranks: list[int], descriptions: list[tuple[int, list[str]]]) -> str:
    """Where the processes' models first differ, in words."""
    (first_tag, first), rank = descriptions[0], ranks[0]
    for other_rank, (other_tag, other) in zip(ranks[1:], descriptions[1:], strict=True):
        for index in range(max(len(first), len(other))):
            a, b = (each[index] if index < len(each) else "no such layer" for each in (first, other))
            if a != b:
                return (
                    f"the processes' models differ in synchronized layer {index}: rank {rank} has {a}, rank "
                    f"{other_rank} has {b}. Every process must run the same model"
                )
        if first_tag != other_tag:
            return (
                f"the processes meet for the first time in layers {first[:1]}, but rank {rank} has connected "
                f"{first_tag - 1} layers before and rank {other_rank} {other_tag - 1}: every process must use the "
                f"same models in the same order"
            )
    raise AssertionError("no difference between equal descriptions")
