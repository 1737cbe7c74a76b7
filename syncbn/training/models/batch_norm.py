"""Which batch normalization layers of a backbone learn, and which stay as they were loaded."""

from collections.abc import Sequence

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

import syncbn

BACKBONE_NORMS = ("batch", "frozen")

_STAGES = ("layer4", "layer3", "layer2", "layer1", "conv1")  # in the order in which torchvision lets them learn


def trainable_batch_norm(module: nn.Module) -> nn.Module:
    """Makes every FrozenBatchNorm2d of torchvision's an `nn.BatchNorm2d`, in place.

    Weight, bias, running statistics and eps are carried over, so that the output in eval mode is the same. A layer
    beside convolutions that do not learn, such as those of the stages that `trainable_backbone_layers` excludes,
    is frozen as by `syncbn.freeze(affine=True)`. To be called before an optimizer or DistributedDataParallel is
    given the parameters.

    Returns:
        `module`, or its replacement if it is such a layer itself.
    """
    made: dict[FrozenBatchNorm2d, nn.BatchNorm2d] = {}
    if isinstance(module, FrozenBatchNorm2d):
        return _batch_norm_of(module)
    for parent in list(module.modules()):
        beside = [p for child in parent.children() for p in child.parameters(recurse=False)]
        for name, child in list(parent.named_children()):
            if not isinstance(child, FrozenBatchNorm2d):
                continue
            if child not in made:
                made[child] = _batch_norm_of(child)
                if beside and not any(p.requires_grad for p in beside):
                    syncbn.freeze(made[child], affine=True)
            setattr(parent, name, made[child])
    return module


def hold_stages(resnet: nn.Module, trainable_layers: int) -> None:
    """Keeps all but the last `trainable_layers` of a ResNet's five stages as they are, batch normalization included.

    torchvision freezes the statistics of either all layers or, in its models "v2", none. Here, a stage that does not
    learn does not move its statistics either, and the layers of the others learn and can be synchronized.

    Raises:
        ValueError: it is not 0 to 5.
    """
    if not isinstance(trainable_layers, int) or not 0 <= trainable_layers <= len(_STAGES):
        raise ValueError(f"trainable_backbone_layers must be 0 to {len(_STAGES)}, got {trainable_layers!r}")
    learning = _STAGES[:trainable_layers]
    for name, child in resnet.named_children():
        if name not in learning and not (name == "bn1" and "conv1" in learning):
            child.requires_grad_(False)
            _hold(child)


def hold_batch_norm(backbone: nn.Module, backbone_norm: str) -> None:
    """Freezes all layers, weight and bias included, where `backbone_norm` is "frozen".

    Raises:
        ValueError: it is neither "batch" nor "frozen".
    """
    if backbone_norm not in BACKBONE_NORMS:
        raise ValueError(f"backbone_norm must be one of {', '.join(BACKBONE_NORMS)}, got {backbone_norm!r}")
    if backbone_norm == "frozen":
        _hold(backbone)


def _hold(module: nn.Module) -> None:
    if any(isinstance(layer, nn.BatchNorm2d) for layer in module.modules()):
        syncbn.freeze(module, affine=True)


def _batch_norm_of(frozen: FrozenBatchNorm2d) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(
        len(frozen.weight), eps=frozen.eps, device=frozen.weight.device, dtype=frozen.weight.dtype
    ).train(frozen.training)
    with torch.no_grad():
        for own, theirs in _pairs(layer, frozen):
            own.copy_(theirs)
    return layer


def _pairs(layer: nn.Module, frozen: nn.Module) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
    return [(getattr(layer, n), getattr(frozen, n)) for n in ("weight", "bias", "running_mean", "running_var")]
