"""What fuse leaves alone: each of these modules would do something else if it were fused."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from typing import Any

import pytest
import torch
from test_fusion import assert_same, fused, iadd, pair, plainly, step
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import syncbn

pytest.importorskip("torchvision")

import torchvision

X = torch.randn(2, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
FLAG = False
SCALE = torch.ones(1)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        self.bn, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.relu, self.inplace = nn.ReLU(), nn.ReLU(inplace=True)


class ReadTwice(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(x)
        return self.relu(y), y


class ReadBeforeInPlace(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(x)
        return y.exp() + self.inplace(y)


class ReadAfterInPlace(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(x)
        y.relu_()
        return y


class SumReadTwice(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x)) + x
        return self.relu(y) * y


class AddedToAnother(Base):
    """The residual is what is changed in place, and read later."""

    def forward(self, x: Tensor) -> Any:
        identity = self.conv(x)
        y = identity
        y += self.bn(self.conv2(x))
        return self.relu(y) + identity


class AddedWithAnotherWeight(Base):
    def forward(self, x: Tensor) -> Any:
        return self.relu(torch.add(self.bn(self.conv(x)), x, alpha=2))


class AddedNumber(Base):
    def forward(self, x: Tensor) -> Any:
        return self.relu(self.bn(self.conv(x)) + 1)


class AddedSize(Base):
    def forward(self, x: Tensor) -> Any:
        return self.relu(self.bn(self.conv(x)) + x.shape[0]) * self.relu(self.bn2(self.conv2(x)) + x.size(1))


class AddedArgument(Base):
    def forward(self, x: Tensor, offset: Any = 0.5) -> Any:
        return self.relu(self.bn(self.conv(x)) + offset)


class AddedToItself(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(x)
        return self.relu(y + y)


class Subtracted(Base):
    def forward(self, x: Tensor) -> Any:
        return self.relu(x - self.bn(self.conv(x)))


class InputChangedBeforeTheSum(Base):
    def forward(self, x: Tensor) -> Any:
        x = self.conv(x)
        y = self.bn(x)
        x *= 2
        return self.relu(y + self.conv2(x))


class CalledTwice(Base):
    def forward(self, x: Tensor) -> Any:
        return self.bn(self.relu(self.bn(x)))


class NegativeSlope(Base):
    def forward(self, x: Tensor) -> Any:
        return F.leaky_relu(self.bn(x), -0.1)


class ChangedBeforeBackward(Base):
    """SiLU's backward needs the residual, where the sum is kept unfused."""

    def forward(self, x: Tensor) -> Any:
        residual = self.conv(x).sigmoid().exp() + 1
        y = F.silu(self.bn(self.conv2(x)) + residual)
        residual.mul_(2)
        return y


class LeakyChangedInPlace(Base):
    def forward(self, x: Tensor) -> Any:
        y = F.leaky_relu(self.bn(self.conv(x)) + x, 0.1)
        y *= 2
        return y


class OnlyInTraining(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        return self.relu(y) if self.training else y


class OtherwiseInTraining(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        return self.relu(y) if self.training else self.relu(y - x)


class ReturnsAnotherKindOfDict(Base):
    """torch.fx would make it a plain one."""

    def forward(self, x: Tensor) -> Any:
        return OrderedDict(out=F.relu(self.bn(x)))


class DropsInTraining(Base):
    def forward(self, x: Tensor) -> Any:
        return F.dropout(F.relu(self.bn(self.conv(x))), 0.5, self.training)


class AsksForAType(Base):
    def forward(self, x: Any) -> Any:
        return self.relu(self.bn(x if isinstance(x, Tensor) else x[0]))


class AsksForTheType(Base):
    def forward(self, x: Any) -> Any:
        return self.bn(x) if type(x) in (Tensor,) else F.relu(self.bn(x))


class OptionalArgument(Base):
    def forward(self, x: Tensor, before: Tensor | None = None) -> Any:
        y = self.bn(self.conv(x))
        return self.relu(y) if before is not None else y


class Counts(Base):
    calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return F.relu(self.bn(x)) * self.calls


class KeepsInAList(Base):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def forward(self, x: Tensor) -> Any:
        self.kept.append(x)
        return F.relu(self.bn(x)) * len(self.kept)


class OnlyKeepsInAList(KeepsInAList):
    def forward(self, x: Tensor) -> Any:
        self.kept.append(x)
        return F.relu(self.bn(x))


class SetsAnAttributeOfATensor(Base):
    def forward(self, x: Any) -> Any:
        x.seen = True
        return F.relu(self.bn(x))


class ComparesModes(Base):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x)) if self.conv.training == self.training else self.bn(x)


class MakesAConstant(Base):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x)) * SCALE


class WithoutGradients(Base):
    def forward(self, x: Tensor) -> Any:
        with torch.no_grad():
            y = F.relu(self.bn(x))
        return y + self.conv(x)


class Decorated(Base):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x)) + self.conv.weight.sum() * x.requires_grad_().sum()


class AsksForGradients(Base):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x)) if torch.is_grad_enabled() else self.bn(x)


class DrawsNumbers(Base):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x)) * torch.rand(1)


class DrawsPythonNumbers(Base):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x)) * random.random()


class Prints(Base):
    def forward(self, x: Tensor) -> Any:
        print("called")
        return F.relu(self.bn(x))


class ReadsAGlobal(Base):
    def forward(self, x: Tensor) -> Any:
        return self.bn(x) if FLAG else self.relu(self.bn(x))


class Tries(Base):
    def forward(self, x: Tensor) -> Any:
        try:
            return self.relu(self.bn(x)) if x.sum() > 1e9 else self.bn(x)
        except Exception:
            return self.relu(self.bn(x))


class Branches(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(x)
        return self.relu(y) if x.sum() > 1e9 else y


class AsksForAChildsMode(Base):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.bn(x)) if self.conv.training else self.bn(x)


class HasASecondWayIn(Base):
    def forward(self, x: Tensor) -> Any:
        return self.relu(self.bn(x))

    def features(self, x: Tensor) -> Any:
        return self.bn(x)


class UsesItsBuffers(Base):
    def forward(self, x: Tensor) -> Any:
        y = self.bn(self.conv(x))
        return F.relu(y + x * self.bn.running_mean.sum())


class Checkpointed(Base):
    def forward(self, x: Tensor) -> Any:
        return checkpoint(self._inner, x, use_reentrant=False)

    def _inner(self, x: Tensor) -> Any:
        return F.relu(self.bn(x))


class Captured(Base):
    def __init__(self) -> None:
        super().__init__()
        flags = [False]

        def maybe(y: Tensor) -> Tensor:
            return y if flags[0] else F.relu(y)

        self.maybe = maybe

    def forward(self, x: Tensor) -> Any:
        return self.maybe(self.bn(x))


class GivesAMask(Base):
    def forward(self, x: Tensor) -> Any:
        return self.relu(self.bn(x, mask=x[:, :1] > 0))


MODULES = [
    ReadTwice,
    ReadBeforeInPlace,
    ReadAfterInPlace,
    SumReadTwice,
    AddedToAnother,
    AddedWithAnotherWeight,
    AddedNumber,
    AddedSize,
    AddedArgument,
    AddedToItself,
    Subtracted,
    InputChangedBeforeTheSum,
    CalledTwice,
    NegativeSlope,
    ChangedBeforeBackward,
    LeakyChangedInPlace,
    OnlyInTraining,
    OtherwiseInTraining,
    ReturnsAnotherKindOfDict,
    DropsInTraining,
    AsksForAType,
    AsksForTheType,
    OptionalArgument,
    Counts,
    KeepsInAList,
    OnlyKeepsInAList,
    SetsAnAttributeOfATensor,
    ComparesModes,
    MakesAConstant,
    WithoutGradients,
    Decorated,
    AsksForGradients,
    DrawsNumbers,
    DrawsPythonNumbers,
    Prints,
    ReadsAGlobal,
    Tries,
    Branches,
    AsksForAChildsMode,
    HasASecondWayIn,
    UsesItsBuffers,
    Checkpointed,
    Captured,
    GivesAMask,
]


@pytest.mark.parametrize("module", MODULES)
def test_what_is_not_proved_is_left_alone(module: type[nn.Module], capsys: Any) -> None:
    random.seed(0)
    model = syncbn.convert(module())
    before = set(vars(model)), len(getattr(model, "kept", ()))
    state, numbers = torch.get_rng_state(), random.getstate()
    syncbn.fuse(model)
    assert fused(model) == []
    assert type(model) is module
    assert before == (set(vars(model)), len(getattr(model, "kept", ())))
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == numbers
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("module", MODULES[: MODULES.index(DropsInTraining)])
def test_they_do_what_they_did(module: type[nn.Module]) -> None:
    if module is InputChangedBeforeTheSum:  # autograd refuses that
        with torch.no_grad():
            a, b = (model(X) for model in pair(module))
        torch.testing.assert_close(a, b)
    else:
        assert_same(*pair(module), X)


class Hooked(Base):
    def forward(self, x: Tensor) -> Any:
        return self.relu(self.bn(x))


HOOKS = {
    "forward": lambda m: m.register_forward_hook(lambda *_: None),
    "forward with arguments": lambda m: m.register_forward_hook(lambda *_: None, with_kwargs=True, always_call=True),
    "before forward": lambda m: m.register_forward_pre_hook(lambda *_: None),
    "backward": lambda m: m.register_full_backward_hook(lambda *_: None),
    "before backward": lambda m: m.register_full_backward_pre_hook(lambda *_: None),
}


@pytest.mark.parametrize("where", ["bn", "relu"])
@pytest.mark.parametrize("register", HOOKS.values(), ids=HOOKS)
def test_a_hook_between_is_respected(register: Any, where: str) -> None:
    for build in (Hooked, lambda: nn.Sequential(OrderedDict(bn=nn.BatchNorm2d(3), relu=nn.ReLU()))):
        model = syncbn.convert(build())
        handle = register(model.get_submodule(where))
        assert fused(syncbn.fuse(model)) == []
        handle.remove()
        assert fused(syncbn.fuse(model)) == ["bn"]


def test_a_forward_set_on_one_object() -> None:
    for where in ("", "bn", "relu"):
        model = syncbn.convert(Hooked())
        target = model.get_submodule(where)
        target.forward = target.forward
        assert fused(syncbn.fuse(model)) == []


def test_layers_with_a_forward_of_their_own() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    model = syncbn.convert(nn.Sequential(Doubled(3), nn.ReLU()))
    assert fused(syncbn.fuse(model)) == []


def test_a_layer_at_two_places() -> None:
    bn, relu = nn.BatchNorm2d(3), nn.ReLU()
    model = syncbn.convert(nn.Sequential(nn.Sequential(bn, relu), nn.Sequential(bn, nn.Conv2d(3, 3, 1))))
    assert fused(syncbn.fuse(model)) == []
    model = syncbn.convert(nn.ModuleDict({"a": nn.Sequential(bn, relu), "b": bn}))
    assert fused(syncbn.fuse(model)) == []


def test_a_lazy_layer_and_a_parametrized_one() -> None:
    lazy = syncbn.convert(nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU()))
    assert fused(syncbn.fuse(lazy)) == []
    parametrized = syncbn.convert(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    nn.utils.parametrize.register_parametrization(parametrized[0], "weight", nn.Softplus())
    assert fused(syncbn.fuse(parametrized)) == []


# ---- calls from further up


class Inner(Base):
    def forward(self, x: Tensor) -> Any:
        return self.relu(self.bn(self.conv(x)))


class CallsAnothersLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Inner(), Inner())

    def forward(self, x: Tensor) -> Any:
        return self.blocks(x) + self.blocks[0].bn(x)


class CallsIfItMust(CallsAnothersLayer):
    """Cannot be followed."""

    def forward(self, x: Tensor) -> Any:
        return self.blocks(x) if x.sum() > 1e9 else self.blocks[0].bn(x)


class TakesApart(nn.Module):
    """As perceptual losses do."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())
        self.head = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x: Tensor) -> Any:
        taps = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.BatchNorm2d):
                taps.append(x)
        return taps[0] + self.head(x)


class TakesApartByName(TakesApart):
    def forward(self, x: Tensor) -> Any:
        y = self.features[1](self.features[0](x))
        return self.features[2](y) + self.head(y)


class Slices(TakesApart):
    def forward(self, x: Tensor) -> Any:
        return self.head(self.features[:2](x))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (CallsAnothersLayer, ["blocks.1.bn"]),
        (CallsIfItMust, []),
        (TakesApart, ["head.0"]),
        (TakesApartByName, ["head.0"]),
        (Slices, ["head.0"]),
    ],
)
def test_a_layer_that_is_called_from_further_up(module: type[nn.Module], expected: list[str]) -> None:
    plain, model = pair(module)
    assert fused(model) == expected
    assert_same(plain, model, X)


def test_models_traced_or_scripted_by_others() -> None:
    model = syncbn.convert(torch.fx.symbolic_trace(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())))
    assert fused(syncbn.fuse(model)) == []
    model = nn.Sequential(torch.jit.script(nn.Conv2d(3, 3, 1)), nn.BatchNorm2d(3), nn.ReLU())
    assert fused(syncbn.fuse(syncbn.convert(model))) == ["1"]
    holder = Base()
    holder.conv = torch.jit.script(holder.conv)
    holder.__class__ = Inner
    assert fused(syncbn.fuse(syncbn.convert(holder))) == ["bn"]


# ---- what forward depends on may change


class Optional(Base):
    tap = False

    def __init__(self) -> None:
        super().__init__()
        self.options = {"scale": [1.0]}
        self.downsample: nn.Module | None = None
        self.drop = nn.Identity()

    def forward(self, x: Tensor) -> Any:
        y = self.drop(self.bn(self.conv(x)))
        if self.tap:
            return y
        y = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return self.relu(self.bn2(self.conv2(y))) * self.options["scale"][0]


def _change_options(model: Any) -> None:
    model.options["scale"][0] = 2.0


CHANGES = {
    "self.tap": lambda model: setattr(model, "tap", True),
    "self.options": _change_options,
    "self.downsample": lambda model: setattr(model, "downsample", nn.Conv2d(3, 3, 1).double()),
    "the class of self.drop": lambda model: setattr(model, "drop", nn.Dropout(0.5)),
    "self.bn._fused_activation": lambda model: setattr(model, "bn", nn.BatchNorm2d(3).double()),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_option_is_noticed_and_can_be_fused_again(what: str) -> None:
    plain, model = pair(Optional)
    assert fused(model) == ["bn", "bn2"]
    assert_same(plain, model, X)
    for each in (plain, model):
        torch.manual_seed(0)
        CHANGES[what](each)
    with pytest.raises(RuntimeError, match=f"{what} is not what it was .* Call syncbn.fuse"):
        model(X)
    syncbn.fuse(model)
    assert_same(plain, model, X)


def test_an_option_is_noticed_where_forward_was_not_rewritten() -> None:
    getter = torchvision.models._utils.IntermediateLayerGetter
    model = getter(torchvision.models.resnet18(weights=None), {"layer1": "out"})
    syncbn.fuse(syncbn.convert(model))
    assert fused(model)[0] == "bn1"
    assert isinstance(model(X.float()), OrderedDict)
    model.return_layers["bn1"] = "stem"
    with pytest.raises(RuntimeError, match=r"self\.return_layers is not what it was"):
        model(X.float())


# ---- random modules


class Random(nn.Module):
    """A random program over convolutions, normalizations, sums, activations, aliases, in place or not."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        choose = random.Random(seed)
        self.bns = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(choose.randint(1, 4)))
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1, bias=False) for _ in range(2))
        self.acts = nn.ModuleList([nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(0.1), nn.SiLU(), nn.Hardswish()])
        kinds = ["bn", "bn", "bn", "conv", "act", "act", "sum", "sum", "other"]
        self.program = [(choose.choice(kinds), *choose.choices(range(60), k=4)) for _ in range(choose.randint(4, 12))]
        order = list(range(len(self.bns)))
        self.order = order if choose.random() < 0.8 else choose.choices(order, k=len(order))

    def forward(self, x: Tensor) -> Any:
        values, remaining = [self.convs[0](x)], list(self.order)
        for kind, first, second, how, then in self.program:
            # mostly the newest value, so that chains come into being
            a = values[-1] if first % 4 else values[first % len(values)]
            b = values[second % len(values)]
            if kind == "bn" and remaining:
                a = self.bns[remaining.pop()](self.convs[1](a) if how % 3 else a)
                kind = ("act", "sum", "sum then act", "none")[then % 4]
            if kind.startswith("sum"):
                a = SUMS[how % len(SUMS)](a, b)
            if kind.endswith("act"):
                a = (*self.acts, F.relu, torch.relu_, Tensor.relu, F.silu)[second % 9](a)
            elif kind == "other":
                a = OTHERS[how % len(OTHERS)](a)
            values.append(a)
        return values[-1] + values[len(values) // 2]


SUMS = (lambda a, b: a + b, iadd, lambda a, b: a.add_(b), lambda a, b: torch.add(b, a), lambda a, b: iadd(b, a))
OTHERS = (lambda a: a * 0.5, lambda a: a.mul_(0.5), lambda a: a[:, :, :1], lambda a: a.view_as(a))


def test_random_modules_do_what_they_did() -> None:
    """Whatever the plain module can do, the fused one can; fusing may not make anything fail."""
    sites = compared = 0
    for seed in range(120):
        plain, model = pair(lambda seed=seed: Random(seed))  # type: ignore[misc]
        sites += len(fused(model))
        try:
            step(copy.deepcopy(plain), X, plainly)
        except RuntimeError:  # it changes in place what backward needs
            continue
        assert_same(plain, model, X, steps=1)
        compared += 1
    assert compared > 60
    assert sites > 40


class _Unfollowed(nn.Module):
    """Its forward cannot be followed, and hands out what each layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self._block(3), self._block(4)])
        self.named = nn.ModuleDict({"a": self._block(4)})
        self.stem = self._block(4)
        self.body = nn.Module()
        self.body.stem = self._block(4)

    @staticmethod
    def _block(channels: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(channels, 4, 1), nn.BatchNorm2d(4), nn.ReLU())

    def forward(self, x: Tensor) -> list[Tensor]:
        with torch.enable_grad():
            outputs: list[Tensor] = []
            for layer in self.layers():
                x = layer(x)
                outputs.append(x)
            return outputs


class _Nested(_Unfollowed):
    def layers(self) -> list[nn.Module]:
        return [layer for block in self.blocks for layer in block]


class _Values(_Unfollowed):
    def layers(self) -> list[nn.Module]:
        return [*self.blocks[0], *[layer for block in self.named.values() for layer in block]]


class _Deeper(_Unfollowed):
    def layers(self) -> list[nn.Module]:
        return [*self.blocks[0], *self.body.stem]


class _Modules(_Unfollowed):
    def layers(self) -> list[nn.Module]:
        kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
        return [each for each in self.modules() if isinstance(each, kinds)]


class _ByName(_Unfollowed):
    def layers(self) -> list[nn.Module]:
        return [self.get_submodule(f"blocks.0.{i}") for i in range(3)]


class _ByGetattr(_Unfollowed):
    def layers(self) -> list[nn.Module]:
        return [*self.blocks[0], *getattr(self, "stem")]  # noqa: B009


class _ByAnother(_Unfollowed):
    def layers(self) -> list[nn.Module]:
        return _walk(self)


def _walk(module: Any) -> list[nn.Module]:
    return [layer for block in module.blocks for layer in block]


@pytest.mark.parametrize("cls", [_Nested, _Values, _Deeper, _Modules, _ByName, _ByGetattr, _ByAnother])
def test_code_that_cannot_be_followed_may_take_sequentials_apart(cls: type[_Unfollowed]) -> None:
    """What it hands out between normalization and activation must stay what it was."""
    torch.manual_seed(0)
    plain = syncbn.convert(cls().double())
    model = syncbn.fuse(copy.deepcopy(plain))
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(x))


def test_hooks_on_all_modules_are_hooks_between() -> None:
    def double(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        return output * 2 if isinstance(module, nn.BatchNorm2d) else None

    handle = torch.nn.modules.module.register_module_forward_hook(double)
    try:
        model = syncbn.fuse(syncbn.convert(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())))
        assert model[1]._fused_activation is None
    finally:
        handle.remove()


def test_a_leaky_relu_after_a_sum_whose_output_may_be_changed() -> None:
    """Backward would need the output, which the unfused one does not unless it works in place."""

    class Leaky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(self.bn(self.conv(x)) + x, 0.1)

    model = syncbn.fuse(syncbn.convert(nn.Sequential(nn.Sequential(Leaky()), nn.ReLU(inplace=True))))
    model(torch.randn(2, 3, 4, 4)).sum().backward()
