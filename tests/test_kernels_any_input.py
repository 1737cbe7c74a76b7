"""Every backend's four operations on whatever inputs hypothesis comes up with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from backends import NAMES, run_on
from judge import assert_close
from test_kernels import TOLERANCE, Case, judge, run

pytest.importorskip("hypothesis")

from hypothesis import given, settings
from hypothesis import strategies as st


@st.composite
def inputs(draw: st.DrawFn) -> Case:
    shape = (draw(st.integers(2, 5)), draw(st.integers(1, 40)), *draw(st.lists(st.integers(1, 12), max_size=3)))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    apart = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))  # so that no variance is near zero
    x = (torch.rand(shape, dtype=torch.float64) / 2 + apart + draw(st.sampled_from([0, 10]))).to(dtype)
    order = draw(st.permutations(range(x.dim())))
    back = [order.index(dim) for dim in range(x.dim())]
    case = Case(x.permute(order).contiguous().permute(back), torch.randn(shape).to(dtype))
    if draw(st.booleans()):
        case = replace(case, residual=torch.randn(shape).to(dtype))
    if draw(st.booleans()):
        case = replace(case, mask=torch.ones(shape[0], 1, *shape[2:], dtype=torch.bool))
    return replace(case, activation=draw(st.sampled_from([None, "silu"])))  # no step at 0 for rounding to cross


@pytest.mark.parametrize("backend", NAMES)
@settings(max_examples=100, deadline=None, derandomize=True)
@given(case=inputs())
def test_any_input(interpreters: Any, backend: str, case: Case) -> None:
    with torch.no_grad():
        results = run_on(backend, run, interpreters, case)
    for name, expected in judge(case).items():
        assert_close(results[name], expected, (20 if name in ("dγ", "dβ") else 2) * TOLERANCE[case.x.dtype], name)
