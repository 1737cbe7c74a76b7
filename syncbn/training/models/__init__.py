"""Models written without a thought for synchronization."""

from syncbn.training.models.unet import UNet

__all__ = ["UNet"]
