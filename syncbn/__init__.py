"""Synchronized batch normalization: every layer sees the whole batch, however it is spread over processes."""

from .accumulation import accumulate_statistics
from .checkpoint import checkpoint_contexts
from .exchange import Exchange
from .freezing import freeze, unfreeze
from .functional import sync_batch_norm
from .fusion import fuse
from .inventory import describe
from .layer import SyncBatchNorm
from .local import local
from .recalibration import recalibrate
from .recompute import recompute_activations
from .region import padding_mask, valid_region
from .surgery import convert, revert
from .together import BatchNormList, normalize_together
from .uneven import even_batches
from .verification import verify

__all__ = [
    "BatchNormList",
    "Exchange",
    "SyncBatchNorm",
    "accumulate_statistics",
    "checkpoint_contexts",
    "convert",
    "describe",
    "even_batches",
    "freeze",
    "fuse",
    "local",
    "normalize_together",
    "padding_mask",
    "recalibrate",
    "recompute_activations",
    "revert",
    "sync_batch_norm",
    "unfreeze",
    "valid_region",
    "verify",
]
