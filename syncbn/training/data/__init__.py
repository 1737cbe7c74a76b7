"""Data sets and LightningDataModules."""

from syncbn.training.data.datamodule import DigitScenesDataModule
from syncbn.training.data.digits import DigitScenes

__all__ = ["DigitScenes", "DigitScenesDataModule"]
