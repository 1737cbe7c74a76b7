"""Processes with their parts of a batch compute what one process with the union computes."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from judge import Options, assert_close, assert_union, judge, run_layer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn

BIAS = pytest.param(
    {"bias": False},
    id="no bias",
    marks=pytest.mark.skipif(
        "bias" not in inspect.signature(nn.BatchNorm2d).parameters, reason="this torch has no bias= argument"
    ),
)


def data(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, mean: float = 0.0, std: float = 1.0
) -> list[Tensor]:
    """A part for each process, of unlike means and spreads."""
    generator = torch.Generator().manual_seed(11)
    return [
        ((torch.randn(shape, generator=generator, dtype=torch.float64) * (1 + i) + i) * std + mean).to(dtype)
        for i, shape in enumerate(shapes)
    ]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("shape", [(5, 6), (3, 6, 7), (2, 6, 5, 4), (2, 6, 3, 4, 5)], ids=["2-D", "3-D", "4-D", "5-D"])
def test_every_dimension_and_world_size(processes: Any, world_size: int, shape: tuple[int, ...]) -> None:
    results = assert_union(processes, data(*[shape] * world_size))
    assert [result.calls for result in results] == [2] * world_size, "one all-reduce in each direction"


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({"affine": False}, id="not affine"),
        pytest.param({"track_running_stats": False}, id="no running statistics"),
        pytest.param({"momentum": None}, id="momentum None"),
        pytest.param({"momentum": 1.0}, id="momentum 1"),
        pytest.param({"momentum": 0.0}, id="momentum 0"),
        pytest.param({"eps": 0.1}, id="eps"),
        BIAS,
    ],
)
def test_every_option(processes: Any, arguments: dict[str, Any]) -> None:
    assert_union(processes, data((2, 3, 4, 5), (2, 3, 4, 5)), Options(arguments, steps=3))


def test_uneven_batches_and_image_sizes(processes: Any) -> None:
    assert_union(processes, data((1, 4, 9, 5), (3, 4, 2, 7)))
    assert_union(processes, data((1, 4, 31, 17), (2, 4, 3, 3), (5, 4, 1, 1), (1, 4, 8, 8)))


@pytest.mark.parametrize("empty", [(0, 4, 5, 5), (2, 4, 0, 5)], ids=["no images", "no places"])
def test_a_process_without_data_takes_part(processes: Any, empty: tuple[int, ...]) -> None:
    results = assert_union(processes, data((2, 4, 5, 5), empty, (1, 4, 3, 3)), Options(steps=2))
    assert [result.calls for result in results] == [2, 2, 2]
    assert results[1].dx is not None
    assert results[1].dx.shape == empty


def test_nobody_has_data(processes: Any) -> None:
    for result in processes(2).run(_nobody):
        assert result


def _nobody() -> bool:
    layer = syncbn.SyncBatchNorm(3)
    x = torch.empty(0, 3, 4, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    return (
        y.shape == x.shape
        and x.grad is not None
        and layer.num_batches_tracked.item() == 0
        and torch.equal(layer.running_mean, torch.zeros(3))
        and torch.equal(layer.running_var, torch.ones(3))
        and torch.equal(layer.weight.grad, torch.zeros(3))
    )


def test_one_value_per_channel_on_each_process(processes: Any) -> None:
    """A pooled 1x1 map at batch one, which other implementations refuse: the union has two values."""
    assert_union(processes, data((1, 5, 1, 1), (1, 5, 1, 1)))
    assert_union(processes, data((1, 5), (1, 5), (0, 5)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_union_of_one_value_gives_beta(processes: Any, dtype: torch.dtype) -> None:
    x = torch.full((1, 3, 1, 1), 1024.0, dtype=dtype)
    for y, dx, running_mean, running_var, beta in processes(2).run(
        _one_value, per_rank=[(x,), (torch.empty(0, 3, 1, 1, dtype=dtype),)]
    ):
        assert torch.equal(y, beta.expand_as(y[:, :, 0, 0]).to(dtype)[:, :, None, None])
        assert torch.equal(dx, torch.zeros_like(dx))
        torch.testing.assert_close(running_mean, torch.full((3,), 102.4))
        assert torch.equal(running_var, torch.full((3,), 0.9))


def _one_value(x: Tensor) -> tuple[Tensor, ...]:
    layer = syncbn.SyncBatchNorm(3)
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(1))
    y = layer(x.requires_grad_())
    y.backward(torch.ones_like(y))
    return y.detach(), x.grad, layer.running_mean, layer.running_var, layer.bias.detach()


@pytest.mark.parametrize(("mean_by_std", "tolerance"), [(0, 1e-9), (1e3, 1e-9), (1e5, 1e-5)], ids=["0", "1e3", "1e5"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("std", [1.0, 1e-6])
def test_float64_bars(processes: Any, mean_by_std: float, tolerance: float, channels_last: bool, std: float) -> None:
    parts = data((2, 3, 16, 16), (2, 3, 16, 16), mean=mean_by_std * std, std=std)
    if channels_last:
        parts = [x.contiguous(memory_format=torch.channels_last) for x in parts]
    eps = 1e-5 * std**2  # so that ε does not hide the variance
    _assert_union_scaled(processes, parts, Options({"eps": eps}), tolerance, std)


@pytest.mark.parametrize("mean_by_std", [0, 1e2, 1e4, 1e5], ids=["0", "1e2", "1e4", "1e5"])
@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
def test_float32_bar(processes: Any, mean_by_std: float, channels_last: bool) -> None:
    parts = data((2, 3, 64, 48), (1, 3, 64, 80), dtype=torch.float32, mean=mean_by_std)
    if channels_last:
        parts = [x.contiguous(memory_format=torch.channels_last) for x in parts]
    assert_union(processes, parts, Options({"momentum": 1.0}, dtype=torch.float32), tolerance=1e-5)


def _assert_union_scaled(processes: Any, parts: list[Tensor], options: Options, tolerance: float, std: float) -> None:
    """dx grows as 1/std: judged where std is 1 for it, too, by an upstream gradient of that size."""
    generator = torch.Generator().manual_seed(3)
    dys = [torch.randn(x.shape, generator=generator, dtype=torch.float64) * std for x in parts]
    results = processes(len(parts)).run(run_layer, options, per_rank=list(zip(parts, dys, strict=True)))
    expected, _ = judge(parts, dys, options)
    for mine, theirs in zip(results, expected, strict=True):
        assert_close(mine.y, theirs.y, tolerance, "y")
        assert_close(mine.dx, theirs.dx, tolerance, "dx")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize("parameters", [torch.float32, None], ids=["float32 parameters", "cast module"])
def test_low_precision(processes: Any, dtype: torch.dtype, tolerance: float, parameters: torch.dtype | None) -> None:
    options = Options(dtype=parameters or dtype)
    assert_union(processes, data((2, 4, 6, 6), (2, 4, 6, 6), dtype=dtype), options, tolerance)


def test_autocast(processes: Any) -> None:
    for dtype, dx_dtype, weight_dtype, off in processes(2).run(_autocast):
        assert dtype == torch.bfloat16
        assert dx_dtype == torch.bfloat16
        assert weight_dtype == torch.float32
        assert off < 2e-2


def _autocast() -> tuple[torch.dtype, torch.dtype, torch.dtype, float]:
    conv, layer = nn.Conv2d(3, 4, 3), syncbn.SyncBatchNorm(4)
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = conv(x)
        features.retain_grad()
        y = layer(features)
        loss = y.float().square().mean()
    loss.backward()
    exact = nn.BatchNorm2d(4).double()(features.detach().double())
    return y.dtype, features.grad.dtype, layer.weight.grad.dtype, (y.double() - exact).abs().max().item()


def test_gradient_pushes_neither_mean_nor_scale(processes: Any) -> None:
    """Σdx = 0 and Σ(dx·x̂) ≈ 0 over all processes: no step may push the mean or the scale of x alone."""
    parts = data((2, 3, 8, 8), (1, 3, 8, 8))
    results = assert_union(processes, parts, Options({"affine": False, "eps": 1e-12}))
    for values in ([r.dx for r in results], [r.dx * r.y for r in results]):
        sums = sum(v.sum((0, 2, 3)) for v in values)
        assert sums.abs().max() < 1e-11


def test_no_gradient_for_the_input_no_backward_exchange(processes: Any) -> None:
    results = assert_union(processes, data((2, 3, 4, 4), (2, 3, 4, 4)), Options(requires_grad=False))
    assert [result.calls for result in results] == [1, 1]


def test_nothing_is_read_on_the_host(processes: Any) -> None:
    """No ``.item()``, no boolean indexing, no nonzero: forward, statistics, tag check, update and backward."""
    assert processes(2).run(_read_nothing) == [True, True]


class _NoReading(TorchDispatchMode):
    """Refuses what would wait for a GPU: results on the host, or shapes that depend on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "index.Tensor", "equal", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not str(func).removeprefix("aten.").startswith(self.FORBIDDEN), f"{func} reads on the host"
        return func(*args, **(kwargs or {}))


def _read_nothing() -> bool:
    for momentum in (0.1, None):
        layer = syncbn.SyncBatchNorm(3, momentum=momentum)
        layer(torch.randn(4, 3))  # connects, which does read
        for shape in ((2, 3, 8, 8), (0, 3, 8, 8)):
            x = torch.randn(shape, requires_grad=True)
            with _NoReading():
                layer(x).square().sum().backward()
    return bool(layer.num_batches_tracked == 2)


def test_many_steps_keep_the_processes_bit_equal(processes: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        states = processes(4).run(_many_steps, dtype)
        for state in states[1:]:
            assert all(torch.equal(a, b) for a, b in zip(state, states[0], strict=True))


def _many_steps(dtype: torch.dtype) -> list[Tensor]:
    rank = torch.distributed.get_rank()
    torch.manual_seed(rank)
    layers = [syncbn.SyncBatchNorm(5, momentum=momentum, dtype=dtype) for momentum in (0.1, None)]
    for step in range(40):
        for layer in layers:
            layer((torch.randn((step + rank) % 4, 5, 3) * 3 + rank).to(dtype))
    return [buffer for layer in layers for buffer in layer.buffers()]


def test_eval_exchanges_nothing(processes: Any) -> None:
    for calls, equal in processes(2).run(_evaluate):
        assert calls == 0
        assert equal


def _evaluate() -> tuple[int, bool]:
    x = torch.randn(2, 3, 4, 4)
    with_statistics, without = syncbn.SyncBatchNorm(3).eval(), syncbn.SyncBatchNorm(3, track_running_stats=False).eval()
    plain = nn.BatchNorm2d(3, track_running_stats=False).eval()
    equal = torch.equal(with_statistics(x), nn.BatchNorm2d(3).eval()(x))
    equal &= torch.allclose(without(x), plain(x), atol=1e-6)
    return with_statistics._exchange.calls + without._exchange.calls, equal


def test_the_same_layer_twice(processes: Any) -> None:
    for off in processes(2).run(_twice, per_rank=[(x,) for x in data((2, 3, 4, 4), (1, 3, 4, 4))]):
        assert off < 1e-12


def _twice(x: Tensor) -> float:
    import torch.distributed as dist

    layer = syncbn.SyncBatchNorm(3, dtype=torch.float64)
    y = layer(layer(x.requires_grad_()).sin())
    y.square().sum().backward()
    everyones: list[Any] = [None, None]
    dist.all_gather_object(everyones, x.detach())
    union, plain = torch.cat(everyones).requires_grad_(), nn.BatchNorm2d(3, dtype=torch.float64)
    plain(plain(union).sin()).square().sum().backward()
    mine = union.grad[:2] if dist.get_rank() == 0 else union.grad[2:]
    return max((x.grad - mine).abs().max().item(), (layer.running_var - plain.running_var).abs().max().item())


def test_gradients_of_gradients(processes: Any) -> None:
    """A gradient penalty across processes is that of the union batch."""
    parts = data((2, 3, 3, 3), (3, 3, 2, 4))
    results = processes(2).run(_penalty, per_rank=[(x,) for x in parts])
    union = torch.cat([x.movedim(1, -1).reshape(-1, 3) for x in parts]).requires_grad_()
    layer = nn.BatchNorm1d(3, dtype=torch.float64)
    (dx,) = torch.autograd.grad(layer(union).pow(3).sum(), union, create_graph=True)
    dx.square().sum().backward()
    ours = torch.cat([grad.movedim(1, -1).reshape(-1, 3) for grad, _ in results])
    assert_close(ours, union.grad, 1e-9)
    assert_close(results[0][1] + results[1][1], layer.weight.grad, 1e-9)


def _penalty(x: Tensor) -> tuple[Tensor, Tensor]:
    layer = syncbn.SyncBatchNorm(3, dtype=torch.float64)
    (dx,) = torch.autograd.grad(layer(x.requires_grad_()).pow(3).sum(), x, create_graph=True)
    dx.square().sum().backward()
    return x.grad, layer.weight.grad


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 3e38])
def test_a_bad_batch_on_one_process_leaves_all_running_statistics(processes: Any, bad: float) -> None:
    """3e38 is finite, but its square's mean overflows the float32 buffer."""
    for unchanged, shown in processes(2).run(_bad_batch, bad, per_rank=[(0,), (1,)]):
        assert unchanged
        assert shown


def _bad_batch(rank: int, bad: float) -> tuple[bool, bool]:
    layer = syncbn.SyncBatchNorm(2)
    layer(torch.randn(4, 2))
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    x = torch.randn(4, 2)
    if rank == 1:
        x[2, 1] = bad
        x[3, 1] = -x[2, 1]
    y = layer(x)
    unchanged = all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    return unchanged, bool(y[:, 0].isfinite().all()) and (abs(bad) == 3e38 or not y[:, 1].isfinite().all())
