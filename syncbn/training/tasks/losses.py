"""Losses for segmentation. Pixels of value 255 count in none of them."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from syncbn.training.data.batches import IGNORED


class CrossEntropyLoss(nn.Module):
    """Cross-entropy, in mean over the pixels that have a class; 0 if none has.

    torch's own is NaN of a batch without such pixels, and one NaN on one process is NaN in all weights.

    Args:
        label_smoothing: as in `torch.nn.CrossEntropyLoss`.
        background_weight: weight of class 0; the other classes weigh 1.

    Raises:
        ValueError: a value is outside its range.
    """

    def __init__(self, label_smoothing: float = 0.0, background_weight: float = 1.0) -> None:
        super().__init__()
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must be a fraction from 0 to 1, got {label_smoothing}")
        if background_weight < 0:
            raise ValueError(f"background_weight must be 0 or more, got {background_weight}")
        self.label_smoothing = label_smoothing
        self.background_weight = background_weight

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """Scores float [B, C, H, W] and target int64 [B, H, W] with values 0 to C-1 or 255; returns a scalar."""
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        class_weights = scores.new_ones(scores.shape[1])
        class_weights[0] = self.background_weight
        # Not as the function's own mean, which divides by 0 where no pixel counts.
        total = F.cross_entropy(
            scores,
            target,
            weight=class_weights,
            ignore_index=IGNORED,
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        weight = torch.where(target == 0, self.background_weight, 1.0).mul(target != IGNORED).sum()
        return total / weight.clamp(min=torch.finfo(weight.dtype).tiny)


class CrossEntropyDiceLoss(nn.Module):
    """Cross-entropy plus `dice_weight` times a soft Dice loss over the classes in the batch.

    Cross-entropy alone is content with background for a long time, since digits cover a tenth of a scene;
    Dice counts every class alike however small it is.

    Args:
        background_weight: weight of class 0 in the cross-entropy; the other classes weigh 1.
        dice_weight: weight of the Dice loss; 0 leaves cross-entropy alone.

    Raises:
        ValueError: a weight is negative.
    """

    def __init__(self, background_weight: float = 0.1, dice_weight: float = 1.0) -> None:
        super().__init__()
        if background_weight < 0 or dice_weight < 0:
            raise ValueError(
                f"background_weight and dice_weight must be 0 or more, got {background_weight} and {dice_weight}"
            )
        self.cross_entropy = CrossEntropyLoss(background_weight=background_weight)
        self.dice_weight = dice_weight

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """Scores float [B, C, H, W] and target int64 [B, H, W] with values 0 to C-1 or 255; returns a scalar."""
        loss: Tensor = self.cross_entropy(scores, target)
        if self.dice_weight > 0:
            loss = loss + self.dice_weight * soft_dice_loss(scores, target)
        return loss


def soft_dice_loss(scores: Tensor, target: Tensor) -> Tensor:
    """1 - the mean Dice coefficient of the classes that occur in `target`, with probabilities for masks.

    Scores float [B, C, H, W], target int64 [B, H, W] with values 0 to C-1 or 255; returns a scalar in 0 to 1.
    """
    counted = target != IGNORED
    probability = scores.float().softmax(1) * counted.unsqueeze(1)
    truth = F.one_hot(target.where(counted, 0), scores.shape[1]).movedim(-1, 1).to(probability.dtype)
    truth = truth * counted.unsqueeze(1)
    pixels = (0, 2, 3)
    truth_C = truth.sum(pixels)
    overlap_C = (probability * truth).sum(pixels)
    # + 1: one pixel more or less of a tiny digit should not swing the loss.
    dice_C = (2 * overlap_C + 1) / (probability.sum(pixels) + truth_C + 1)
    present_C = (truth_C > 0).to(dice_C.dtype)
    return torch.sum((1 - dice_C) * present_C) / present_C.sum().clamp(min=1)
