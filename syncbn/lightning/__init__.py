"""syncbn in PyTorch Lightning."""

from .plugin import SyncBatchNormGuard, SyncBatchNormPlugin

__all__ = ["SyncBatchNormGuard", "SyncBatchNormPlugin"]
