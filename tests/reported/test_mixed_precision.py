"""Batch normalization in float16 and bfloat16.

- pytorch/pytorch#96203: SyncBatchNorm fails with "Expected counts to have type Half but got Float" in a model that was
  cast to float16.
- hpcaitech/ColossalAI#258: the same of ``resnet18().half()``.
- pytorch/pytorch#115500: float16 activations overflow under autocast, and the running mean is NaN from then on.
- pytorch/pytorch#75478: FSDP's mixed precision does not work with batch normalization, where x or parameters are cast
  and the rest is not.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from documentation import blocks
from judge import affine, assert_close
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import syncbn

HALVES = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 1e-5, torch.float64: 1e-9}


def parts(*shapes: tuple[int, ...]) -> list[Tensor]:
    """One for each process, with unlike statistics."""
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(shape, generator=generator) * (i + 1) + i for i, shape in enumerate(shapes)]


# ---- models that were cast


class SimpleModel(nn.Module):
    """The model of pytorch/pytorch#96203."""

    def __init__(self, hidden_dim: int = 10) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_dim, hidden_dim)
        self.BatchNorm1d = nn.BatchNorm1d(hidden_dim)
        self.cross_entropy_loss = nn.CrossEntropyLoss(reduction="sum")

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.cross_entropy_loss(self.BatchNorm1d(self.linear(x)), y)


def simple_step(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    loss = model(x, y)
    loss.backward()
    net = model.module if isinstance(model, DistributedDataParallel) else model
    return loss.detach(), {name: p.grad for name, p in net.named_parameters()}, dict(net.named_buffers())


def _simple_step(x: Tensor, y: Tensor, half: torch.dtype) -> Any:
    torch.manual_seed(0)
    model = DistributedDataParallel(syncbn.convert(SimpleModel()).to(half))
    return simple_step(model, x.to(half), y)


@HALVES
def test_a_model_that_was_cast_in_ddp(processes: Any, half: torch.dtype) -> None:
    inputs = [(x.to(half).float(), torch.arange(x.shape[0]) % 10) for x in parts((8, 10), (6, 10))]
    results = processes(2).run(_simple_step, half, per_rank=inputs)
    torch.manual_seed(0)
    x, y = (torch.cat(each) for each in zip(*inputs, strict=True))
    loss, grads, buffers = simple_step(SimpleModel().to(half).double(), x.double(), y)
    assert_close(sum(result[0].double() for result in results), loss.double(), TOLERANCE[half], "loss")
    for _, our_grads, our_buffers in results:
        for name, theirs in grads.items():
            assert our_grads[name].dtype == half
            assert_close(2 * our_grads[name], theirs, 5 * TOLERANCE[half], name)
        for name, theirs in buffers.items():
            assert_close(our_buffers[name], theirs.double(), TOLERANCE[half], name)


def half_resnet() -> nn.Module:
    torch.manual_seed(0)
    return pytest.importorskip("torchvision").models.resnet18(num_classes=10).half()


def _half_resnet(img: Tensor) -> tuple[bool, dict[str, Tensor]]:
    model = syncbn.convert(half_resnet())
    output = model(img.half())
    output.float().square().sum().backward()
    finite = all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    return finite, dict(model.named_buffers())


def test_the_resnet_that_was_cast_to_half(processes: Any) -> None:
    judge, images = half_resnet().double(), parts((2, 3, 32, 32), (1, 3, 32, 32))
    results = processes(2).run(_half_resnet, per_rank=[(x,) for x in images])
    judge(torch.cat(images).double())
    for finite, buffers in results:
        assert finite
        for name, buffer in buffers.items():
            assert buffer.dtype == (torch.int64 if "num" in name else torch.float16)
            assert torch.equal(buffer, results[0][1][name]), "processes differ"
            # Further on, few values per channel amplify the rounding of all layers before.
            if name.startswith(("bn1", "layer1")):
                assert_close(buffer, judge.get_buffer(name).double(), 5e-3, name)


# ---- every dtype of x beside every dtype of γ and β and every dtype of the buffers

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
MIXTURES = list(itertools.product(DTYPES, DTYPES, DTYPES))


def mixed_layer(cls: Any, parameters: torch.dtype, buffers: torch.dtype) -> nn.Module:
    layer = cls(4)
    affine(layer)
    layer.running_mean.fill_(0.5)
    layer.running_var.fill_(2.0)
    for name, parameter in layer.named_parameters():
        setattr(layer, name, nn.Parameter(parameter.detach().to(parameters)))
    layer.running_mean, layer.running_var = layer.running_mean.to(buffers), layer.running_var.to(buffers)
    return layer


def _mixed(x: Tensor, mixtures: list[Any], training: bool) -> list[dict[str, Tensor]]:
    results = []
    for dtype, parameters, buffers in mixtures:
        layer = mixed_layer(nn.BatchNorm2d, parameters, buffers)
        results.append(mixed_step(syncbn.convert(layer).train(training), x.to(dtype)))
    return results


def mixed_step(layer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    (y * torch.linspace(-1, 1, y.shape[-1], dtype=y.dtype)).sum().backward()
    return (
        {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in layer.named_parameters()} | dict(layer.named_buffers())
    )


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_any_mixture_of_dtypes(processes: Any, training: bool) -> None:
    inputs = [x.half().bfloat16().float() for x in parts((2, 4, 5, 5), (1, 4, 5, 5))]  # exact in all of them
    results = processes(2).run(_mixed, MIXTURES, training, per_rank=[(x,) for x in inputs])
    for i, mixture in enumerate(MIXTURES):
        dtype, parameters, buffers = mixture
        judge = mixed_layer(nn.BatchNorm2d, parameters, buffers).double().train(training)
        expected = mixed_step(judge, torch.cat(inputs).double())
        ours = [result[i] for result in results]
        assert [ours[0][n].dtype for n in ("y", "x", "weight", "bias", "running_var")] == [
            dtype, dtype, parameters, parameters, buffers
        ]  # fmt: skip
        for name, theirs in expected.items():
            computed = (
                [dtype] if name in ("y", "x") else [dtype, parameters] if name in ("weight", "bias") else [buffers]
            )
            tolerance = max(TOLERANCE[each] for each in computed)
            if not training:  # PyTorch computes it, in float32 beside all but float64
                tolerance = max(tolerance, *(TOLERANCE[each] for each in mixture))
            if name in ("y", "x"):
                each = [torch.cat([our[name] for our in ours])]
            elif name in ("weight", "bias"):
                each = [sum(our[name].double() for our in ours)]
            else:
                each = [our[name] for our in ours]
            for our in each:
                assert_close(our.double(), theirs.double(), 2 * tolerance, f"{name} of {mixture}")


def test_float16_input_beside_float32_parameters(processes: Any) -> None:
    """The lines of pytorch/pytorch#75478."""
    for y in processes(2).run(_the_lines):
        assert y.dtype == torch.float16
        assert torch.all(y == 0)


def _the_lines() -> Tensor:
    z = torch.ones(128, 128, 128).to(torch.float16)
    x = syncbn.convert(nn.BatchNorm1d(128))
    return x(z).detach()


# ---- autocast, and batches that overflow


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.Flatten(),
        nn.Linear(8 * 9, 4),
    )


def as_autocast(model: nn.Module, x: Tensor, half: torch.dtype | None) -> Tensor:
    with torch.autocast("cpu", half or torch.bfloat16, enabled=half is not None):
        return model(x)


def train(model: nn.Module, batches: list[Tensor], half: torch.dtype | None, scale: float) -> dict[str, Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    for x in batches:
        optimizer.zero_grad()
        (scale * as_autocast(model, x, half).float().square().mean(1).sum()).backward()
        optimizer.step()
    net = model.module if isinstance(model, DistributedDataParallel) else model
    return {name: t.detach().clone() for name, t in net.state_dict().items()}


def assert_trained_like_the_union(
    states: list[dict[str, Tensor]], steps: list[list[Tensor]], half: torch.dtype
) -> None:
    """In rounding that is small beside what the steps have changed; without synchronization it is as large as that."""
    start, judge = network().state_dict(), network().double()
    expected = train(judge, [torch.cat(step).double() for step in steps], None, scale=1 / 5)
    for state in states:
        assert state.keys() == expected.keys()
        for name, theirs in expected.items():
            assert state[name].dtype == start[name].dtype, "what is trained keeps its precision"
            moved = (theirs - start[name]).abs().max().item()
            error = (state[name].double() - theirs).abs().max().item()
            assert error <= 10 * TOLERANCE[half] * moved, f"{name} is off by {error:.1e} after a change by {moved:.1e}"
            assert torch.equal(state[name], states[0][name]), "processes differ"


STEPS = [parts((3, 3, 8, 8), (2, 3, 8, 8)), parts((1, 3, 8, 8), (4, 3, 8, 8))]
BATCHES = [(list(each),) for each in zip(*STEPS, strict=True)]  # of each process


def _train_with_autocast(batches: list[Tensor], half: torch.dtype, kind: str) -> dict[str, Tensor]:
    model = syncbn.convert(network())
    if kind == "fused":
        model = syncbn.fuse(model)
    return train(DistributedDataParallel(model), batches, half, scale=2 / 5)  # 2 is what DDP divides by


@HALVES
@pytest.mark.parametrize("kind", ["unfused", "fused"])
def test_autocast(processes: Any, half: torch.dtype, kind: str) -> None:
    states = processes(2).run(_train_with_autocast, half, kind, per_rank=BATCHES)
    assert_trained_like_the_union(states, STEPS, half)


def _an_overflow_on_one_process(through: str) -> dict[str, Any]:
    """Steps with a GradScaler: a good one, one that overflows on process 1 only, and a good one again."""
    rank = dist.get_rank()
    net = syncbn.convert(network())
    model = DistributedDataParallel(net) if through == "DDP" else net
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    good = STEPS[0][rank]
    states, scales = [], []
    for x in (good, good * 1e5 if rank == 1 else good, good):
        optimizer.zero_grad()
        loss = as_autocast(model, x, torch.float16).float().square().mean(1).sum() / 5
        scaler.scale(2 * loss if through == "DDP" else loss).backward()
        if through == "all_reduce":
            for parameter in net.parameters():
                dist.all_reduce(parameter.grad)
        scaler.step(optimizer)
        scaler.update()
        states.append({name: t.clone() for name, t in net.state_dict().items()})
        scales.append(scaler.get_scale())
    outputs = as_autocast(net.eval(), good, torch.float16)
    return {"states": states, "scales": scales, "finite": bool(outputs.isfinite().all())}


@pytest.mark.parametrize("through", ["DDP", "all_reduce"])
def test_both_processes_skip_a_step_in_which_one_overflows(processes: Any, through: str) -> None:
    results = processes(2).run(_an_overflow_on_one_process, through)
    assert_trained_like_the_union([result["states"][2] for result in results], [STEPS[0], STEPS[0]], torch.float16)
    for result in results:
        first, second, third = result["states"]
        assert result["scales"] == [256.0, 128.0, 128.0]
        assert all(torch.equal(first[name], second[name]) for name in first), "skipped, statistics included"
        assert third["1.num_batches_tracked"] == 2
        assert not torch.equal(third["1.running_var"], second["1.running_var"])
        assert result["finite"], "eval"


class Overflowing(nn.Module):
    """The layers of pytorch/pytorch#115500."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_layer, self.bn_layer = nn.Linear(10, 10), nn.BatchNorm1d(10)

    def forward(self, inp: Tensor) -> Tensor:
        return self.bn_layer(self.conv_layer(inp))


def _overflow(factor: float) -> tuple[bool, Tensor, Tensor, Tensor]:
    torch.manual_seed(dist.get_rank())
    model, inp = syncbn.convert(Overflowing()), torch.rand(2, 10) * factor
    with torch.autocast("cpu", torch.float16):
        y = model(inp)
    layer = model.bn_layer
    return bool(y.isfinite().all()), layer.running_mean, layer.running_var, layer.num_batches_tracked


def test_running_statistics_survive_an_overflow(processes: Any) -> None:
    for finite, mean, var, count in processes(2).run(_overflow, 65535.0 * 2):
        assert not finite, "it must show, so that the step can be skipped"
        assert torch.equal(mean, torch.zeros(10))
        assert torch.equal(var, torch.ones(10))
        assert count == 0


def test_statistics_are_not_computed_in_float16(processes: Any) -> None:
    """pytorch/pytorch#115500 asks whether they are: what fits into float16 must not overflow in a sum or a square."""
    for finite, mean, var, count in processes(2).run(_overflow, 30000.0):
        assert finite
        assert mean.isfinite().all()
        assert var.max() > 65504, "unlike float16"
        assert count == 1


# ---- FSDP


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def outputs_in_eval(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.eval()
    with torch.no_grad():
        first = model(x)
    second = model(x)
    second.float().sum().backward()
    return [first, second.detach()]


def assert_evaluates_like_the_union(results: list[dict[str, Any]], half: torch.dtype) -> None:
    for result, (batches,) in zip(results, BATCHES, strict=True):
        judge = network()
        judge.load_state_dict(result["state"])
        expected = judge.double().eval()(batches[0].double()).detach()
        for y in result["outputs"]:
            assert_close(y.double(), expected, 2 * TOLERANCE[half], "eval")


def _fully_shard(batches: list[Tensor], policy: dict[str, torch.dtype], each_layer: bool) -> dict[str, Any]:
    model = syncbn.convert(network())
    mesh, mp_policy = init_device_mesh("cpu", (2,)), MixedPrecisionPolicy(**policy)
    if each_layer:
        for layer in (model[0], model[1], model[3], model[4], model[6]):
            fully_shard(layer, mesh=mesh, mp_policy=mp_policy)
    fully_shard(model, mesh=mesh, mp_policy=mp_policy)
    seen = set()
    model[4].register_forward_pre_hook(lambda m, args: seen.add((args[0].dtype, m.weight.dtype, m.running_var.dtype)))
    train(model, batches, None, scale=2 / 5)  # 2 is what FSDP divides by
    state = {name: whole(tensor) for name, tensor in model.state_dict().items()}
    return {"state": state, "seen": seen, "outputs": outputs_in_eval(model, batches[0])}


POLICIES = {
    "bfloat16": {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32},
    "float16": {"param_dtype": torch.float16, "reduce_dtype": torch.float32},
    "bfloat16, float32 output": {"param_dtype": torch.bfloat16, "output_dtype": torch.float32},
}


@pytest.mark.parametrize("each_layer", [False, True], ids=["the model", "each layer"])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_fully_shard(processes: Any, policy: dict[str, torch.dtype], each_layer: bool) -> None:
    """γ and β are cast, running statistics are not, and torch.nn.BatchNorm2d takes no such mixture."""
    results, half = processes(2).run(_fully_shard, policy, each_layer, per_rank=BATCHES), policy["param_dtype"]
    assert all(result["seen"] == {(half, half, torch.float32)} for result in results)
    assert_trained_like_the_union([result["state"] for result in results], STEPS, half)
    assert_evaluates_like_the_union(results, half)


def _fsdp(batches: list[Tensor]) -> dict[str, Any]:
    model = FullyShardedDataParallel(
        syncbn.convert(network()),
        auto_wrap_policy=ModuleWrapPolicy({nn.Conv2d, nn.Linear}),
        mixed_precision=MixedPrecision(torch.bfloat16, torch.float32, torch.float32),
        device_id=torch.device("cpu"),
    )
    train(model, batches, None, scale=2 / 5)
    return {"state": model.state_dict(), "outputs": outputs_in_eval(model, batches[0])}


def test_fsdp(processes: Any) -> None:
    """The class that pytorch/pytorch#75478 is about; it keeps batch normalization in float32 by its class."""
    results = processes(2).run(_fsdp, per_rank=BATCHES)
    assert_trained_like_the_union([result["state"] for result in results], STEPS, torch.bfloat16)
    assert_evaluates_like_the_union(results, torch.bfloat16)


# ---- the documentation


def _run_documentation(code: str) -> bool:
    model = network()
    names: dict[str, Any] = {
        "torch": torch,
        "syncbn": syncbn,
        "model": model,
        "device": "cpu",
        "mesh": init_device_mesh("cpu", (2,)),
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "criterion": nn.CrossEntropyLoss(),
        "loader": [(torch.randn(2, 3, 8, 8), torch.tensor([0, 3]))],
    }
    exec(code, names)
    return bool(names["model"](torch.randn(2, 3, 8, 8)).isfinite().all())


def test_the_documentation_s_code_runs(processes: Any) -> None:
    codes = blocks("docs/precision.md")
    assert len(codes) == 2
    for code in codes:
        assert processes(2).run(_run_documentation, code) == [True, True]
