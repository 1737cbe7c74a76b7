"""Export: a trained model in eval, converted, fused or plain again, is the plain model to torch.export and ONNX."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from documentation import blocks
from judge import assert_close
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.optimization import fuse as fold
from torch.fx.node import map_arg
from torch.nn.utils.fusion import fuse_conv_bn_eval

import syncbn

STRICT = pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])


# ---- models


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.bn(self.conv(x)) + x)


def block() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU())


def options() -> nn.Module:
    return nn.Sequential(
        nn.BatchNorm2d(3, affine=False),
        nn.LeakyReLU(0.2),
        nn.Conv2d(3, 4, 1),
        nn.BatchNorm2d(4, momentum=None, eps=1e-3),
        nn.SiLU(),
    )


def vectors() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())


def signals() -> nn.Module:
    return nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU())


def volumes() -> nn.Module:
    return nn.Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4), nn.ReLU())


def of_timm() -> nn.Module:
    layers = pytest.importorskip("timm.layers")
    return nn.Sequential(nn.Conv2d(3, 4, 3), layers.BatchNormAct2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())


def resnet18() -> nn.Module:
    return pytest.importorskip("torchvision").models.resnet18(weights=None)


@dataclass(frozen=True)
class Case:
    """A model, an input to export it with, and one of other sizes."""

    build: Callable[[], nn.Module]
    example: tuple[int, ...] = (2, 3, 8, 9)
    other: tuple[int, ...] = (3, 3, 12, 7)

    @property
    def dynamic_shapes(self) -> tuple[dict[int, Any]]:
        """All but the channels may change; an error where the exported program would fix one."""
        return ({dim: Dim.DYNAMIC for dim in range(len(self.example)) if dim != 1},)


SMALL = {
    "block": Case(block),
    "residual": Case(Residual),
    "options": Case(options),
    "vectors": Case(vectors, (2, 3), (5, 3)),
    "signals": Case(signals, (2, 3, 8), (3, 3, 11)),
    "volumes": Case(volumes, (2, 3, 5, 6, 7), (3, 3, 7, 4, 5)),
    "timm": Case(of_timm),
}
RESNET18 = Case(resnet18, (2, 3, 64, 72), (3, 3, 96, 40))
of_small_models = pytest.mark.parametrize("case", SMALL.values(), ids=SMALL)


def randomized(model: nn.Module) -> nn.Module:
    """γ, β and running statistics unlike those of the start."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                    if tensor is not None:
                        tensor.uniform_(0.5, 1.5)
    return model


def in_eval(case: Case) -> tuple[nn.Module, dict[str, nn.Module]]:
    """The plain model, and what syncbn has made of it."""
    plain = randomized(case.build()).eval()
    models = {"converted": syncbn.convert(copy.deepcopy(plain))}
    models["fused"] = syncbn.fuse(copy.deepcopy(models["converted"]))
    models["reverted"] = syncbn.revert(copy.deepcopy(models["fused"]))
    assert [type(each) for each in models["reverted"].modules()] == [type(each) for each in plain.modules()]
    assert all(not each.training for model in models.values() for each in model.modules())
    return plain, models


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(case.example, generator=generator), torch.randn(case.other, generator=generator)


# ---- torch.export


def export(model: nn.Module, case: Case, strict: bool = False) -> ExportedProgram:
    return torch.export.export(model, inputs(case)[:1], dynamic_shapes=case.dynamic_shapes, strict=strict)


def operations(program: ExportedProgram) -> list[tuple[str, ...]]:
    """What the program computes from what, in PyTorch's core operators: none in place, none that does nothing."""
    nodes = [node for node in program.run_decompositions().graph.nodes if node.op == "call_function"]
    numbers = {node: f"result {i}" for i, node in enumerate(nodes)}
    return [
        (str(node.target), *(str(map_arg(argument, lambda n: numbers.get(n, n.name))) for argument in node.args))
        for node in nodes
    ]


@STRICT
@of_small_models
def test_the_program_is_the_plain_model_s(case: Case, strict: bool) -> None:
    """The same operations on the same tensors, and the same bits; nothing in float64, nothing of the layer's own."""
    plain, models = in_eval(case)
    expected = operations(export(plain, case, strict))
    for how in ("fused",) if strict else models:
        model = models[how]
        program = export(model, case, strict)
        assert any(node.target is torch.ops.aten.batch_norm.default for node in program.graph.nodes)
        assert torch.float64 not in {node.meta["val"].dtype for node in program.graph.nodes if "val" in node.meta}
        assert program.state_dict.keys() == plain.state_dict().keys()
        for x in inputs(case):
            y = program.module()(x)
            assert torch.equal(y, plain(x)), how
            assert torch.equal(y, model(x)), how
        assert operations(program) == expected, how
        assert not program.graph_signature.buffers_to_mutate


@STRICT
def test_a_residual_and_a_mask(strict: bool) -> None:
    """Arguments of the layer's own; in eval there are no statistics for a mask to change."""
    layer = randomized(syncbn.SyncBatchNorm(3, activation="silu")).eval()
    x, residual = torch.randn(2, 2, 3, 4, 5)
    mask = torch.rand(2, 1, 4, 5) < 0.5
    program = torch.export.export(layer, (x, residual, mask), strict=strict)
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert names == ["aten.batch_norm.default", "aten.add.Tensor", "aten.silu.default"]
    assert torch.equal(program.module()(x, residual, mask), layer(x, residual, mask))


def test_an_empty_batch() -> None:
    _, models = in_eval(SMALL["residual"])
    for model in models.values():
        program = export(model, SMALL["residual"])
        assert program.module()(torch.empty(0, 3, 8, 9)).shape == (0, 3, 8, 9)


LOADED_ELSEWHERE = """
import sys
from pathlib import Path

import torch

sys.modules["syncbn"] = None  # whatever imports it raises ImportError
torch.set_num_threads(int(sys.argv[2]))  # a convolution's bits depend on it
for file in Path(sys.argv[1]).glob("*.pt2"):
    x, expected = torch.load(file.with_suffix(".pt"))
    program = torch.export.load(file)
    for model in (program.module(), torch.export.unflatten(program)):
        assert torch.equal(model(x), expected), file
    print(file.stem, "is equal")
"""


def test_programs_run_where_there_is_no_syncbn(tmp_path: Path) -> None:
    for name, case in SMALL.items():
        model = in_eval(case)[1]["fused"]
        example, other = inputs(case)
        torch.export.save(export(model, case), tmp_path / f"{name}.pt2")
        torch.save((other, model(other).detach()), tmp_path / f"{name}.pt")
        assert example.shape != other.shape
    command = [sys.executable, "-c", LOADED_ELSEWHERE, str(tmp_path), str(torch.get_num_threads())]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert sorted(run.stdout.splitlines()) == sorted(f"{name} is equal" for name in SMALL)


# ---- in one of several processes


def test_one_process_exports_while_the_others_go_on(processes: Any) -> None:
    """As after training: no rank but the first takes part, and the next step finds all ranks in step."""
    (exported, calls), (nothing, _) = processes(2).run(_train_export_and_train)
    assert nothing == []
    assert exported == ["strict", "non-strict", "onnx", "trace"]
    assert calls == [0, 4, 4, 8]  # before, after a step of two layers, after the export, after another step


def _train_export_and_train() -> tuple[list[str], list[int]]:
    pytest.importorskip("onnxruntime")
    case, rank = SMALL["block"], dist.get_rank()
    model = nn.Sequential(*randomized(block()), *Residual().children())
    model[3] = nn.Conv2d(4, 3, 1)
    model = syncbn.fuse(syncbn.convert(model))
    exchange = model[1]._exchange
    x, other = inputs(case)
    calls, equal = [exchange.calls], []

    def step() -> None:
        model.train()(x * (rank + 1)).square().sum().backward()
        calls.append(exchange.calls)

    step()
    if rank == 0:
        expected = model.eval()(other)
        for strict in (True, False):
            if torch.equal(export(model, case, strict).module()(other), expected):
                equal.append("strict" if strict else "non-strict")
        assert_close(run_onnx(to_onnx(export(model, case)), other), expected, 1e-6)
        equal.append("onnx")
        if torch.equal(torch.jit.trace(model, x)(other), expected):
            equal.append("trace")
    calls.append(exchange.calls)
    step()
    return equal, calls


# ---- ONNX


def to_onnx(program: ExportedProgram) -> Any:
    """The ONNX model, as PyTorch's current exporter makes it."""
    pytest.importorskip("onnxscript")
    return torch.onnx.export(program, dynamo=True, verbose=False).model_proto  # type: ignore[union-attr]


def run_onnx(model: Any, x: Tensor) -> Tensor:
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(model.SerializeToString())
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(y)


def operators(model: Any) -> list[str]:
    return [f"{node.domain}{node.op_type}" for node in model.graph.node]


@pytest.mark.parametrize("name", SMALL)
def test_onnx(name: str) -> None:
    """The operators of the plain model, of which the exporter has folded what can be; outputs as PyTorch's."""
    case = SMALL[name]
    plain, models = in_eval(case)
    expected, model = (to_onnx(export(each, case)) for each in (plain, models["fused"]))
    assert operators(model) == operators(expected)
    assert name in ("options", "vectors") or "BatchNormalization" not in operators(model)
    for x in inputs(case):
        y = run_onnx(model, x)
        assert torch.equal(y, run_onnx(expected, x))
        assert_close(y, plain(x), 1e-6)


def test_resnet18() -> None:
    """Of torchvision: 17 of its 20 layers are fused."""
    plain, models = in_eval(RESNET18)
    program = export(models["fused"], RESNET18)
    assert sum(node.target is torch.ops.aten.batch_norm.default for node in program.graph.nodes) == 20
    model = to_onnx(program)
    assert set(operators(model)) == {"Conv", "Relu", "MaxPool", "Add", "ReduceMean", "Reshape", "Gemm"}
    for x in inputs(RESNET18):
        y = plain(x)
        assert torch.equal(program.module()(x), y)
        assert torch.equal(models["reverted"](x), y)
        assert_close(run_onnx(model, x), y, 1e-6)


@pytest.mark.filterwarnings("ignore")  # that it is deprecated, and what it says of tracing
def test_onnx_by_the_older_exporter(tmp_path: Path) -> None:
    pytest.importorskip("onnx")
    case = SMALL["residual"]
    x, other = inputs(case)
    for model in in_eval(case)[1].values():
        file = tmp_path / "model.onnx"
        axes = {"x": [0, 2, 3], "y": [0, 2, 3]}
        torch.onnx.export(model, (x,), file, dynamo=False, input_names=["x"], output_names=["y"], dynamic_axes=axes)
        session = pytest.importorskip("onnxruntime").InferenceSession(file)
        (y,) = session.run(None, {"x": other.numpy()})
        assert_close(torch.from_numpy(y), model(other), 1e-6)


# ---- folding and TorchScript


@of_small_models
def test_a_reverted_model_folds_into_its_convolutions(case: Case) -> None:
    plain, models = in_eval(case)
    model = fold(models["reverted"].double())
    x = inputs(case)[1].double()
    left = [type(each).__name__ for each in model.modules()]
    assert left == [type(each).__name__ for each in fold(plain.double()).modules()]
    assert "BatchNorm2d" not in left or case.build in (options, of_timm)  # before its convolution, or timm's subclass
    torch.testing.assert_close(model(x), plain(x), rtol=1e-12, atol=1e-12)


def test_one_layer_folds_as_it_is() -> None:
    plain, models = in_eval(SMALL["block"])
    conv, bn, _ = models["converted"]
    x = inputs(SMALL["block"])[1]
    torch.testing.assert_close(fuse_conv_bn_eval(conv, bn)(x), plain[:2](x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*is deprecated:FutureWarning")
@of_small_models
def test_torchscript(case: Case) -> None:
    """Traced as it is, and compiled when reverted."""
    plain, models = in_eval(case)
    example, other = inputs(case)
    with torch.no_grad():
        for model in models.values():
            traced = torch.jit.trace(model, example)
            assert torch.equal(traced(other), plain(other))
            assert_close(torch.jit.freeze(traced)(other), plain(other), 1e-6)
        assert torch.equal(torch.jit.script(models["reverted"])(other), plain(other))


def test_torchscript_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"syncbn\.revert\(model\)"):
        torch.jit.script(in_eval(SMALL["block"])[1]["fused"])


# ---- batch statistics


@STRICT
@pytest.mark.parametrize("how", ["converted", "fused", "reverted"])
@pytest.mark.parametrize("build", [block, Residual], ids=["block", "residual"])
def test_one_process_exports_in_training(build: Callable[[], nn.Module], how: str, strict: bool) -> None:
    """For quantization-aware training and the like: PyTorch's own operations, which a program can train."""
    case = Case(build)
    plain, models = in_eval(case)
    x = inputs(case)[0]
    expected, program = (export(each.train(), case, strict) for each in (plain, models[how]))
    assert operations(program) == operations(expected)
    module = program.module()
    y = module(x)
    y.sum().backward()
    assert torch.equal(y, plain(x))
    buffers = dict(plain.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in module.named_buffers())
    assert all(parameter.grad is not None for parameter in module.parameters())


@STRICT
def test_a_layer_without_running_statistics(strict: bool) -> None:
    case = Case(lambda: nn.BatchNorm2d(3, track_running_stats=False))
    plain, models = in_eval(case)
    program = export(models["converted"], case, strict)
    assert [str(n.target) for n in program.graph.nodes if n.op == "call_function"] == ["aten.batch_norm.default"]
    for x in inputs(case):
        assert torch.equal(program.module()(x), plain(x))


@STRICT
@pytest.mark.parametrize(
    ("momentum", "masked", "message"), [(None, False, "momentum=None averages"), (0.1, True, "cannot leave places out")]
)
def test_what_a_program_in_training_cannot_do(momentum: float | None, masked: bool, message: str, strict: bool) -> None:
    layer = syncbn.SyncBatchNorm(3, momentum=momentum)
    mask = torch.ones(2, 1, 4, 4) if masked else None
    with pytest.raises(Exception, match=message):
        torch.export.export(layer, (torch.randn(2, 3, 4, 4), None, mask), strict=strict)


def test_several_processes_cannot_export_in_training(processes: Any) -> None:
    """One that tries learns so at once, and the others are not left waiting."""
    for rank, messages in enumerate(processes(2).run(_export_in_training)):
        assert len(messages) == (2 if rank == 0 else 0)
        assert all("call model.eval() or syncbn.revert(model) before torch.export" in each for each in messages)


def _export_in_training() -> list[str]:
    model = syncbn.convert(block())
    messages = []
    for strict in (True, False) if dist.get_rank() == 0 else ():
        try:
            export(model, SMALL["block"], strict)
        except Exception as error:
            messages.append(str(error))
    model(torch.randn(2, 3, 5, 5)).sum().backward()  # all are still in step
    return messages


# ---- documentation


def test_the_documentation_s_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": syncbn.fuse(syncbn.convert(block())), "x": torch.randn(2, 3, 8, 9)}
    for code in blocks("docs/export.md"):
        exec(code, names)
    x = torch.randn(5, 3, 10, 12)
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.equal(loaded(x), names["model"](x))
    assert (tmp_path / "model.onnx").exists()


# ---- layers that are normalized together


class Levels(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norms = syncbn.BatchNormList(nn.BatchNorm2d(4) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        high, low = self.norms([self.conv(x), self.conv(x[..., ::2, ::2])])
        return high.sum() + low.square().sum()


@pytest.mark.parametrize("strict", [False, True])
def test_layers_that_are_normalized_together_train_as_exported(strict: bool) -> None:
    torch.manual_seed(0)
    model, x = syncbn.convert(Levels()), torch.randn(2, 3, 12, 12)
    program = torch.export.export(model, (x,), strict=strict)
    exported = program.module()
    exported(x).backward()
    gradients = {name: p.grad for name, p in exported.named_parameters()}
    model(x).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-4)


def _export_levels() -> str:
    model, x = syncbn.convert(Levels()), torch.randn(2, 3, 12, 12)
    try:
        torch.export.export(model, (x,), strict=False)
    except RuntimeError as error:
        return str(error)
    return "exported"


def test_layers_of_several_processes_are_not_exported_in_training(processes: Any) -> None:
    assert all("torch.export keeps no process group" in error for error in processes(2).run(_export_levels))
