"""Layers whose processes meet before they exchange: where one fails or goes astray, all of them stop together.

It costs a message between hosts for each exchange, so it is for a diagnosis, not for training.
"""

from __future__ import annotations

import io
import traceback
from collections.abc import Callable, Sequence
from enum import IntEnum
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..exchange import Exchange
from ..host import HostCommunicator
from ..peers import Peers
from .recording import bytes_of

Result = TypeVar("Result")


class Talk:
    """What the processes of a diagnosis tell each other, on the host; one process alone talks to itself."""

    def __init__(self, host: HostCommunicator | None) -> None:
        self.host = host
        self.rank = host.own_rank if host is not None else 0
        self.ranks: tuple[int, ...] = tuple(host.ranks) if host is not None else (0,)

    def share(self, value: Any) -> list[Any]:
        """Every process's value, by its place in ``ranks``. Collective."""
        if self.host is None:
            return [value]
        values: list[Any] = [None] * len(self.ranks)
        dist.all_gather_object(values, value, group=self.host.group)
        return values

    def together(self, function: Callable[[], Result]) -> Result:
        """``function()``, in which nobody waits for anybody. Where it raises in one process, all raise. Collective."""
        try:
            result = function()
        except Exception as error:
            self.agree(error)
            raise AssertionError("unreachable") from error
        self.agree(None)
        return result

    def agree(self, error: Exception | None) -> None:
        """Raises if any process has failed: its own error, or one that names the others' and says what theirs are."""
        texts = self.share(None if error is None else "".join(traceback.format_exception_only(error)).strip())
        if error is not None:
            raise error
        failed = [f"rank {rank} has raised {text}" for rank, text in zip(self.ranks, texts, strict=True) if text]
        if failed:
            raise RuntimeError("; ".join(failed))

    def send(self, value: Tensor, rank: int) -> None:
        """A tensor on the host to a process that receives it."""
        if value.numel():
            assert self.host is not None
            dist.send(value.view(-1).view(torch.uint8), dst=rank, group=self.host.group)

    def receive(self, shape: Sequence[int], dtype: torch.dtype, rank: int) -> Tensor:
        value = torch.empty(list(shape), dtype=dtype)
        if value.numel():
            assert self.host is not None
            dist.recv(value.view(-1).view(torch.uint8), src=rank, group=self.host.group)
        return value

    def send_object(self, value: Any, rank: int) -> None:
        file = io.BytesIO()
        torch.save(value, file)
        message = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
        self.send(torch.tensor([len(message)]), rank)
        self.send(message, rank)

    def receive_object(self, rank: int, device: torch.device) -> Any:
        """What is on a GPU there comes to ``device``, and what is on the host to the host."""
        (length,) = self.receive([1], torch.int64, rank).tolist()
        message = self.receive([length], torch.uint8, rank)

        def place(storage: Any, location: str) -> Any:
            return storage if location == "cpu" else torch.serialization.default_restore_location(storage, str(device))

        # From a process of the same program, as are the objects that torch.distributed itself pickles.
        return torch.load(io.BytesIO(bytes_of(message)), map_location=place, weights_only=False)


class _State(IntEnum):
    IN_AN_EXCHANGE = 0
    DONE = 1
    FAILED = 2


class Stopped(Exception):  # noqa: N818, it is no error of the process that it ends
    """Raised in every process where they are not all in the same exchange; why, the meeting knows."""


class Meeting:
    """One run of a model on all processes, each of which says which exchange it is in, that it is done, or has failed.

    Args:
        host: how the processes talk; None for one process alone.
        names: of the layers, which are numbered in this order, the same on all processes.
    """

    def __init__(self, host: HostCommunicator | None, names: Sequence[str]) -> None:
        self._host, self._names = host, names
        self._parted: list[list[int]] | None = None

    def arrive(self, layer: int, backward: bool) -> None:
        """Before an exchange. Collective.

        Raises:
            Stopped: some process is elsewhere.
        """
        if self._parted is None:
            self._compare([_State.IN_AN_EXCHANGE, 2 * layer + backward])
        if self._parted is not None:
            raise Stopped

    def leave(self, failed: bool) -> None:
        """After the run; collective like ``arrive``, and not necessary after ``Stopped``."""
        if self._parted is None:
            self._compare([_State.FAILED if failed else _State.DONE, 0])

    @property
    def failed(self) -> bool:
        """Whether a process has raised an exception of its own."""
        return any(state == _State.FAILED for state, _ in self._parted or ())

    @property
    def parted(self) -> dict[str, list[int]] | None:
        """Where the processes have been, and their ranks, if they were not in the same exchange."""
        if self._parted is None or self._host is None:
            return None
        places: dict[str, list[int]] = {}
        for rank, row in zip(self._host.ranks, self._parted, strict=True):
            places.setdefault(self._in_words(*row), []).append(rank)
        return places

    @property
    def first_layer(self) -> str | None:
        """The first in module order of the layers that processes were in when they parted."""
        numbers = [place // 2 for state, place in self._parted or () if state == _State.IN_AN_EXCHANGE]
        return self._names[min(numbers)] if numbers else None

    def _compare(self, own: list[int]) -> None:
        if self._host is None:
            return
        rows = self._host.read(self._host.post(own))
        if any(row != own for row in rows) or own[0] == _State.FAILED:
            self._parted = rows

    def _in_words(self, state: int, place: int) -> str:
        if state == _State.IN_AN_EXCHANGE:
            return f"in {self._names[place // 2]}, {'backward' if place % 2 else 'forward'}"
        return "at the end" if state == _State.DONE else "failed"


class InStep:
    """Stands in for a layer's Exchange: the processes meet, and then it does what that one does."""

    def __init__(self, exchange: Exchange, number: int, meeting: Meeting) -> None:
        self.exchange, self.number, self.meeting = exchange, number, meeting
        self.used = False

    def peers(self, index: int, x: Tensor) -> Peers:
        self.used = True
        self.meeting.arrive(self.number, backward=False)
        return _PeersInStep(self.exchange.peers(index, x), self)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["exchange"], name)


class _PeersInStep(NamedTuple):
    peers: Peers
    source: InStep

    @property
    def world_size(self) -> int:
        return self.peers.world_size

    @property
    def forward_tag(self) -> int:
        return self.peers.forward_tag

    @property
    def backward_tag(self) -> int:
        return self.peers.backward_tag

    @property
    def joint(self) -> Any:
        return getattr(self.peers, "joint", None)

    def sum_moments(self, message: Tensor) -> Tensor:
        self.source.meeting.arrive(self.source.number, backward=False)
        return self.peers.sum_moments(message)

    def sum_grad_moments(self, message: Tensor) -> Tensor:
        self.source.meeting.arrive(self.source.number, backward=True)
        return self.peers.sum_grad_moments(message)
