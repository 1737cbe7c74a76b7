"""Every backend's four operations against PyTorch's own batch normalization in float64."""

from __future__ import annotations

import inspect
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from judge import assert_close
from torch import Tensor, nn

from syncbn.kernels import Backend, Layer, aten, backend_for, cpu, reference

BACKENDS = pytest.mark.parametrize("backend", [reference, cpu], ids=["reference", "cpu"])
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def run(backend: Backend, x: Tensor, dy: Tensor, layer: nn.BatchNorm1d) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, dx, dγ and dβ of one process, through the four operations."""
    C = x.shape[1]
    plain = Layer(layer.weight, layer.bias, layer.eps)
    message, scratch = backend.moments(x, None, 7)
    assert message.dtype == torch.float64
    assert message.shape == (2 * C + 3,)
    assert message[2 * C :].tolist() == [x.numel() / C, 7, 49]
    y, stats = backend.normalize(x, None, message, plain, None, scratch)
    message, dweight, dbias, scratch = backend.grad_moments(dy, x, None, stats, plain, 8)
    assert message.shape == (2 * C + 2,)
    assert message[2 * C :].tolist() == [8, 64]
    assert torch.equal(message[: 2 * C], torch.cat([dbias, dweight]))
    dx, dresidual = backend.grad_input(dy, x, None, None, stats, plain, message, False, scratch)
    assert dresidual is None
    for result in (y, dx):
        assert result.dtype == x.dtype
        assert result.stride() == torch.empty_like(x).stride() or not _dense(x)
    return y, dx, dweight, dbias


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


@torch.no_grad()
def check(backend: Backend, x: Tensor, dy: Tensor, tolerance: float, eps: float = 1e-5) -> None:
    layer = nn.BatchNorm1d(x.shape[1], eps=eps, dtype=torch.float64)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    nn.init.uniform_(layer.bias, -1, 1)
    y, dx, dweight, dbias = run(backend, x, dy, layer)
    matrix = x.movedim(1, -1).reshape(-1, x.shape[1]).double().requires_grad_()
    with torch.enable_grad():
        expected = layer(matrix)
        expected.backward(dy.movedim(1, -1).reshape(-1, x.shape[1]).double())
    shape = x.movedim(1, -1).shape
    assert_close(y, expected.view(shape).movedim(-1, 1), tolerance, "y")
    assert_close(dx, matrix.grad.view(shape).movedim(-1, 1), tolerance, "dx")
    assert_close(dweight, layer.weight.grad, 10 * tolerance, "dγ")
    assert_close(dbias, layer.bias.grad, 10 * tolerance, "dβ")


SHAPES = [
    (2, 3),
    (64, 5),
    (4, 5, 33),
    (2, 3, 1, 1),
    (2, 1, 9, 9),
    (3, 7, 20, 31),
    (2, 3, 5, 6, 7),
    (1, 2, 300, 301),  # rows longer than one run of a fused kernel
    (1, 2, 1, 40009),  # ... of prime length, which cannot be cut into equal runs
    (5000, 3),  # more rows than one run
    (2, 70, 64, 65),  # more than one chunk
]


@BACKENDS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_shapes_and_dtypes(
    backend: ModuleType, dtype: torch.dtype, shape: tuple[int, ...], channels_last: bool
) -> None:
    x, dy = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    if channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    check(backend, x, dy, TOLERANCE[dtype])


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mean_by_std", [1e2, 1e3, 1e4, 1e5], ids=["1e2", "1e3", "1e4", "1e5"])
@pytest.mark.parametrize("std", [1.0, 1e-6], ids=["std 1", "std 1e-6"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_far_from_zero(
    backend: ModuleType, dtype: torch.dtype, mean_by_std: float, std: float, channels_last: bool
) -> None:
    """float64 within 1e-9 up to mean/std = 1e3, float32 within 1e-5 up to 1e5."""
    x = ((torch.randn(2, 4, 60, 50, dtype=torch.float64) + mean_by_std) * std).to(dtype)
    dy = (torch.randn_like(x) * std).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    tolerance = 1e-9 if dtype == torch.float64 and mean_by_std <= 1e3 else 1e-5
    check(backend, x, dy, tolerance, eps=1e-5 * std**2)


@BACKENDS
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("where", ["first", "border", "middle", "sampled"])
def test_outliers_where_a_pivot_may_be_taken(backend: ModuleType, channels_last: bool, where: str) -> None:
    """A pivot far from the mean must not cost accuracy: a corner pixel, a zero border, or just the sampled values."""
    x = torch.randn(2, 4, 64, 64) + 1e4
    match where:
        case "first":
            x[:, :, 0, 0] = 0
        case "border":
            x[:, :, 0], x[:, :, -1], x[..., 0], x[..., -1] = 0, 0, 0, 0
        case "middle":
            x[:, :, 32, 32] = 1e6
        case "sampled":
            x.view(2, 4, -1)[..., 64] = -1e6  # the middle of the first stretch of which one value is looked at
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    check(backend, x, torch.randn_like(x), 1e-5)


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 3)], ids=str)
def test_nothing(backend: ModuleType, shape: tuple[int, ...]) -> None:
    x, layer = torch.empty(shape), Layer(torch.ones(3), torch.ones(3))
    message, scratch = backend.moments(x, None, 5)
    assert message.tolist() == [0] * 7 + [5, 25]
    y, stats = backend.normalize(x, None, message, layer, None, scratch)
    assert y.shape == shape
    message, dweight, dbias, scratch = backend.grad_moments(x, x, None, stats, layer, 5)
    assert message.tolist() == [0] * 6 + [5, 25]
    assert dweight.tolist() == dbias.tolist() == [0] * 3
    dx, _ = backend.grad_input(x, x, None, None, stats, layer, message, False, scratch)
    assert dx.shape == shape


@BACKENDS
@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:, :, ::2], id="every second row"),
        pytest.param(lambda x: x.contiguous(memory_format=torch.channels_last)[..., 1:], id="cropped channels_last"),
        pytest.param(lambda x: x[:, 1:3], id="some channels"),
        pytest.param(lambda x: x.transpose(2, 3), id="transposed image"),
        pytest.param(lambda x: x.transpose(0, 1), id="channels first of all"),
        pytest.param(lambda x: x[:, :, :1, :1].expand(4, 6, 5, 7), id="expanded"),
        pytest.param(lambda x: x.flip(3), id="flipped"),
    ],
)
def test_any_strides(backend: ModuleType, view: object) -> None:
    x = view(torch.randn(4, 6, 10, 8))  # type: ignore[operator]
    dy = torch.randn(x.shape)
    for upstream in (dy, dy.contiguous(memory_format=torch.channels_last), dy[:1, :, :1, :1].expand(x.shape)):
        check(backend, x, upstream, 1e-5)


@st.composite
def inputs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    shape = (draw(st.integers(2, 5)), draw(st.integers(1, 40)), *draw(st.lists(st.integers(1, 20), max_size=3)))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    apart = torch.arange(shape[0]).view(-1, *[1] * (len(shape) - 1))  # so that no variance is near zero
    x = (torch.rand(shape, dtype=torch.float64) / 2 + apart + draw(st.sampled_from([0, 10]))).to(dtype)
    order = draw(st.permutations(range(x.dim())))
    back = [order.index(dim) for dim in range(x.dim())]
    return x.permute(order).contiguous().permute(back), torch.randn(shape).to(dtype)


@BACKENDS
@settings(max_examples=150, deadline=None, derandomize=True)
@given(inputs())
def test_any_input(backend: ModuleType, x_dy: tuple[Tensor, Tensor]) -> None:
    x, dy = x_dy
    check(backend, x, dy, 2 * TOLERANCE[x.dtype])


def test_accuracy_does_not_depend_on_the_threads() -> None:
    threads = torch.get_num_threads()
    x, dy = torch.randn(2, 70, 64, 65), torch.randn(2, 70, 64, 65)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            check(cpu, x, dy, 2e-6)
    finally:
        torch.set_num_threads(threads)


def test_the_reference_runs_where_there_is_no_backend() -> None:
    """Any other device (xpu, hpu, npu) gets the reference: PyTorch's operations on x's device only."""
    x = torch.empty(2, 3, 4, 4, device="meta")
    assert backend_for(x) is reference
    assert backend_for(torch.empty(1)) is cpu
    layer = Layer(None, None, world_size=2)
    message, _ = reference.moments(x, None, 1)
    y, stats = reference.normalize(x, None, message, layer, None, None)
    message, *_ = reference.grad_moments(x, x, None, stats, layer, 2)
    dx, _ = reference.grad_input(x, x, None, None, stats, layer, message, False, None)
    for each in (message, y, dx):
        assert each.device.type == "meta"
    assert y.shape == dx.shape == x.shape


def test_backends_are_called_alike() -> None:
    for name in ("moments", "normalize", "grad_moments", "grad_input"):
        names = [list(inspect.signature(getattr(each, name)).parameters) for each in (reference, cpu, aten, Backend)]
        assert names[0] == names[1] == names[2] == names[3][1:]
