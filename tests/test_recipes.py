"""Which layers convert follows, how, and which it refuses."""

from __future__ import annotations

import functools
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from union import assert_like_the_union, parts

import syncbn
from syncbn import SyncBatchNorm

pytest.importorskip("timm")
pytest.importorskip("torchvision")

import timm
import torchvision

IMAGES = parts((2, 3, 32, 32), (1, 3, 32, 32))
FEATURES = parts((3, 4, 5, 5), (2, 4, 5, 5))


# ---- real models


def resnet18() -> nn.Module:
    return torchvision.models.resnet18(num_classes=4)


def timm_model(name: str) -> nn.Module:
    return timm.create_model(name, pretrained=False, num_classes=4)


@pytest.mark.parametrize(
    "build",
    [resnet18, functools.partial(timm_model, "mobilenetv3_small_050")],
    ids=["torchvision resnet18", "timm mobilenetv3_small_050"],
)
def test_a_converted_model_in_two_processes_is_the_plain_one_on_the_union(processes: Any, build: Any) -> None:
    # Deep networks of few values per channel amplify rounding; without synchronization the difference is ~1.
    assert_like_the_union(processes, build, IMAGES, tolerance=1e-6)


def test_timms_layers_are_followed() -> None:
    model = syncbn.convert(timm_model("efficientnet_b0"))
    layers = [m for m in model.modules() if isinstance(m, timm.layers.BatchNormAct2d)]
    assert len(layers) == 49
    assert all(isinstance(layer, SyncBatchNorm) for layer in layers)


# ---- subclasses that add behaviour


class Scaled(nn.BatchNorm2d):
    """Adds before, after, and a parameter of its own."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 1) * self.scale


class Shifted(Scaled):
    """A second level, in the older spelling of super."""

    def forward(self, x: Tensor) -> Tensor:
        return super(Shifted, self).forward(x) - 2  # noqa: UP008


class Doubling:
    """A mixin that is no module."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)  # type: ignore[misc]


class Mixed(Doubling, nn.BatchNorm2d):
    pass


def logged(forward: Any) -> Any:
    @functools.wraps(forward)
    def wrapper(self: nn.Module, x: Tensor) -> Tensor:
        return forward(self, x)

    return wrapper


class Decorated(nn.BatchNorm2d):
    @logged
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class InALambda(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        normalize = lambda y: super(InALambda, self).forward(y)  # noqa: E731
        return normalize(x)


class AnyShape(nn.modules.batchnorm._BatchNorm):
    """Derived from torch's common base, with an input check of its own."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() == 2:
            raise ValueError("no vectors, please")


@pytest.mark.parametrize("cls", [Scaled, Shifted, Mixed, Decorated, InALambda, AnyShape])
def test_a_subclass_keeps_what_it_adds(processes: Any, cls: Any) -> None:
    assert_like_the_union(processes, functools.partial(cls, 4), FEATURES)


def test_timms_split_batch_norm_is_followed_with_its_parts(processes: Any) -> None:
    build = functools.partial(timm.layers.SplitBatchNorm2d, 4, num_splits=2)
    layer = syncbn.convert(build())
    assert isinstance(layer, SyncBatchNorm)
    assert isinstance(layer.aux_bn[0], SyncBatchNorm)
    # Each process splits its part: first halves form one batch, second halves the other.
    a, b, c, d = parts((1, 4, 5, 5), (1, 4, 5, 5), (1, 4, 5, 5), (1, 4, 5, 5))
    (one, two) = processes(2).run(_split, per_rank=[(torch.cat([a, b]),), (torch.cat([c, d]),)])
    expected = build().double()(torch.cat([a, c, b, d]))
    torch.testing.assert_close(torch.cat([one[:1], two[:1], one[1:], two[1:]]), expected)


def _split(x: Tensor) -> Tensor:
    return syncbn.convert(timm.layers.SplitBatchNorm2d(4, num_splits=2).double())(x).detach()


@pytest.mark.parametrize(
    ("cls", "wrong"),
    [(nn.BatchNorm1d, 4), (nn.BatchNorm2d, 3), (nn.BatchNorm3d, 4), (Scaled, 3), (AnyShape, 2)],
)
def test_a_converted_layer_keeps_its_input_check(cls: Any, wrong: int) -> None:
    plain, x = cls(4), torch.randn(2, 4, 3, 3, 3)[(..., *[0] * (5 - wrong))]
    with pytest.raises(ValueError) as of_the_original:  # noqa: PT011 (its message is compared)
        plain(x)
    with pytest.raises(ValueError) as of_the_converted:  # noqa: PT011
        syncbn.convert(plain)(x)
    assert str(of_the_converted.value) == str(of_the_original.value)


# ---- subclasses that cannot be followed


class OwnNormalization(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training)


class ByName(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return nn.BatchNorm2d.forward(self, x).relu()


TorchsOwn = nn.BatchNorm2d


class ByAnotherName(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else TorchsOwn.forward(self, x)


class Both(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if x.shape[0] > 1:
            return super().forward(x)
        return F.batch_norm(x, None, None, self.weight, self.bias, True)


class SynchronizedElsewhere(nn.BatchNorm2d):
    """As several packages do: their own statistics in training, super's in eval."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        mean = x.mean([0, 2, 3])
        self.running_mean = self.running_mean * 0.9 + mean.detach() * 0.1
        return x - mean[:, None, None]


class NoCode(nn.BatchNorm2d):
    forward = functools.partialmethod(nn.BatchNorm2d.forward)


class OwnCall(nn.BatchNorm2d):
    def __call__(self, x: Tensor) -> Tensor:
        return OwnNormalization.forward(self, x)


class Inherits(OwnNormalization):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class OtherSuper(nn.BatchNorm2d):
    """Calls super, and a forward, but not super's forward."""

    def forward(self, x: Tensor) -> Tensor:
        super().train(True)
        return self.inner.forward(x)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (OwnNormalization, "OwnNormalization.forward never calls super().forward"),
        (ByName, "ByName.forward calls BatchNorm2d.forward by name"),
        (ByAnotherName, "ByAnotherName.forward calls TorchsOwn.forward by name"),
        (Both, "Both.forward calls super().forward, but also normalizes by itself (batch_norm)"),
        (SynchronizedElsewhere, "but also normalizes by itself (running_mean)"),
        (NoCode, "NoCode.forward has no Python code to read"),
        (OwnCall, "OwnCall.__call__ never calls super().__call__"),
        (Inherits, "OwnNormalization.forward never calls super().forward"),
        (OtherSuper, "OtherSuper.forward never calls super().forward"),
    ],
)
def test_a_subclass_that_cannot_be_followed_is_refused_by_name(cls: Any, reason: str) -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.Sequential(cls(4)))
    with pytest.raises(TypeError) as error:
        syncbn.convert(model)
    assert f"1.0 ({cls.__name__}): " in str(error.value)
    assert reason in str(error.value)
    assert [type(model[0]), type(model[1][0])] == [nn.BatchNorm2d, cls], "nothing may have been changed"
    assert "_exchange" not in vars(model[0])


def test_all_layers_at_fault_are_named_and_can_be_left_out() -> None:
    model = nn.ModuleDict({"a": OwnNormalization(4), "b": nn.BatchNorm2d(4), "c": ByName(4)})
    with pytest.raises(TypeError, match=r"(?s)a \(OwnNormalization\).*c \(ByName\).*exclude="):
        syncbn.convert(model)
    syncbn.convert(model, exclude=["a", "c"])
    assert [type(m).__name__ for m in model.values()] == ["OwnNormalization", "SyncBatchNorm2d", "ByName"]


def test_a_forward_set_on_the_object_is_refused() -> None:
    """Hook libraries do this: the object's forward would go on calling the unsynchronized one."""
    layer = nn.BatchNorm2d(4)
    former = layer.forward
    layer.forward = types.MethodType(lambda self, x: former(x), layer)
    with pytest.raises(TypeError, match="a forward was set on this one object"):
        syncbn.convert(layer)
    del layer.forward
    assert isinstance(syncbn.convert(layer), SyncBatchNorm)


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 2


def test_a_parametrized_layer_is_refused_but_a_converted_one_can_be_parametrized() -> None:
    layer = nn.BatchNorm2d(4)
    nn.utils.parametrize.register_parametrization(layer, "weight", Halved())
    with pytest.raises(TypeError, match="parametrize has changed its class"):
        syncbn.convert(layer)
    nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)

    syncbn.convert(layer)
    nn.utils.parametrize.register_parametrization(layer, "weight", Halved())
    assert isinstance(layer, SyncBatchNorm)
    with pytest.raises(TypeError, match=r"cannot revert.*ParametrizedSyncBatchNorm2d"):
        syncbn.revert(layer)
    nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    assert type(syncbn.revert(layer)) is nn.BatchNorm2d


def test_a_scripted_model_is_refused() -> None:
    model = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(TypeError, match=r"1 \(RecursiveScriptModule\): it is compiled by TorchScript"):
        syncbn.convert(model)


def test_an_exported_graph_is_refused() -> None:
    """Its normalizations are no layers any more: they would be passed over in silence."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    exported = torch.export.export(model, (torch.randn(2, 3, 4, 4),)).module()
    with pytest.raises(TypeError, match=r"GraphModule.*batch_norm"):
        syncbn.convert(exported)


def test_several_devices_in_one_process_are_refused() -> None:
    model = nn.DataParallel(nn.BatchNorm2d(4))
    assert isinstance(syncbn.convert(model).module, SyncBatchNorm), "without devices it changes nothing"
    syncbn.revert(model)
    model.device_ids = [0, 1]
    with pytest.raises(TypeError, match="DataParallel over several devices"):
        syncbn.convert(model)
    assert type(model.module) is nn.BatchNorm2d


class NeedsATag(nn.BatchNorm2d):
    """Its subclasses cannot be made without an argument."""

    def __init_subclass__(cls, *, tag: str) -> None:
        super().__init_subclass__()


class Sealed(type):
    """A metaclass that has the last word about its classes."""

    def __new__(mcs, name: str, bases: tuple[type, ...], members: dict[str, Any]) -> Any:
        if any(isinstance(base, Sealed) for base in bases):
            raise TypeError(f"{bases[0].__name__} is sealed")
        return super().__new__(mcs, name, bases, members)


class SealedNorm(nn.BatchNorm2d, metaclass=Sealed):
    pass


@pytest.mark.parametrize(("cls", "reason"), [(NeedsATag, "tag"), (SealedNorm, "SealedNorm is sealed")])
def test_a_class_that_cannot_be_derived_from_is_refused(cls: Any, reason: str) -> None:
    with pytest.raises(TypeError, match=rf"{cls.__name__}\): .*{reason}"):
        syncbn.convert(nn.Sequential(cls(4)))


class Disguised(nn.BatchNorm2d):
    """Python lets nobody change its class."""

    __class__ = property(lambda self: nn.BatchNorm2d)


def test_a_class_that_cannot_be_changed_is_refused_and_nothing_is_changed() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), Disguised(4), nn.BatchNorm2d(4))
    with pytest.raises(TypeError, match="cannot change the class of a Disguised"):
        syncbn.convert(model)
    assert [type(m) for m in model] == [nn.BatchNorm2d, Disguised, nn.BatchNorm2d]
    syncbn.convert(model, exclude=Disguised)
    assert [type(m).__name__ for m in model] == ["SyncBatchNorm2d", "Disguised", "SyncBatchNorm2d"]


class Registered(type):
    """A metaclass that adds to its classes."""

    def __init__(cls, name: str, bases: tuple[type, ...], members: dict[str, Any]) -> None:
        super().__init__(name, bases, members)
        cls.registered_as = name


class RegisteredNorm(nn.BatchNorm2d, metaclass=Registered):
    pass


class Slotted(nn.BatchNorm2d):
    __slots__ = ("note",)


def test_metaclasses_and_slots_are_kept() -> None:
    layer, slotted = RegisteredNorm(4), Slotted(4)
    slotted.note = "kept"
    syncbn.convert(nn.Sequential(layer, slotted))
    assert type(layer).registered_as == "SyncRegisteredNorm"
    assert isinstance(slotted, SyncBatchNorm)
    assert slotted.note == "kept"
    assert syncbn.revert(slotted).note == "kept"


# ---- layers that are left alone


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """As some packages write it: derived from the layer that it is not."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False)


@pytest.mark.parametrize(
    "layer",
    [
        torchvision.ops.FrozenBatchNorm2d(4),
        timm.layers.norm_act.FrozenBatchNormAct2d(4),
        FrozenBatchNorm2d(4),
        nn.InstanceNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.LazyInstanceNorm2d(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_other_normalizations_are_left_alone(layer: nn.Module) -> None:
    cls, before = type(layer), dict(vars(layer))
    syncbn.convert(nn.Sequential(layer))
    assert type(layer) is cls
    assert vars(layer) == before


# ---- layers that are synchronized already, by others


def test_torchs_own_is_taken_over_and_given_back() -> None:
    """DistributedDataParallel refuses torch.nn.SyncBatchNorm on a CPU."""
    layer = nn.SyncBatchNorm(4)
    before = dict(vars(layer))
    syncbn.convert(layer)
    assert isinstance(layer, SyncBatchNorm)
    assert not isinstance(layer, nn.SyncBatchNorm)
    syncbn.revert(layer)
    assert type(layer) is nn.SyncBatchNorm
    assert vars(layer) == before


class ActivatedTorch(nn.SyncBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class ActivatedPlain(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def timms_converted() -> nn.Module:
    return timm.layers.convert_sync_batchnorm(timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU))


def mmcv_like() -> nn.Module:
    return MMCVSyncBatchNorm(4)


class MMCVSyncBatchNorm(nn.Module):
    """The attributes of mmcv.ops.SyncBatchNorm, which is built from C++ and CUDA. It derives from Module."""

    def __init__(self, num_features: int, track_running_stats: bool = True, group: Any = None) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = num_features, 1e-5, 0.1
        self.affine, self.track_running_stats = True, track_running_stats
        self.group, self.group_size = group, 1
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("must not be called any more")


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """The attributes of detectron2's."""

    def __init__(self, *args: Any, stats_mode: str = "", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stats_mode = stats_mode

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("must not be called any more")


class NaiveSyncBatchNorm3d(nn.BatchNorm3d):
    """The attributes of pytorchvideo's."""

    def __init__(self, num_sync_devices: int | None = None, global_sync: bool = True, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.global_sync, self.num_sync_devices = global_sync, num_sync_devices

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("must not be called any more")


class ApexSyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """The attributes of apex's."""

    def __init__(
        self,
        num_features: int,
        process_group: Any = None,
        channel_last: bool = False,
        fuse_relu: bool = False,
        track_running_stats: bool = True,
    ) -> None:
        super().__init__(num_features, track_running_stats=track_running_stats)
        self.process_group, self.channel_last, self.fuse_relu = process_group, channel_last, fuse_relu

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        raise AssertionError("must not be called any more")


class FairscaleSyncBatchNorm(nn.BatchNorm2d):
    """The attributes of fairscale's."""

    def __init__(self, *args: Any, process_group: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._process_group, self.saved_for_2nd_fwd, self.disable_patch_batchnorm = process_group, [], True

    def forward(self, x: Tensor) -> Tensor:
        raise AssertionError("must not be called any more")


for cls, path in {
    MMCVSyncBatchNorm: "mmcv.ops.sync_bn.SyncBatchNorm",
    NaiveSyncBatchNorm: "detectron2.layers.batch_norm.NaiveSyncBatchNorm",
    NaiveSyncBatchNorm3d: "pytorchvideo.layers.batch_norm.NaiveSyncBatchNorm3d",
    ApexSyncBatchNorm: "apex.parallel.optimized_sync_batchnorm.SyncBatchNorm",
    FairscaleSyncBatchNorm: "fairscale.experimental.nn.sync_batchnorm.SyncBatchNorm",
}.items():
    cls.__module__, _, cls.__qualname__ = path.rpartition(".")
    cls.__name__ = cls.__qualname__


def build(cls_name: str, *args: Any, **kwargs: Any) -> nn.Module:
    """By a name of this module: the classes above are not found under the names that they bear."""
    return globals()[cls_name](*args, **kwargs)


VIDEOS = parts((2, 4, 2, 3, 3), (3, 4, 2, 3, 3))


@pytest.mark.parametrize(
    ("builder", "judge", "inputs"),
    [
        (functools.partial(nn.SyncBatchNorm, 4), functools.partial(nn.BatchNorm2d, 4), FEATURES),
        (timms_converted, functools.partial(timm.layers.BatchNormAct2d, 4, act_layer=nn.SiLU), FEATURES),
        (mmcv_like, functools.partial(nn.BatchNorm2d, 4), FEATURES),
        (functools.partial(build, "NaiveSyncBatchNorm", 4), functools.partial(nn.BatchNorm2d, 4), FEATURES),
        (
            functools.partial(build, "NaiveSyncBatchNorm3d", num_features=4),
            functools.partial(nn.BatchNorm3d, 4),
            VIDEOS,
        ),
        (functools.partial(build, "ApexSyncBatchNorm", 4), functools.partial(nn.BatchNorm2d, 4), FEATURES),
        (
            functools.partial(build, "ApexSyncBatchNorm", 4, fuse_relu=True),
            functools.partial(ActivatedPlain, 4),
            FEATURES,
        ),
        (
            functools.partial(build, "FairscaleSyncBatchNorm", 4),
            functools.partial(nn.BatchNorm2d, 4),
            FEATURES,
        ),
        (functools.partial(ActivatedTorch, 4), functools.partial(ActivatedPlain, 4), FEATURES),
    ],
    ids=[
        "torch",
        "timm",
        "mmcv",
        "detectron2",
        "pytorchvideo",
        "apex",
        "apex relu",
        "fairscale",
        "torch subclass",
    ],
)
def test_layers_of_other_packages_are_taken_over(
    processes: Any, builder: Any, judge: Any, inputs: list[Tensor]
) -> None:
    layer = builder()
    cls, before = type(layer), dict(vars(layer))
    assert isinstance(syncbn.convert(layer), SyncBatchNorm)
    assert type(syncbn.revert(layer)) is cls
    assert vars(layer) == before
    assert_like_the_union(processes, builder, inputs, judge)


def test_apexs_channels_may_be_last_and_an_addend_may_come() -> None:
    layer = syncbn.convert(ApexSyncBatchNorm(4, channel_last=True, fuse_relu=True))
    x, z = torch.randn(3, 5, 5, 4), torch.randn(3, 5, 5, 4)
    expected = (nn.BatchNorm2d(4)(x.movedim(-1, 1)).movedim(1, -1) + z).relu()
    torch.testing.assert_close(layer(x, z), expected)


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (NaiveSyncBatchNorm(4, stats_mode="N"), 'stats_mode="N" weights images'),
        (NaiveSyncBatchNorm3d(2, False, num_features=4), "over num_sync_devices of one machine"),
        (MMCVSyncBatchNorm(4, track_running_stats=False), "exchanges the batch's even in eval"),
        (ApexSyncBatchNorm(4, track_running_stats=False), "exchanges the batch's even in eval"),
    ],
    ids=["detectron2 N", "pytorchvideo local", "mmcv", "apex"],
)
def test_options_that_cannot_be_followed_are_refused(layer: nn.Module, reason: str) -> None:
    with pytest.raises(TypeError) as error:
        syncbn.convert(layer)
    assert reason in str(error.value)
    assert not isinstance(layer, SyncBatchNorm)


def test_a_group_that_is_given_settles_over_whom() -> None:
    layer = NaiveSyncBatchNorm3d(2, False, num_features=4)
    assert isinstance(syncbn.convert(layer, syncbn.Exchange()), SyncBatchNorm)


def _own_groups() -> list[Any]:
    import torch.distributed as dist

    mine = [dist.new_group([0]), dist.new_group([1])][dist.get_rank()]
    layers = [
        nn.SyncBatchNorm(4, process_group=mine),
        nn.BatchNorm2d(4),
        ApexSyncBatchNorm(4, dist.group.WORLD),
    ]
    layers += [MMCVSyncBatchNorm(4, group=mine), FairscaleSyncBatchNorm(4, process_group=mine)]
    model = syncbn.convert(nn.ModuleList(layers))
    syncbn.convert(model)  # a second time: they keep their groups
    own = [layer.process_group for layer in model]
    shared = model[0]._exchange is model[3]._exchange and model[1]._exchange is model[2]._exchange
    given = [layer.process_group for layer in syncbn.convert(model, dist.new_group())]
    ranks = [None if group is None else dist.get_process_group_ranks(group) for group in [*own, *given]]
    dist.destroy_process_group(mine)
    return [ranks, shared]


def test_a_layers_own_group_is_kept_unless_one_is_given(processes: Any) -> None:
    for rank, (ranks, shared) in enumerate(processes(2).run(_own_groups)):
        assert ranks == [[rank], None, None, [rank], [rank], *[[0, 1]] * 5]
        assert shared, "layers with the same processes share one exchange"
