"""Clocks, and implementations taking turns.

On a GPU, CUDA events mark the device's own time; the L2 cache is overwritten before each phase, and since the device is
idle before that, every implementation's host has the same head start: the time which that takes. On a CPU the clock is
the wall's, all processes start a phase together, and caches are left as the others leave them. With several processes
a phase has taken as long as on the slowest of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_LEAST_FLUSH = 256 << 20  # bytes


class Clock:
    """Time on one device: the wall's on a CPU, CUDA events on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cache = _as_large_as_cache(device) if device.type == "cuda" else None

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def align(self) -> None:
        """Before a phase: the device is idle, and the processes are at the same place."""
        self.wait()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()
            self.wait()

    def flush(self) -> None:
        """Fills a GPU's L2 cache with something else, without waiting for it."""
        if self._cache is not None:
            self._cache.zero_()

    def mark(self) -> Any:
        if self.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two marks that the device has passed."""
        return 1e3 * (end - start) if self.device.type == "cpu" else start.elapsed_time(end)


def _as_large_as_cache(device: torch.device) -> Tensor:
    size = max(_LEAST_FLUSH, 4 * torch.cuda.get_device_properties(device).L2_cache_size)
    return torch.empty(size, dtype=torch.uint8, device=device)


class Turn(NamedTuple):
    """What one implementation does in a round: untimed preparation, then phases that are timed one by one."""

    prepare: Callable[[], None]
    phases: Sequence[Callable[[], None]]


def interleave(
    turns: dict[str, Turn], clock: Clock, rounds: int, warm_up: int, align_each_phase: bool = True
) -> dict[str, Tensor]:
    """Lets every implementation take its turn in every round, each round beginning with another one.

    Args:
        align_each_phase: whether the device is idle and its cache overwritten before each phase, not only the first.

    Returns:
        by name: [rounds, phases] milliseconds, float64; the most that any process has needed.
    """
    names = list(turns)
    marks: dict[str, list[list[Any]]] = {name: [] for name in names}
    for round_ in range(warm_up + rounds):
        shift = round_ % len(names) if names else 0
        for name in names[shift:] + names[:shift]:
            taken = _take(turns[name], clock, align_each_phase)
            if round_ >= warm_up:
                marks[name].append(taken)
    clock.wait()
    return {
        name: slowest(
            torch.tensor(
                [[clock.milliseconds(*pair) for pair in phases] for phases in marks[name]], dtype=torch.float64
            ),
            clock.device,
        )
        for name in names
    }


def _take(turn: Turn, clock: Clock, align_each_phase: bool) -> list[Any]:
    turn.prepare()
    marks = []
    for index, phase in enumerate(turn.phases):
        if index == 0 or align_each_phase:
            clock.align()
            clock.flush()
        start = clock.mark()
        phase()
        marks.append((start, clock.mark()))
    return marks


def slowest(milliseconds: Tensor, device: torch.device) -> Tensor:
    """Element by element, the most that any process has."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return milliseconds
    on_device = milliseconds.to(device)
    dist.all_reduce(on_device, dist.ReduceOp.MAX)
    return on_device.cpu()


class Spread(NamedTuple):
    """The quartiles of repeated measurements."""

    q1: float
    median: float
    q3: float


def spread(values: Tensor) -> Spread:
    """Of a vector."""
    q1, median, q3 = values.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=values.dtype)).tolist()
    return Spread(q1, median, q3)


class HostTime(NamedTuple):
    """Microseconds of wall time for one call that does not wait for the device."""

    forward_us: float
    backward_us: float


def host_time(
    forward: Callable[[], Tensor], backward: Callable[[Tensor], Any], clock: Clock, calls: int, repeats: int
) -> HostTime:
    """How long the host is busy with a forward and a backward call: the medians of ``repeats`` loops of ``calls``.

    Few enough calls that the device's queue never fills up. On a CPU, where nothing is asynchronous, it is the call's
    whole time.
    """
    forward_us, backward_us = [], []
    for repeat in range(repeats + 1):
        clock.align()
        start = time.perf_counter()
        outputs = [forward() for _ in range(calls)]
        middle = time.perf_counter()
        clock.align()
        restart = time.perf_counter()
        for output in outputs:
            backward(output)
        end = time.perf_counter()
        if repeat > 0:
            forward_us.append(1e6 * (middle - start) / calls)
            backward_us.append(1e6 * (end - restart) / calls)
    clock.wait()
    return HostTime(statistics.median(forward_us), statistics.median(backward_us))
