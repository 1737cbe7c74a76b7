"""Losses for segmentation."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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
        self.background_weight = background_weight
        self.dice_weight = dice_weight

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """Scores float [B, C, H, W] and target int64 [B, H, W] with values 0 to C-1; returns a scalar."""
        class_weights = scores.new_ones(scores.shape[1])
        class_weights[0] = self.background_weight
        loss = F.cross_entropy(scores, target, weight=class_weights)
        if self.dice_weight > 0:
            loss = loss + self.dice_weight * soft_dice_loss(scores, target)
        return loss


def soft_dice_loss(scores: Tensor, target: Tensor) -> Tensor:
    """1 - the mean Dice coefficient of the classes that occur in `target`, with probabilities for masks.

    Scores float [B, C, H, W], target int64 [B, H, W]; returns a scalar in 0 to 1.
    """
    probability = scores.float().softmax(1)
    truth = F.one_hot(target, scores.shape[1]).movedim(-1, 1).to(probability.dtype)
    pixels = (0, 2, 3)
    truth_C = truth.sum(pixels)
    overlap_C = (probability * truth).sum(pixels)
    # + 1: one pixel more or less of a tiny digit should not swing the loss.
    dice_C = (2 * overlap_C + 1) / (probability.sum(pixels) + truth_C + 1)
    present_C = (truth_C > 0).to(dice_C.dtype)
    return torch.sum((1 - dice_C) * present_C) / present_C.sum().clamp(min=1)
