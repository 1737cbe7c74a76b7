"""docs/integrate.md: detectron2, which PyPI does not have.

So its lines are run against stand-ins that bear its names and do what its sources do where normalization is concerned:
``get_norm`` and freezing (detectron2/layers/batch_norm.py at 047d477), and ``instantiate``
(detectron2/config/instantiate.py at 02c1c35), for which Hydra's own stands in. What holds the configurations is the
real one: yacs, and omegaconf for a LazyConfig.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from documentation import ROOT
from integrations import PAGE, code_of
from torch import Tensor, nn
from union import assert_like_the_union, parts

import syncbn
from syncbn import SyncBatchNorm

omegaconf = pytest.importorskip("omegaconf")
hydra = pytest.importorskip("hydra")
yacs = pytest.importorskip("yacs.config")

SECTION = "detectron2"
IMAGES = parts((2, 3, 12, 12), (1, 3, 12, 12))


class FrozenBatchNorm2d(nn.Module):
    """Normalizes by fixed statistics, which are buffers, and so are γ and β."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features, self.eps = channels, eps
        plain = nn.BatchNorm2d(channels)
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, getattr(plain, name).detach())

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def get_norm(norm: Any, channels: int) -> nn.Module:
    """By name, or by a callable that takes the number of channels."""
    by_name = {"BN": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm, "FrozenBN": FrozenBatchNorm2d}
    return (by_name[norm] if isinstance(norm, str) else norm)(channels)


class Detector(nn.Module):
    """A stem that ``freeze_at`` freezes, by the layers' classes, and a head."""

    def __init__(self, norm: Any = "FrozenBN", head_norm: Any = "", freeze_at: int = 2) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), get_norm(norm, 4))
        self.head = nn.Sequential(nn.Conv2d(4, 4, 3, bias=not head_norm), nn.Identity())
        if head_norm:
            self.head[1] = get_norm(head_norm, 4)
        if freeze_at > 0 and isinstance(self.stem[1], nn.BatchNorm2d | nn.SyncBatchNorm):
            self.stem[1] = FrozenBatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stem(x).relu())


def plain_detector() -> nn.Module:
    return Detector("BN", "BN", freeze_at=0)


def default_config() -> Any:
    heads = {name: {"NORM": ""} for name in ("FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")}
    return yacs.CfgNode({"MODEL": {"BACKBONE": {"FREEZE_AT": 2}, "RESNETS": {"NORM": "FrozenBN"}, **heads}})


class DefaultTrainer:
    """Builds by a class method, which subclasses override."""

    @classmethod
    def build_model(cls, cfg: Any) -> nn.Module:
        model = cfg.MODEL
        return Detector(model.RESNETS.NORM, model.ROI_BOX_HEAD.NORM, model.BACKBONE.FREEZE_AT)


def lazy_call(target: Any) -> Any:
    """A call that is written down, in an omegaconf config that may hold objects."""
    return lambda **arguments: omegaconf.DictConfig({**arguments, "_target_": target}, flags={"allow_objects": True})


@pytest.fixture
def detectron2(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch.setitem)


def _install(set_item: Any) -> None:
    for name, members in {
        "detectron2": {},
        "detectron2.engine": {"DefaultTrainer": DefaultTrainer},
        "detectron2.config": {"LazyCall": lazy_call},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        set_item(sys.modules, name, module)


def run(index: int, **names: Any) -> dict[str, Any]:
    exec(code_of(SECTION)[index], names)
    return names


def by_trainer() -> nn.Module:
    _install(dict.__setitem__)
    cfg = run(1, cfg=default_config())["cfg"]
    return run(0)["Trainer"].build_model(cfg)


def by_lazy_config() -> nn.Module:
    _install(dict.__setitem__)
    model = lazy_call(Detector)(norm="BN", head_norm="${.norm}", freeze_at=0)
    return hydra.utils.instantiate(run(2, model=model)["model"], _convert_="all")


def by_callable() -> nn.Module:
    model = lazy_call(Detector)(norm=SyncBatchNorm, head_norm="${.norm}", freeze_at=0)
    return hydra.utils.instantiate(model, _convert_="all")


def test_three_blocks_stand_on_the_page() -> None:
    assert len(code_of(SECTION)) == 3


@pytest.mark.parametrize("build", [by_trainer, by_lazy_config, by_callable])
def test_each_way_builds_the_plain_model_of_the_union(processes: Any, build: Any) -> None:
    assert_like_the_union(processes, build, IMAGES, plain_detector)


def test_weights_of_a_plain_model_fit(detectron2: None) -> None:
    by_trainer().load_state_dict(plain_detector().state_dict(), strict=True)


def test_converted_layers_are_still_of_the_class_that_freezing_and_weight_decay_look_for(detectron2: None) -> None:
    assert isinstance(by_trainer().head[1], nn.BatchNorm2d)
    assert not isinstance(by_callable().head[1], nn.BatchNorm2d | nn.SyncBatchNorm)


def test_a_callable_escapes_freezing_where_bn_does_not() -> None:
    """Why the page calls the callable second best."""
    assert isinstance(Detector("BN", "BN").stem[1], FrozenBatchNorm2d)
    assert isinstance(Detector(SyncBatchNorm, "BN").stem[1], SyncBatchNorm)


def test_a_yaml_configuration_takes_no_callable() -> None:
    refusal = "Invalid type <class 'type'> for key NORM"
    assert f"`{refusal}`" in (ROOT / PAGE).read_text()
    with pytest.raises(AssertionError, match=refusal):
        default_config().MODEL.RESNETS.NORM = SyncBatchNorm


def test_frozen_layers_are_said_to_be_frozen() -> None:
    """facebookresearch/detectron2#2022: "SyncBN" is asked for, and the stem and res2 show FrozenBatchNorm2d."""
    description = syncbn.describe(syncbn.convert(Detector("BN", "BN", freeze_at=2)))
    assert description.names("frozen") == ["stem.1"]
    assert description.names("synchronized") == ["head.1"]
