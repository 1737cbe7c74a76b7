"""torch.compile takes a converted model as one graph.

pytorch/pytorch#161302, #156680: torch.nn.SyncBatchNorm breaks the graph, and ``fullgraph=True`` refuses it.
pytorch/pytorch#107372, #100239: compiling a model of DistributedDataParallel and SyncBatchNorm fails.
pytorch/pytorch#194504: training with ``momentum=None`` fails under ``fullgraph=True``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from documentation import blocks
from judge import assert_close
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from union import parts

import syncbn


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, padding=1),
        nn.BatchNorm2d(6, momentum=None),
        nn.SiLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.BatchNorm1d(6, affine=False),
    )


class Block(nn.Module):
    """A residual block, whose addition and activations ``fuse`` puts into the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.conv2, self.bn2 = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3, track_running_stats=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x))))) + x)


def steps(model: nn.Module, run: Callable[[Tensor], Tensor], batches: list[Tensor]) -> list[Tensor]:
    """A training step on each batch: outputs, the input's and all parameters' gradients, the buffers."""
    seen = []
    for x in batches:
        model.zero_grad()
        x = x.clone().requires_grad_()
        y = run(x)
        y.sin().sum().backward()
        seen += [y.detach(), x.grad, *(p.grad.clone() for p in model.parameters())]
        seen += [b.double().clone() for b in model.buffers()]
    return seen


def build(which: str, fused: bool) -> nn.Module:
    torch.manual_seed(0)
    model = syncbn.convert({"convolutional": convolutional, "block": Block, "twice": Twice}[which]().double())
    return syncbn.fuse(model) if fused else model


def _compiled_and_eager(batches: list[Tensor], which: str, fused: bool, backend: str) -> tuple[Any, Any, int]:
    torch._dynamo.reset()
    model, eager = build(which, fused), build(which, fused)
    counter = CompileCounterWithBackend(backend)
    run = torch.compile(model, backend=counter, fullgraph=True)
    return steps(model, run, batches), steps(eager, eager, batches), counter.frame_count


def sizes(n: int, *sides: int) -> list[Tensor]:
    return parts(*((n, 3, side, side + 3) for side in sides))


@pytest.mark.parametrize("fused", [False, True], ids=["converted", "fused"])
@pytest.mark.parametrize("which", ["convolutional", "block"])
def test_one_graph_equal_to_eager_whatever_the_image_size(processes: Any, which: str, fused: bool) -> None:
    """Two compilations for any number of sizes: one for the first, one for all others."""
    inputs = [(sizes(2, 12, 16, 21, 24),), (sizes(3, 12, 18, 20, 25),)]
    for compiled, eager, graphs in processes(2).run(_compiled_and_eager, which, fused, "aot_eager", per_rank=inputs):
        for a, b in zip(compiled, eager, strict=True):
            assert_close(a, b, 1e-9)
        assert graphs == 2


def test_with_inductor(processes: Any) -> None:
    inputs = [(sizes(2, 12),), (sizes(3, 12),)]
    for compiled, eager, _ in processes(2).run(_compiled_and_eager, "block", True, "inductor", per_rank=inputs):
        for a, b in zip(compiled, eager, strict=True):
            assert_close(a, b, 1e-9)


class Twice(nn.Module):
    """One layer on two inputs, its input added to its output, and a tensor that is scale and shift."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(3), nn.ReLU()
        self.tied = nn.BatchNorm2d(3)
        self.tied.bias = self.tied.weight

    def forward(self, x: Tensor) -> Tensor:
        first, second = syncbn.normalize_together([self.bn, self.bn], [x, x])
        return self.relu(self.bn(first) + first) + self.tied(second)


@pytest.mark.parametrize("fused", [False, True], ids=["converted", "fused"])
def test_a_tensor_that_a_layer_has_twice(processes: Any, fused: bool) -> None:
    inputs = [(sizes(2, 5),), (sizes(3, 4),)]
    for compiled, eager, _ in processes(2).run(_compiled_and_eager, "twice", fused, "aot_eager", per_rank=inputs):
        for a, b in zip(compiled, eager, strict=True):
            assert_close(a, b, 1e-9)


def test_long_rows_with_inductor() -> None:
    """Inductor adds the values of a row one after another in float32."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 1 << 17) + 1e5
    layer = syncbn.SyncBatchNorm(3, momentum=1.0)
    y = torch.compile(layer, fullgraph=True)(x)
    judge = nn.BatchNorm1d(3, momentum=1.0).double()
    assert_close(y.detach().double(), judge(x.double()).detach(), 1e-5)


# ---- what a graph exchanges


def _all_reduces_of_each_graph() -> list[int]:
    torch._dynamo.reset()
    counts = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        counts.append(sum("all_reduce" in str(node.target) for node in graph.graph.nodes))
        return graph

    model = build("convolutional", fused=False)
    run = torch.compile(model, backend=aot_autograd(fw_compiler=count, bw_compiler=count), fullgraph=True)
    run(torch.randn(2, 3, 8, 8, dtype=torch.float64)).sin().sum().backward()
    return counts


def test_one_all_reduce_for_each_layer_and_direction(processes: Any) -> None:
    assert processes(2).run(_all_reduces_of_each_graph) == [[3, 3], [3, 3]]


# ---- under DistributedDataParallel


def _ddp(batches: list[Tensor], compiled: bool) -> list[Tensor]:
    torch._dynamo.reset()
    model = build("convolutional", fused=False)
    inner = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    ddp = DistributedDataParallel(inner)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    for x in batches:
        optimizer.zero_grad()
        ddp(x).sin().sum().backward()
        optimizer.step()
    return [each.detach().double() for each in (*model.parameters(), *model.buffers())]


def test_inside_of_ddp(processes: Any) -> None:
    inputs = [(sizes(2, 12, 16, 14),), (sizes(1, 12, 10, 14),)]
    compiled, eager = (processes(2).run(_ddp, each, per_rank=inputs) for each in (True, False))
    for mine, theirs, other in zip(compiled[0], eager[0], compiled[1], strict=True):
        assert_close(mine, theirs, 1e-9)
        assert torch.equal(mine, other), "processes differ"


# ---- an empty process, and half precision


def _layer_alone(x: Tensor, compiled: bool) -> list[Tensor]:
    torch._dynamo.reset()
    layer = syncbn.SyncBatchNorm(3, activation="relu").to(x.dtype)
    return steps(layer, torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer, [x])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_process_without_data(processes: Any, dtype: torch.dtype) -> None:
    inputs = [(torch.randn(4, 3, 6, 6).to(dtype),), (torch.randn(0, 3, 6, 6).to(dtype),)]
    compiled, eager = (processes(2).run(_layer_alone, each, per_rank=inputs) for each in (True, False))
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.02}[dtype]
    for mine, theirs in zip(compiled, eager, strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a.dtype == b.dtype
            assert_close(a.double(), b.double(), tolerance)


# ---- what a graph was compiled for may change


def _other_processes(x: Tensor) -> list[float]:
    """The same compiled layer over all processes, over this one alone, and over all again."""
    torch._dynamo.reset()
    layer = syncbn.convert(nn.BatchNorm1d(1, momentum=1.0))
    run = torch.compile(layer, backend="eager", fullgraph=True)
    own_groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    means = []
    for group in (None, own_groups[dist.get_rank()], None):
        syncbn.convert(syncbn.revert(layer), group)
        run(x)
        means.append(layer.running_mean.item())
    return means


def test_a_layer_that_is_given_other_processes_is_compiled_anew(processes: Any) -> None:
    inputs = [(torch.full((2, 1), 1.0),), (torch.full((2, 1), 3.0),)]
    assert processes(2).run(_other_processes, per_rank=inputs) == [[2, 1, 2], [2, 3, 2]]


def _modes(x: Tensor) -> list[Tensor]:
    torch._dynamo.reset()
    layer, eager = syncbn.SyncBatchNorm(3), syncbn.SyncBatchNorm(3)
    run = torch.compile(layer, backend="eager", fullgraph=True)
    outputs = []
    for training in (True, False, True, False):
        outputs += [run.train(training)(x), eager.train(training)(x)]
    return outputs


def test_train_and_eval(processes: Any) -> None:
    for outputs in processes(2).run(_modes, per_rank=[(torch.randn(4, 3),), (torch.randn(2, 3) + 2,)]):
        for mine, theirs in zip(outputs[::2], outputs[1::2], strict=True):
            assert_close(mine.double(), theirs.double(), 1e-5)


def test_the_documentation_s_code_runs() -> None:
    (code,) = blocks("docs/compile.md")
    names: dict[str, Any] = {}
    exec(code.replace("fullgraph=True", 'fullgraph=True, backend="eager"'), names)
    assert names["compiled"](torch.randn(2, 3, 8, 8)).shape == (2, 8, 6, 6)
