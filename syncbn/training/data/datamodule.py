"""The digit scenes as a LightningDataModule."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from syncbn.training.data.digits import CLASS_NAMES, DigitScenes, collate_scenes


class DigitScenesDataModule(LightningDataModule):
    """Training and validation scenes; see `DigitScenes` for what an item holds.

    The loaders carry no sampler of their own: over several processes Lightning adds a DistributedSampler,
    which shuffles in training. Scenes are synthesized on demand (about 2 ms each), so nothing has to be
    shared or cached.

    Args:
        train_size, val_size: scenes per training epoch and for validation, over all processes.
        batch_size: scenes per process and step.
        num_workers: loader processes per training process; 0 synthesizes scenes in the training process
        itself.
        pin_memory: page-locked batches, for GPUs.
        seed, image_size, digits, digit_size: as in `DigitScenes`.

    Raises:
        ValueError: an argument is outside its range.
    """

    class_names = CLASS_NAMES

    def __init__(
        self,
        train_size: int = 800,
        val_size: int = 200,
        batch_size: int = 2,
        num_workers: int = 0,
        pin_memory: bool = False,
        seed: int = 0,
        image_size: int = 96,
        digits: Sequence[int] = (2, 6),
        digit_size: Sequence[int] = (28, 44),
    ) -> None:
        super().__init__()
        _require_integer("train_size", train_size, at_least=1)
        _require_integer("val_size", val_size, at_least=1)
        _require_integer("batch_size", batch_size, at_least=1)
        _require_integer("num_workers", num_workers, at_least=0)
        _require_integer("seed", seed, at_least=0)
        _require_integer("image_size", image_size, at_least=64)
        _require_range("digits", digits)
        _require_range("digit_size", digit_size)
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        scene: dict[str, Any] = {
            "seed": seed,
            "image_size": image_size,
            "digits": tuple(digits),
            "digit_size": tuple(digit_size),
        }
        self.train_scenes = DigitScenes("train", train_size, **scene)
        self.val_scenes = DigitScenes("val", val_size, **scene)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        # An incomplete last batch would be the one batch with other statistics.
        return self._loader(self.train_scenes, shuffle=True, drop_last=len(self.train_scenes) >= self.batch_size)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        return self._loader(self.val_scenes, shuffle=False, drop_last=False)

    def _loader(self, scenes: DigitScenes, shuffle: bool, drop_last: bool) -> DataLoader[dict[str, Any]]:
        return DataLoader(
            scenes,
            batch_size=self.batch_size,
            shuffle=shuffle,
            drop_last=drop_last,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            pin_memory=self.pin_memory,
            collate_fn=collate_scenes,
        )


def _require_integer(name: str, value: Any, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} must be a whole number of at least {at_least}, got {value!r}")


def _require_range(name: str, value: Any) -> None:
    is_pair = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    if not is_pair or not all(isinstance(v, int) for v in value):
        raise ValueError(f"{name} must be two whole numbers [low, high], got {value!r}")
