"""The U-Net."""

import pytest
import torch
from torch import nn

from syncbn.training.models import UNet


@pytest.mark.parametrize("size", [(96, 96), (97, 61), (8, 15)])
def test_unet_keeps_height_and_width(size):
    scores = UNet(11)(torch.rand(2, 3, *size))
    assert scores.shape == (2, 11, *size)


def test_unet_is_compact_and_knows_only_ordinary_batch_norm():
    model = UNet(11)
    assert sum(p.numel() for p in model.parameters()) < 500_000
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    assert len(norms) == 14
    assert {type(norm) for norm in norms} == {nn.BatchNorm2d}


@pytest.mark.parametrize("wrong", [{"widths": (8,)}, {"widths": (8, 0)}, {"num_classes": 0}])
def test_unet_refuses_impossible_sizes(wrong):
    with pytest.raises(ValueError, match="at least"):
        UNet(**({"num_classes": 2} | wrong))
