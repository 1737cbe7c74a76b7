"""A loss that does not know how a batch is spread over processes."""

import torch
from torch import Tensor, nn


class MeanOverImages(nn.Module):
    """The mean of a loss that is taken for each image by itself.

    A class-weighted cross-entropy divides by the weights in its batch, and Dice counts the classes in its batch: the
    mean of such losses over processes is not the loss of the union, so that training would depend on the batch per
    process whatever the normalization does. The mean over images is the same, as long as all processes have equally
    many.

    Args:
        loss: maps scores [1, C, H, W] and target [1, H, W] to a scalar.
    """

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, scores: Tensor, target: Tensor) -> Tensor:
        """Scores float [B, C, H, W] and target int64 [B, H, W]; returns a scalar."""
        losses = [self.loss(*image) for image in zip(scores.split(1), target.split(1), strict=True)]
        return torch.stack(losses).mean()
