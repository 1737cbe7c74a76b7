"""The shapes: every normalization layer of real networks at the sizes at which they are trained.

A network is a literal table, so that measuring needs no torchvision; the tests hold the tables against the models
themselves, run on the meta device with a hook on every normalization layer. A size is written as the factor by which
the network has made the image smaller there: strided convolutions and pooling with padding round up.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

GLOBAL = 0  # the stride of a layer after global pooling: one place is left


class Layers(NamedTuple):
    """So many normalization layers of one shape."""

    channels: int
    stride: int
    number: int


@dataclass(frozen=True)
class Case:
    """One shape, and how many of the network's layers have it."""

    network: str
    shape: tuple[int, ...]
    count: int

    @property
    def name(self) -> str:
        return f"{self.network} {'x'.join(map(str, self.shape))}"

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Network:
    """A network, the batch and image of one process, and its normalization layers."""

    name: str
    origin: str
    batch: int
    image: tuple[int, ...]
    layers: tuple[Layers, ...]

    def cases(self, shrink: int = 1) -> list[Case]:
        """The distinct shapes at images ``shrink`` times smaller in every dimension, in the order of the network."""
        counts: Counter[tuple[int, ...]] = Counter()
        for channels, stride, number in self.layers:
            places = (1 if stride == GLOBAL else math.ceil(side / (shrink * stride)) for side in self.image)
            counts[self.batch, channels, *places] += number
        return [Case(self.name, shape, count) for shape, count in counts.items()]


RESNET50_FPN = Network(
    "resnet50-fpn",
    "backbone of torchvision's fasterrcnn_resnet50_fpn_v2: ResNet-50 (53 layers) and a feature pyramid with "
    "normalization (8 layers)",
    2,
    (800, 1344),
    (
        Layers(64, 2, 1),
        Layers(64, 4, 6),
        Layers(256, 4, 6),
        Layers(128, 4, 1),
        Layers(128, 8, 7),
        Layers(512, 8, 5),
        Layers(256, 8, 3),
        Layers(256, 16, 13),
        Layers(1024, 16, 7),
        Layers(512, 16, 1),
        Layers(512, 32, 5),
        Layers(2048, 32, 4),
        Layers(256, 32, 2),
    ),
)

DEEPLABV3 = Network(
    "deeplabv3",
    "torchvision's deeplabv3_resnet50, output stride 8",
    2,
    (512, 1024),
    (
        Layers(64, 2, 1),
        Layers(64, 4, 6),
        Layers(256, 4, 4),
        Layers(128, 4, 1),
        Layers(128, 8, 7),
        Layers(512, 8, 11),
        Layers(256, 8, 18),
        Layers(1024, 8, 7),
        Layers(2048, 8, 4),
        Layers(256, GLOBAL, 1),
    ),
)

MOBILENET_V3 = Network(
    "mobilenet-v3",
    "torchvision's mobilenet_v3_large",
    32,
    (224, 224),
    (
        Layers(16, 2, 3),
        Layers(64, 2, 1),
        Layers(64, 4, 1),
        Layers(24, 4, 2),
        Layers(72, 4, 3),
        Layers(72, 8, 1),
        Layers(40, 8, 3),
        Layers(120, 8, 4),
        Layers(240, 8, 1),
        Layers(240, 16, 1),
        Layers(80, 16, 4),
        Layers(200, 16, 2),
        Layers(184, 16, 4),
        Layers(480, 16, 2),
        Layers(112, 16, 2),
        Layers(672, 16, 3),
        Layers(672, 32, 1),
        Layers(160, 32, 3),
        Layers(960, 32, 5),
    ),
)

UNET_3D = Network(
    "unet-3d",
    "3D U-Net (Çiçek et al. 2016, figure 2): four resolutions, two padded convolutions each with normalization",
    1,
    (128, 128, 128),
    (
        Layers(32, 1, 1),
        Layers(64, 1, 3),
        Layers(64, 2, 1),
        Layers(128, 2, 3),
        Layers(128, 4, 1),
        Layers(256, 4, 3),
        Layers(256, 8, 1),
        Layers(512, 8, 1),
    ),
)

NETWORKS = {network.name: network for network in (RESNET50_FPN, DEEPLABV3, MOBILENET_V3, UNET_3D)}

# Where a layer is all overhead: few channels, 64 places.
TINY = (1, 64, 8, 8)


def suite(names: tuple[str, ...], shrink: int, ends_only: bool = False) -> list[Case]:
    """The cases of these networks; ``ends_only`` keeps each network's largest and smallest shape."""
    cases = []
    for name in names:
        of_network = sorted(NETWORKS[name].cases(shrink), key=lambda case: -case.elements)
        cases += [of_network[0], of_network[-1]] if ends_only else of_network
    return cases


def channel_counts(network: Network) -> dict[int, int]:
    """How many layers have how many channels: what the exchange's messages depend on."""
    counts: Counter[int] = Counter()
    for channels, _, number in network.layers:
        counts[channels] += number
    return dict(sorted(counts.items()))
