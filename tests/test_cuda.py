"""What can only be seen on an NVIDIA GPU: compiled kernels, their number, CUDA graphs, NCCL, memory."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from judge import assert_close
from torch import Tensor, nn

import syncbn
from syncbn import functional
from syncbn.kernels import aten, backend_for

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

PROGRAM = Path(__file__).parent / "programs" / "nccl.py"
LAYOUTS = pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
CUDA = torch.device("cuda")


def randn(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
    x = torch.randn(*shape, device=CUDA, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


def test_triton_is_used() -> None:
    backend = backend_for(torch.empty(1, device=CUDA))
    assert backend.__name__ == "syncbn.kernels.triton"


@pytest.mark.parametrize("backend", ["triton", "aten"])
@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 7), (2, 4, 5, 6), (2, 4, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_layer_is_batch_norm(
    monkeypatch: pytest.MonkeyPatch, backend: str, shape: tuple[int, ...], momentum: float | None
) -> None:
    if backend == "aten":
        monkeypatch.setattr(functional, "backend_for", lambda x: aten)
    cls = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}[len(shape)]
    plain = cls(shape[1], momentum=momentum, device=CUDA, dtype=torch.float64)
    ours = syncbn.SyncBatchNorm(shape[1], momentum=momentum, device=CUDA, dtype=torch.float64)
    for _ in range(3):
        x = torch.randn(shape, device=CUDA, dtype=torch.float64) * 3 + 2
        results = []
        for layer in (ours, plain):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(x.flip(0))
            results.append([y, leaf.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
        torch.testing.assert_close(*results, rtol=1e-9, atol=1e-10)


@LAYOUTS
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu"])
def test_all_at_once_through_autograd(channels_last: bool, activation: str | None) -> None:
    """Residual, mask and activation: as the CPU's layer has it, which is tested against PyTorch."""
    results = []
    x, residual, dy = (torch.randn(3, 20, 17, 16) for _ in range(3))
    mask = torch.rand(3, 1, 17, 16) < 0.7
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for device in ("cpu", "cuda"):
        layer = syncbn.SyncBatchNorm(20, activation=activation, device=device)
        leaves = [t.to(device).contiguous(memory_format=layout).requires_grad_() for t in (x, residual)]
        y = layer(*leaves, mask.to(device))
        y.backward(dy.to(device))
        tensors = [y.detach(), *(leaf.grad for leaf in leaves), *(p.grad for p in layer.parameters()), *layer.buffers()]
        results.append([each.cpu() for each in tensors])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)


def test_gradients_of_gradients() -> None:
    layer = syncbn.SyncBatchNorm(3, activation="silu", device=CUDA, dtype=torch.float64, track_running_stats=False)
    x, residual = (torch.randn(2, 3, 2, 2, device=CUDA, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(layer, (x, residual))
    assert torch.autograd.gradgradcheck(layer, (x, residual))


def test_a_graph_without_other_processes() -> None:
    layer = syncbn.SyncBatchNorm(16, activation="relu", device=CUDA)
    x = randn(2, 16, 24, 24).requires_grad_()
    dy = torch.randn_like(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        layer(x).backward(dy)
    torch.cuda.current_stream().wait_stream(side)
    x.grad = None
    layer.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        y.backward(dy)
    eager = copy.deepcopy(layer)
    for _ in range(3):
        with torch.no_grad():
            x.copy_(torch.randn_like(x) + 1)
        graph.replay()
        again = x.detach().clone().requires_grad_()
        expected = eager(again)
        expected.backward(dy)
        assert torch.equal(y, expected)
        assert torch.equal(x.grad, again.grad)
        assert all(torch.equal(a, b) for a, b in zip(layer.buffers(), eager.buffers(), strict=True))


@pytest.mark.parametrize("what", ["residual", "mask"])
def test_tensors_elsewhere_are_refused(what: str) -> None:
    x = randn(2, 3, 4, 4)
    elsewhere = {"residual": torch.randn(2, 3, 4, 4), "mask": torch.ones(2, 1, 4, 4)}[what]
    with pytest.raises(RuntimeError, match="expected residual and mask on cuda:0"):
        syncbn.SyncBatchNorm(3, device=CUDA)(x, **{what: elsewhere})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).to(CUDA)
    converted = syncbn.convert(nn.Sequential(*model))
    x = randn(4, 3, 20, 20)
    with torch.autocast("cuda", dtype):
        y = converted(x)
    y.float().sum().backward()
    assert y.dtype == dtype
    with torch.no_grad():
        expected = F.relu(F.batch_norm(model[0](x), None, None, training=True))
    assert_close(y.cpu(), expected.cpu().double(), 0.05, "y")


@LAYOUTS
@pytest.mark.parametrize("activation", [None, "silu"])
def test_the_same_bits_each_time(channels_last: bool, activation: str | None) -> None:
    x, residual, dy = (randn(2, 96, 200, 336, channels_last=channels_last) for _ in range(3))
    layer = syncbn.SyncBatchNorm(96, activation=activation, device=CUDA)
    first: list[Tensor] | None = None
    for _ in range(5):
        leaves = x.clone().requires_grad_(), residual.clone().requires_grad_()
        layer.zero_grad()
        y = layer(*leaves)
        y.backward(dy)
        results = [y.detach(), *(leaf.grad for leaf in leaves), *(p.grad.clone() for p in layer.parameters())]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(first, results, strict=True))


def kernels_of(call: Any) -> list[str]:
    """The names of the kernels that the GPU runs for a call."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in events if not event.name.startswith("Context")]


NAMES = {"_moments", "_combine", "_normalize", "_grad_moments", "_grad_input"}


@LAYOUTS
@pytest.mark.parametrize(("shape", "most"), [((2, 64, 200, 336), 3), ((1, 64, 8, 8), 2)], ids=["large", "tiny"])
def test_at_most_three_kernels_each_way(channels_last: bool, shape: tuple[int, ...], most: int) -> None:
    """With the running statistics, γ's, β's and the residual's gradients; two where one program per channel will do."""
    x, residual, dy = (randn(*shape, channels_last=channels_last) for _ in range(3))
    x, residual = x.requires_grad_(), residual.requires_grad_()
    layer = syncbn.SyncBatchNorm(64, activation="relu", device=CUDA)
    forward = kernels_of(lambda: layer(x, residual))
    assert {"_moments", "_normalize"} <= set(forward) <= NAMES
    assert len(forward) <= most, forward
    y = layer(x, residual)
    inputs = (x, residual, *layer.parameters())
    backward = kernels_of(lambda: torch.autograd.grad(y, inputs, dy, retain_graph=True))
    assert {"_grad_moments", "_grad_input"} <= set(backward) <= NAMES
    assert len(backward) <= most, backward


def test_the_host_never_waits() -> None:
    layer = syncbn.SyncBatchNorm(8, activation="relu", device=CUDA)
    x, residual = randn(4, 8, 20, 20).requires_grad_(), randn(4, 8, 20, 20).requires_grad_()
    mask = torch.rand(4, 1, 20, 20, device=CUDA) < 0.5
    layer(x, residual, mask).sum().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x, residual, mask).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_on_a_stream_of_the_user_s_own() -> None:
    layer = syncbn.SyncBatchNorm(64, device=CUDA)
    x = randn(8, 64, 128, 128)
    expected = layer(x)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what runs on the default stream would be far ahead
        late = x.clone() * 1
        y = layer(late)
    stream.synchronize()
    assert torch.equal(y, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_device_that_is_not_the_current_one() -> None:
    layer = syncbn.SyncBatchNorm(8, device="cuda:1")
    x = torch.randn(4, 8, 9, 9, device="cuda:1", requires_grad=True)
    assert torch.cuda.current_device() == 0
    layer(x).square().sum().backward()
    plain = nn.BatchNorm2d(8, device="cuda:1")
    torch.testing.assert_close(layer(x), plain(x))
    assert torch.cuda.current_device() == 0


@LAYOUTS
def test_more_than_2_to_31_elements(channels_last: bool) -> None:
    shape = (2, 64, 4100, 4100)
    assert torch.Size(shape).numel() > 2**31
    needed = 7 * 2 * torch.Size(shape).numel()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    x = torch.empty(shape, device=CUDA, dtype=torch.bfloat16)
    x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
    x.normal_(2, 3).requires_grad_()
    dy = torch.empty_like(x).normal_()
    layer = syncbn.SyncBatchNorm(64, device=CUDA)
    y = layer(x)
    y.backward(dy)
    for channel in (0, 63):
        values, upstream = x.detach()[:, channel].double(), dy[:, channel].double()
        var, mean = torch.var_mean(values, correction=0)
        xhat = (values - mean) * (var + layer.eps).rsqrt()
        assert_close(y[:, channel].cpu(), xhat.cpu(), 1e-2, "y")
        dx = (upstream - upstream.mean() - xhat * (upstream * xhat).mean()) * (var + layer.eps).rsqrt()
        assert_close(x.grad[:, channel].cpu(), dx.cpu(), 1e-2, "dx")


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_fusing_takes_less_memory(activation: str) -> None:
    """What backward keeps, and the peak."""
    plain = nn.BatchNorm2d(64, device=CUDA)
    fused = syncbn.SyncBatchNorm(64, activation=activation, device=CUDA)
    act = {"relu": F.relu, "silu": F.silu}[activation]
    x, residual = randn(4, 64, 256, 256).requires_grad_(), randn(4, 64, 256, 256).requires_grad_()

    def measure(call: Any) -> tuple[int, int]:
        x.grad = residual.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = call()
        kept = torch.cuda.memory_allocated() - before
        y.sum().backward()
        return kept, torch.cuda.max_memory_allocated() - before

    ours = measure(lambda: fused(x, residual))
    theirs = measure(lambda: act(plain(x) + residual))
    assert ours[0] <= theirs[0] + 2**20
    assert ours[1] <= theirs[1] + 2**20


def nccl(processes: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    shared = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "4"} if processes > torch.cuda.device_count() else {}
    return subprocess.run(
        [*command, str(PROGRAM), "nccl"],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | shared,
    )


def test_nccl_with_one_process() -> None:
    run = nccl(1)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "rank 0 is done" in run.stdout


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2 and torch.cuda.nccl.version() < (2, 30),
    reason="needs two GPUs, or NCCL 2.30, with which two processes can share one",
)
def test_nccl_with_two_processes() -> None:
    run = nccl(2)
    assert run.returncode == 0, run.stdout + run.stderr
    assert all(f"rank {rank} is done" in run.stdout for rank in range(2))
