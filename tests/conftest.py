"""Fixtures for all tests: pools of real processes, started once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec

import pytest
import torch
from processes import Processes

# The core and the benchmark are tested without Hydra, too: a bare GPU machine may have none.
collect_ignore = [] if find_spec("hydra") else ["training"]


@pytest.fixture(scope="session")
def processes() -> Iterator[Callable[[int], Processes]]:
    """``processes(world_size)``: the session's pool of that many gloo processes."""
    pools: dict[int, Processes] = {}
    yield lambda world_size: pools.setdefault(world_size, Processes(world_size))
    for pool in pools.values():
        pool.stop()


@pytest.fixture(scope="session")
def interpreters() -> Iterator[Callable[[int], Processes]]:
    """The same, of processes in which Triton's kernels are interpreted, on CPU tensors."""
    pools: dict[int, Processes] = {}
    yield lambda world_size: pools.setdefault(world_size, Processes(world_size, {"TRITON_INTERPRET": "1"}))
    for pool in pools.values():
        pool.stop()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
