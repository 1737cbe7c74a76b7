"""docs/integrate.md: mmengine and mmcv, with real Runners."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from integrations import Images, assert_same_training, code_of, pools, state
from torch import Tensor, nn
from union import assert_like_the_union, parts

import syncbn
from syncbn import SyncBatchNorm

pytest.importorskip("mmengine")
pytest.importorskip("mmcv")

from mmcv.cnn import ConvModule, build_norm_layer, is_norm
from mmengine import Config
from mmengine.model import BaseModel, convert_sync_batchnorm, revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from mmengine.runner import Runner

SECTION = "mmengine and mmcv"
FEATURES = parts((2, 3, 9, 9), (1, 3, 9, 9))


@pytest.fixture(scope="module")
def workers() -> Iterator[Any]:
    with pools() as pool:
        yield pool


def documented(index: int, **names: Any) -> dict[str, Any]:
    exec(code_of(SECTION)[index], names)
    return names


def norm_cfg() -> dict[str, Any]:
    return documented(0)["norm_cfg"]


def test_three_blocks_stand_on_the_page() -> None:
    assert len(code_of(SECTION)) == 3


# ---- by configuration


def convolutions(config: dict[str, Any] | None = None) -> nn.Module:
    """Two of mmcv's modules, of which the second puts the normalization first."""
    return nn.Sequential(
        ConvModule(3, 4, 3, norm_cfg=config or norm_cfg()),
        ConvModule(4, 4, 3, norm_cfg=config or norm_cfg(), order=("norm", "act", "conv")),
    )


def plain_convolutions() -> nn.Module:
    return convolutions({"type": "BN"})


def test_the_type_builds_layers_that_form_the_unions_statistics(workers: Any) -> None:
    assert_like_the_union(workers, convolutions, FEATURES, plain_convolutions)


def test_the_layer_has_the_name_and_the_options_of_batch_normalization() -> None:
    name, layer = build_norm_layer({**norm_cfg(), "momentum": 0.01, "requires_grad": False}, 8, postfix=1)
    assert (name, type(layer), layer.momentum, layer.eps) == ("bn1", SyncBatchNorm, 0.01, 1e-5)
    assert is_norm(layer)
    assert not any(parameter.requires_grad for parameter in layer.parameters())


def test_a_scope_of_another_library_does_not_hide_the_type() -> None:
    from mmengine.registry import DefaultScope, Registry

    Registry("model", scope="mmelsewhere", parent=MODELS)
    with DefaultScope.overwrite_default_scope("mmelsewhere"):
        assert isinstance(build_norm_layer(norm_cfg(), 8)[1], SyncBatchNorm)


@pytest.mark.parametrize("kind", ["BN", "SyncBN"])
def test_checkpoints_of_mmcvs_own_layers_fit(kind: str) -> None:
    own = convolutions({"type": kind})
    convolutions().load_state_dict(own.state_dict(), strict=True)


def test_no_weight_decay_on_normalization_finds_the_layer() -> None:
    config = {"optimizer": {"type": "SGD", "lr": 0.1, "weight_decay": 0.3}, "paramwise_cfg": {"norm_decay_mult": 0.0}}
    for model in (convolutions(), syncbn.convert(plain_convolutions())):
        groups = build_optim_wrapper(model, config).optimizer.param_groups
        decay = {parameter.dim(): group["weight_decay"] for group in groups for parameter in group["params"]}
        assert decay == {1: 0.0, 4: 0.3}


def test_what_mmengine_does_in_a_single_process_leaves_the_layer() -> None:
    model = revert_sync_batchnorm(convolutions())
    assert isinstance(model[0].norm, SyncBatchNorm)
    assert model(FEATURES[0].float()).isfinite().all()


def test_mmengines_own_conversion_would_replace_the_layer() -> None:
    """Why the page says: no ``sync_bn="torch"``."""
    assert type(convert_sync_batchnorm(convolutions(), "torch")[0].norm) is nn.SyncBatchNorm


# ---- converted


def converted(kind: str = "BN") -> nn.Module:
    config = {"type": "ConvModule", "in_channels": 3, "out_channels": 4, "kernel_size": 3, "norm_cfg": {"type": kind}}
    return documented(2, cfg=Config({"model": config}))["model"]


def converted_sync_bn() -> nn.Module:
    return converted("SyncBN")


def plain_convolution() -> nn.Module:
    return ConvModule(3, 4, 3, norm_cfg={"type": "BN"})


@pytest.mark.parametrize("build", [converted, converted_sync_bn], ids=["BN", "SyncBN"])
def test_models_that_mmengine_has_built_are_converted(workers: Any, build: Any) -> None:
    assert_like_the_union(workers, build, FEATURES, plain_convolution)


# ---- by the hook


class Net(BaseModel):
    """A plain layer, one of a kind, and one that is kept in eval as ``norm_eval`` does it; with a loss."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.first = ConvModule(3, 4, 3, norm_cfg={"type": "BN"})
        self.second = ConvModule(4, 4, 3, norm_cfg=config)
        self.held = ConvModule(4, 4, 3, norm_cfg={"type": "BN"})

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        self.held.norm.eval()
        return self

    def forward(self, image: Tensor, label: Tensor, mode: str = "tensor") -> Any:
        features = self.held(self.second(self.first(image))).mean((2, 3))
        return {"loss": nn.functional.cross_entropy(features, label)} if mode == "loss" else features


@dataclass
class Outcome:
    """A trained model's state, the classes that its layers had, and what the hook said."""

    state: dict[str, Tensor]
    classes: list[str]
    said: list[str]


def train(folder: str, config: dict[str, Any], hooks: list[dict[str, Any]]) -> Outcome:
    """On a worker: two epochs of eight images, four images a step, over all processes there are."""
    several = dist.get_world_size() > 1
    runner = Runner(
        model=Net(config).double(),
        work_dir=folder,
        train_dataloader={
            "batch_size": 4 // dist.get_world_size(),
            "num_workers": 0,
            "dataset": Images(),
            "sampler": {"type": "DefaultSampler", "shuffle": False},
            "collate_fn": {"type": "default_collate"},
        },
        train_cfg={"by_epoch": True, "max_epochs": 2},
        optim_wrapper={"optimizer": {"type": "SGD", "lr": 0.1, "momentum": 0.9}},
        default_hooks={"logger": None},
        custom_hooks=hooks,
        launcher="pytorch" if several else "none",
        randomness={"seed": 3},
        experiment_name=Path(folder).name,
        log_level="WARNING",
        cfg={"model_wrapper_cfg": {"type": "MMDistributedDataParallel", "device_ids": None}},
    )
    said: list[str] = []
    runner.logger.setLevel(logging.INFO)
    runner.logger.addFilter(lambda record: said.append(record.getMessage()) or False)
    runner.train()
    model = runner.model.module if several else runner.model
    return Outcome(
        state=state(model),
        classes=[type(layer.norm).__name__ for layer in (model.first, model.second, model.held)],
        said=[line for line in said if "batch normalization" in line],
    )


@pytest.fixture(scope="module")
def expected(workers: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """What a Runner in one process makes of the same images, with plain layers."""
    (outcome,) = workers(1).run(train, str(tmp_path_factory.mktemp("single")), {"type": "BN"}, [])
    return outcome.state


def test_a_runner_with_the_hook_trains_as_one_process_does(
    workers: Any, expected: dict[str, Tensor], tmp_path: Path
) -> None:
    """Also open-mmlab/mmengine#412: all BN of a model, by configuration."""
    hooks = documented(1)["custom_hooks"]
    outcomes = workers(2).run(train, str(tmp_path), norm_cfg(), hooks)
    assert_same_training([outcome.state for outcome in outcomes], expected)
    for outcome in outcomes:
        assert outcome.classes == ["SyncBatchNorm2d", "SyncBatchNorm", "SyncBatchNorm2d"]
    assert outcomes[0].said[0].startswith("3 of 3 batch normalization layers synchronized over all 2 processes")
    saved = torch.load(tmp_path / "epoch_2.pth", weights_only=False)["state_dict"]
    Net({"type": "BN"}).load_state_dict(saved, strict=True)


def test_without_synchronization_training_differs(workers: Any, expected: dict[str, Tensor], tmp_path: Path) -> None:
    outcome = workers(2).run(train, str(tmp_path), {"type": "BN"}, [])[0]
    assert not torch.allclose(outcome.state["first.conv.weight"], expected["first.conv.weight"], atol=1e-4)


def test_the_hook_takes_converts_options(workers: Any, tmp_path: Path) -> None:
    hooks = [{**documented(1)["custom_hooks"][0], "exclude": "second.*"}]
    for outcome in workers(2).run(train, str(tmp_path), {"type": "BN"}, hooks):
        assert outcome.classes == ["SyncBatchNorm2d", "BatchNorm2d", "SyncBatchNorm2d"]


def test_what_a_runner_has_made_of_sync_bn_in_one_process_is_converted_like_any_other(
    workers: Any, tmp_path: Path
) -> None:
    (outcome,) = workers(1).run(train, str(tmp_path), {"type": "SyncBN"}, documented(1)["custom_hooks"])
    assert outcome.classes == ["SyncBatchNorm2d", "Sync_BatchNormXd", "SyncBatchNorm2d"]


def test_an_unknown_option_is_told_when_the_runner_is_built() -> None:
    from mmengine.registry import HOOKS

    with pytest.raises(TypeError, match=r"expected options of syncbn.convert \(process_group, .*, got exlude"):
        HOOKS.build({**documented(1)["custom_hooks"][0], "exlude": "neck.*"})
