"""The layer on any batch that hypothesis comes up with, split over two processes in any way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from judge import Options, assert_union
from test_union import data
from torch import Tensor

pytest.importorskip("hypothesis")

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


@st.composite
def splits(draw: st.DrawFn) -> list[Tensor]:
    """Parts for 2 to 4 processes: any dimension, sizes, layouts and dtypes, some empty, two values at least."""
    world_size = draw(st.integers(2, 4))
    dims = draw(st.integers(0, 3))
    channels = draw(st.integers(1, 5))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    offset = draw(st.sampled_from([0.0, 3.0, 300.0]))
    shapes = [
        (draw(st.integers(0, 3)), channels, *[draw(st.integers(1, 9)) for _ in range(dims)]) for _ in range(world_size)
    ]
    shapes[0] = (max(2, shapes[0][0]), *shapes[0][1:])
    parts = data(*shapes, dtype=dtype, mean=offset)
    return [_laid_out(x, draw(st.sampled_from(["contiguous", "channels last", "sliced", "transposed"]))) for x in parts]


def _laid_out(x: Tensor, layout: str) -> Tensor:
    match layout:
        case "channels last":
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        case "sliced":
            return torch.stack([x, x], -1)[..., 0]
        case "transposed":
            return x.transpose(0, -1).contiguous().transpose(0, -1)
    return x


@settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(parts=splits())
def test_any_split(processes: Any, parts: list[Tensor]) -> None:
    dtype = parts[0].dtype
    tolerance = 1e-9 if dtype == torch.float64 else 2e-5
    assert_union(processes, parts, Options(dtype=dtype), tolerance)
