"""Batch normalization that keeps its output and drops its input (In-Place ABN), and what its users ran into.

- pytorch/pytorch#12198: it takes only activations that can be inverted, so that ReLU is not possible.
- mapillary/inplace_abn#6: in DenseNet's layers with ReLU, "one of the variables needed for gradient computation has
  been modified by an inplace operation".
- mapillary/inplace_abn#91: the same in a residual block with pre-activation, unless two of its layers stay plain.
- mapillary/inplace_abn#7: the same where one such layer follows another.
- mapillary/inplace_abn#77: PReLU, whose slope is learned, needs code of its own; weights trained with it behind a plain
  layer lose accuracy.
- mapillary/inplace_abn#92, #114, #163, #179: weights of a plain model give other outputs, as |γ| is taken for γ.
- mapillary/inplace_abn#55: it is not recommended together with checkpointing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.bench.memory import saved_bytes
from syncbn.recompute import recompute_activations


class DenseLayer(nn.Sequential):
    """Of DenseNet: normalization, ReLU, convolution, twice; what comes out is appended to what came in."""

    def __init__(self, channels: int, growth: int = 8, bottleneck: int = 2) -> None:
        width = growth * bottleneck
        super().__init__(
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], 1)


class PreActivation(nn.Module):
    """A residual block that normalizes before each convolution, and its shortcut, too."""

    def __init__(self, channels: int = 16) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3))
        self.relu = nn.ReLU(inplace=False)

    def forward(self, x: Tensor) -> Tensor:
        first = self.relu(self.norms[0](x))
        second = self.convs[1](self.relu(self.norms[1](self.convs[0](first))))
        return second + self.convs[2](self.norms[2](x))


def dense() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), DenseLayer(16), DenseLayer(24), DenseLayer(32))


def pre_activation() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), PreActivation(), PreActivation())


def in_a_row() -> nn.Module:
    norms = (nn.BatchNorm2d(16), nn.ReLU(), nn.BatchNorm2d(16), nn.ReLU(), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(nn.Conv2d(3, 16, 3), *norms, nn.Conv2d(16, 2, 1))


def with_prelu() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.PReLU(), nn.Conv2d(16, 2, 1))


def trained(build: Callable[[], nn.Module]) -> nn.Module:
    """A model with weights of both signs."""
    torch.manual_seed(1)
    model = build().double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


def gradients(model: nn.Module, output: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(output.square().mean(), list(model.parameters())))


def recomputing(model: nn.Module, x: Tensor) -> Tensor:
    with recompute_activations():
        return model(x)


@pytest.mark.parametrize("build", [dense, pre_activation, in_a_row, with_prelu])
def test_plain_weights_train_as_in_the_plain_model(build: Callable[[], nn.Module]) -> None:
    """Outputs and gradients in float64, from the plain model's own state_dict; and less is kept for backward."""
    plain, x = trained(build), torch.randn(2, 3, 14, 14, dtype=torch.float64)
    ours = syncbn.fuse(syncbn.convert(copy.deepcopy(plain)))
    ours.load_state_dict(plain.state_dict())
    y, expected = recomputing(ours, x), plain(x)
    torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients(ours, y), gradients(plain, expected), rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(plain.named_buffers()))
    assert saved_bytes(lambda: recomputing(ours, x)) < 0.9 * saved_bytes(lambda: plain(x))


def test_beside_checkpointing() -> None:
    """Blocks that are checkpointed and blocks that are not, in one model."""
    plain, x = trained(dense), torch.randn(2, 3, 12, 12, dtype=torch.float64)
    ours = syncbn.fuse(syncbn.convert(copy.deepcopy(plain)))

    def forward(model: nn.Module) -> Tensor:
        stem, first, second, third = model
        return third(checkpoint(second, first(stem(x)), use_reentrant=False))

    with recompute_activations():
        y = forward(ours)
    torch.testing.assert_close(gradients(ours, y), gradients(plain, plain(x)), rtol=1e-7, atol=1e-9)
