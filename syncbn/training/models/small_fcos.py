"""A detector that is small enough to be trained from scratch on a CPU."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import nn
from torchvision.models.detection import FCOS
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.fcos import FCOSHead
from torchvision.models.resnet import BasicBlock

from syncbn.training.models.padding import count_valid_region
from syncbn.training.models.segmentation import require_classes

_STEM_STRIDE = 2
_HEAD_GROUPS = 32  # of the head's group normalization


def small_fcos(
    num_classes: int,
    widths: Sequence[int] = (32, 64, 128),
    blocks: int = 1,
    channels: int = 64,
    head_convs: int = 2,
    **options: Any,
) -> FCOS:
    """torchvision's FCOS on a slim ResNet and pyramid, with batch normalization in both, from scratch.

    The finest level has a stride of 4, for objects of 8 to 64 pixels. As in MegDet, the pyramid is normalized like
    the backbone, so that both see the whole batch when they are synchronized; torchvision's head keeps its group
    normalization, since one batch normalization cannot serve all levels.

    Args:
        num_classes: the number of classes, the background included.
        widths: channels of the ResNet's stages, of stride 4, 8, 16, ...
        blocks: residual blocks in each stage.
        channels: of pyramid and head, a multiple of 32.
        head_convs: convolutions in each branch of the head.
        options: torchvision's own, such as min_size, max_size and score_thresh.

    Raises:
        ValueError: a number is outside its range.
    """
    require_classes(num_classes)
    if not widths or min(widths) < 1 or blocks < 1 or head_convs < 1:
        raise ValueError(f"expected positive widths, blocks, head_convs; got {list(widths)}, {blocks}, {head_convs}")
    if channels < 1 or channels % _HEAD_GROUPS:
        raise ValueError(f"channels must be a multiple of {_HEAD_GROUPS}, got {channels}")
    stages = [f"stage{level}" for level in range(len(widths))]
    backbone = BackboneWithFPN(
        _slim_resnet(widths, blocks),
        return_layers=dict(zip(stages, stages, strict=True)),
        in_channels_list=list(widths),
        out_channels=channels,
        norm_layer=nn.BatchNorm2d,
    )
    # One more level than stages: the pyramid's own pooling.
    strides = [2 * _STEM_STRIDE * 2**level for level in range(len(widths) + 1)]
    model = FCOS(
        backbone,
        num_classes,
        anchor_generator=AnchorGenerator(tuple((s,) for s in strides), ((1.0,),) * len(strides)),
        head=FCOSHead(channels, 1, num_classes, head_convs),
        **{key: list(v) if isinstance(v, Sequence) else v for key, v in options.items()},
    )
    count_valid_region(model)
    return model


def _slim_resnet(widths: Sequence[int], blocks: int) -> nn.Module:
    body = OrderedDict(
        conv1=nn.Conv2d(3, widths[0], kernel_size=3, stride=_STEM_STRIDE, padding=1, bias=False),
        bn1=nn.BatchNorm2d(widths[0]),
        relu=nn.ReLU(inplace=True),
    )
    channels = widths[0]
    for level, width in enumerate(widths):
        stage = nn.Sequential()
        for block in range(blocks):
            shortcut = _projection(channels, width) if block == 0 else None
            stage.append(BasicBlock(channels, width, stride=2 if block == 0 else 1, downsample=shortcut))
            channels = width
        body[f"stage{level}"] = stage
    model = nn.Sequential(body)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return model


def _projection(channels: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(channels, width, kernel_size=1, stride=2, bias=False), nn.BatchNorm2d(width))
