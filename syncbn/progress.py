"""How far this process has come on a communicator: which exchange it is in, or was in last."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor


class Entry(NamedTuple):
    """One exchange as its process sees it. Equal on all processes, as long as they run the same layers in order."""

    number: int  # how many there were on the communicator, with this one
    tag: int  # which layer and direction; 0 for an exchange of no layer
    size: int  # of the message, in elements
    differentiable: bool = False  # where gradients of gradients will be asked for


NOTHING = Entry(0, 0, 0)
OF_MEETING = -1  # the tag of what the processes do before a model's first exchange
Comparison = Callable[[Entry], None]


class DisagreementError(RuntimeError):
    """The processes are in different exchanges."""


Explanation = Callable[[Exception], Exception]


class Progress:
    """Written by the thread that exchanges, read by a watchdog's.

    Attributes:
        last: the exchange that was begun last.
        since: when it began, or when it ended if it has, in seconds of ``time.monotonic``.
        within: whether the host is still in it.
        compare: called before each exchange; see ``check``.
        explain: makes of an exchange's error one that says where the others are.
    """

    def __init__(self) -> None:
        self.last = NOTHING
        self.since = time.monotonic()
        self.within = False
        self.compare: Comparison | None = None
        self.explain: Explanation | None = None
        self._device = torch.device("cpu")  # of the last exchange
        self._ended_on_device: torch.cuda.Event | None = None

    def of(self, tag: int, message: Tensor, differentiable: bool = False) -> Progress:
        """A ``with`` block around an exchange."""
        self.last = Entry(self.last.number + 1, tag, message.numel(), differentiable)
        self._device = message.device
        return self

    @contextmanager
    def of_meeting(self) -> Iterator[None]:
        """A block in which the processes find one another and compare their layers."""
        self.last = Entry(self.last.number + 1, OF_MEETING, 0)
        self.since, self.within = time.monotonic(), True
        try:
            yield
        finally:
            self.since, self.within = time.monotonic(), False

    def __enter__(self) -> None:
        self.since = time.monotonic()
        self.within = True
        if self.compare is not None:
            try:
                self.compare(self.last)
            except DisagreementError:
                self.within = False
                raise
            except RuntimeError as error:
                self._raise_explained(error)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None and self._device.type == "cuda":
            self._record_end()
        if isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError):
            self._raise_explained(error)
        self.since = time.monotonic()
        self.within = False

    def _raise_explained(self, error: RuntimeError) -> NoReturn:
        try:
            explained = error if self.explain is None else self.explain(error)  # while it still counts as under way
        finally:
            self.within = False
        raise explained from error

    def _record_end(self) -> None:
        """Only marks the place on the device's stream: nothing is waited for."""
        if torch.cuda.is_current_stream_capturing():
            return
        if self._ended_on_device is None:
            self._ended_on_device = torch.cuda.Event()
        self._ended_on_device.record(torch.cuda.current_stream(self._device))

    @property
    def under_way(self) -> bool:
        """Whether the last exchange has not ended yet: not on the host, or not on the device.

        It may ask the device, which the capture of a CUDA graph does not allow any thread of the process.
        """
        return self.within or (self._ended_on_device is not None and not self._ended_on_device.query())

    @property
    def quiet_for(self) -> float:
        """Seconds since the last exchange began, or ended."""
        return time.monotonic() - self.since
