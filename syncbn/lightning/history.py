"""The course of a run's readings, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .readings import Reading

OF_STEP = ("step", "batch_s", "exchange_s", "samples", "skipped")
OF_LAYER = ("values", "mean_stray", "var_stray", "collapsed", "mean_lag", "var_lag")
_MOST = 256  # rows: a run of weeks keeps every so many-th of its samples


class History:
    """Rows of numbers of the sampled steps, and of each layer there. When it is full, every other row goes.

    Args:
        names: of the layers.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self._stride = 1
        self._seen = 0
        self._steps: list[list[float]] = []
        self._layers: list[Tensor] = []  # [L, OF_LAYER] float32 each

    def __len__(self) -> int:
        return len(self._steps)

    def add(self, of_step: Sequence[float], readings: Sequence[Reading]) -> None:
        """The row of a sampled step, in the order of ``OF_STEP``."""
        if self._seen % self._stride == 0:
            self._steps.append(list(of_step))
            rows = [[getattr(reading, name) for name in OF_LAYER] for reading in readings]
            self._layers.append(torch.tensor(rows, dtype=torch.float32))
        self._seen += 1
        if len(self._steps) > _MOST:
            self._steps, self._layers, self._stride = self._steps[::2], self._layers[::2], 2 * self._stride

    def of_step(self, name: str) -> list[float]:
        """A column."""
        return [row[OF_STEP.index(name)] for row in self._steps]

    def of_layers(self, name: str) -> Tensor:
        """[rows, L] float32."""
        return torch.stack(self._layers)[:, :, OF_LAYER.index(name)]

    def latest(self, name: str) -> list[float]:
        """Of each layer what was known of it last; NaN where nothing was."""
        column = self.of_layers(name)
        return [next((v for v in reversed(each.tolist()) if not math.isnan(v)), math.nan) for each in column.T]

    def state_dict(self) -> dict[str, Any]:
        layers = torch.stack(self._layers) if self._layers else torch.empty(0, len(self.names), len(OF_LAYER))
        return {
            "names": self.names,
            "stride": self._stride,
            "seen": self._seen,
            "steps": [list(row) for row in self._steps],
            "layers": layers,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the course so far, unless it is of other layers."""
        if list(state["names"]) != self.names or state["layers"].shape[2:] != (len(OF_LAYER),):
            return
        self._stride, self._seen = int(state["stride"]), int(state["seen"])
        self._steps = [list(row) for row in state["steps"]]
        self._layers = list(state["layers"].unbind())
