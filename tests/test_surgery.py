"""convert and revert: what changes, what stays, and who is chosen."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from union import Step, assert_like_the_union, parts, train_step

import syncbn
from syncbn import Exchange, SyncBatchNorm

FEATURES = parts((3, 4, 5, 5), (2, 4, 5, 5))


class Net(nn.Module):
    """A backbone, two heads, and one layer at two places."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU())
        self.neck = nn.ModuleDict({"a": nn.BatchNorm2d(6), "b": nn.BatchNorm2d(6)})
        self.head = nn.Sequential(nn.Flatten(1), nn.LazyLinear(5), nn.BatchNorm1d(5))
        self.tied = self.neck["a"]

    def forward(self, x: Tensor) -> Tensor:
        x = self.neck["b"](self.neck["a"](self.backbone(x)))
        return self.head(self.tied(x))


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def synchronized(model: nn.Module) -> list[str]:
    return [name for name, layer in layers(model).items() if isinstance(layer, SyncBatchNorm)]


ALL = ["backbone.1", "neck.a", "neck.b", "head.2"]


# ---- what stays


def test_everything_about_a_layer_stays() -> None:
    """pytorch/pytorch#37454 and others: a conversion that rebuilds layers loses hooks and optimizers."""
    model = nn.Sequential(nn.BatchNorm2d(4, eps=1e-3, momentum=None), nn.BatchNorm1d(4, affine=False))
    layer = model[0]
    layer.weight.requires_grad_(False)
    layer.my_own = "attribute"
    layer.eval().double()
    called = []
    layer.register_forward_hook(lambda *_: called.append("hook"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [dict(vars(m)) for m in model]

    assert syncbn.convert(model) is model
    assert model[0] is layer
    for m, its in zip(model, before, strict=True):
        assert all(vars(m)[key] is value for key, value in its.items())
    assert isinstance(layer, SyncBatchNorm)
    assert isinstance(layer, nn.BatchNorm2d)
    assert not layer.training
    assert not layer.weight.requires_grad
    assert optimizer.param_groups[0]["params"][1] is layer.bias
    layer(torch.randn(2, 4, 3, 3, dtype=torch.float64))
    assert called == ["hook"]

    assert syncbn.revert(model) is model
    assert [type(m) for m in model] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert [vars(m) for m in model] == before


def test_an_optimizer_built_before_updates_the_converted_model() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    syncbn.convert(model)
    model(FEATURES[0].float()).square().sum().backward()
    optimizer.step()
    assert (model[0].weight != 1).all()


def test_a_single_layer_is_converted_itself() -> None:
    for cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        layer = cls(4)
        assert syncbn.convert(layer) is layer
        assert type(layer).__name__ == f"Sync{cls.__name__}"
        assert type(syncbn.revert(layer)) is cls


def test_a_model_without_batch_normalization_is_returned() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    assert syncbn.convert(model) is model
    assert syncbn.revert(model) is model


def test_classes_are_made_once() -> None:
    a, b, other = nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.BatchNorm1d(4)
    syncbn.convert(nn.Sequential(a, b, other))
    assert type(a) is type(b)
    assert type(a) is not type(other)
    assert repr(type(a)) == "<class 'syncbn.surgery.SyncBatchNorm2d'>"
    assert pickle.loads(pickle.dumps(type(a))) is type(a)
    assert repr(a) == repr(b) == f"Sync{nn.BatchNorm2d(4)!r}"


def test_a_model_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = syncbn.convert(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    assert model[1].weight.is_meta
    model.to_empty(device="cpu")
    model[1].reset_parameters()
    assert model(torch.randn(2, 4, 3, 3)).shape == (2, 4, 3, 3)


def test_converting_twice_changes_nothing() -> None:
    model = syncbn.convert(Net())
    classes = [type(m) for m in model.modules()]
    syncbn.convert(model)
    assert [type(m) for m in model.modules()] == classes
    syncbn.revert(model)
    assert {type(m) for m in layers(model).values()} == {nn.BatchNorm2d, nn.BatchNorm1d}


def test_quantization_aware_training_keeps_its_configuration() -> None:
    quantization = torch.ao.quantization
    model = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU()).train()
    model = quantization.fuse_modules_qat(model, [["0", "1", "2"]])
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    quantization.prepare_qat(model, inplace=True)
    plain = copy.deepcopy(model)
    syncbn.convert(model)
    assert synchronized(model) == ["0.bn"]
    x = FEATURES[0].float()
    torch.testing.assert_close(model(x), plain(x))
    syncbn.revert(model)
    assert type(model[0].bn) is nn.BatchNorm2d
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


# ---- several processes


def _after_wrapping(x: Tensor) -> Step:
    model = DistributedDataParallel(_net())
    step = train_step(syncbn.convert(model), x)
    # DistributedDataParallel has averaged what train_step has summed over two equal copies.
    step.grads = {name.removeprefix("module."): grad for name, grad in step.grads.items()}
    step.buffers = {name.removeprefix("module."): buffer for name, buffer in step.buffers.items()}
    return step


def _net() -> nn.Module:
    torch.manual_seed(0)
    net = Net()
    net.head[1] = nn.Linear(6 * 3 * 3, 5)
    return net.double()


def test_a_net_with_a_layer_at_two_places_is_the_plain_one_on_the_union(processes: Any) -> None:
    assert_like_the_union(processes, _net, FEATURES, tolerance=1e-7)


def test_a_model_in_distributed_data_parallel_is_converted_in_place(processes: Any) -> None:
    expected = train_step(_net(), torch.cat(FEATURES))
    for step in processes(2).run(_after_wrapping, per_rank=[(part,) for part in FEATURES]):
        torch.testing.assert_close(step.grads, expected.grads)
        torch.testing.assert_close(step.buffers, expected.buffers)


def _names() -> tuple[list[str], bool]:
    model = syncbn.convert(DistributedDataParallel(_net()), exclude="head")
    one = {layer._exchange for layer in model.modules() if isinstance(layer, SyncBatchNorm)}
    return [d.partition("(")[0] for d in next(iter(one))._layers], len(one) == 1


def test_layers_are_known_by_their_own_names_in_module_order(processes: Any) -> None:
    """Whatever is wrapped around the model."""
    assert processes(2).run(_names) == [(ALL[:3], True)] * 2


def _different_models() -> str:
    features = 4 + dist.get_rank()
    model = syncbn.convert(nn.ModuleDict({"stem": nn.BatchNorm2d(features)}))
    with pytest.raises(RuntimeError) as error:
        model["stem"](torch.randn(2, features, 3, 3))
    return str(error.value)


def test_different_models_are_refused_by_the_layers_name(processes: Any) -> None:
    for message in processes(2).run(_different_models):
        assert "rank 0 has stem(channels=4" in message
        assert "rank 1 has stem(channels=5" in message


def _lazy(x: Tensor) -> tuple[Tensor, list[Any], str]:
    model = syncbn.convert(nn.Sequential(nn.LazyBatchNorm2d(dtype=torch.float64)))
    before = type(model[0]).__name__
    y = model(x)
    after = [before, type(model[0]).__name__, "_lazy_name" in vars(model[0]), model[0].num_features]
    return y.detach(), after, model[0]._exchange._layers[0]


def test_a_lazy_layer_is_synchronized_in_its_first_forward(processes: Any) -> None:
    answers = processes(2).run(_lazy, per_rank=[(part,) for part in FEATURES])
    expected = nn.BatchNorm2d(4).double()(torch.cat(FEATURES))
    torch.testing.assert_close(torch.cat([y for y, _, _ in answers]), expected)
    for _, after, description in answers:
        assert after == ["SyncLazyBatchNorm2d", "SyncBatchNorm2d", False, 4]
        assert description.startswith("0(channels=4,")


def test_a_lazy_layer_that_has_not_seen_anything_can_be_reverted() -> None:
    layer = nn.LazyBatchNorm1d()
    before = dict(vars(layer))
    syncbn.revert(syncbn.convert(layer))
    assert type(layer) is nn.LazyBatchNorm1d
    assert vars(layer) == before
    layer(torch.randn(3, 2))
    assert type(layer) is nn.BatchNorm1d


def test_a_lazy_layer_learns_its_channels_from_a_state_dict() -> None:
    layer = syncbn.convert(nn.LazyBatchNorm2d())
    layer.load_state_dict(nn.BatchNorm2d(4).state_dict())
    layer(torch.randn(2, 4, 3, 3))
    assert layer.num_features == 4
    assert type(syncbn.revert(layer)) is nn.BatchNorm2d


class Activated(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class LazyActivated(nn.LazyBatchNorm2d):
    cls_to_become = Activated


def test_a_users_lazy_layer_becomes_the_users_layer() -> None:
    layer = syncbn.convert(LazyActivated())
    layer(torch.randn(2, 4, 3, 3))
    assert layer(torch.randn(2, 4, 3, 3)).min() == 0
    assert isinstance(layer, SyncBatchNorm)
    assert type(syncbn.revert(layer)) is Activated


# ---- exchanges


def test_all_layers_share_one_exchange() -> None:
    model = syncbn.convert(Net())
    assert len({layer._exchange for layer in layers(model).values()}) == 1
    exchange = Exchange()
    syncbn.convert(model, exchange)
    assert {layer._exchange for layer in layers(model).values()} == {exchange}
    syncbn.convert(model, exchange)
    assert len(exchange._layers) == 4, "a layer is not registered twice"


def test_hand_built_layers_join_and_get_names() -> None:
    model = nn.ModuleDict({"mine": SyncBatchNorm(4), "other": nn.BatchNorm2d(4)})
    syncbn.convert(model)
    assert model["mine"]._exchange is model["other"]._exchange
    assert model["mine"]._exchange._layers[0].startswith("mine(")
    syncbn.revert(model)
    assert [type(m) for m in model.values()] == [SyncBatchNorm, nn.BatchNorm2d]


def test_a_second_convert_keeps_the_exchanges_options() -> None:
    model = syncbn.convert(nn.Sequential(nn.BatchNorm2d(4)), Exchange(dedicated=False))
    assert not syncbn.convert(model)[0]._exchange.dedicated


# ---- who is chosen


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "backbone"}, ["backbone.1"]),
        ({"include": "neck.a"}, ["neck.a"]),
        ({"include": "neck.*"}, ["neck.a", "neck.b"]),
        ({"include": ["head", "neck.[b]"]}, ["neck.b", "head.2"]),
        ({"include": "tied"}, ["neck.a"]),
        ({"include": nn.BatchNorm1d}, ["head.2"]),
        ({"include": nn.ModuleDict}, ["neck.a", "neck.b"]),
        ({"include": "*"}, ALL),
        ({"include": []}, []),
        ({"exclude": nn.BatchNorm2d}, ["head.2"]),
        ({"exclude": ("neck", nn.BatchNorm1d)}, ["backbone.1"]),
        ({"exclude": nn.BatchNorm3d}, ALL),
        ({"include": "neck", "exclude": "tied"}, ["neck.b"]),
    ],
    ids=str,
)
def test_include_and_exclude(options: Any, expected: list[str]) -> None:
    assert synchronized(syncbn.convert(Net(), **options)) == expected


def test_sets_of_names() -> None:
    model = syncbn.convert(Net(), include={"neck", "backbone"}, exclude={"backbone.*"})
    assert synchronized(model) == ["neck.a", "neck.b"]


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_name_that_matches_nothing_is_refused(argument: str) -> None:
    model = Net()
    with pytest.raises(ValueError, match=r"'neck\.c' matches no batch normalization layer.*neck\.a"):
        syncbn.convert(model, **{argument: ["head", "neck.c"]})
    with pytest.raises(ValueError, match=r"'backbone\.0' matches no"):
        syncbn.convert(model, **{argument: "backbone.0"})
    assert synchronized(model) == []


def test_what_is_no_name_is_refused() -> None:
    model = Net()
    with pytest.raises(TypeError, match=r"expected include to be a layer's name.*got 3"):
        syncbn.convert(model, include=[3])
    with pytest.raises(TypeError, match=r"expected exclude to be .*got <class 'int'>"):
        syncbn.convert(model, exclude=int)


def test_a_group_that_is_none_is_refused_before_anything_is_changed() -> None:
    model = Net()
    with pytest.raises(TypeError, match="expected process_group to be a ProcessGroup"):
        syncbn.convert(model, "all of them")
    assert synchronized(model) == []


# ---- copies, pickles, checkpoints


class Tagged(nn.BatchNorm2d):
    """Pickles itself in its own way."""

    def __init__(self, channels: int, tag: str) -> None:
        super().__init__(channels)
        self.tag = tag

    def __reduce__(self) -> Any:
        return Tagged, (self.num_features, self.tag), vars(self)


def _trained() -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(4), Activated(4), Tagged(4, "x"), nn.SyncBatchNorm(4), SyncBatchNorm(4))
    model(FEATURES[0].float())
    return syncbn.convert(model)


def _torch_saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle 0": lambda model: pickle.loads(pickle.dumps(model, protocol=0)),
    "torch.save": _torch_saved,
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_are_converted_and_can_be_reverted(duplicate: Any) -> None:
    model = _trained()
    copied = duplicate(model)
    assert [type(m) for m in copied] == [type(m) for m in model]
    assert len({m._exchange for m in copied}) == 1
    assert copied[0]._exchange is not model[0]._exchange
    assert copied[2].tag == "x"
    x = FEATURES[1].float()
    torch.testing.assert_close(copied(x), model(x))
    syncbn.revert(copied)
    syncbn.revert(model)
    assert [type(m) for m in copied] == [nn.BatchNorm2d, Activated, Tagged, nn.SyncBatchNorm, SyncBatchNorm]
    assert [vars(m).keys() for m in copied] == [vars(m).keys() for m in model]


def test_a_copied_layer_is_one_of_the_same_class() -> None:
    layer = syncbn.convert(nn.BatchNorm2d(4))
    assert copy.copy(layer).weight is layer.weight
    assert type(copy.deepcopy(layer)) is type(layer)


def test_a_pickled_model_loads_where_only_torch_and_syncbn_are_imported(tmp_path: Any) -> None:
    model = syncbn.convert(nn.Sequential(nn.BatchNorm2d(4), nn.SyncBatchNorm(4), nn.BatchNorm1d(3)))
    torch.save(model, tmp_path / "model.pt")
    program = (
        "import sys, torch; model = torch.load(sys.argv[1], weights_only=False); import syncbn; "
        "print(*[type(m).__name__ for m in model], *[type(m).__name__ for m in syncbn.revert(model)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "model.pt")],
        capture_output=True,
        text=True,
        check=True,
    )
    converted = ["SyncBatchNorm2d", "SyncBatchNorm", "SyncBatchNorm1d"]
    reverted = ["BatchNorm2d", "SyncBatchNorm", "BatchNorm1d"]
    assert done.stdout.split() == converted + reverted


def test_state_dicts_move_freely() -> None:
    kinds = [nn.BatchNorm2d, nn.SyncBatchNorm, SyncBatchNorm, lambda c: syncbn.convert(nn.BatchNorm2d(c))]
    for source in kinds:
        for target in kinds:
            a, b = source(4), target(4)
            a.running_mean.normal_()
            b.load_state_dict(a.state_dict(), strict=True)
            torch.testing.assert_close(b.state_dict(), a.state_dict())
            assert b.state_dict()._metadata == a.state_dict()._metadata


# ---- compiled models


def test_compiled_models_are_converted_in_place() -> None:
    layer = nn.BatchNorm2d(4)
    model = torch.compile(nn.Sequential(layer), backend="eager")
    x = FEATURES[0].float()
    before = model(x)
    syncbn.convert(model)
    assert layer._exchange._layers[0].startswith("0("), "the wrapper's name is not the layer's"
    torch.testing.assert_close(model(x), before)
    assert layer.num_batches_tracked == 2
    syncbn.revert(model)
    assert type(layer) is nn.BatchNorm2d


def _compiled_before(x: Tensor) -> Tensor:
    layer = nn.BatchNorm2d(4).double()
    model = torch.compile(layer, backend="eager")
    model(x)
    syncbn.convert(model)
    layer._exchange.connect(x.device)
    return model(x).detach()


def test_a_model_compiled_before_is_synchronized_after(processes: Any) -> None:
    """What was compiled must not be used any more."""
    answers = processes(2).run(_compiled_before, per_rank=[(part,) for part in FEATURES])
    torch.testing.assert_close(torch.cat(answers), nn.BatchNorm2d(4).double()(torch.cat(FEATURES)))
