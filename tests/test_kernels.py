"""Every backend's four operations against PyTorch's own batch normalization in float64."""

from __future__ import annotations

import inspect
import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from backends import NAMES, run_on
from judge import assert_close
from torch import Tensor, nn

from syncbn.kernels import Backend, Layer, aten, backend_for, cpu, reference
from syncbn.kernels.activation import ACTIVATIONS, activate, kept_for_backward
from syncbn.moments import Running

BACKENDS = pytest.mark.parametrize("backend", NAMES)
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@dataclass
class Case:
    """One layer's forward and backward in one process."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None = None
    mask: Tensor | None = None  # [N, 1, ...], bool or whole numbers, so that values can be repeated
    activation: str | None = None
    negative_slope: float = 0.1
    eps: float = 1e-5
    momentum: float | None = 0.3
    dtype: torch.dtype = torch.float64  # of γ, β and the running statistics

    def layer(self) -> nn.BatchNorm1d:
        layer = nn.BatchNorm1d(self.x.shape[1], self.eps, self.momentum, dtype=self.dtype)
        generator = torch.Generator().manual_seed(5)
        layer.weight.data.copy_(torch.rand(layer.weight.shape, generator=generator) + 0.5)
        layer.bias.data.copy_(torch.rand(layer.bias.shape, generator=generator) * 2 - 1)
        return layer


Results = dict[str, Tensor]


def run(backend: Backend, device: torch.device, case: Case) -> Results:
    """Through the four operations, where the backend runs. γ, β and statistics in the case's dtype."""
    plain = case.layer().to(device)
    x, dy, residual, mask = (placed(each, device) for each in (case.x, case.dy, case.residual, case.mask))
    C = x.shape[1]
    layer = Layer(plain.weight.data, plain.bias.data, case.eps, case.activation, case.negative_slope)
    running = Running(plain.running_mean, plain.running_var, plain.num_batches_tracked, case.momentum)
    message, scratch = backend.moments(x, mask, 7)
    assert message.dtype == torch.float64
    assert message.shape == (2 * C + 3,)
    weights = x.numel() / C if mask is None else mask.sum().item()
    assert message[2 * C :].tolist() == [weights, 7, 49]
    y, stats = backend.normalize(x, residual, message, layer, running, scratch)
    kept = kept_for_backward(case.activation, residual, y)
    message, dweight, dbias, scratch = backend.grad_moments(dy, x, kept, stats, layer, 8)
    assert message.dtype == torch.float64
    assert message.shape == (2 * C + 2,)
    assert message[2 * C :].tolist() == [8, 64]
    one_place = 1e-2 if case.dtype == torch.bfloat16 else 0.0  # which Triton's interpreter cuts off
    torch.testing.assert_close(torch.cat([dbias, dweight]), message[: 2 * C].to(case.dtype), rtol=one_place, atol=0)
    wants = residual is not None
    dx, dresidual = backend.grad_input(dy, x, kept, mask, stats, layer, message, wants, scratch)
    assert (dresidual is not None) == wants
    for result in (y, dx, *([dresidual] if wants else [])):
        assert result.dtype == x.dtype
        assert result.device == x.device
    for result in (y, dx):
        assert result.stride() == torch.empty_like(x).stride() or not _dense(x)
    results = {"y": y, "dx": dx, "dγ": dweight, "dβ": dbias, "running_mean": running.mean, "running_var": running.var}
    results["num_batches_tracked"] = running.num_batches_tracked
    return {name: each.cpu() for name, each in (results | ({"dresidual": dresidual} if wants else {})).items()}


def placed(x: Tensor | None, device: torch.device) -> Tensor | None:
    """x on the device with the same strides and the same place in its storage, which ``to`` does not keep."""
    if x is None or x.device == device:
        return x
    storage = x.as_strided((x.untyped_storage().nbytes() // x.element_size(),), (1,), 0).to(device)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.movedim(1, -1).is_contiguous()


def judge(case: Case) -> Results:
    """PyTorch in float64: its layer on the values as a matrix; with a mask, on as many copies of each as it weighs."""
    layer = case.layer().double()
    order = case.x.movedim(1, -1).shape
    x, dy = (_as_matrix(t.double()).requires_grad_() for t in (case.x, case.dy))
    residual = None if case.residual is None else _as_matrix(case.residual.double()).requires_grad_()
    if case.mask is None:
        normalized = layer(x)
    else:
        copies = x.repeat_interleave(_as_matrix(case.mask)[:, 0].long(), 0)
        layer(copies)  # moves the running statistics
        var, mean = torch.var_mean(copies, 0, correction=0)
        normalized = (x - mean) / (var + case.eps).sqrt() * layer.weight + layer.bias
    y = activate(normalized if residual is None else normalized + residual, case.activation, case.negative_slope)
    y.backward(dy)
    results = {"y": y, "dx": x.grad} | ({} if residual is None else {"dresidual": residual.grad})
    results = {name: each.detach().view(order).movedim(-1, 1) for name, each in results.items()}
    return results | {"dγ": layer.weight.grad, "dβ": layer.bias.grad} | dict(layer.named_buffers())


def _as_matrix(x: Tensor) -> Tensor:
    return x.movedim(1, -1).reshape(-1, x.shape[1]).detach()


@pytest.fixture
def check(interpreters: Any) -> Any:
    def check(backend: str, case: Case, tolerance: float) -> None:
        with torch.no_grad():
            results = run_on(backend, run, interpreters, case)
        expected = judge(case)
        assert results.keys() == expected.keys()
        for name, each in expected.items():
            assert_close(results[name], each, tolerance * (10 if name in ("dγ", "dβ") else 1), name)

    return check


def randn(shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool = False) -> Tensor:
    x = torch.randn(shape).to(dtype)
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if channels_last else x


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
    (3, 16, 16, 16),  # tiles that end where the rows do, in both layouts
    (2, 129, 2, 8),  # one channel more than a tile has
    (1, 8, 1, 2049),  # one place more
    (4, 300, 3, 3),  # more channels than the running statistics are moved by at a time
    (2, 520, 2, 2),  # ... or looked at
]


def every_shape_and_dtype() -> list[tuple[Any, ...]]:
    """The interpreter takes seconds for the larger ones: these in one dtype."""
    interpreted = not torch.cuda.is_available()
    every = itertools.product(NAMES, SHAPES, TOLERANCE)
    small = [s for s in SHAPES if math.prod(s) < 1e5]
    return [(n, s, d) for n, s, d in every if not (interpreted and n == "triton") or s in small or d == torch.float32]


@pytest.mark.parametrize(("backend", "shape", "dtype"), every_shape_and_dtype(), ids=str)
@LAYOUTS
def test_shapes_and_dtypes(
    check: Any, backend: str, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool
) -> None:
    check(backend, Case(randn(shape, dtype, channels_last), torch.randn(shape).to(dtype)), TOLERANCE[dtype])


@BACKENDS
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
@LAYOUTS
def test_residual_and_activation(
    check: Any, backend: str, dtype: torch.dtype, activation: str | None, with_residual: bool, channels_last: bool
) -> None:
    shape = (3, 6, 17, 16)
    residual = randn(shape, dtype, not channels_last) if with_residual else None  # in the other order of memory
    case = Case(randn(shape, dtype, channels_last), randn(shape, dtype), residual, activation=activation)
    check(backend, case, TOLERANCE[dtype])


def masks(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Images of different size in the upper left, ones that begin late, and weights."""
    N, _, H, W = shape
    heights = torch.linspace(1, H, N).long().view(N, 1, 1, 1)
    corner = (torch.arange(H).view(H, 1) < heights).expand(N, 1, H, W)
    late = torch.zeros(N, 1, H, W, dtype=torch.bool)
    late[-1, :, -1] = True
    weights = torch.randint(0, 3, (N, 1, H, W), generator=torch.Generator().manual_seed(1))
    return {
        "corner": corner,
        "late": late,
        "weights": weights.float(),
        "one row for all": corner[-1:].expand(N, 1, H, W),
    }


@BACKENDS
@pytest.mark.parametrize("mask", ["corner", "late", "weights", "one row for all"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@LAYOUTS
def test_masks(check: Any, backend: str, mask: str, dtype: torch.dtype, channels_last: bool) -> None:
    """Far from zero, with zeros where the mask is zero: a pivot from there would cost accuracy."""
    shape = (3, 5, 40, 41)
    weights = masks(shape)[mask]
    x = (torch.randn(shape) + 100) * (weights > 0)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    case = Case(x.to(dtype), torch.randn(shape).to(dtype), mask=weights)
    check(backend, case, max(20 * TOLERANCE[dtype], 1e-9) if dtype != torch.bfloat16 else 0.05)


@BACKENDS
@LAYOUTS
def test_all_at_once(check: Any, backend: str, channels_last: bool) -> None:
    shape = (3, 5, 40, 41)
    x, dy, residual = (randn(shape, torch.float32, channels_last) for _ in range(3))
    case = Case(x, dy, residual, masks(shape)["weights"], "silu", dtype=torch.float32, momentum=None)
    check(backend, case, 1e-5)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("mean_by_std", [1e2, 1e3, 1e4, 1e5], ids=["1e2", "1e3", "1e4", "1e5"])
@pytest.mark.parametrize("std", [1.0, 1e-6], ids=["std 1", "std 1e-6"])
@LAYOUTS
def test_far_from_zero(
    check: Any, backend: str, dtype: torch.dtype, mean_by_std: float, std: float, channels_last: bool
) -> None:
    """float64 within 1e-9 up to mean/std = 1e3, float32 within 1e-5 up to 1e5."""
    x = ((torch.randn(2, 4, 60, 50, dtype=torch.float64) + mean_by_std) * std).to(dtype)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    tolerance = 1e-9 if dtype == torch.float64 and mean_by_std <= 1e3 else 1e-5
    check(backend, Case(x, (torch.randn_like(x) * std).to(dtype), eps=1e-5 * std**2), tolerance)


@BACKENDS
@LAYOUTS
@pytest.mark.parametrize("where", ["first", "border", "top", "middle", "sampled"])
def test_outliers_where_a_pivot_may_be_taken(check: Any, backend: str, channels_last: bool, where: str) -> None:
    """A pivot far from the mean must not cost accuracy: a corner pixel, a zero border, or just the sampled values."""
    x = torch.randn(2, 4, 64, 64) + 1e4
    match where:
        case "first":
            x[:, :, 0, 0] = 0
        case "border":
            x[:, :, 0], x[:, :, -1], x[..., 0], x[..., -1] = 0, 0, 0, 0
        case "top":
            x[0, :, :32] = 0
        case "middle":
            x[:, :, 32, 32] = 1e6
        case "sampled":
            x.view(2, 4, -1)[..., 64] = -1e6  # the middle of the first stretch of which one value is looked at
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    check(backend, Case(x, torch.randn_like(x)), 1e-5)


@BACKENDS
def test_a_long_program_whose_first_tile_is_an_outlier(check: Any, backend: str) -> None:
    """The worst for sums around a pivot: the first values, and only these, are far from all others."""
    x = torch.randn(1, 2, 1, 64 * 2048) + 1e4
    x[..., :2048] = 0
    check(backend, Case(x, torch.randn_like(x)), 1e-5)


@BACKENDS
@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 0, 4), (0, 3)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])
def test_nothing(interpreters: Any, backend: str, shape: tuple[int, ...], masked: bool) -> None:
    run_on(backend, run_nothing, interpreters, shape, masked)


def run_nothing(backend: Backend, device: torch.device, shape: tuple[int, ...], masked: bool) -> None:
    x = torch.empty(shape, device=device)
    mask = torch.ones(shape[0], 1, *shape[2:], device=device) if masked else None
    running = [torch.full((3,), 0.5, device=device) for _ in range(2)]
    layer = Layer(torch.ones(3, device=device), torch.ones(3, device=device), activation="relu")
    message, scratch = backend.moments(x, mask, 5)
    assert message.tolist() == [0] * 7 + [5, 25]
    y, stats = backend.normalize(x, x, message, layer, Running(*running, None, 0.1), scratch)
    assert y.shape == shape
    assert all(each.tolist() == [0.5] * 3 for each in running)
    message, dweight, dbias, scratch = backend.grad_moments(x, x, y, stats, layer, 5)
    assert message.tolist() == [0] * 6 + [5, 25]
    assert dweight.tolist() == dbias.tolist() == [0] * 3
    dx, dresidual = backend.grad_input(x, x, y, mask, stats, layer, message, True, scratch)
    assert dx.shape == dresidual.shape == shape


@BACKENDS
def test_a_mask_without_weight_is_an_empty_batch(interpreters: Any, backend: str) -> None:
    assert run_on(backend, run_weightless, interpreters) == [0] * 7 + [5, 25]


@BACKENDS
def test_a_union_of_nothing(interpreters: Any, backend: str) -> None:
    """Mean 0 and variance 1 stand in: NaN would reach everybody's gradients, even through a loss times 0."""
    x, y, dx, gradients, running = run_on(backend, run_union_of_nothing, interpreters)
    assert_close(y, 2 * x / (1 + 1e-5) ** 0.5 + 1, 1e-6)
    assert_close(dx, 2 * torch.ones_like(x) / (1 + 1e-5) ** 0.5, 1e-6)
    assert all(each.isfinite().all() for each in gradients)
    assert running == ([0.5] * 3, [2.0] * 3, 3)


def run_union_of_nothing(backend: Backend, device: torch.device) -> Any:
    x = randn((2, 3, 40, 40), torch.float32).to(device)
    mask = torch.zeros(2, 1, 40, 40, dtype=torch.bool, device=device)
    mean, var, tracked = (torch.full((3,), v, device=device) for v in (0.5, 2.0, 3.0))
    tracked = tracked[0].long()
    layer = Layer(torch.full((3,), 2.0, device=device), torch.ones(3, device=device), world_size=2)
    message, scratch = backend.moments(x, mask, 5)
    y, stats = backend.normalize(x, None, 2 * message, layer, Running(mean, var, tracked, 0.1), scratch)
    dy = torch.ones_like(x)
    message, *gradients, scratch = backend.grad_moments(dy, x, None, stats, layer, 6)
    dx, _ = backend.grad_input(dy, x, None, mask, stats, layer, 2 * message, False, scratch)
    return (
        *(each.double().cpu() for each in (x, y, dx)),
        [each.cpu() for each in gradients],
        (mean.tolist(), var.tolist(), tracked.item()),
    )


def run_weightless(backend: Backend, device: torch.device) -> list[float]:
    x = torch.randn(2, 3, 40, 40, device=device)
    message, _ = backend.moments(x, torch.zeros(2, 1, 40, 40, dtype=torch.bool, device=device), 5)
    return message.tolist()


@BACKENDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_bad_channel_leaves_all_running_statistics(
    interpreters: Any, backend: str, bad: float, dtype: torch.dtype
) -> None:
    """1e38 is a finite mean, but its variance is not a finite float32."""
    assert run_on(backend, run_bad, interpreters, bad, dtype) == ([0.5] * 300, [2.0] * 300, 3)


def run_bad(backend: Backend, device: torch.device, bad: float, dtype: torch.dtype) -> Any:
    x = torch.randn(4, 300, 2, 2, device=device)
    x[1, 270, 0, 0] = bad
    mean, var = (torch.full((300,), value, device=device, dtype=dtype) for value in (0.5, 2.0))
    tracked = torch.tensor(3, device=device)
    message, scratch = backend.moments(x, None, 5)
    y, _ = backend.normalize(x, None, message, Layer(None, None), Running(mean, var, tracked, 0.1), scratch)
    assert y[:, 270].isfinite().logical_not().any() or bad == 1e38
    assert y[:, :270].isfinite().all()
    return mean.tolist(), var.tolist(), tracked.item()


@BACKENDS
@pytest.mark.parametrize("momentum", [0.0, 0.1, 1.0, None])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_running_statistics(check: Any, backend: str, momentum: float | None, dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, 6, 7) * 2 + 1
    check(backend, Case(x, x, momentum=momentum, dtype=dtype), max(2e-6, 2 * TOLERANCE[dtype]))


@BACKENDS
def test_without_parameters_and_buffers(interpreters: Any, backend: str) -> None:
    x = torch.randn(3, 5, 6, 7)
    y, dx = run_on(backend, run_bare, interpreters, x)
    leaf = x.double().requires_grad_()
    expected = F.silu(F.batch_norm(leaf, None, None, training=True))
    expected.sum().backward()
    assert_close(y, expected.detach(), 2e-6, "y")
    assert_close(dx, leaf.grad, 2e-6, "dx")


def run_bare(backend: Backend, device: torch.device, x: Tensor) -> Any:
    x, layer = x.to(device), Layer(None, None, activation="silu")
    message, scratch = backend.moments(x, None, 5)
    y, stats = backend.normalize(x, None, message, layer, None, scratch)
    message, *gradients, scratch = backend.grad_moments(torch.ones_like(x), x, None, stats, layer, 5)
    assert gradients == [None, None]
    dx, _ = backend.grad_input(torch.ones_like(x), x, None, None, stats, layer, message, False, scratch)
    return y.cpu(), dx.cpu()


@BACKENDS
@pytest.mark.parametrize("world_size", [1, 3])
def test_processes_that_met_in_different_layers(interpreters: Any, backend: str, world_size: int) -> None:
    """The tags' sums say so: all is NaN, and no running statistics move. One process has nobody to differ from."""
    y, dx, running = run_on(backend, run_mixed, interpreters, world_size)
    assert y.isnan().all().item() == dx.isnan().all().item() == (world_size > 1)
    assert (running.tolist() == [0.5] * 3) == (world_size > 1)


def run_mixed(backend: Backend, device: torch.device, world_size: int) -> Any:
    x = torch.randn(2, 3, 4, 4, device=device)
    running = [torch.full((3,), 0.5, device=device) for _ in range(2)]
    layer = Layer(None, None, world_size=world_size)
    message, scratch = backend.moments(x, None, 5)
    message[-2:] += torch.tensor([7.0, 49.0], device=device) if world_size > 1 else 0  # a process with another tag
    y, stats = backend.normalize(x, None, message, layer, Running(*running, None, 0.1), scratch)
    good, scratch = backend.moments(x, None, 5)
    good[-2:] *= world_size
    _, stats = backend.normalize(x, None, good, layer, None, scratch)
    message, _, _, scratch = backend.grad_moments(x, x, None, stats, layer, 6)
    message[-2:] += torch.tensor([7.0, 49.0], device=device) if world_size > 1 else 0
    dx, _ = backend.grad_input(x, x, None, None, stats, layer, message, False, scratch)
    return y.cpu(), dx.cpu(), running[0].cpu()


VIEWS = [
    pytest.param(lambda x: x[:, :, ::2], id="every second row"),
    pytest.param(lambda x: x.contiguous(memory_format=torch.channels_last)[..., 1:], id="cropped channels_last"),
    pytest.param(lambda x: x[:, 1:3], id="some channels"),
    pytest.param(lambda x: x.transpose(2, 3), id="transposed image"),
    pytest.param(lambda x: x.transpose(0, 1), id="channels first of all"),
    pytest.param(lambda x: x[:, :, :1, :1].expand(5, 6, 5, 7), id="expanded"),
    pytest.param(lambda x: x.flip(3), id="flipped"),
    pytest.param(lambda x: x.view(-1)[1:1921].view(4, 6, 10, 8)[:3], id="not aligned"),
]


@BACKENDS
@pytest.mark.parametrize("view", VIEWS)
def test_any_strides(check: Any, backend: str, view: Any) -> None:
    x = view(torch.randn(5, 6, 10, 8))
    dy = torch.randn(x.shape)
    for upstream in (dy, dy.contiguous(memory_format=torch.channels_last), dy[:1, :, :1, :1].expand(x.shape)):
        check(backend, Case(x, upstream, upstream, activation="leaky_relu"), 1e-5)


def test_accuracy_does_not_depend_on_the_threads(check: Any) -> None:
    threads = torch.get_num_threads()
    x, dy = torch.randn(2, 70, 64, 65), torch.randn(2, 70, 64, 65)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            check("cpu", Case(x, dy, x, activation="relu"), 2e-6)
    finally:
        torch.set_num_threads(threads)


def test_the_reference_runs_where_there_is_no_backend() -> None:
    """Any other device (xpu, hpu, npu) gets the reference: PyTorch's operations on x's device only."""
    x = torch.empty(2, 3, 4, 4, device="meta")
    assert backend_for(x) is reference
    assert backend_for(torch.empty(2, 3, 100, 100)) is cpu
    assert backend_for(torch.empty(2, 3, 4, 4)) is reference  # which is the faster one there
    layer = Layer(None, None, activation="silu", world_size=2)
    message, _ = reference.moments(x, None, 1)
    y, stats = reference.normalize(x, x, message, layer, None, None)
    message, *_ = reference.grad_moments(x, x, x, stats, layer, 2)
    dx, _ = reference.grad_input(x, x, x, None, stats, layer, message, False, None)
    for each in (message, y, dx):
        assert each.device.type == "meta"
    assert y.shape == dx.shape == x.shape


def test_backends_are_called_alike() -> None:
    for name in ("moments", "normalize", "grad_moments", "grad_input"):
        names = [list(inspect.signature(getattr(each, name)).parameters) for each in (reference, cpu, aten, Backend)]
        assert names[0] == names[1] == names[2] == names[3][1:]
