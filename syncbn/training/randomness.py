"""Random numbers that are a function of where they are drawn, not of what was drawn before.

A run that is interrupted and resumed draws what the uninterrupted one would have drawn, whatever number of worker
processes prepares its data.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def seed_of(*place: int) -> int:
    """A 64-bit seed for a place, such as (seed, epoch, index). Neighbouring places share nothing."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])


def reseed(*place: int) -> None:
    """Sets the generators of torch (all devices), numpy and `random` to a place. Waits for no device."""
    seed = seed_of(*place)
    torch.manual_seed(seed)
    _reseed_host(seed)


@contextmanager
def reseeded(*place: int) -> Iterator[None]:
    """The same for a while, on the CPU; afterwards the generators go on where they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed = seed_of(*place)
    torch.default_generator.manual_seed(seed)
    _reseed_host(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])


def _reseed_host(seed: int) -> None:
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    random.seed(seed)
