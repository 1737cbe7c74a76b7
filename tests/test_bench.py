"""The benchmark's parts: shapes, bytes, clocks, baselines, the model of scaling, the command line."""

from __future__ import annotations

import importlib.util
import math
import sys
import types
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from syncbn.bench import (
    apex_beside_syncbn,
    exchange,
    implementations,
    layer,
    plot,
    report,
    scaling,
    step,
    timing,
    traffic,
)
from syncbn.bench import processes as bench_processes
from syncbn.bench.__main__ import main
from syncbn.bench.cases import DEEPLABV3, MOBILENET_V3, RESNET50_FPN, UNET_3D, Network, channel_counts, suite
from syncbn.bench.options import MODELS, parse
from syncbn.bench.report import row

CPU = torch.device("cpu")


# Shapes


def shapes_of(model: nn.Module, x: torch.Tensor) -> Counter[tuple[int, ...]]:
    """How many of a model's normalization layers have which output."""
    shapes: Counter[tuple[int, ...]] = Counter()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.register_forward_hook(lambda module, x, y: shapes.update([tuple(y.shape)]))
    model(x)
    return shapes


def backbone_of_the_detector() -> nn.Module:
    pytest.importorskip("torchvision")
    from torchvision.models.detection import fasterrcnn_resnet50_fpn_v2

    return fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None).backbone


def segmenter() -> nn.Module:
    pytest.importorskip("torchvision")
    from torchvision.models.segmentation import deeplabv3_resnet50

    return deeplabv3_resnet50(weights=None, weights_backbone=None)


def mobilenet() -> nn.Module:
    pytest.importorskip("torchvision")
    from torchvision.models import mobilenet_v3_large

    return mobilenet_v3_large()


def unet_3d() -> nn.Module:
    """3D U-Net as its paper draws it; what the decoder gets from the encoder is only there for its channels."""

    def block(*channels: int) -> list[nn.Module]:
        return [m for a, b in pairwise(channels) for m in (nn.Conv3d(a, b, 3, padding=1), nn.BatchNorm3d(b), nn.ReLU())]

    encoder: list[nn.Module] = block(1, 32, 64)
    for channels in (64, 128, 256):
        encoder += [nn.MaxPool3d(2), *block(channels, channels, 2 * channels)]
    decoder: list[nn.Module] = []
    for channels in (512, 256, 128):
        decoder += [nn.ConvTranspose3d(channels, channels, 2, stride=2)]
        decoder += [_Concatenate(channels // 2), *block(channels + channels // 2, channels // 2, channels // 2)]
    return nn.Sequential(*encoder, *decoder)


class _Concatenate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x.new_zeros(x.shape[0], self.channels, *x.shape[2:])], dim=1)


@pytest.mark.parametrize(
    ("network", "build", "colors"),
    [
        (RESNET50_FPN, backbone_of_the_detector, 3),
        (DEEPLABV3, segmenter, 3),
        (MOBILENET_V3, mobilenet, 3),
        (UNET_3D, unet_3d, 1),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@pytest.mark.parametrize("shrink", [1, 4])
def test_the_shapes_are_those_of_the_networks(network: Network, build: Any, colors: int, shrink: int) -> None:
    image = [math.ceil(side / shrink) for side in network.image]
    with torch.device("meta"):
        shapes = shapes_of(build(), torch.empty(network.batch, colors, *image))
    assert {case.shape: case.count for case in network.cases(shrink)} == shapes


def test_resnet50_fpn_has_61_layers() -> None:
    assert sum(channel_counts(RESNET50_FPN).values()) == 53 + 8


def test_a_quick_suite_has_the_ends() -> None:
    large, small = suite(("unet-3d",), shrink=8, ends_only=True)
    sizes = [case.elements for case in suite(("unet-3d",), shrink=8)]
    assert (large.elements, small.elements) == (max(sizes), min(sizes))
    assert large.name == "unet-3d 1x64x16x16x16"


# Bytes


def test_the_least_traffic() -> None:
    """Counted from the two passes of each direction."""
    x = y = dy = dx = r = dr = 1
    assert traffic.passes(adds=False) == (x + x + y, x + dy + x + dy + dx)
    assert traffic.passes(adds=True) == (x + x + r + y, (x + dy + y + dr) + (x + dr + dx))
    assert traffic.passes(adds=True).total == 11
    assert traffic.gigabytes_per_second(3_000_000, 1.5) == 2.0


def test_the_copy_has_a_bandwidth() -> None:
    assert traffic.copy_bandwidth(timing.Clock(CPU), 1 << 20, rounds=3) > 0


# Clocks


def test_implementations_take_turns() -> None:
    order: list[str] = []

    def turn(name: str) -> timing.Turn:
        steps = [lambda part=part: order.append(f"{name} {part}") for part in ("prepare", "forward", "backward")]
        return timing.Turn(steps[0], steps[1:])

    names = ("a", "b", "c")
    times = timing.interleave({name: turn(name) for name in names}, timing.Clock(CPU), rounds=3, warm_up=2)
    assert [entry.split()[0] for entry in order[::3]] == [*"abc", *"bca", *"cab", *"abc", *"bca"]
    assert [entry.split()[1] for entry in order[:3]] == ["prepare", "forward", "backward"]
    assert {name: tuple(value.shape) for name, value in times.items()} == dict.fromkeys(names, (3, 2))
    assert all(bool((value >= 0).all()) for value in times.values())


def test_quartiles() -> None:
    assert timing.spread(torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0], dtype=torch.float64)) == (2, 3, 4)


def test_the_slowest_process_counts(processes: Any) -> None:
    assert processes(2).run(_slowest, per_rank=[([1.0, 4.0],), ([3.0, 2.0],)]) == [[3.0, 4.0]] * 2


def _slowest(milliseconds: list[float]) -> list[float]:
    return timing.slowest(torch.tensor(milliseconds, dtype=torch.float64), CPU).tolist()


def test_host_times_are_per_call() -> None:
    calls: list[str] = []
    y = torch.zeros(1)
    host = timing.host_time(lambda: calls.append("f") or y, lambda y: calls.append("b"), timing.Clock(CPU), 7, 3)
    assert calls == (["f"] * 7 + ["b"] * 7) * 4
    assert min(host) > 0


# Baselines


@pytest.mark.parametrize("name", ["syncbn", "naive"])
def test_a_baseline_is_batch_normalization_of_the_union(processes: Any, name: str) -> None:
    x, dy = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    x.requires_grad_()
    judge = nn.BatchNorm2d(3)
    y = judge(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    parts = processes(2).run(_normalize, name, per_rank=[(x[i : i + 2].detach(), dy[i : i + 2]) for i in (0, 2)])
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), y.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), dx, atol=1e-5, rtol=1e-5)


def _normalize(x: torch.Tensor, dy: torch.Tensor, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    (chosen,) = [each for each in implementations.implementations(CPU, 2) if each.name == name]
    x.requires_grad_()
    assert chosen.layer is not None
    y = chosen.layer(3, 2)(x)
    return y.detach(), torch.autograd.grad(y, x, dy)[0]


def test_add_and_relu_are_the_same_with_and_without_fusion(processes: Any) -> None:
    fused, plain = processes(2).run(_fused_and_not)[0]
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def _fused_and_not() -> list[list[torch.Tensor]]:
    x, residual, dy = (torch.randn(2, 3, 4, 4) for _ in range(3))
    results = []
    unfused = implementations.FollowedByAddAndReLU(implementations._ours(3, 2))
    for module in (implementations._ours_fused(3, 2), unfused):
        inputs = [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        y = module(*inputs)
        results.append([y.detach(), *torch.autograd.grad(y, inputs, dy)])
    return results


def test_one_process_exchanges_as_one_of_many(processes: Any) -> None:
    """Otherwise a machine with one GPU would compare local normalization with torch's synchronized path."""
    assert processes(1).run(_calls_of_one_step) == [2]


def _calls_of_one_step() -> int:
    norm = implementations._ours(3, 2)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    norm(x).sum().backward()
    return norm._exchange.calls


def test_torchs_path_is_the_one_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module itself would normalize locally in a world of one."""
    asked: list[Any] = []
    monkeypatch.setattr(implementations.TorchSyncBatchNormFunction, "apply", lambda *args: asked.append(args))
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 1)
    model = implementations._convert_to_torch_sync(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    model(torch.randn(2, 3, 4, 4))
    ((_, weight, _, mean, var, eps, momentum, _, world_size),) = asked
    norm = model[1]
    assert weight is norm.weight
    assert (mean is norm.running_mean, var is norm.running_var) == (True, True)
    assert (eps, momentum, world_size) == (1e-5, 0.1, 1)
    assert norm.num_batches_tracked == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_torchs_path_normalizes() -> None:
    x, y = bench_processes.run(_normalize_as_torch, 1, "cuda")
    torch.testing.assert_close(y, nn.BatchNorm2d(3)(x), atol=1e-5, rtol=1e-5)


def _normalize_as_torch(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, 3, 4, 4)
    norm = implementations.TorchSyncBatchNorm(3).to(device)
    y = norm(x.to(device).requires_grad_())
    y.sum().backward()
    return x, y.detach().cpu()


def test_what_is_missing_says_why() -> None:
    known = implementations.implementations(CPU, 2)
    names = [each.name for each in known]
    assert names == [
        *("syncbn", "syncbn+add+relu", "syncbn+fuse", "syncbn+recompute", "syncbn+compile", "syncbn+fuse+compile"),
        *("local", "local+compile", "local+add+relu", "torch-sync", "torch-sync+add+relu"),
        *("fairscale", "naive", "inplace-abn", "apex"),
    ]
    for each in known:
        if each.name.startswith("torch-sync"):
            assert "refuses tensors on a CPU" in (each.missing or "")
        if each.name.startswith(("syncbn", "local", "naive")):
            assert each.missing is None


def test_apex_is_loaded_beside_this_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its CUDA extension is a top-level module named syncbn as well."""
    package = tmp_path / "apex/parallel"
    package.mkdir(parents=True)
    (tmp_path / "apex/__init__.py").touch()
    (package / "__init__.py").write_text("import syncbn\n\nclass SyncBatchNorm:\n    kernels = syncbn.kernels\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    extension = types.ModuleType("syncbn")
    extension.kernels = "apex's"  # type: ignore[attr-defined]
    monkeypatch.setattr(apex_beside_syncbn, "_load_extension", lambda: extension)
    ours = sys.modules["syncbn"]
    try:
        assert apex_beside_syncbn.apex_sync_batch_norm().kernels == "apex's"
        assert sys.modules["syncbn"] is ours
    finally:
        for name in ("apex", "apex.parallel"):
            sys.modules.pop(name, None)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several threads wait for each other at length where other processes are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", MODELS)
def test_the_models_of_step_can_be_trained(name: str) -> None:
    recipe = step.RECIPES[name]
    model = recipe.build((32, 32))
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert len(norms) >= 53  # trainable ones: detection models often have frozen ones
    loss = recipe.loss(model, torch.rand(2, 3, 32, 32))
    loss.backward()
    assert torch.isfinite(loss)
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == []  # DistributedDataParallel would wait for them


# Figures


def test_the_summary_of_layer() -> None:
    def measured(impl: str, case: str, total: float, size: float, count: int = 1) -> dict[str, Any]:
        return row(
            case=case,
            impl=impl,
            layout="contiguous",
            dtype="bfloat16",
            total_ms=total,
            tensor_bytes=size,
            of_copy=total / 10,
            count=count,
        )

    rows = [
        measured("syncbn", "a", 1.0, 65e6),
        measured("torch-sync", "a", 2.0, 65e6),
        measured("syncbn", "b", 2.0, 63e6, count=3),
        measured("torch-sync", "b", 3.0, 63e6, count=3),
        measured("syncbn+add+relu", "a", 3.0, 65e6),
        measured("torch-sync+add+relu", "a", 12.0, 65e6),
    ]
    host = {"syncbn": timing.HostTime(10, 20), "torch-sync": timing.HostTime(40, 20)}
    summary = layer.summarize(rows, host)
    plain, fused = (each for each in summary if each["figure"] == "speed-up")
    assert (plain["impl"], plain["against"], plain["cases"]) == ("syncbn", "torch-sync", 2)
    assert (plain["median"], plain["least"], plain["greatest"]) == (1.75, 1.5, 2.0)
    assert plain["all_layers"] == pytest.approx((2 + 3 * 3) / (1 + 3 * 2))
    assert (fused["against"], fused["median"]) == ("torch-sync+add+relu", 4.0)
    large = [each for each in summary if each["figure"] == "of copy bandwidth"]
    assert [(each["impl"], each["cases"], each["median"]) for each in large] == [
        ("syncbn", 1, 0.1),
        ("syncbn+add+relu", 1, 0.3),
    ]
    of_torch = {each["impl"]: each["of_torch_sync"] for each in summary if each["figure"] == "host time"}
    assert of_torch == {"syncbn": 0.5, "torch-sync": 1.0}


# The model of scaling


def synthetic(parameters: scaling.Parameters, backend: str, noise: float = 0.0) -> list[dict[str, Any]]:
    """Idle rows of a machine that follows the model exactly, or nearly."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for count in (2, 4, 8, 16):
        for C in channel_counts(RESNET50_FPN):
            for impl, size in (("all-reduce", 8 * (2 * C + 3)), ("all-gather", 4 * (2 * C + 1))):
                exact = parameters.microseconds(scaling.FITTED[backend][impl](count), size) / 1e3
                jitter = 1 + noise * float(torch.randn(1, generator=generator))
                rows.append(
                    row(
                        impl=impl,
                        total_ms=exact * jitter,
                        processes=count,
                        message_bytes=size,
                        channels=C,
                        situation=exchange.IDLE,
                        backend=backend,
                    )
                )
    return rows


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_the_fit_finds_the_parameters(backend: str) -> None:
    truth = scaling.Parameters(12.0, 3.0, 1e-3 / 20)
    assert scaling.fit(synthetic(truth, backend), backend) == pytest.approx(truth, rel=1e-6)
    noisy = scaling.fit(synthetic(truth, backend, noise=0.02), backend)
    assert noisy == pytest.approx(truth, rel=0.15)


def test_the_fit_has_no_negative_parameters() -> None:
    """Where larger messages happen to be faster, a byte costs nothing."""
    rows = synthetic(scaling.Parameters(12.0, 3.0, 0.0), "nccl")
    for each in rows:
        each["total_ms"] *= 1 - 1e-6 * each["message_bytes"]
    fitted = scaling.fit(rows, "nccl")
    assert fitted.us_per_byte == 0
    assert min(fitted) >= 0
    assert fitted[:2] == pytest.approx((12.0, 3.0), rel=0.05)


def machine(**network: float) -> scaling.Machine:
    host = scaling.Parameters(5.0, 0.5, 1e-3 / 200)
    return scaling.Machine(host, scaling.Parameters(0.0, 5.0, 1e-3 / 50), 8)


def test_the_model_grows_with_the_processes() -> None:
    rows = scaling.predictions(machine())
    assert {each["impl"] for each in rows} == set(scaling.SCHEMES)
    for name in scaling.SCHEMES:
        for part in ("fwd_ms", "bwd_ms", "total_ms"):
            values = [each[part] for each in rows if each["impl"] == name]
            assert len(values) == len(scaling.PROCESSES)
            assert all(a <= b for a, b in pairwise(values)), (name, part)


def test_the_model_in_numbers() -> None:
    """16 processes in two nodes, 1000 bytes, by hand."""
    bytes_host, bytes_network = 1000e-3 / 200, 1000e-3 / 50
    flat = 5 + 2 * 4 * 5 + 2 * bytes_network
    by_node = 5 + 2 * 3 * 0.5 + 2 * bytes_host + 2 * 1 * 5 + 2 * bytes_network
    ring = 5 + 15 * 5 + 15 * bytes_network
    ring_by_node = 5 + 14 * 0.5 + 1 * 5 + 15 * bytes_network
    fewest = 5 + 4 * 5 + 15 * bytes_network
    for cost, expected in (
        (scaling.all_reduce_flat, flat),
        (scaling.all_reduce_by_node, by_node),
        (scaling.ring_all_gather_flat, ring),
        (scaling.ring_all_gather_by_node, ring_by_node),
        (scaling.all_gather_in_fewest_hops, fewest),
    ):
        assert cost(machine(), 16, 1000) == pytest.approx(expected), cost.__name__
    # Within a node, nothing goes over the network.
    assert scaling.all_reduce_flat(machine(), 8, 1000) == pytest.approx(5 + 2 * 3 * 0.5 + 2 * bytes_host)
    assert scaling.all_reduce_by_node(machine(), 8, 1000) == scaling.all_reduce_flat(machine(), 8, 1000)


def test_measurements_add_up_over_the_layers() -> None:
    idle = synthetic(scaling.Parameters(1000.0, 0.0, 0.0), "gloo")  # 1 ms each
    measured = scaling.sums_of_measurements(idle, cores=4)
    assert {each["total_ms"] for each in measured} == {2 * 61.0}
    assert [each["processes"] for each in measured if each["crowded"]] == [8, 8, 16, 16]


def test_nccl_is_preferred_where_it_has_exchanged() -> None:
    rows = [row(backend=backend, processes=count) for backend, count in (("nccl", 1), ("gloo", 2))]
    assert scaling.fitted_backend(rows) == "gloo"
    assert scaling.fitted_backend([*rows, row(backend="nccl", processes=2)]) == "nccl"


# Pictures


def test_peak_memory_is_drawn_beside_the_times(tmp_path: Path) -> None:
    """As a GPU reports it; the runs on a CPU know none."""
    rows = [
        row(case=case, impl=impl, layout="contiguous", dtype="bfloat16", fwd_ms=1.0, bwd_ms=2.0, total_ms=3.5)
        | {"optimizer_ms": 0.5, "peak_mb": 100.0}
        for case in ("resnet50 32x3x224x224", "fcos_resnet50_fpn 2x3x800x1344")
        for impl in ("syncbn", "syncbn+fuse", "torch-sync")
    ]
    header = report.header("step", "python -m syncbn.bench step") | {"world_size": 1, "gpu": "a GPU"}
    figure = plot.draw_step(report.Report(header, rows))
    assert ["memory" in axes.get_xlabel() for axes in figure.axes] == [False, True]
    assert [label.get_text() for label in figure.axes[1].get_yticklabels()] == 2 * [
        "syncbn",
        "syncbn+fuse",
        "torch-sync",
    ]
    plot.draw(report.Report(header, rows), tmp_path / "step.svg")
    assert (tmp_path / "step.svg").read_text().startswith("<?xml")


# The command line


def no_measurement(*args: Any) -> None:
    raise AssertionError("a measurement has begun")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["layers"], "invalid choice: 'layers'"),
        ([], "the following arguments are required"),
        (["layer", "--json", "/nowhere/x.json"], "there is no directory /nowhere"),
        (["layer", "--json", "/"], "is a directory"),
        (["layer", "--plot", "x.txt"], ".png"),
        (["layer", "--dtypes", "float31"], "'float31' is none of float32"),
        (["layer", "--layouts", "nhwc"], "'nhwc' is none of contiguous"),
        (["layer", "--networks", "vgg"], "'vgg' is none of resnet50-fpn"),
        (["layer", "--implementations", "apexx"], "'apexx' is none of syncbn"),
        (["layer", "--rounds", "0"], "at least 1"),
        (["step", "--models", "resnet51"], "'resnet51' is none of resnet50"),
        (["exchange", "--counts", "1,2"], "at least 2"),
        (["exchange", "--processes", "two"], "whole number"),
        (["scaling", "--from", "/nowhere.json"], "no such file"),
        (["scaling", "--from", __file__], "is not the JSON of a benchmark"),
        (["scaling", "--network-gbs", "0"], "positive number"),
    ],
    ids=lambda value: " ".join(value)[-24:] if isinstance(value, list) else "",
)
def test_a_mistake_ends_in_one_line_before_measuring(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_processes, "run", no_measurement)
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


@pytest.mark.parametrize(
    ("package", "arguments"), [("torchvision", ["step"]), ("matplotlib", ["layer", "--plot", "x.png"])]
)
def test_a_missing_package_is_named(package: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(Exception, match=f"{package}, which is not installed: pip install {package}"):
        parse(arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(Exception, match="--device cuda: there is no GPU"):
        parse(["layer", "--device", "cuda"])


def test_torchruns_number_of_processes_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert parse(["exchange", "--device", "cpu"]).processes == 3
    with pytest.raises(Exception, match="torchrun has started 3"):
        parse(["exchange", "--device", "cpu", "--processes", "2"])


# Processes


def test_a_failure_ends_all_processes() -> None:
    """And its cause is told, not the consequence for those that were waiting for it."""
    with pytest.raises(SystemExit) as end:
        bench_processes.run(_fail_while_others_wait, 2, "cpu")
    assert "RuntimeError: on purpose\nerror: process 1 of 2 has failed" in str(end.value.code)


def _fail_while_others_wait(device: torch.device) -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("on purpose")
    dist.barrier()


def test_the_first_process_answers() -> None:
    assert bench_processes.run(_where_am_i, 2, "cpu", "here") == (0, 2, 1, "here")


def _where_am_i(device: torch.device, word: str) -> tuple[int, int, int, str]:
    return dist.get_rank(), dist.get_world_size(), torch.get_num_threads(), word
