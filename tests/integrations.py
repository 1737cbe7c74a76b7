"""What the tests of docs/integrate.md share: the page's lines, framework by framework, and the data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from documentation import ROOT
from processes import Processes
from torch import Tensor, nn
from torch.utils.data import Dataset

PAGE = "docs/integrate.md"


def code_of(framework: str) -> list[str]:
    """The Python blocks beneath the heading that names the framework."""
    (section,) = re.findall(rf"^## {framework}\n(.*?)(?=^## |\Z)", (ROOT / PAGE).read_text(), re.DOTALL | re.MULTILINE)
    return re.findall(r"```python\n(.*?)```", section, re.DOTALL)


@contextmanager
def pools(environment: dict[str, str] | None = None) -> Iterator[Any]:
    """``pool(world_size)``, of workers for one framework, which changes process-wide state, and goes with them."""
    made: dict[int, Processes] = {}
    try:
        yield lambda world_size: made.setdefault(world_size, Processes(world_size, environment))
    finally:
        for pool in made.values():
            pool.stop()


class Images(Dataset):
    """Images in float64 whose statistics differ from one to the next, under the names that a framework wants."""

    def __init__(self, image: str = "image", label: str = "label", count: int = 8) -> None:
        self.image, self.label, self.count = image, label, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= self.count:
            raise IndexError(index)  # ends a for loop
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(3, 16, 16, generator=generator, dtype=torch.float64)
        return {self.image: x * (1 + index % 3) + index % 2, self.label: index % 3}


def state(model: nn.Module) -> dict[str, Tensor]:
    """The model's own state, wrapped or not."""
    return {name.removeprefix("module."): value.detach().clone() for name, value in model.state_dict().items()}


def assert_same_training(states: list[dict[str, Tensor]], expected: dict[str, Tensor], tolerance: float = 1e-8) -> None:
    """All processes end with the same model, and with that of one process on the union of their batches."""
    for each in states:
        assert each.keys() == expected.keys()
        torch.testing.assert_close(each, expected, rtol=100 * tolerance, atol=tolerance)
