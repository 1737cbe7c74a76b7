"""torchvision's detectors, from scratch or from weights on disk, with batch normalization that learns."""

import functools
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torchvision.models import detection, get_model_weights
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from syncbn.training.errors import did_you_mean
from syncbn.training.models.batch_norm import hold_batch_norm, hold_stages, trainable_batch_norm
from syncbn.training.models.padding import count_valid_region
from syncbn.training.models.segmentation import require_classes, require_known
from syncbn.training.models.weights import load_backbone_weights, load_weights

# Each with the classifier that its backbone comes from.
BACKBONES = {
    "fcos_resnet50_fpn": "resnet50",
    "retinanet_resnet50_fpn_v2": "resnet50",
    "fasterrcnn_resnet50_fpn_v2": "resnet50",
}
_KINDS: dict[str, type[nn.Module]] = {
    "fcos_resnet50_fpn": detection.FCOS,
    "retinanet_resnet50_fpn_v2": detection.RetinaNet,
    "fasterrcnn_resnet50_fpn_v2": detection.FasterRCNN,
}
_ALL_STAGES = 5
_PRETRAINED_STAGES = 3  # torchvision's default: stem and first stage stay as ImageNet has made them


def detection_model(
    name: str,
    num_classes: int,
    weights: str | Path | None = None,
    weights_backbone: str | Path | None = None,
    class_heads: str = "auto",
    backbone_norm: str = "batch",
    trainable_backbone_layers: int | None = None,
    skip_resize: bool = False,
    **options: Any,
) -> nn.Module:
    """One of torchvision's detectors. Nothing is downloaded unless a word asks for it.

    It takes a list of images float [3, H, W] in 0 to 1 and, in training, targets, and returns losses or detections;
    it normalizes, resizes and pads by itself. Its batch normalization is `nn.BatchNorm2d` throughout, also where
    torchvision's has FrozenBatchNorm2d; what pads an image counts in no synchronized layer's statistics.

    Args:
        name: "fcos_resnet50_fpn", "retinanet_resnet50_fpn_v2" or "fasterrcnn_resnet50_fpn_v2".
        num_classes: the number of classes, the background included.
        weights: None, from scratch; a file; or "download" or a name such as "COCO_V1", torchvision's.
        weights_backbone: likewise for the ResNet alone, a classifier's; `weights`, if given, comes before it.
        class_heads: whether `weights` fill in what depends on the classes: "auto", if their number is the same;
            "fresh", never; or "kept", or else it is an error.
        backbone_norm: "batch", the ResNet's batch normalization learns in the stages that learn; "frozen", all of it
            stays as it was loaded, as in torchvision.
        trainable_backbone_layers: how many of the ResNet's five stages learn, the last ones; the others, their batch
            normalization included, stay as they are. None: all, from scratch; three, from weights.
        skip_resize: whether training takes the images in the size that the augmentation has given them.
        options: torchvision's own, of the model (min_size, max_size, image_mean, score_thresh, ...) and of its
            transform (fixed_size, size_divisible).

    Raises:
        ValueError: an argument cannot be used, or weights cannot be read or do not fit.
        TypeError: there is no such option.
    """
    require_known(name, BACKBONES)
    require_classes(num_classes)
    _require_options(name, options)
    options = {key: _plain(value) for key, value in options.items()}
    build = functools.partial(_build, name, {**options, "_skip_resize": skip_resize})
    model = build(num_classes)
    resnet = model.get_submodule("backbone.body")
    stages = _ALL_STAGES
    if weights is not None:
        load_weights(model, weights, get_model_weights(name), build, num_classes, class_heads)
        stages = _PRETRAINED_STAGES
    elif weights_backbone is not None:
        load_backbone_weights(resnet, weights_backbone, get_model_weights(BACKBONES[name]))
        stages = _PRETRAINED_STAGES
    hold_stages(resnet, stages if trainable_backbone_layers is None else trainable_backbone_layers)
    hold_batch_norm(resnet, backbone_norm)
    return count_valid_region(model)


def trainable_detector(model: nn.Module) -> nn.Module:
    """Any other detector of torchvision's as `detection_model` makes its own.

    In a configuration::

        model:
          _target_: syncbn.training.models.trainable_detector
          model:
            _target_: torchvision.models.detection.maskrcnn_resnet50_fpn
            num_classes: ${num_classes}
            weights: null
            weights_backbone: IMAGENET1K_V1 # torchvision downloads it

    See `trainable_batch_norm` and `count_valid_region`.
    """
    return count_valid_region(trainable_batch_norm(model))


def _build(name: str, options: dict[str, Any], num_classes: int) -> nn.Module:
    # Left to torchvision, weights_backbone would be a download.
    model: nn.Module = getattr(detection, name)(num_classes=num_classes, weights=None, weights_backbone=None, **options)
    return model


def _require_options(name: str, options: dict[str, Any]) -> None:
    """torchvision passes what it does not know on to its transform, which ignores it."""
    known = {*inspect.signature(_KINDS[name]).parameters, *inspect.signature(GeneralizedRCNNTransform).parameters}
    for key in options:
        if key not in known - {"kwargs", "backbone", "num_classes"}:
            raise TypeError(f"{name} has no option {key}.{did_you_mean(key, known)}")


def _plain(value: Any) -> Any:
    """Hydra's lists as tuples, which torchvision looks for."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
