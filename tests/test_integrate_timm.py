"""docs/integrate.md: timm."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from integrations import code_of
from torch import nn
from union import assert_like_the_union, parts

import syncbn
from syncbn import SyncBatchNorm

timm = pytest.importorskip("timm")

IMAGES = parts((2, 3, 32, 32), (1, 3, 32, 32))


def documented(index: int) -> nn.Module:
    names: dict[str, Any] = {}
    exec(code_of("timm")[index], names)
    return names["model"]


@pytest.mark.parametrize(
    ("index", "plain"), [(0, "efficientnet_b0"), (1, "resnet18")], ids=["converted", "norm_layer="]
)
def test_the_lines_build_the_plain_model_of_the_union(processes: Any, index: int, plain: str) -> None:
    judge = functools.partial(timm.create_model, plain, num_classes=4)
    assert_like_the_union(processes, functools.partial(documented, index), IMAGES, judge, tolerance=1e-6)


def test_two_blocks_stand_on_the_page() -> None:
    assert len(code_of("timm")) == 2


@pytest.mark.parametrize("index", [0, 1])
def test_every_layer_is_synchronized_and_named(index: int) -> None:
    description = syncbn.describe(documented(index))
    assert len(description.names("synchronized")) == {0: 49, 1: 20}[index]
    assert not description.names("local")


def test_norm_layer_reaches_a_part_of_the_layers_in_some_models_and_convert_the_rest() -> None:
    model = timm.create_model("visformer_tiny", norm_layer=SyncBatchNorm)
    missed = syncbn.describe(model).names("local")
    assert missed
    assert not syncbn.describe(syncbn.convert(model)).names("local")


def test_norm_layer_is_refused_by_name_where_a_model_has_layers_with_activations() -> None:
    with pytest.raises(AssertionError, match="No equivalent norm_act layer for syncbatchnorm"):
        timm.create_model("efficientnet_b0", norm_layer=SyncBatchNorm)


def test_what_timm_has_converted_is_taken_over() -> None:
    model = timm.layers.convert_sync_batchnorm(timm.create_model("efficientnet_b0"))
    assert len(syncbn.describe(model).names("foreign")) == 49
    assert len(syncbn.describe(syncbn.convert(model)).names("synchronized")) == 49


def test_a_converted_models_weights_are_the_plain_ones() -> None:
    plain = timm.create_model("resnet18", num_classes=4)
    documented(1).load_state_dict(plain.state_dict(), strict=True)
