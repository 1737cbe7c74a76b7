"""``verify``: models that agree with one process, and models that do not, whose first wrong layer it names."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from documentation import blocks
from processes import WorkerError
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.verification import Verification


def images(*counts: int, size: int = 9) -> list[Tensor]:
    """Parts with unlike statistics."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, 3, size, size, generator=generator) * (i + 1) + i for i, n in enumerate(counts)]


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(36, 2),
    )


Build = Callable[[], nn.Module]


def verified(part: Any, build: Build, options: dict[str, Any]) -> Verification:
    """On a worker."""
    torch.manual_seed(0)
    return syncbn.verify(build(), part, **options)


def run(processes: Any, build: Build, parts: list[Any], **options: Any) -> Verification:
    """What all processes have found, which is the same."""
    found, *others = processes(len(parts)).run(verified, build, options, per_rank=[(part,) for part in parts])
    assert all(other == found for other in others)
    assert found.ok == (found.first is None)
    assert str(found).endswith(found.summary)
    return found


# ---- models that agree


def converted() -> nn.Module:
    return syncbn.convert(network())


def fused() -> nn.Module:
    return syncbn.fuse(converted())


def in_ddp() -> nn.Module:
    return DistributedDataParallel(converted())


def resnet18() -> nn.Module:
    from torchvision.models import resnet18

    return syncbn.fuse(syncbn.convert(resnet18(num_classes=3, zero_init_residual=False)))


def no_batch_norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))


class Repeated(nn.Module):
    """One layer called twice, one never, one frozen; a functional dropout; a layer with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.unused, self.frozen, self.last = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.levels = syncbn.BatchNormList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.bn(self.conv(self.bn(x)))
        x = self.frozen(F.dropout(x, 0.3, training=self.training))
        a, b = self.levels([x, F.max_pool2d(x, 2)])
        return {"a": self.last(a, x), "b": b}


def repeated() -> nn.Module:
    model = Repeated()
    nn.init.normal_(model.last.weight)
    return syncbn.freeze(syncbn.convert(model), "frozen")


@pytest.mark.parametrize("counts", [(3, 2), (4, 0)], ids=["uneven", "empty"])
@pytest.mark.parametrize("build", [converted, fused, in_ddp, repeated, no_batch_norm])
def test_agrees(processes: Any, build: Build, counts: tuple[int, int]) -> None:
    found = run(processes, build, images(*counts))
    assert found.ok, found
    assert found.samples == counts
    assert found.groups == ((0, 1),)
    assert found.summary.startswith("OK: ")
    assert found.worst is not None
    assert found.worst.error is not None
    assert found.worst.error < 1e-11


def test_what_is_compared(processes: Any) -> None:
    found = run(processes, converted, images(3, 2))
    of_layer = {row.what for row in found.rows if row.layer == "5"}
    kinds = {"output", "grad of output", "grad of input", "grad of weight", "grad of bias"}
    assert of_layer == kinds | {"running_mean", "running_var", "num_batches_tracked"}
    assert [row.layer for row in found.rows if row.what == "output"][:3] == ["0", "1", "2"]
    assert "dropout was switched off" in str(found)


def test_a_layer_called_twice_and_one_never(processes: Any) -> None:
    found = run(processes, repeated, images(3, 2))
    assert {row.call for row in found.rows if row.layer == "bn" and row.what == "output"} == {1, 2}
    text = str(found)
    assert "bn (2)" in text
    assert "not called by anything, so not compared: unused" in text
    assert "normalizing by fixed statistics: frozen" in text
    assert "compared with themselves in one process: last" in text
    assert "dropout was switched off" in text


def test_resnet(processes: Any) -> None:
    found = run(processes, resnet18, images(2, 1, size=33))
    assert found.ok, found
    assert len({row.layer for row in found.rows if row.class_name == "BatchNorm2d"}) == 20


def test_groups(processes: Any) -> None:
    """Each group is compared with the union of its own parts."""
    found = run(processes, in_groups, images(1, 2, 2, 1))
    assert found.ok, found
    assert found.groups == ((0, 1), (2, 3))
    assert "4 processes in 2 groups" in found.summary


def in_groups() -> nn.Module:
    return syncbn.convert(network(), group_size=2)


class Checkpointed(nn.Module):
    """Its layers run again in backward; PyTorch's own move their running statistics again there."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self.body, self.options = network(), options

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.body, x.requires_grad_(), use_reentrant=False, **self.options)


def checkpointed() -> nn.Module:
    return syncbn.convert(Checkpointed({"context_fn": syncbn.checkpoint_contexts}))


def checkpointed_plainly() -> nn.Module:
    return syncbn.convert(Checkpointed({}))


@pytest.mark.parametrize("build", [checkpointed, checkpointed_plainly])
def test_activation_checkpointing(processes: Any, build: Build) -> None:
    found = run(processes, build, images(3, 2))
    assert found.ok, found
    assert {row.call for row in found.rows} == {0, 1}


class Detector(nn.Module):
    """Lists in, a dict of losses out in training, as torchvision's detectors have it; and a mask for the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.heads = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2)) for _ in range(2)])

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        x = torch.stack([F.pad(image, (0, 8 - image.shape[2], 0, 8 - image.shape[1])) for image in images])
        mask = torch.stack([F.pad(x.new_ones(1, *i.shape[1:]), (0, 8 - i.shape[2], 0, 8 - i.shape[1])) for i in images])
        with syncbn.valid_region(mask.bool()):
            x = self.body(x)
            box, score = (head(x) for head in self.heads)
        boxes = torch.cat([target["boxes"] for target in targets])
        return {"boxes": (box.mean((2, 3)).sum() - boxes.sum()).abs(), "scores": score.sigmoid().sum()}


def detector() -> nn.Module:
    return syncbn.convert(Detector())


def with_boxes(*sizes: tuple[int, int]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    pictures = [torch.randn(3, *size) for size in sizes]
    return pictures, [
        {"boxes": torch.rand(i + 1, 4) - 9, "labels": torch.ones(i + 1).long()} for i in range(len(sizes))
    ]


def test_a_detector(processes: Any) -> None:
    found = run(processes, detector, [with_boxes((8, 8), (5, 8)), with_boxes((8, 6))])
    assert found.ok, found
    assert found.samples == (2, 1)
    assert "in one process: body.1" in str(found)


def test_keyword_arguments_targets_and_a_loss(processes: Any) -> None:
    """A mean over equal parts, whose gradients are averaged."""
    parts = [{"input": part} for part in images(3, 3)]
    for reduction, ok in ("mean", True), ("sum", False):
        found = run(
            processes, converted, parts, targets=torch.tensor([0, 1, 1]), loss=F.cross_entropy, reduction=reduction
        )
        assert found.ok == ok, found
    assert found.first.where == "10, grad of output"
    assert found.causes[0].startswith("the gradient is 2, 2 times that of the union: the loss divides by the local")
    assert 'pass reduction="mean"' in found.causes[1]


def test_a_mean_over_unequal_parts(processes: Any) -> None:
    found = run(processes, converted, images(3, 2), loss=torch.mean, reduction="mean")
    assert found.first.where == "10, grad of output"
    assert "unequal numbers of samples (3, 2)" in found.causes[1]


def test_the_models_own_dtype(processes: Any) -> None:
    found = run(processes, converted, images(3, 2), dtype=None)
    assert found.ok, found
    assert (found.dtype, found.tolerance) == ("float32", 1e-3)
    assert found.worst.error > 1e-9


def test_one_process() -> None:
    found = verified(images(3)[0], converted, {})
    assert found.ok, found
    assert "one process: there is nobody to synchronize with" in str(found)


# ---- models that do not


def left_plain() -> nn.Module:
    return syncbn.convert(network(), exclude="5")


def alone_in_its_group() -> nn.Module:
    model = left_plain()
    syncbn.convert(model[5], group_size=1)
    return model


def in_eval() -> nn.Module:
    model = converted()
    model[5].eval()
    return model


def in_eval_on_rank_1() -> nn.Module:
    return in_eval() if dist.get_rank() == 1 else converted()


def other_weights_on_rank_1() -> nn.Module:
    model = converted()
    with torch.no_grad():
        model[5].weight[1] += 1e-5 * dist.get_rank()
    return model


class TwoHeads(nn.Module):
    """Detection's classic: a process whose loss ignores a head."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.heads = network()[:3], nn.ModuleList([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.body(x)
        y = self.heads[1](self.heads[0](x))
        return x, (y.detach() if dist.get_rank() == 1 else y)


def ignores_a_head_on_rank_1() -> nn.Module:
    return syncbn.convert(TwoHeads())


class _CentersItsGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy - dy.mean(0, keepdim=True)


class WrongBackward(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _CentersItsGradient.apply(x)


def wrong_backward() -> nn.Module:
    model = converted()
    model[6] = WrongBackward()
    return model


class LocalGradient(nn.BatchNorm2d):
    """Its output is right. Its gradient is that of fixed statistics, as if they had not come from x."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        r = y.detach()
        return r + (x - x.detach()) * self.weight.view(1, -1, 1, 1) * len(x)


def wrong_backward_of_a_batch_norm() -> nn.Module:
    model = network()
    model[5] = LocalGradient(4)
    return syncbn.convert(model)


class CentersInBetween(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        x = self[1](self[0](x))
        return self[2](x - x.mean((0, 2, 3), keepdim=True) + x[:1].square().mean())


def mixing_samples_in_between() -> nn.Module:
    return syncbn.convert(CentersInBetween(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3)))


class OwnBatchStatistics(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / (1 + x.std())


def another_layer_that_mixes() -> nn.Module:
    model = converted()
    model[6] = OwnBatchStatistics()
    return model


def other_statistics() -> nn.Module:
    model = converted()
    model[5].register_forward_hook(_move_more)
    return model


def _move_more(layer: nn.Module, args: tuple[Tensor], y: Tensor) -> None:
    layer.running_mean.data += 0.01 * args[0].data.mean((0, 2, 3))


@pytest.mark.parametrize(
    ("build", "where", "cause"),
    [
        (left_plain, "5, output", "5 is local over this process (left out by exclude='5')"),
        (alone_in_its_group, "5, output", "5 is synchronized over this process (group_size=1)"),
        (in_eval, "5, output", "5 is frozen (in eval mode while the model trains"),
        (in_eval_on_rank_1, "5, call", "rank 0 in 5, forward; rank 1 in 8, forward"),
        (ignores_a_head_on_rank_1, "body.1, call", "rank 0 in heads.1, backward; rank 1 in body.1, backward"),
        (other_weights_on_rank_1, "5, weight at the start", "different weights on the processes to begin with"),
        (wrong_backward, "6, grad of input", "the backward of 6 is wrong over several processes"),
        (wrong_backward_of_a_batch_norm, "5, grad of input", "the backward of 5 is wrong over several processes"),
        (mixing_samples_in_between, "2, input", "what the model's code does between 1 and 2 mixes samples"),
        (another_layer_that_mixes, "6, output", "6 itself mixes samples or depends on the process"),
        (other_statistics, "5, running_mean", "5 moves its running statistics by another rule"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_names_the_layer_that_is_wrong(processes: Any, build: Build, where: str, cause: str) -> None:
    found = run(processes, build, images(3, 2))
    assert found.first is not None, found
    assert found.first.where == where, found
    assert cause in found.causes[0], found
    assert f"the first is {where}" in found.summary


def test_what_comes_before_the_wrong_layer_is_right(processes: Any) -> None:
    rows = {(row.layer, row.what): row for row in run(processes, left_plain, images(3, 2)).rows}
    assert rows["4", "output"].ok
    assert rows["5", "output"].ranks == (0, 1)
    assert not rows["8", "output"].ok


def noisy() -> nn.Module:
    model = converted()
    model[3] = Noise()
    return model


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_random_numbers(processes: Any) -> None:
    found = run(processes, noisy, images(3, 2))
    assert found.first.where == "3, output"
    assert "draws random numbers" in found.causes[0]


# ---- what it leaves, and how it fails


def test_the_model_is_left_as_it_was(processes: Any) -> None:
    assert processes(2).run(_left_as_it_was, per_rank=[(part,) for part in images(3, 2)]) == [[], []]


def _left_as_it_was(part: Tensor) -> list[str]:
    model = converted()
    model[8].eval()
    exchange = model[1]._exchange
    model(part).square().sum().backward()
    handle = model[1].register_forward_hook(lambda *_: None)
    before, calls, copied = _state(model), exchange.calls, part.clone()
    syncbn.verify(DistributedDataParallel(model), part)
    after = _state(model)
    changed = [name for name, value in before.items() if not _same(value, after[name])]
    changed += [] if torch.equal(copied, part) and not part.requires_grad else ["part"]
    changed += [] if exchange is model[1]._exchange and calls == exchange.calls else ["exchange"]
    changed += [] if handle.id in model[1]._forward_hooks and len(model[1]._forward_hooks) == 1 else ["hooks"]
    return changed


def _state(model: nn.Module) -> dict[str, Any]:
    return copy.deepcopy(
        dict(model.state_dict())
        | {f"{name} grad": parameter.grad for name, parameter in model.named_parameters()}
        | {f"{name} class and mode": (str(type(each)), each.training) for name, each in model.named_modules()}
        | {"random": torch.get_rng_state(), "python": random.getstate()}
    )


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b


def fails_on_rank_1() -> nn.Module:
    model = converted()
    if dist.get_rank() == 1:
        model[7].register_forward_pre_hook(_fail)
    return model


def _fail(*_: Any) -> None:
    raise FloatingPointError("this one fails")


def fails_in_backward_on_rank_1() -> nn.Module:
    model = converted()
    if dist.get_rank() == 1:
        model[7].register_full_backward_hook(_fail)
    return model


def other_channels_on_rank_1() -> nn.Module:
    return syncbn.convert(nn.Sequential(nn.Conv2d(3, 4 + dist.get_rank(), 3), nn.BatchNorm2d(4 + dist.get_rank())))


class Scaled(nn.Module):
    """A tensor without dimensions that is no loss, and one that is."""

    def __init__(self) -> None:
        super().__init__()
        self.bn, self.temperature, self.loss = nn.BatchNorm2d(3), Temperature(), nn.MSELoss(reduction="sum")

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn(x) * self.temperature()
        return self.loss(y, x)


class Temperature(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.log = nn.Parameter(torch.tensor(0.5))

    def forward(self) -> Tensor:
        return self.log.exp()


def scaled() -> nn.Module:
    return syncbn.convert(Scaled())


def test_tensors_without_dimensions(processes: Any) -> None:
    found = run(processes, scaled, images(3, 2))
    assert found.ok, found
    assert {"temperature", "loss"} <= {row.layer for row in found.rows if row.what == "output"}


def no_copy_on_rank_1() -> nn.Module:
    model = converted()
    if dist.get_rank() == 1:
        model.generator = (each for each in [1])
    return model


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("build", "errors"),
    [
        (fails_on_rank_1, ("rank 1 has raised FloatingPointError: this one fails", "FloatingPointError: this one")),
        (fails_in_backward_on_rank_1, ("rank 1 has raised FloatingPointError", "FloatingPointError: this one")),
        (no_copy_on_rank_1, ("rank 1 has raised TypeError: cannot pickle", "TypeError: cannot pickle")),
        (other_channels_on_rank_1, ("rank 1 has 0.weight of shape [5, 3, 3, 3]",) * 2),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_where_one_fails_all_do(processes: Any, build: Build, errors: tuple[str, str]) -> None:
    with pytest.raises(WorkerError) as raised:
        run(processes, build, images(3, 2))
    for text, error in zip(raised.value.errors, errors, strict=True):
        assert error in text
    assert run(processes, converted, images(1, 2)).ok  # and go on


@pytest.mark.parametrize(
    ("parts", "error"),
    [
        (
            images(2, size=9) + images(2, size=8),
            "can be laid end to end along dimension 0, got [2, 3, 9, 9], [2, 3, 8, 8]",
        ),
        ([images(2)[0], (images(2)[0],)], "the processes pass different types"),
    ],
    ids=["sizes", "types"],
)
def test_parts_without_a_union(processes: Any, parts: list[Any], error: str) -> None:
    with pytest.raises(WorkerError) as raised:
        run(processes, mixing_samples_in_between, parts)
    assert all(error in text for text in raised.value.errors)


def test_what_cannot_be_asked() -> None:
    x = images(2)[0]
    with pytest.raises(ValueError, match='"sum" or "mean", got \'median\''):
        syncbn.verify(network(), x, reduction="median")
    with pytest.raises(TypeError, match="one of shape"):
        syncbn.verify(network(), x, loss=lambda y: y)
    with pytest.raises(TypeError, match="no floating tensor: pass loss="):
        syncbn.verify(nn.Sequential(nn.Conv2d(3, 1, 1), Signs()), x)
    with pytest.raises(TypeError, match=r"weight, 0.bias.* have no size yet"):
        syncbn.verify(nn.Sequential(nn.LazyConv2d(3, 1)), x)


def test_parameters_that_are_spread_over_the_processes(processes: Any) -> None:
    """Of tensor parallelism: their parts would be sent as if they were the whole, and gloo would abort the process."""
    said = processes(2).run(_verify_tensor_parallel)
    assert all("1.weight, 1.bias are spread over the processes (DTensor)" in each for each in said)


def _verify_tensor_parallel() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 6)))
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"1": ColwiseParallel()})
    with pytest.raises(TypeError) as raised:
        syncbn.verify(model, torch.randn(3, 4))
    return str(raised.value)


class Signs(nn.Module):
    def forward(self, x: Tensor) -> str:
        return "positive"


# ---- the page


def test_the_page(processes: Any) -> None:
    for block in blocks("docs/doctor.md"):
        assert processes(2).run(_run_block, block) == [True, True]


def _run_block(code: str) -> bool:
    exec(code, {})
    return True
