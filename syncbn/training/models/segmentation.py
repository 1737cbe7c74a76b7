"""torchvision's segmentation networks, from scratch or from weights on disk."""

import functools
from pathlib import Path
from typing import Any

from torch import nn
from torchvision.models import get_model_weights, segmentation

from syncbn.training.errors import did_you_mean
from syncbn.training.models.batch_norm import hold_batch_norm
from syncbn.training.models.weights import load_backbone_weights, load_weights

# Each with the classifier that its backbone comes from.
BACKBONES = {
    "deeplabv3_resnet50": "resnet50",
    "fcn_resnet50": "resnet50",
    "lraspp_mobilenet_v3_large": "mobilenet_v3_large",
}


def segmentation_model(
    name: str,
    num_classes: int,
    weights: str | Path | None = None,
    weights_backbone: str | Path | None = None,
    class_heads: str = "auto",
    backbone_norm: str = "batch",
    aux_loss: bool = False,
) -> nn.Module:
    """One of torchvision's segmentation networks. Nothing is downloaded unless a word asks for it.

    Images float [B, 3, H, W] to a dict with scores [B, num_classes, H, W] under "out" and, with `aux_loss`, "aux".

    Args:
        name: "deeplabv3_resnet50", "fcn_resnet50" or "lraspp_mobilenet_v3_large".
        num_classes: the number of classes, the background included.
        weights: None, from scratch; a file; or "download" or a name such as "COCO_WITH_VOC_LABELS_V1", torchvision's.
        weights_backbone: likewise for the backbone alone, a classifier's; `weights`, if given, comes before it.
        class_heads: whether `weights` fill in what depends on the classes: "auto", if their number is the same;
            "fresh", never; or "kept", or else it is an error.
        backbone_norm: "batch", the backbone's batch normalization learns; "frozen", it stays as it was loaded.
        aux_loss: whether there is a second head, on the backbone's last stage but one (not in LR-ASPP).

    Raises:
        ValueError: an argument cannot be used, or weights cannot be read or do not fit.
    """
    require_known(name, BACKBONES)
    require_classes(num_classes)
    options: dict[str, Any] = {"weights": None, "weights_backbone": None}
    if name == "lraspp_mobilenet_v3_large":
        if aux_loss:
            raise ValueError("aux_loss: lraspp_mobilenet_v3_large has no auxiliary classifier")
    else:
        options["aux_loss"] = aux_loss
    build = functools.partial(_build, name, options)
    model = build(num_classes)
    backbone = model.get_submodule("backbone")
    if weights is not None:
        load_weights(model, weights, get_model_weights(name), build, num_classes, class_heads)
    elif weights_backbone is not None:
        load_backbone_weights(backbone, weights_backbone, get_model_weights(BACKBONES[name]))
    hold_batch_norm(backbone, backbone_norm)
    return model


def require_known(name: str, known: dict[str, str]) -> None:
    """Raises ValueError where `name` is none of the `known` models."""
    if name not in known:
        raise ValueError(
            f"name must be one of {', '.join(known)}, got {name!r}.{did_you_mean(str(name), known)} "
            f"Any other model is built by its own _target_"
        )


def require_classes(num_classes: int) -> None:
    """Raises ValueError where it is no number of classes with a background; torchvision would take its own."""
    if not isinstance(num_classes, int) or num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, the background included, got {num_classes!r}")


def _build(name: str, options: dict[str, Any], num_classes: int) -> nn.Module:
    model: nn.Module = getattr(segmentation, name)(num_classes=num_classes, **options)
    return model
