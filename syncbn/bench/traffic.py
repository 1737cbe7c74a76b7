"""The bytes that a normalization layer must move at the least, and the bandwidth of a plain copy to compare with.

In units of the input, of which all tensors have the size:

                        forward                          backward
    plain               reads x twice, writes y      3   reads x and dy twice, writes dx                5
    with add and ReLU   reads r, too                 4   reads y, too (where ReLU was off), and
                                                         writes dr in the first pass, which the
                                                         second then reads instead of dy and y          7

Twice, because the statistics of the whole tensor must be known before its first value can be normalized. The same
figure stands for every implementation, whatever it really moves, so that their fractions of the copy's bandwidth
compare. What a cache keeps between the two readings can lift a small tensor above the copy.
"""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch

from .timing import Clock


class Passes(NamedTuple):
    """How many times the input's bytes each direction moves."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        return self.forward + self.backward


PLAIN = Passes(3, 5)
WITH_ADD_AND_RELU = Passes(4, 7)


def passes(adds: bool) -> Passes:
    return WITH_ADD_AND_RELU if adds else PLAIN


def gigabytes_per_second(size: int, milliseconds: float) -> float:
    """GB/s (10⁹) of ``size`` bytes in ``milliseconds``."""
    return size / milliseconds / 1e6


def copy_bandwidth(clock: Clock, size: int, rounds: int) -> float:
    """GB/s of copying ``size`` bytes on the clock's device, read and written bytes counted: the median of the rounds.

    All processes copy at once, as they will when they normalize at once.
    """
    source = torch.ones(size // 4, device=clock.device)
    target = torch.empty_like(source)
    marks = []
    for _ in range(rounds + 2):
        clock.align()
        start = clock.mark()
        target.copy_(source)
        marks.append((start, clock.mark()))
    clock.wait()
    return gigabytes_per_second(2 * size, statistics.median(clock.milliseconds(*pair) for pair in marks[2:]))
