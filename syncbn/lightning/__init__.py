"""syncbn in PyTorch Lightning."""

from .accumulation import AccumulateStatisticsCallback
from .monitor import StatisticsMonitor
from .plugin import SyncBatchNormGuard, SyncBatchNormPlugin
from .recalibration import RecalibrationCallback
from .uneven import EvenBatchesCallback

__all__ = [
    "AccumulateStatisticsCallback",
    "EvenBatchesCallback",
    "RecalibrationCallback",
    "StatisticsMonitor",
    "SyncBatchNormGuard",
    "SyncBatchNormPlugin",
]
