"""Under torchrun, over NCCL on GPUs or, as the program's argument says, gloo on CPUs: the layer against the union.

Several processes may share one GPU, if NCCL lets them. With one process the layer exchanges nevertheless.
"""

from __future__ import annotations

import copy
import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import syncbn


class Exchanging(syncbn.Exchange):
    """Over one process, too."""

    alone = False  # type: ignore[assignment]


def main() -> None:
    backend = sys.argv[1]
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", rank % torch.cuda.device_count()) if backend == "nccl" else torch.device("cpu")
    if backend == "nccl":
        torch.cuda.set_device(device)
    dist.init_process_group(backend, timeout=timedelta(seconds=60))
    try:
        for channels_last in (False, True):
            the_layer(device, torch.float64, channels_last, 1e-9)
            the_layer(device, torch.float32, channels_last, 1e-5)
            the_layer(device, torch.bfloat16, channels_last, 3e-2)
        a_model_in_ddp(device)
        if backend == "nccl":
            a_communicator_of_its_own()
            a_graph(device)
    finally:
        dist.destroy_process_group()
    print(f"rank {rank} is done", flush=True)


def parts_of(dtype: torch.dtype, channels_last: bool) -> list[tuple[Tensor, Tensor, Tensor]]:
    """x, residual and dy of every process; the first has more images, and the second (of several) none."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for rank in range(dist.get_world_size()):
        shape = (3 if rank == 0 else 0 if rank == 1 and dist.get_world_size() > 2 else 1, 16, 40, 24)
        three = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
        three[0] += 10
        layout = torch.channels_last if channels_last else torch.contiguous_format
        parts.append(tuple(each.contiguous(memory_format=layout) for each in three))
    return parts


def the_layer(device: torch.device, dtype: torch.dtype, channels_last: bool, tolerance: float) -> None:
    parts = parts_of(dtype, channels_last)
    layer = syncbn.SyncBatchNorm(16, process_group=Exchanging(), activation="relu", device=device)
    plain = nn.BatchNorm2d(16, dtype=torch.float64)
    x, residual, dy = (each.to(device) for each in parts[dist.get_rank()])
    x, residual = x.detach().requires_grad_(), residual.detach().requires_grad_()
    layer(x, residual).backward(dy)
    y = layer(x, residual)
    assert layer._exchange.calls == 3
    union = [torch.cat([part[i] for part in parts]).double().detach() for i in range(3)]
    leaves = union[0].requires_grad_(), union[1].requires_grad_()
    F.relu(plain(leaves[0]) + leaves[1]).backward(union[2])
    expected = F.relu(plain(leaves[0]) + leaves[1])
    first = sum(len(part[0]) for part in parts[: dist.get_rank()])
    mine = slice(first, first + len(x))
    close(y, expected[mine], tolerance, "y")
    close(x.grad, leaves[0].grad[mine], tolerance, "dx")
    close(residual.grad, leaves[1].grad[mine], tolerance, "dresidual")
    for ours, theirs in zip(layer.buffers(), plain.buffers(), strict=True):
        close(ours, theirs, max(tolerance, 1e-6), "buffers")
    for ours, theirs in zip(layer.parameters(), plain.parameters(), strict=True):
        total = ours.grad.double()
        dist.all_reduce(total)
        close(total, theirs.grad, 10 * max(tolerance, 1e-6), "γ's and β's gradients")


def a_model_in_ddp(device: torch.device) -> None:
    """Gradient buckets and messages at the same time, on two communicators."""
    torch.manual_seed(1)
    blocks = [[nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()] for _ in range(4)]
    plain = nn.Sequential(*(each for block in blocks for each in block)).double()
    model = syncbn.convert(copy.deepcopy(plain), process_group=Exchanging()).to(device)
    ddp = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.001)
    world_size = dist.get_world_size()
    images = torch.randn(2 * world_size, 8, 20, 20, dtype=torch.float64)
    for _ in range(3):
        model.zero_grad()
        plain.zero_grad()
        mine = images[2 * dist.get_rank() :][:2].to(device)
        ddp(mine).square().mean().backward()
        plain(images).square().mean().backward()
        for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            close(ours.grad, theirs.grad, 1e-7, name)


def a_communicator_of_its_own() -> None:
    from syncbn.communicator import communicators

    group = communicators.dedicated(None).group
    assert group is not dist.group.WORLD
    options = group._get_backend(torch.device("cuda")).options
    assert options.is_high_priority_stream
    assert options._timeout == timedelta(seconds=60)


def a_graph(device: torch.device) -> None:
    """torch.cuda.graph captures forward, collective and backward; replayed, they do what they do without it."""
    layer = syncbn.SyncBatchNorm(16, process_group=Exchanging(), activation="silu", device=device)
    x = torch.randn(2, 16, 24, 24, device=device, requires_grad=True)
    dy = torch.randn_like(x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
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
            x.copy_(torch.randn_like(x) * 2 + 1)
        graph.replay()
        again = x.detach().clone().requires_grad_()
        eager.zero_grad()
        expected = eager(again)
        expected.backward(dy)
        for actual, wanted in (
            (y, expected),
            (x.grad, again.grad),
            *zip([p.grad for p in layer.parameters()], [p.grad for p in eager.parameters()], strict=True),
            *zip(layer.buffers(), eager.buffers(), strict=True),
        ):
            assert torch.equal(actual, wanted)


def close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    bound = tolerance * max(1.0, expected.abs().max().item() if expected.numel() else 0)
    error = (actual.cpu().double() - expected.cpu()).abs().max().item() if expected.numel() else 0
    assert error <= bound, f"{what} is off by {error:.2e}, allowed {bound:.2e}"


if __name__ == "__main__":
    main()
