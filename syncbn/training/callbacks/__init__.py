"""What a run shows and keeps: epoch lines, pictures, tables, and a checkpoint when it is interrupted."""

from syncbn.training.callbacks.agreement import Agreement
from syncbn.training.callbacks.checkpoints import LastCheckpoint
from syncbn.training.callbacks.console import EpochLines, FinalTable
from syncbn.training.callbacks.graceful_stop import GracefulStop
from syncbn.training.callbacks.non_finite import NonFiniteLoss
from syncbn.training.callbacks.pictures import Curves, Pictures
from syncbn.training.callbacks.progress import ProgressBar
from syncbn.training.callbacks.random_state import StatelessRandom
from syncbn.training.callbacks.resume import ExactResume
from syncbn.training.callbacks.summary import Summary

__all__ = [
    "Agreement",
    "Curves",
    "EpochLines",
    "ExactResume",
    "FinalTable",
    "GracefulStop",
    "LastCheckpoint",
    "NonFiniteLoss",
    "Pictures",
    "ProgressBar",
    "StatelessRandom",
    "Summary",
]
