"""What a detector of torchvision's pads counts in no layer's statistics."""

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection.image_list import ImageList

import syncbn


def count_valid_region(detector: nn.Module) -> nn.Module:
    """Lets synchronized layers of a torchvision detector see the images alone, not what pads them to one size.

    The detector's own transform resizes and pads, so that nobody outside of it knows the sizes. Hooks take them
    from there and run backbone and dense heads inside of `syncbn.valid_region`; a box head, which sees regions, is
    left alone. A batch without padding, and eval mode, pay nothing. No keys of the state_dict change; copies and
    pickles have hooks of their own. A second call changes nothing.

    Args:
        detector: with `transform`, `backbone`, and `head` or `rpn.head`, as all of torchvision's have.

    Returns:
        `detector` itself.

    Raises:
        TypeError: it has no such parts.
    """
    head = getattr(detector, "head", None) or getattr(getattr(detector, "rpn", None), "head", None)
    transform, backbone = getattr(detector, "transform", None), getattr(detector, "backbone", None)
    if not (isinstance(transform, nn.Module) and isinstance(backbone, nn.Module) and isinstance(head, nn.Module)):
        raise TypeError(f"expected a detector with transform, backbone and head, got {type(detector).__name__}")
    if any(isinstance(getattr(hook, "__self__", None), _Padding) for hook in transform._forward_hooks.values()):
        return detector  # it does so already
    padding = _Padding()
    detector.register_forward_pre_hook(padding.begin)
    detector.register_forward_hook(padding.end, always_call=True)
    transform.register_forward_hook(padding.measure)
    for part in (backbone, head):
        part.register_forward_pre_hook(padding.enter)
        part.register_forward_hook(padding.leave, always_call=True)
    return detector


class _Padding:
    """The valid region of the batch that a detector is seeing. A class, so that copies and pickles have their own."""

    def __init__(self) -> None:
        self.learning = False
        self.valid: Tensor | None = None  # bool [N, 1, H, W]; None: nothing is padded
        self.entered: list[syncbn.valid_region] = []

    def begin(self, detector: nn.Module, args: Any) -> None:
        self.valid = None
        # `syncbn.recalibrate` has the layers alone in training mode.
        self.learning = detector.training or any(
            layer.training for layer in detector.modules() if isinstance(layer, _BatchNorm)
        )

    def end(self, detector: nn.Module, args: Any, output: Any) -> None:
        self.valid, self.learning = None, False

    def measure(self, transform: nn.Module, args: Any, output: tuple[ImageList, Any]) -> None:
        images, sizes = output[0].tensors, output[0].image_sizes
        if not self.learning or all(tuple(size) == tuple(images.shape[-2:]) for size in sizes):
            return
        # Not by padding_mask: it would send the sizes to the device, which waits for that.
        self.valid = images.new_zeros((len(sizes), 1, *images.shape[-2:]), dtype=bool)
        for image, (height, width) in zip(self.valid, sizes, strict=True):
            image[:, :height, :width] = True

    def enter(self, part: nn.Module, args: Any) -> None:
        if self.valid is not None:
            region = syncbn.valid_region(self.valid, strict=False)
            region.__enter__()
            self.entered.append(region)

    def leave(self, part: nn.Module, args: Any, output: Any) -> None:
        if self.entered:  # not if the part has failed before it was entered
            self.entered.pop().__exit__(None, None, None)
