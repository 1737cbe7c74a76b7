"""Models written without a thought for synchronization."""

from syncbn.training.models.batch_norm import trainable_batch_norm
from syncbn.training.models.detection import detection_model, trainable_detector
from syncbn.training.models.padding import count_valid_region
from syncbn.training.models.segmentation import segmentation_model
from syncbn.training.models.small_fcos import small_fcos
from syncbn.training.models.unet import UNet
from syncbn.training.models.weights import skip_weights

__all__ = [
    "UNet",
    "count_valid_region",
    "detection_model",
    "segmentation_model",
    "skip_weights",
    "small_fcos",
    "trainable_batch_norm",
    "trainable_detector",
]
