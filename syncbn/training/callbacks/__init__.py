"""What a run shows and keeps: epoch lines, pictures, tables, and a checkpoint when it is interrupted."""

from syncbn.training.callbacks.console import EpochLines, FinalTable
from syncbn.training.callbacks.graceful_stop import GracefulStop
from syncbn.training.callbacks.pictures import Curves, SegmentationPictures

__all__ = ["Curves", "EpochLines", "FinalTable", "GracefulStop", "SegmentationPictures"]
