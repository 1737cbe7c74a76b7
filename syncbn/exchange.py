"""``Exchange``: what all layers of a model share to talk to the other processes.

It finds (or makes) the process group at the first exchange, proves once that every process brings the same layers, and
then sums messages.
"""

from __future__ import annotations

import hashlib
import itertools
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .communicator import (
    Communicator,
    communicators,
    exists,
    find_group,
    initialized,
    nothing,
    ranks_of,
    reference,
    require_device,
    resolve,
)
from .groups import ALL, Member, OfSamples, grouping, meet
from .guard import asked_timeout, guard, meeting
from .peers import ALONE, Connected, Peers
from .traffic import OF_NO_LAYER, Traffic

_numbers = itertools.count()


class Exchange:
    """What all layers of a model share to talk to the other processes.

    Args:
        process_group: a ``ProcessGroup`` or a one-dimensional ``DeviceMesh``, used as it is. None for all processes;
            the default group, which is DistributedDataParallel's, means the same.
        dedicated: for all processes, whether to use a communicator beside the default group, so that a layer's few
            kilobytes do not wait behind DistributedDataParallel's gradient buckets. It is made once per process, at
            the first exchange of any model, in which all processes take part.
        timeout: how long an exchange may take before this process says where all processes are, and ends: longer than
            the slowest of them may ever need between two exchanges, for a recompilation or a checkpoint. None for the
            process group's timeout, which it cannot exceed. It is that of the first model on a communicator.
            ``SYNCBN_TIMEOUT`` in the environment, in seconds, has the last word.
        group_size: in place of a process group, how many consecutive ranks form their statistics together; "node" for
            the processes of one host.
        statistics_batch: in place of these, how many samples the statistics shall see. All processes are divided into
            groups whose batches come nearest to it, by what they have in their first batch in training: the size of
            dimension 0 of the first layer's input.

    Raises:
        ValueError: ``process_group`` has more than one dimension, or this process is not a member of it, or
            ``group_size`` does not divide the number of processes, or there are two of those options, or ``timeout``
            is not positive.
        TypeError: ``process_group`` is none of the above, or a number is not whole, or ``timeout`` is no timedelta.

    Attributes:
        traffic: what this process has exchanged, by layer and direction.
        number: which Exchange of this process it is.
    """

    def __init__(
        self,
        process_group: Any = None,
        dedicated: bool = True,
        timeout: timedelta | None = None,
        *,
        group_size: int | Literal["node"] | None = None,
        statistics_batch: int | None = None,
    ) -> None:
        _require_positive(timeout)
        self.grouping = grouping(process_group, group_size, statistics_batch)
        if initialized():
            self.grouping.require_possible(dist.get_world_size())
        group = resolve(process_group)
        self._own_group = reference(group)
        # By its name and ranks a group is found again: after pickling, and after torch.distributed was set up anew.
        self._identity = None if group is None else (str(group.group_name), tuple(ranks_of(group)))
        self.dedicated = dedicated
        self.timeout = timeout
        self.traffic = Traffic()
        self._layers: list[str] = []
        self._communicator: Communicator | None = None
        self._first_tag = 0
        # That of this process's group: it stays what it is when layers are added and the processes meet again.
        self._own: Communicator | None = None
        self.number = next(_numbers)

    @property
    def calls(self) -> int:
        """How many all-reduces this process has taken part in."""
        return self.traffic.calls

    @property
    def bytes(self) -> int:
        """How many bytes these had."""
        return self.traffic.bytes

    def layer_name(self, index: int) -> str:
        """What the layer is called in its model, such as "backbone.bn1"."""
        return self._layers[index].partition("(")[0]

    @property
    def process_group(self) -> Any:
        """The process group that the user passed, where it still exists, or that has been made for this process's
        group; None for all processes."""
        own = self._own
        return own.group if own is not None and self.ranks is not None else self._own_group()

    @property
    def ranks(self) -> tuple[int, ...] | None:
        """The global ranks of the processes with whom the statistics are formed; None for all processes.

        Groups of a size, node or number of samples are known from the first exchange on; before, None.
        """
        if self._identity is not None:
            return self._identity[1]
        own = self._own
        if own is None or not own.alive or len(own.ranks) == dist.get_world_size():
            return None
        return tuple(own.ranks)

    @property
    def grouped(self) -> bool:
        """Whether it is known who is in this process's group; that is never asked of the user's own."""
        return self._own is not None and self._own.alive

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
        """Over how many processes the statistics are formed: 1 without torch.distributed, all before the first exchange
        has divided them into groups."""
        if self._communicator is not None and self._communicator.alive:
            return len(self._communicator.ranks)
        return dist.get_world_size(self._group()) if initialized() else 1

    @property
    def alone(self) -> bool:
        """Whether there is nobody to exchange with: the layer's statistics are those of this process."""
        return self.world_size == 1

    def peers(self, index: int, x: Tensor) -> Peers:
        """Those of one layer, for its input x; the first call is collective, see ``connect``."""
        if torch.compiler.is_dynamo_compiling():
            from .compiled import traced_peers

            return traced_peers(self, self.number, index, x.device)
        if not self.alone:
            self.connect(x.device, x.shape[0])
        if self.alone:  # in its group, too
            return ALONE
        return Connected(self.world_size, self.tag(index, backward=False), self.tag(index, backward=True), self)

    def tag(self, index: int, backward: bool) -> int:
        """The number that says who is exchanging: unlike for any other layer or direction on the communicator.

        Known once the processes are connected; 0 before, and where there is only one.
        """
        return 2 * (self._first_tag + index) + backward

    def connect(self, device: torch.device, batch_size: int | None = None) -> None:
        """Makes the communicator and compares this model's layers with those of the other processes.

        Collective over all processes, or over the group that the user has passed. It happens by itself at the first
        exchange; call it before capturing a CUDA graph. A second call does nothing.

        Args:
            device: that of the tensors to be exchanged.
            batch_size: of this process, which ``statistics_batch`` needs; at the first exchange, that of the input.

        Raises:
            RuntimeError: the layers or the groups asked for differ between processes, the group cannot reduce tensors
                of ``device``, a CUDA graph is being captured, or the batch size is needed and not known.
        """
        if self._communicator is not None and self._communicator.alive:
            return
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the first exchange of a model makes its communicator, which a CUDA graph cannot capture: run one "
                "training step, or call exchange.connect(device), before the capture"
            )
        group = self._group()
        first = communicators.of(dist.group.WORLD if group is None else group)
        require_device(first, device)
        with meeting(first, self.timeout):
            self._meet(first if group is not None else self._own_of_all(first, device, batch_size), device)

    def _meet(self, communicator: Communicator, device: torch.device) -> None:
        """Agrees with the other processes on the layers and takes tags for them."""
        require_device(communicator, device)
        if len(communicator.ranks) > 1:
            _require_same_layers(communicator, self._layers, device)
        self._first_tag = communicator.take_tags(self.layer_name, len(self._layers))
        guard(communicator, self.timeout)
        self._communicator = communicator

    def _own_of_all(self, world: Communicator, device: torch.device, batch_size: int | None) -> Communicator:
        """The communicator of the group in which this one of all processes is. Collective over all of them."""
        members = [Member(host=0, samples=None)]
        if len(world.ranks) > 1:
            asked = f"{self.grouping}{'' if self.dedicated else ', not dedicated'}"
            if self.grouped and isinstance(self.grouping, OfSamples):  # others would form theirs by this batch
                asked += ", which has formed its groups before"
            members = meet(asked, batch_size, device)
        if not self.grouped:
            groups, timeout = self.grouping.divide(members), asked_timeout(self.timeout)
            if len(groups) > 1:
                self._own = communicators.of_own_among(groups, timeout)
            else:
                self._own = communicators.dedicated(timeout) if self.dedicated else world
        assert self._own is not None
        return self._own

    def all_reduce(self, message: Tensor, tag: int = 0) -> None:
        """Sums ``message`` over all processes, in place.

        Args:
            message: of any shape and dtype, the same on all processes.
            tag: which layer and direction it belongs to; 0 for none.

        Raises:
            RuntimeError: the group cannot reduce tensors on the message's device; another process has ended; or, with
                ``SYNCBN_CHECK=1``, the processes meet in different layers, directions or calls.
        """
        communicator = self.connected(message.device)
        with self._counted(tag, message), communicator.progress.of(tag, message):
            dist.all_reduce(message, group=communicator.group)

    def differentiable_all_reduce(self, message: Tensor, tag: int = 0) -> Tensor:
        """The sum of ``message`` over all processes as a new tensor; its gradient is summed over them, too."""
        from torch.distributed import _functional_collectives

        communicator = self.connected(message.device)
        with self._counted(tag, message), communicator.progress.of(tag, message, differentiable=True):
            total = _functional_collectives.all_reduce(message, "sum", communicator.group)
            return _functional_collectives.wait_tensor(total)  # here, where it is known who waits for what

    def _counted(self, tag: int, message: Tensor) -> Any:
        number, backward = divmod(tag, 2)
        index = number - self._first_tag if tag else OF_NO_LAYER
        return self.traffic.counted(index, "backward" if backward else "forward", message)

    def connected(self, device: torch.device) -> Communicator:
        """The communicator for messages on ``device``; see ``connect``."""
        self.connect(device)
        communicator = self._communicator
        assert communicator is not None  # connect() has set it, or raised
        require_device(communicator, device)
        return communicator

    def _group(self) -> Any:
        """The user's process group, or None for all processes.

        Raises:
            RuntimeError: it does not exist in this program, or not any more.
        """
        if self._identity is None:
            return None
        group = self._own_group()
        if group is None or not exists(group):
            group = find_group(*self._identity)
            self._own_group = reference(group)
        return group

    def __getstate__(self) -> dict[str, Any]:
        """All but what lives in this process only."""
        return self.__dict__ | {
            "_own_group": nothing,
            "_communicator": None,
            "_own": None,
            "_first_tag": 0,
            "traffic": Traffic(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state | {"number": next(_numbers)}

    def __deepcopy__(self, memo: dict[int, Any]) -> Exchange:
        """A copied model is another model: it shares the communicator, but proves its layers and counts for itself."""
        copy = self.renewed()
        copy._layers, copy._own = list(self._layers), self._own
        memo[id(self)] = copy
        return copy

    def renewed(self, timeout: timedelta | None = None) -> Exchange:
        """An Exchange with the same options, but for a timeout that is given, and no layers yet."""
        renewed = Exchange(None, self.dedicated, self.timeout if timeout is None else timeout)
        renewed._own_group, renewed._identity, renewed.grouping = self._own_group, self._identity, self.grouping
        return renewed

    @property
    def options(self) -> tuple[Any, ...]:
        """What two Exchanges have in common if one can stand for the other; hashable."""
        return self._identity, self.grouping, self.dedicated, self.timeout

    def __repr__(self) -> str:
        ranks = "" if self.ranks is None else f"ranks {list(self.ranks)}"
        if self.grouping == ALL:
            return f"Exchange({ranks or self.grouping})"
        return f"Exchange({self.grouping}{ranks and f': {ranks}'})"


def _require_positive(timeout: timedelta | None) -> None:
    if timeout is not None and not isinstance(timeout, timedelta):
        raise TypeError(f"expected timeout to be a datetime.timedelta, got {type(timeout).__name__}")
    if timeout is not None and timeout <= timedelta(0):
        raise ValueError(f"expected a positive timeout, got {timeout}")


def _require_same_layers(communicator: Communicator, layers: list[str], device: torch.device) -> None:
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
