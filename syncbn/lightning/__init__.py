"""syncbn in PyTorch Lightning."""

from .accumulation import AccumulateStatisticsCallback
from .plugin import SyncBatchNormGuard, SyncBatchNormPlugin
from .recalibration import RecalibrationCallback
from .uneven import EvenBatchesCallback

__all__ = [
    "AccumulateStatisticsCallback",
    "EvenBatchesCallback",
    "RecalibrationCallback",
    "SyncBatchNormGuard",
    "SyncBatchNormPlugin",
]
