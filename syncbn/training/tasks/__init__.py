"""LightningModules: a model, its loss, its metrics and its optimizer."""

from syncbn.training.tasks.detection import DetectionTask
from syncbn.training.tasks.segmentation import SegmentationTask
from syncbn.training.tasks.task import Task

__all__ = ["DetectionTask", "SegmentationTask", "Task"]
