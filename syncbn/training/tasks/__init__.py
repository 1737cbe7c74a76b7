"""LightningModules: a model, its loss, its metrics and its optimizer."""

from syncbn.training.tasks.segmentation import SegmentationTask

__all__ = ["SegmentationTask"]
