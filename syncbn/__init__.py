"""Synchronized batch normalization: every layer sees the whole batch, however it is spread over processes."""

from .exchange import Exchange
from .functional import sync_batch_norm
from .fusion import fuse
from .inventory import describe
from .layer import SyncBatchNorm
from .surgery import convert, revert

__all__ = ["Exchange", "SyncBatchNorm", "convert", "describe", "fuse", "revert", "sync_batch_norm"]
