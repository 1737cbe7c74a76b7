"""Nothing waits for the GPU, and CUDA graphs can be captured, with empty processes included.

- pytorch/pytorch#36452: SyncBatchNorm copies the processes' counts to the host and back, and blocks the host's thread.
- pytorch/pytorch#78549: ``count_all[mask]``, which is to leave out empty processes, cannot be captured in a CUDA graph.
- pytorch/pytorch#78656: so in a captured graph they are not left out; the operators are to take counts of zero.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from backends import (
    batch_norm_backward_elemt,
    batch_norm_backward_reduce,
    batch_norm_elemt,
    batch_norm_stats,
    stand_in_for_cuda_operators,
)
from documentation import blocks
from hostless import HostReadError, fake_gpu, no_data, no_reading
from judge import large_enough
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.func import functional_call
from torch.nn.modules import _functions

import syncbn
from syncbn import functional
from syncbn.kernels import Layer
from syncbn.moments import Running

TESTS = Path(__file__).parent.parent
READING = (HostReadError, DataDependentOutputException, DynamicOutputShapeException)

STAND_INS = (batch_norm_stats, batch_norm_elemt, batch_norm_backward_reduce, batch_norm_backward_elemt)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: a CUDA graph is captured")


# ---- on any machine: no host reads what is on the device


class _Reads(torch.autograd.Function):
    """Reads its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * dy.sum().item()


READS: dict[str, Callable[[Tensor], Any]] = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.tolist(),
    "bool": lambda x: bool(x.sum() > 0),
    "index": lambda x: x[x > 0],
    "equal": lambda x: torch.equal(x, x + 1),
    "in backward": lambda x: _Reads.apply(x.requires_grad_()).sum().backward(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reading_is_noticed(read: Callable[[Tensor], Any]) -> None:
    with pytest.raises(READING), no_data():
        read(torch.rand(3))


COPIES: dict[str, Callable[[], Tensor]] = {
    "to the host": lambda: torch.ones(3, device="cuda").cpu(),
    "to the device": lambda: torch.tensor([1.0, 2.0], device="cuda"),
}


@pytest.mark.parametrize("copy", COPIES.values(), ids=COPIES)
def test_copying_is_noticed(copy: Callable[[], Tensor]) -> None:
    with pytest.raises(HostReadError), fake_gpu():
        copy()


def test_it_notices_the_reported_line(interpreters: Any) -> None:
    """torch.nn.SyncBatchNorm's own function, whose CUDA operators have stand-ins here."""
    for trace in interpreters(2).run(_reported):
        assert "DynamicOutputShapeException" in trace
        assert "count_all = count_all[mask]" in trace


def _reported() -> str:
    stand_in_for_cuda_operators()
    try:
        with no_data():
            x = torch.randn(2, 3, 4, 4, requires_grad=True)
            buffers = torch.zeros(3), torch.ones(3)
            _functions.SyncBatchNorm.apply(
                x, torch.ones(3), torch.zeros(3), *buffers, 1e-5, 0.1, dist.group.WORLD, dist.get_world_size()
            )
    except READING:
        return traceback.format_exc()
    return "nothing was noticed"


SHAPES = {"full": (2, 3, 4, 5), "empty": (0, 3, 4, 5), "one value": (1, 3, 1, 1), "vectors": (4, 3)}
# Activation, residual and mask; what the running statistics follow.
KINDS = [(None, False, False), ("relu", True, False), ("silu", True, True), ("leaky_relu", False, True)]
MOMENTA = [0.1, None]


@pytest.mark.parametrize("backend", ["reference", "cpu", "aten", "triton"])
def test_a_step_reads_nothing(interpreters: Any, backend: str) -> None:
    """Forward and backward of two processes, of which one may be empty, and of one alone."""
    for one, other in (("full", "full"), ("full", "empty"), ("empty", "empty"), ("one value", "vectors")):
        per_rank = [(backend, SHAPES[one]), (backend, SHAPES[other])]
        steps = interpreters(2).run(_steps, per_rank=per_rank)
        assert steps == [len(KINDS) * len(MOMENTA)] * 2
    for name in ("full", "empty", "vectors"):
        assert interpreters(1).run(_steps, backend, SHAPES[name]) == [len(KINDS) * len(MOMENTA)]


def _steps(backend: str, shape: tuple[int, ...]) -> int:
    """How many steps have been made without reading anything."""
    if backend == "aten":
        stand_in_for_cuda_operators()
    chosen = import_module(f"syncbn.kernels.{backend}")
    before, functional.backend_for = functional.backend_for, lambda x: chosen
    try:
        with large_enough():
            kinds = itertools.product(KINDS, MOMENTA)
            return sum(_step(shape, backend != "triton", *kind, momentum) for kind, momentum in kinds)
    finally:
        functional.backend_for = before


def _step(
    shape: tuple[int, ...],
    fake: bool,
    activation: str | None,
    with_residual: bool,
    with_mask: bool,
    momentum: float | None,
) -> int:
    """One step. Kernels that Triton interprets need data: there, only PyTorch's operators are watched."""
    layer = syncbn.SyncBatchNorm(3, activation=activation, momentum=momentum)
    layer._exchange.connect(torch.device("cpu"))  # which compares the layers, and so reads, once
    before = layer._exchange.calls
    state = dict(layer.named_parameters()) | dict(layer.named_buffers())
    with no_data() if fake else no_reading() as mode:
        state = {name: mode.from_tensor(each) if mode else each for name, each in state.items()}
        x, residual = (torch.randn(shape, requires_grad=True) for _ in range(2))
        mask = torch.ones(shape[0], 1, *shape[2:], dtype=torch.bool) if with_mask else None
        y = functional_call(layer, state, (x, residual if with_residual else None, mask))
        y.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert (residual.grad is not None) == with_residual
        assert state["weight"].grad is not None
    assert layer._exchange.calls - before == (2 if dist.get_world_size() > 1 else 0)
    return 1


@pytest.mark.parametrize("backend", ["reference", "aten"])
def test_nothing_is_copied_between_host_and_device(interpreters: Any, backend: str) -> None:
    """By the backends that call PyTorch's operators: on a fake GPU there is no autograd, but their four operations."""
    assert interpreters(1).run(_on_a_fake_gpu, backend) == [len(SHAPES) * len(MOMENTA) * 2]


def _on_a_fake_gpu(backend: str) -> int:
    if backend == "aten":
        stand_in_for_cuda_operators_on_fake_gpus()
    chosen = import_module(f"syncbn.kernels.{backend}")
    kinds = list(itertools.product(SHAPES.values(), MOMENTA, (False, True)))
    for kind in kinds:
        with fake_gpu():
            _operations(chosen, *kind)
    return len(kinds)


_registered: list[torch.library.Library] = []


def stand_in_for_cuda_operators_on_fake_gpus() -> None:
    """Of which shape their results are: what PyTorch does not say for fake tensors."""
    if not _registered:
        library = torch.library.Library("aten", "IMPL")
        for function in STAND_INS:
            library.impl(function.__name__, function, "Meta")
        _registered.append(library)


def _operations(backend: Any, shape: tuple[int, ...], momentum: float | None, masked: bool) -> None:
    x, residual, dy = (torch.randn(shape, device="cuda") for _ in range(3))
    mask = torch.ones(shape[0], 1, *shape[2:], device="cuda") if masked else None
    weight, bias, mean, var = (torch.ones(3, device="cuda") for _ in range(4))
    running = Running(mean, var, torch.zeros((), dtype=torch.int64, device="cuda"), momentum)
    layer = Layer(weight, bias, 1e-5, "silu", 0.01, world_size=2)
    message, scratch = backend.moments(x, mask, 2)
    y, stats = backend.normalize(x, residual, message, layer, running, scratch)
    message, dweight, dbias, scratch = backend.grad_moments(dy, x, residual, stats, layer, 3)
    dx, dresidual = backend.grad_input(dy, x, residual, mask, stats, layer, message, True, scratch)
    assert y.shape == dx.shape == dresidual.shape == x.shape
    assert dweight.shape == dbias.shape == (3,)


# ---- with processes of a program's own


def torchrun(backend: str, processes: int) -> None:
    """The program runs on every process to its end."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    shared = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_MAX_CTAS": "4"} if _share_a_gpu(backend, processes) else {}
    run = subprocess.run(
        [*command, str(TESTS / "programs" / "cuda_graphs.py"), backend],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | shared,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert all(f"rank {rank} is done" in run.stdout for rank in range(processes))


def _share_a_gpu(backend: str, processes: int) -> bool:
    return backend == "nccl" and processes > torch.cuda.device_count()


def test_the_program_without_graphs() -> None:
    torchrun("gloo", 2)


@needs_gpu
def test_graphs_of_one_process() -> None:
    torchrun("nccl", 1)


@needs_gpu
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.device_count() < 2 and torch.cuda.nccl.version() < (2, 30),
    reason="needs two GPUs, or NCCL 2.30, with which two processes can share one",
)
def test_graphs_of_two_processes_of_which_one_is_empty() -> None:
    torchrun("nccl", 2)


def test_the_documentation_s_code_compiles() -> None:
    """The program above runs it, on a GPU."""
    codes = blocks("docs/cuda-graphs.md")
    assert len(codes) == 4
    for code in codes:
        compile(code, "docs/cuda-graphs.md", "exec")
