"""Under torchrun, over NCCL: CUDA graphs that capture a layer and its collectives, where some processes are empty.

With the argument gloo, the same on CPUs, where a captured step is the step itself: that shows the program right.
"""

from __future__ import annotations

import copy
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn

DOCUMENTATION = Path(__file__).parents[2] / "docs" / "cuda-graphs.md"
CHANNELS = 16
ROUNDS = 3


class Exchanging(syncbn.Exchange):
    """Over one process, too."""

    alone = False  # type: ignore[assignment]


def main() -> None:
    backend, rank = sys.argv[1], int(os.environ["RANK"])
    on_gpu = backend == "nccl"
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    try:
        if on_gpu:
            the_first_exchange_is_refused(device)
        a_step(device)
        a_process_that_becomes_empty(device)
        a_model(device)
        if on_gpu:
            the_host_does_not_wait(device)
            the_documentation(device)
    finally:
        dist.destroy_process_group()
    print(f"rank {rank} is done", flush=True)


# ---- what is captured


def captured(step: Callable[[], Any], device: torch.device) -> Callable[[], Any]:
    """``step`` as one graph, after three rounds on a side stream."""
    if device.type == "cpu":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def layer_on(device: torch.device, **options: Any) -> syncbn.SyncBatchNorm:
    torch.manual_seed(0)
    layer = syncbn.SyncBatchNorm(CHANNELS, process_group=Exchanging(), device=device, **options)
    nn.init.uniform_(layer.weight, 0.5, 1.5)
    return layer


def sizes() -> list[int]:
    """How many images each process has: the last of several, none (pytorch/pytorch#78656)."""
    world_size = dist.get_world_size()
    return [2] * (world_size - 1) + [0] if world_size > 1 else [2]


def batches(generator: torch.Generator) -> list[Tensor]:
    """Every process's images, known to all, so that each can form the union."""
    return [torch.randn(n, CHANNELS, 12, 10, generator=generator) * 2 + r for r, n in enumerate(sizes())]


def the_first_exchange_is_refused(device: torch.device) -> None:
    """And takes place with ``connect``, where kernels and NCCL are there already."""
    layer, other = layer_on(device), layer_on(device)
    x = torch.randn(2, CHANNELS, 4, 4, device=device)
    other(x)
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            layer(x)
    except RuntimeError as error:
        message = str(error)
    else:
        message = "it was captured"
    assert "call exchange.connect(device), before the capture" in message, message
    layer._exchange.connect(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    graph.replay()
    close(y, other(x), "y")


def a_step(device: torch.device) -> None:
    """Forward, collectives and backward in one graph (pytorch/pytorch#78549), against PyTorch on the union."""
    for momentum in (0.1, None):
        layer, generator = layer_on(device, momentum=momentum, activation="silu"), torch.Generator().manual_seed(1)
        x = torch.zeros_like(batches(generator)[dist.get_rank()], device=device).normal_().requires_grad_()
        dy = torch.empty_like(x)
        results: dict[str, Any] = {}

        def step(layer: Any = layer, x: Tensor = x, dy: Tensor = dy, results: dict[str, Any] = results) -> None:
            layer.weight.grad = layer.bias.grad = x.grad = None
            results["y"] = layer(x)
            results["y"].backward(dy)

        replay = captured(step, device)
        plain = nn.BatchNorm2d(CHANNELS, momentum=momentum, dtype=torch.float64)
        plain.load_state_dict(layer.state_dict())  # the rounds before the capture have moved the running statistics
        for _ in range(ROUNDS):
            parts, upstream = batches(generator), batches(generator)
            with torch.no_grad():
                x.copy_(parts[dist.get_rank()])
                dy.copy_(upstream[dist.get_rank()])
            replay()
            union = torch.cat(parts).double().requires_grad_()
            plain.zero_grad()
            y = nn.functional.silu(plain(union))
            y.backward(torch.cat(upstream).double())
            close(results["y"], mine(y), "y")
            close(x.grad, mine(union.grad), "dx")
            for (name, ours), theirs in zip(layer.named_parameters(), plain.parameters(), strict=True):
                total = ours.grad.clone()
                dist.all_reduce(total)
                close(total, theirs.grad, name, 1e-3)
            for (name, ours), theirs in zip(layer.named_buffers(), plain.buffers(), strict=True):
                close(ours, theirs, name)


def a_process_that_becomes_empty(device: torch.device) -> None:
    """Shapes are fixed in a graph; a mask of zeros empties a process from one replay to the next."""
    layer, generator = layer_on(device), torch.Generator().manual_seed(2)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    x = torch.randn(2, CHANNELS, 6, 6, device=device)
    mask = torch.ones(2, 1, 1, 1, device=device)
    results: dict[str, Any] = {}

    def step() -> None:
        results["y"] = layer(x, mask=mask)

    replay = captured(step, device)
    plain = nn.BatchNorm2d(CHANNELS, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    for empty in [None, *range(world_size if world_size > 1 else 0), None]:
        parts = [torch.randn(2, CHANNELS, 6, 6, generator=generator) + r for r in range(world_size)]
        x.copy_(parts[rank])
        mask.fill_(rank != empty)
        replay()
        y = plain(torch.cat([part for r, part in enumerate(parts) if r != empty]).double())
        if rank != empty:
            first = sum(2 for r in range(rank) if r != empty)
            close(results["y"], y[first : first + 2], "y")
        for (name, ours), theirs in zip(layer.named_buffers(), plain.buffers(), strict=True):
            close(ours, theirs, name)


def a_model(device: torch.device) -> None:
    """make_graphed_callables: forward and backward as graphs in an otherwise eager step."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(CHANNELS, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    model = syncbn.fuse(syncbn.convert(model.to(device), process_group=Exchanging()))
    eager = copy.deepcopy(model)
    if device.type == "cuda":
        sample = torch.randn(2, CHANNELS, 12, 10, device=device)
        model = torch.cuda.make_graphed_callables(model, (sample,))
        eager.load_state_dict(model.state_dict())
    for _ in range(ROUNDS):
        x = torch.randn(2, CHANNELS, 12, 10, device=device) + dist.get_rank()
        for each in (model, eager):
            each.zero_grad()
            each(x).square().mean().backward()
        for ours, theirs in zip(model.parameters(), eager.parameters(), strict=True):
            close(ours.grad, theirs.grad, "gradients", 1e-4)
        for ours, theirs in zip(model.buffers(), eager.buffers(), strict=True):
            close(ours, theirs, "buffers")


# ---- the host


def the_host_does_not_wait(device: torch.device) -> None:
    """It has issued a step while the GPU is still busy with what came before (pytorch/pytorch#36452)."""
    layer = layer_on(device)
    x = torch.randn(sizes()[dist.get_rank()], CHANNELS, 12, 10, device=device, requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.synchronize()
    with no_synchronization():
        torch.cuda._sleep(2_000_000_000)  # about a second
        layer(x).sum().backward()
        done = torch.cuda.Event()
        done.record()
        waiting = not done.query()
    torch.cuda.synchronize()
    assert waiting, "the host has waited for the GPU"


@contextmanager
def no_synchronization() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def the_documentation(device: torch.device) -> None:
    """Its code, line by line, on a model and batches as it supposes."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 1, 1)).to(device)
    names: dict[str, Any] = {
        "model": model,
        "device": device,
        "batches": [torch.randn(4, 3, 16, 16) for _ in range(ROUNDS)],
        "criterion": lambda y: y.square().mean(),
    }
    for code in re.findall(r"```python\n(.*?)```", DOCUMENTATION.read_text(), re.DOTALL):
        exec(code, names)


# ---- comparing


def mine(union: Tensor) -> Tensor:
    return union.split(sizes())[dist.get_rank()]


def close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape, what
    if expected.numel():
        bound = tolerance * max(1.0, expected.abs().max().item())
        error = (actual.cpu().double() - expected.cpu().double()).abs().max().item()
        assert error <= bound, f"{what} is off by {error:.2e}, allowed {bound:.2e}"


if __name__ == "__main__":
    main()
