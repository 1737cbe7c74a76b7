"""Data sets and LightningDataModules."""

from syncbn.training.data.datamodule import DataModule, DigitScenesDataModule
from syncbn.training.data.digits import DigitScenes

__all__ = ["DataModule", "DigitScenes", "DigitScenesDataModule"]
