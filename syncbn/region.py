"""``valid_region``: padded places count in no layer's statistics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .calls import Call, Surrounding, entered
from .functional import require_weights


class valid_region(Surrounding):  # noqa: N801, used like a function
    """A ``with`` block in which the statistics of every SyncBatchNorm layer are those of the valid places alone.

    Images or sequences that are padded to a common size pull mean and variance toward the padding (PyTorch issues
    25910 and 70529). Inside of this block each layer weights its input by the mask at the input's own resolution
    (nearest place: output i of L belongs to place ⌊i·L₀/L⌋ of L₀, which is where a convolution of stride L₀/L has its
    centre). An input without places, [N, C], takes the greatest weight of each sample. All places are normalized, so
    that x must be finite in the padding, too; the gradients are exact.

    It holds on the thread that enters it, in training; the innermost block is the one that counts, and a mask that is
    passed to the layer itself comes before it. Where activation checkpointing recomputes a part,
    ``syncbn.checkpoint_contexts`` brings the block back.

    Args:
        mask: [N, 1, places...], [N, places...] or, for whole samples, [N], bool or weights of at least 0.
            False: nothing counts, in inputs of any shape. None or True: everything counts.
        strict: whether to raise at a layer whose input is not one of this batch, such as the regions of a detector's
            box head. If not, all of such an input counts.

    Raises:
        TypeError: the mask is none of these, or holds complex numbers.
        ValueError: the mask requires a gradient. At a layer: its input is not of the mask's batch or not of as many
            dimensions.
    """

    def __init__(self, mask: Tensor | bool | None = None, strict: bool = True) -> None:
        if not isinstance(mask, (Tensor, bool)) and mask is not None:
            raise TypeError(f"expected mask to be a tensor, a bool or None, got {type(mask).__name__}")
        if isinstance(mask, Tensor):
            require_weights(mask)
        self._mask = None if mask is True else mask
        self._strict = strict

    def changed(self, call: Call) -> Call:
        if self._mask is None or call.mask is not None or self._is_covered():
            return call
        if isinstance(self._mask, bool):
            return call._replace(mask=torch.zeros((), dtype=torch.bool, device=call.x.device))
        if not self._strict and not _is_of_batch(self._mask, call.x):
            return call
        return call._replace(mask=mask_for(self._mask, call.x))

    def _is_covered(self) -> bool:
        """Whether there is another region inside of this one."""
        return [block for block in entered() if isinstance(block, valid_region)][-1] is not self


def padding_mask(sizes: Tensor | Sequence[int | Sequence[int]], padded: int | Sequence[int]) -> Tensor:
    """Which places of a padded batch are valid: those before each sample's own size, in every dimension.

    Args:
        sizes: [N] lengths, or [N, D] sizes such as torchvision's ``ImageList.image_sizes``; numbers or a tensor.
        padded: the common length, or the D sizes, that all have been padded to.

    Returns:
        [N, 1, *padded] bool, on the device of ``sizes``.

    Raises:
        ValueError: the numbers of dimensions differ.
    """
    sizes_ND = torch.as_tensor(sizes)
    padded = (padded,) if isinstance(padded, int) else tuple(padded)
    if sizes_ND.dim() == 1:  # lengths; or a list of no samples, which says nothing of dimensions
        sizes_ND = sizes_ND.view(0, len(padded)) if len(sizes_ND) == 0 else sizes_ND.unsqueeze(1)
    if sizes_ND.dim() != 2 or sizes_ND.shape[1] != len(padded):
        raise ValueError(
            f"expected sizes of {len(padded)} numbers for each sample, as many as the padded size {padded} has, got "
            f"shape {list(torch.as_tensor(sizes).shape)}"
        )
    N, D = sizes_ND.shape
    valid = torch.ones((N, 1, *padded), dtype=torch.bool, device=sizes_ND.device)
    for dim, length in enumerate(padded):
        along = [1, 1] + [length if d == dim else 1 for d in range(D)]
        place = torch.arange(length, device=sizes_ND.device).view(along)
        valid = valid & (place < sizes_ND[:, dim].view(N, 1, *[1] * D))
    return valid


def mask_for(mask: Tensor, x: Tensor) -> Tensor:
    """The mask [N, 1, places...], [N, places...] or [N] at x's resolution: [N, 1, ...], to be broadcast to x.

    Raises:
        ValueError: it does not fit.
    """
    if not _is_of_batch(mask, x):
        raise ValueError(
            f"expected the input of a layer inside of valid_region to be of the mask's batch, that is a mask of "
            f"[N, 1, places...], [N, places...] or [N] for the input {list(x.shape)}, got a mask {list(mask.shape)}. "
            f"Put what normalizes other batches into valid_region(None), or pass valid_region(mask, strict=False)"
        )
    if mask.dim() == 1:
        return mask.view(-1, *[1] * (x.dim() - 1))
    if x.dim() == 2:
        return mask.flatten(1).amax(1, keepdim=True)
    mask = mask if mask.dim() == x.dim() else mask.unsqueeze(1)
    for dim in range(2, x.dim()):
        mask = _nearest(mask, dim, x.shape[dim])
    return mask


def _is_of_batch(mask: Tensor, x: Tensor) -> bool:
    if mask.dim() == 0 or mask.shape[0] != x.shape[0]:
        return False
    if mask.dim() == 1 or x.dim() == 2:
        return True
    return mask.dim() == x.dim() - 1 or (mask.dim() == x.dim() and mask.shape[1] == 1)


def _nearest(mask: Tensor, dim: int, length: int) -> Tensor:
    """Resized along one dimension. In whole numbers: a rounded scale would be off by one at some lengths."""
    if mask.shape[dim] == length:
        return mask
    places = torch.arange(length, device=mask.device) * mask.shape[dim] // max(length, 1)
    return mask.index_select(dim, places)
