"""A compact U-Net of conv-BN-ReLU blocks, all normalization ordinary `nn.BatchNorm2d`."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class UNet(nn.Module):
    """Encoder and decoder with skip connections. Nothing in it knows of other processes.

    Input float [B, in_channels, H, W], H and W at least 2 ** (len(widths) - 1), of any parity; output float
    [B, num_classes, H, W], unnormalized class scores.

    Args:
        num_classes: number of classes, the background included.
        in_channels: channels of the image.
        widths: channels of each level, the finest first; each further level halves height and width.

    Raises:
        ValueError: fewer than two levels, or a count below 1.
    """

    def __init__(self, num_classes: int, in_channels: int = 3, widths: Sequence[int] = (16, 32, 64, 96)) -> None:
        super().__init__()
        if len(widths) < 2 or min(widths) < 1:
            raise ValueError(f"widths must name at least two levels of 1 or more channels, got {list(widths)}")
        if num_classes < 1 or in_channels < 1:
            raise ValueError(f"num_classes and in_channels must be at least 1, got {num_classes} and {in_channels}")
        self.down = nn.ModuleList()
        channels = in_channels
        for width in widths:
            self.down.append(nn.Sequential(conv_bn_relu(channels, width), conv_bn_relu(width, width)))
            channels = width
        self.up = nn.ModuleList()
        for width in reversed(widths[:-1]):
            self.up.append(nn.Sequential(conv_bn_relu(channels + width, width), conv_bn_relu(width, width)))
            channels = width
        self.head = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, image: Tensor) -> Tensor:
        x = image
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            if level > 0:
                x = F.max_pool2d(x, 2)
            x = block(x)
            skips.append(x)
        skips.pop()  # the coarsest level is x itself
        for block in self.up:
            skip = skips.pop()
            # To the skip's size rather than times two: pooling drops an odd row or column.
            x = F.interpolate(x, size=skip.shape[-2:], mode="nearest")
            x = block(torch.cat([skip, x], 1))
        scores: Tensor = self.head(x)
        return scores


def conv_bn_relu(in_channels: int, out_channels: int) -> nn.Sequential:
    """3x3 convolution without bias (normalization would cancel it), normalization, ReLU; keeps H and W."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            norm=nn.BatchNorm2d(out_channels),
            act=nn.ReLU(inplace=True),
        )
    )
