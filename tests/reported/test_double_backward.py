"""pytorch/pytorch#61222: a loss that contains gradients ended in "derivative for batch_norm_backward_elemt is not
implemented" as soon as the layers were synchronized."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from documentation import blocks
from judge import affine, assert_close, large_enough
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

UNEVEN = [(3, 4, 3, 2), (1, 4, 3, 2)]
EMPTY = [(3, 4, 3, 2), (0, 4, 3, 2)]


@dataclass
class Case:
    """A layer, what it is called with, and how the union is spread over the processes."""

    layer: dict[str, Any] = field(default_factory=dict)
    residual: bool = False
    mask: bool = False
    frozen: bool = False  # γ and β take no gradient
    shapes: list[tuple[int, ...]] = field(default_factory=lambda: [(2, 4, 3, 2), (2, 4, 3, 2)])


CASES = {
    "plain": Case(),
    "uneven": Case(shapes=UNEVEN),
    "an empty process": Case(shapes=EMPTY),
    "vectors": Case(shapes=[(4, 4), (1, 4)]),
    "affine=False": Case({"affine": False}),
    "frozen": Case(frozen=True),
    "relu": Case({"activation": "relu"}, shapes=UNEVEN),
    "leaky_relu": Case({"activation": "leaky_relu", "negative_slope": 0.2}, shapes=EMPTY),
    "silu": Case({"activation": "silu"}, shapes=UNEVEN),
    "residual": Case(residual=True, shapes=UNEVEN),
    "residual, relu": Case({"activation": "relu"}, residual=True, shapes=EMPTY),
    "residual, silu": Case({"activation": "silu"}, residual=True, shapes=UNEVEN),
    "mask": Case(mask=True, shapes=UNEVEN),
    "mask, residual, silu": Case({"activation": "silu"}, residual=True, mask=True),
    "mask, an empty process": Case({"activation": "relu", "affine": False}, mask=True, shapes=EMPTY),
}
EVERY_CASE = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def layer_of(case: Case) -> syncbn.SyncBatchNorm:
    channels = case.shapes[0][1]
    layer = syncbn.SyncBatchNorm(channels, dtype=torch.float64, track_running_stats=False, **case.layer)
    affine(layer)
    return layer.requires_grad_(not case.frozen)


def tensors_of(case: Case) -> list[tuple[Tensor, Tensor | None, Tensor | None, Tensor]]:
    """x, residual, mask and dy, for each process."""
    generator = torch.Generator().manual_seed(11)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = []
    for rank, shape in enumerate(case.shapes):
        mask = randn(shape[0], 1, *shape[2:]) > -0.5 if case.mask else None
        dy = randn(*shape) if mask is None else randn(*shape) * mask
        tensors.append((randn(*shape) * (rank + 1) + rank, randn(*shape) if case.residual else None, mask, dy))
    return tensors


# ---- the layer, compared with torch.nn.BatchNorm1d on the union


def penalty_gradients(call: Any, x: Tensor, residual: Tensor | None, dy: Tensor, parameters: list[Tensor]) -> Any:
    """The gradients of a penalty on the gradients of the inputs alone: of x, the residual, dy, γ and β."""
    inputs = [x.requires_grad_()] if residual is None else [x.requires_grad_(), residual.requires_grad_()]
    first = torch.autograd.grad(call(x, residual), inputs, dy.requires_grad_(), create_graph=True)
    penalty = sum((g.sin() * (i + 1)).sum() for i, g in enumerate(first))
    wanted = [*inputs, dy, *(p for p in parameters if p.requires_grad)]
    second = torch.autograd.grad(penalty, wanted, allow_unused=True)  # β is in no gradient, unless an activation is
    return [torch.zeros_like(w) if g is None else g for w, g in zip(wanted, second, strict=True)]


def _penalize(x: Tensor, residual: Tensor | None, mask: Tensor | None, dy: Tensor, case: Case) -> list[Tensor]:
    layer = layer_of(case)
    with large_enough():
        return penalty_gradients(
            lambda x, residual: layer(x, residual, mask), x, residual, dy, list(layer.parameters())
        )


@EVERY_CASE
def test_the_gradients_of_a_penalty_are_those_of_the_union(processes: Any, case: Case) -> None:
    tensors = tensors_of(case)
    results = processes(2).run(_penalize, case, per_rank=tensors)

    masks = [torch.ones_like(x[:, :1], dtype=torch.bool) if mask is None else mask for x, _, mask, _ in tensors]
    inside = torch.cat([rows(mask)[:, 0] for mask in masks])
    x, residual, dy = (
        None if each[0] is None else torch.cat([rows(t) for t in each])[inside]
        for each in ([t[i] for t in tensors] for i in (0, 1, 3))
    )
    norm = nn.BatchNorm1d(4, affine=case.layer.get("affine", True), track_running_stats=False, dtype=torch.float64)
    affine(norm)
    norm.requires_grad_(not case.frozen)
    activation = {
        None: lambda z: z,
        "relu": F.relu,
        "leaky_relu": functools.partial(F.leaky_relu, negative_slope=0.2),
        "silu": F.silu,
    }[case.layer.get("activation")]
    expected = penalty_gradients(
        lambda x, residual: activation(norm(x) if residual is None else norm(x) + residual),
        x,
        residual,
        dy,
        list(norm.parameters()),
    )
    inputs = 3 if case.residual else 2
    assert len(results[0]) == len(expected)
    for i, theirs in enumerate(expected[:inputs]):
        # Behind the mask, dy is 0 in the layer's call and absent in the judge's.
        ours = torch.cat([rows(result[i]) for result in results])
        assert_close(ours[inside], theirs, 1e-9, f"gradient of input {i}")
        assert i == inputs - 1 or torch.all(ours[~inside] == 0)
    for i, theirs in enumerate(expected[inputs:], inputs):
        assert_close(sum(result[i] for result in results), theirs, 1e-9, f"gradient of parameter {i - inputs}")


def rows(x: Tensor) -> Tensor:
    """[N, C, ...] as [N·..., C]."""
    return x.movedim(1, -1).reshape(-1, x.shape[1])


# ---- gradgradcheck


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("uneven", "an empty process")])
def test_gradgradcheck_in_one_process(name: str) -> None:
    case = replace(CASES[name], shapes=[(3, 2, 2, 1)])
    (x, residual, mask, _), *_ = tensors_of(case)
    layer = layer_of(case)
    inputs = [t.requires_grad_() for t in (x, residual) if t is not None]

    def call(*inputs: Tensor) -> Tensor:
        return layer(*inputs[: len(inputs) - len(wanted)], mask=mask)

    wanted = [p for p in layer.parameters() if p.requires_grad]
    with large_enough():
        assert torch.autograd.gradcheck(call, (*inputs, *wanted))
        assert torch.autograd.gradgradcheck(call, (*inputs, *wanted))


class ToEveryProcess(torch.autograd.Function):
    """What all processes have alike; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return SumOfProcesses.apply(dy)


class SumOfProcesses(torch.autograd.Function):
    """The inverse direction: the sum, which all processes have alike, and so they have its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return ToEveryProcess.apply(dy)


def _check_as_a_function_of_the_union(case: Case, tensors: list[Any]) -> bool:
    """Both processes move the same value of the union at a time, and see all of the union's output."""
    rank, layer = dist.get_rank(), layer_of(case)
    sizes = [x.shape[0] for x, *_ in tensors]
    mask = tensors[rank][2]
    inputs = [torch.cat([t[i] for t in tensors]).requires_grad_() for i in (0, 1) if tensors[0][i] is not None]
    parameters = [p.detach().clone().requires_grad_() for p in layer.parameters()]

    def call(*tensors: Tensor) -> Tensor:
        tensors = [ToEveryProcess.apply(t) for t in tensors]
        mine = [t.split(sizes)[rank] for t in tensors[: len(inputs)]]
        named = dict(zip(("weight", "bias"), tensors[len(inputs) :], strict=False))
        y = torch.func.functional_call(layer, named, (*mine,), {"mask": mask})
        others = [y if r == rank else y.new_zeros(size, *y.shape[1:]) for r, size in enumerate(sizes)]
        return SumOfProcesses.apply(torch.cat(others))

    # Undefined gradients would leave some processes' collectives out.
    assert torch.autograd.gradcheck(call, (*inputs, *parameters), check_undefined_grad=False)
    return torch.autograd.gradgradcheck(call, (*inputs, *parameters), check_undefined_grad=False)


@pytest.mark.parametrize("counts", [(2, 1), (3, 0)], ids=["uneven", "an empty process"])
@pytest.mark.parametrize("name", ["plain", "mask, residual, silu"])
def test_gradgradcheck_in_two_processes(processes: Any, name: str, counts: tuple[int, int]) -> None:
    case = replace(CASES[name], shapes=[(n, 2, 2) for n in counts])
    assert all(processes(2).run(_check_as_a_function_of_the_union, case, tensors_of(case)))


# ---- models that are trained so


class Energy(nn.Module):
    """A potential whose derivatives are forces, as in the report."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 8),
            nn.BatchNorm1d(8),
            nn.SiLU(),
            nn.Linear(8, 8),
            nn.BatchNorm1d(8),
            nn.Softplus(),
            nn.Linear(8, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def force_loss(model: nn.Module, x: Tensor) -> Tensor:
    """The report's: the gradients of the output with respect to the input are part of the cost."""
    x = x.clone().requires_grad_()
    energy = model(x)
    (forces,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    return (energy - 1).square().sum() + (forces + x.detach().sin()).square().sum()


class Critic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(2, 6, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.LeakyReLU(0.2),
            nn.Conv2d(6, 4, 3, bias=False),
            nn.BatchNorm2d(4),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(4 * 4, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def wgan_gp_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Gulrajani et al., "Improved Training of Wasserstein GANs", 2017: the critic's loss with its gradient penalty."""
    real, fake = x, x.flip(-1) * 0.5 + 0.3
    between = (real * 0.4 + fake * 0.6).requires_grad_()
    (gradient,) = torch.autograd.grad(model(between).sum(), between, create_graph=True)
    penalty = (gradient.flatten(1).norm(dim=1) - 1).square()
    return model(fake).sum() - model(real).sum() + 10 * penalty.sum()


def build(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return cls().double()


def train(model: nn.Module, loss_of: Any, batches: list[Tensor], through: str) -> list[Tensor]:
    """Steps of SGD on a sum over the union's samples."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for x in batches:
        optimizer.zero_grad()
        loss = loss_of(model, x)
        if through == "DDP":
            loss = loss * dist.get_world_size()  # DDP averages
        loss.backward()
        if through == "all_reduce":
            for parameter in model.parameters():
                dist.all_reduce(parameter.grad)
        optimizer.step()
    return [each.detach().clone() for each in (*model.parameters(), *model.buffers())]


def _train(batches: list[Tensor], cls: type[nn.Module], loss_of: Any, fused: bool, through: str) -> list[Tensor]:
    model = syncbn.convert(build(cls))
    if fused:
        model = syncbn.fuse(model)
        assert "activation=" in str(model)
    return train(DistributedDataParallel(model) if through == "DDP" else model, loss_of, batches, through)


@pytest.mark.parametrize("through", ["all_reduce", "DDP"])
@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
@pytest.mark.parametrize(
    ("cls", "loss_of", "shape", "counts"),
    [
        (Energy, force_loss, (3,), ([4, 2, 5], [4, 3, 0])),
        (Critic, wgan_gp_loss, (2, 7, 7), ([2, 1, 3], [2, 3, 0])),
    ],
    ids=["forces", "WGAN-GP"],
)
def test_a_model_that_learns_from_its_gradients_learns_as_on_the_union(
    processes: Any, cls: Any, loss_of: Any, shape: tuple[int, ...], counts: Any, fused: bool, through: str
) -> None:
    """Even, uneven and empty batches."""
    generator = torch.Generator().manual_seed(5)
    parts = [
        [torch.randn(n, *shape, generator=generator, dtype=torch.float64) * (rank + 1) for n in each]
        for rank, each in enumerate(counts)
    ]
    states = processes(2).run(_train, cls, loss_of, fused, through, per_rank=[(each,) for each in parts])
    unions = [torch.cat(step) for step in zip(*parts, strict=True)]
    expected = train(build(cls), loss_of, unions, "one process")
    for state in states:
        for ours, theirs, first in zip(state, expected, states[0], strict=True):
            assert_close(ours, theirs.double(), 1e-8)
            assert torch.equal(ours, first), "processes differ"


# ---- the documentation


def _run_documentation(code: str) -> bool:
    real, fake = torch.randn(2, 2, 2, 7, 7)
    names: dict[str, Any] = {"critic": build(Critic).float(), "real": real, "fake": fake}
    exec(code, names)
    return all(p.grad is not None and p.grad.isfinite().all() for p in names["critic"].parameters())


def test_the_documentation_s_code_runs(processes: Any) -> None:
    (code,) = blocks("docs/double-backward.md")
    assert processes(2).run(_run_documentation, code) == [True, True]
