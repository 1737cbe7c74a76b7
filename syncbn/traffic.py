"""``Traffic``: what an Exchange has sent, by layer and direction, and how long that took.

Calls and bytes are counted. On a CPU every exchange is timed but a layer's first one, which sets connections up. On a
GPU each so many-th of a layer and direction is, other layers' in other steps: two events mark it on its stream, and are
read when the device has long passed them. Nothing waits for the device.

A few things to know of the times: they are this process's, and most of an exchange is waiting for the slowest one.
What torch.compile has compiled, or a CUDA graph replays, has no Python at its exchanges and is not counted. An exchange
that is differentiated (double backward) is counted and not timed. The message of several layers together (see
``normalize_together``) is that of the first of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

OF_NO_LAYER = -1  # the index of an exchange that belongs to none
Direction = Literal["forward", "backward"]
_EVERY = 16  # on a GPU, where an event costs as much as a small kernel


class Counts(NamedTuple):
    """What has been counted in one layer and direction, since the beginning."""

    calls: int
    bytes: int
    samples: int
    sampled_s: float


Snapshot = dict[tuple[int, Direction], Counts]
_NOTHING = Counts(0, 0, 0, 0.0)


class Row(NamedTuple):
    """One layer and direction."""

    layer: int  # its index at the Exchange, or OF_NO_LAYER
    name: str
    direction: Direction
    calls: int
    bytes: int
    samples: int  # how many of the calls were timed
    mean_s: float  # of the samples; of all earlier ones where there are none; NaN where there never was one
    longest_s: float  # of all samples since the beginning

    @property
    def seconds(self) -> float:
        """The time of all calls, as the samples say; NaN where there never was one."""
        return self.mean_s * self.calls


class Traffic:
    """What one Exchange has sent. Readers take a ``snapshot`` and ask for what came ``since``: none disturbs another.

    Args:
        every: which part of the exchanges on a GPU is timed: each n-th of a layer and direction.
    """

    def __init__(self, every: int = _EVERY) -> None:
        self._every = every
        self._lines: dict[tuple[int, Direction], _Line] = {}

    @property
    def calls(self) -> int:
        """How many all-reduces."""
        return sum(line.calls for line in list(self._lines.values()))

    @property
    def bytes(self) -> int:
        """How many bytes these had."""
        return sum(line.bytes for line in list(self._lines.values()))

    def counted(self, index: int, direction: Direction, message: Tensor) -> _Line:
        """A ``with`` block around one exchange of ``message``. One that raises does not count."""
        line = self._lines.get((index, direction))
        if line is None:
            line = self._lines.setdefault((index, direction), _Line(index, self._every))
        line.message = message
        return line

    def snapshot(self) -> Snapshot:
        """All that has been counted so far. Nothing is waited for: what the device is still at is not in it."""
        return {key: line.counts() for key, line in list(self._lines.items())}

    def rows(self, name: Callable[[int], str] = str, since: Snapshot | None = None) -> list[Row]:
        """A row for each layer and direction, in the order of their first exchanges.

        Args:
            name: what a layer is called: the Exchange's ``layer_name``.
            since: leave out what this has counted.
        """
        return [_row(*key, line, name, (since or {}).get(key, _NOTHING)) for key, line in list(self._lines.items())]


def total_seconds(rows: Iterable[Row]) -> float:
    """The time of all exchanges in these rows, as the samples say. NaN where none was timed."""
    known = [row for row in rows if not math.isnan(row.seconds)]
    return sum(row.seconds for row in known) if known else math.nan


def _row(index: int, direction: Direction, line: _Line, name: Callable[[int], str], before: Counts) -> Row:
    now = line.counts()
    timed = now if now.samples == before.samples else Counts(*(a - b for a, b in zip(now, before, strict=True)))  # type: ignore[arg-type]
    return Row(
        index,
        "no layer" if index == OF_NO_LAYER else name(index),
        direction,
        now.calls - before.calls,
        now.bytes - before.bytes,
        now.samples - before.samples,
        timed.sampled_s / timed.samples if timed.samples else math.nan,
        line.longest_s,
    )


class _Line:
    """The counts of one layer and direction, and the ``with`` block that adds to them.

    One object for all calls, since two of one layer and direction never overlap: every process exchanges in one order.
    """

    __slots__ = (
        "_every",
        "_offset",
        "_pending",
        "_started",
        "bytes",
        "calls",
        "longest_s",
        "message",
        "sampled_s",
        "samples",
    )

    def __init__(self, index: int, every: int) -> None:
        self.calls = self.bytes = self.samples = 0
        self.sampled_s = self.longest_s = 0.0
        self.message: Tensor | None = None
        self._every = every
        self._offset = index % every  # no step pays for all layers, nor stands for all of their steps
        self._started: Any = None
        self._pending: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def __enter__(self) -> None:
        # Where gradients are recorded it is a functional collective, and what takes time is waiting for it, later.
        if self.calls and not torch.is_grad_enabled():
            if not self.message.is_cuda:  # type: ignore[union-attr]
                self._started = time.perf_counter()
            elif (self.calls + self._offset) % self._every == 0:
                self._begin_on_device()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        ended = time.perf_counter()
        message, self.message = self.message, None
        started, self._started = self._started, None
        if kind is not None:
            return
        self.calls += 1
        self.bytes += message.nbytes  # type: ignore[union-attr]
        if started.__class__ is float:
            self._add(ended - started)
        elif started is not None:
            self._pending = started, _event(message)

    def counts(self) -> Counts:
        self._read()
        return Counts(self.calls, self.bytes, self.samples, self.sampled_s)

    def _begin_on_device(self) -> None:
        # An event in the capture of a CUDA graph would be a part of it; asking for one would break it.
        if not torch.cuda.is_current_stream_capturing() and self._read():
            self._started = _event(self.message)

    def _read(self) -> bool:
        """Takes what the device has finished; whether there is nothing more to come."""
        pending = self._pending
        if pending is not None and pending[1].query():
            self._pending = None
            self._add(pending[0].elapsed_time(pending[1]) / 1e3)
        return self._pending is None

    def _add(self, seconds: float) -> None:
        self.samples += 1
        self.sampled_s += seconds
        self.longest_s = max(self.longest_s, seconds)


def _event(message: Any) -> torch.cuda.Event:
    """Marks this place on the stream on which the message is exchanged."""
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(message.device))
    return event
