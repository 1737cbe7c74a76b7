"""Datasets as LightningDataModules: what is checked before training, how items are ordered and batched."""

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from syncbn.training.data.batches import Batch, Item, make_collate
from syncbn.training.data.digits import DigitScenes
from syncbn.training.data.faults import ITEM, ROW, Fault, count, describe, survey
from syncbn.training.data.items import BROKEN, Items
from syncbn.training.data.loader_processes import leave_signals_to_training, loader_context
from syncbn.training.data.order import EpochOrder, ResumableLoader
from syncbn.training.errors import UserError, few
from syncbn.training.processes import gather, rank, world_size

_WARNINGS = 10  # of single items; their count is told at the end
_CHECKS = ("headers", "full", "none")
_FAULTS = ("raise", "skip")
_LEFT_OUT = "left_out.txt"


class DataModule(LightningDataModule):
    """Training and validation data, checked before the first step.

    Before training each process looks through its share of the items, and all learn what was found: a file that is
    missing or broken ends the run on all processes with one message, or is left out on all of them. A file that
    only turns out broken when it is decoded is replaced by another item; the run then goes on, or ends on all
    processes after the same step with a checkpoint saved.

    The order of an epoch is a function of (seed, epoch) and an item's augmentation of (seed, epoch, item), whatever
    the number of workers, so that a run resumes where it was.

    Args:
        train, val: datasets; see `syncbn.training.data.faults` for what they offer.
        batch_size: items per process and step.
        num_workers: loader processes per training process; 0 reads items in the training process itself.
        pin_memory: page-locked batches, for GPUs.
        train_transforms, val_transforms: from item to item; None makes images float and changes nothing else.
        seed: of order and augmentation.
        faults: "raise" ends the run for a broken item, "skip" goes on without it and says so.
        check: how items are looked through before training: "headers" opens files without decoding images, "full"
            decodes them, "none" leaves it out; an image with a faulty object is then skipped as a whole.
        collate: "segmentation", "detection", "auto" (segmentation if the items have `semantic`), or a function.
        pad_to: for segmentation, batches' height and width become multiples of this.
        val_batch_size: items per process and validation step; None as in training.

    Raises:
        ValueError: an argument is outside its range, or the datasets differ in their classes.
    """

    def __init__(
        self,
        train: Any,
        val: Any,
        batch_size: int = 2,
        num_workers: int = 0,
        pin_memory: bool = False,
        train_transforms: Callable[[Any], Any] | None = None,
        val_transforms: Callable[[Any], Any] | None = None,
        seed: int = 0,
        faults: str = "raise",
        check: str = "headers",
        collate: str | Callable[[Sequence[Item]], Batch] = "auto",
        pad_to: int = 1,
        val_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        _require_integer("batch_size", batch_size, at_least=1)
        _require_integer("num_workers", num_workers, at_least=0)
        _require_integer("seed", seed, at_least=0)
        _require_integer("pad_to", pad_to, at_least=1)
        if val_batch_size is not None:
            _require_integer("val_batch_size", val_batch_size, at_least=1)
        _require_choice("faults", faults, _FAULTS)
        _require_choice("check", check, _CHECKS)
        if tuple(train.class_names) != tuple(val.class_names):
            different = " and ".join(f"{len(s.class_names)} ({few(s.class_names)})" for s in (train, val))
            raise ValueError(f"train and val must have the same classes, got {different}")
        self.class_names: tuple[str, ...] = tuple(train.class_names)
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.seed = seed
        self.faults = faults
        self.check = check
        self.train_set = Items(train, train_transforms, seed)
        self.val_set = Items(val, val_transforms, seed)
        self._collate = make_collate(collate, pad_to)
        self._surveyed: set[int] = set()
        self._broken: list[Fault] = []  # found by this process while reading
        self._train_loader: ResumableLoader | None = None
        self._place: dict[str, int] | None = None  # where a resumed run's epoch was left
        for dataset in (train, val):
            # Objects that no survey has counted would be lost in silence.
            if faults == "skip" and check != "none" and hasattr(dataset, "bad_objects"):
                dataset.bad_objects = "skip"

    def setup(self, stage: str) -> None:
        """Looks through the items, once; on all processes together.

        Raises:
            UserError: with faults="raise", an item is broken; with "skip", none is left; or the processes have
                different files.
        """
        sets = (
            {"training": self.train_set, "validation": self.val_set} if stage == "fit" else {"validation": self.val_set}
        )
        for name, items in sets.items():
            if id(items) not in self._surveyed:
                _require_same(name, items.dataset)
                if self.check != "none":
                    self._survey(name, items)
                self._surveyed.add(id(items))

    def train_dataloader(self) -> ResumableLoader:
        loader = self._loader(self.train_set, self.batch_size, training=True)
        if self._place is not None:
            loader.load_state_dict(self._place)
            self._place = None
        self._train_loader = loader
        return loader

    # Lightning keeps the loader's state as well, but does not restore it to a loader that is made early, such as for
    # the number of steps that a schedule asks for.
    def state_dict(self) -> dict[str, Any]:
        return {} if self._train_loader is None else {"place": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._place = state_dict.get("place")

    def val_dataloader(self) -> ResumableLoader:
        return self._loader(self.val_set, self.val_batch_size, training=False)

    # In the training process, whoever made the batch: workers' findings travel with it.
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Notes what broke, and warns of it.

        Raises:
            UserError: nothing could be read.
        """
        if isinstance(batch, dict) and set(batch) == {BROKEN}:
            raise UserError(_in_a_line(batch[BROKEN]))
        for fault in batch.pop(BROKEN, []) if isinstance(batch, dict) else []:
            if fault not in self._broken:
                self._broken.append(fault)
                if self.faults == "skip" and len(self._broken) <= _WARNINGS:
                    warnings.warn(f"{fault}; replaced by another item", stacklevel=2)
        return batch

    @property
    def stop_reason(self) -> str | None:
        """Why training should stop on all processes; `GracefulStop` asks after each step."""
        return _in_a_line(self._broken) if self._must_end(self._broken) else None

    def teardown(self, stage: str) -> None:
        """Tells what was found while reading, all processes' together.

        Raises:
            UserError: with faults="raise", an item turned out broken, or in any case so many in a row, and nothing has
                stopped the run.
        """
        broken = sorted({fault for share in gather(self._broken) for fault in share})
        self._broken = []
        if self._must_end(broken):
            raise UserError(_in_a_line(broken))
        if broken and rank() == 0:
            warnings.warn(f"replaced by others while reading: {count(broken)}", stacklevel=2)

    def _must_end(self, broken: Sequence[Fault]) -> bool:
        return any(self.faults == "raise" or fault.kind == ROW for fault in broken)

    def _survey(self, name: str, items: Items) -> None:
        dataset = items.dataset
        share = survey(dataset, range(rank(), len(dataset), world_size()), decode=self.check == "full")
        found = sorted(fault for share in gather(share) for fault in share)
        if not found:
            return
        told = f"{name} data: {_in_a_line(found)}"
        if self.faults == "raise":
            raise UserError(f"{told}; data.faults=skip goes on without them")
        items.leave_out({fault.index for fault in found if fault.kind == ITEM})
        if not len(items):
            raise UserError(f"{told}; nothing is left")
        if rank() == 0:
            self._list_left_out(name, found)
            warnings.warn(f"{told}; left out", stacklevel=2)

    def _list_left_out(self, name: str, found: Sequence[Fault]) -> None:
        if self.trainer is None:
            return
        path = Path(self.trainer.default_root_dir, _LEFT_OUT)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.writelines(f"{name}\t{fault.kind}\t{fault.file}\t{fault.why}\n" for fault in found)

    def _loader(self, items: Items, batch_size: int, training: bool) -> ResumableLoader:
        processes, this = world_size(), rank()
        if self.trainer is not None and self.trainer.distributed_sampler_kwargs is not None:
            # A strategy may count several processes as one where data is concerned.
            processes = self.trainer.distributed_sampler_kwargs["num_replicas"]
            this = self.trainer.distributed_sampler_kwargs["rank"]
        # In training nothing is shown twice; a validation metric must see all, and leaves out what is repeated.
        drop_last = training and len(items) >= processes
        order = EpochOrder(items, processes, this, shuffle=training, seed=self.seed, drop_last=drop_last)
        return ResumableLoader(
            items,
            batch_size=batch_size,
            sampler=order,
            # An incomplete last batch would be the one batch with other statistics.
            drop_last=training and len(order) >= batch_size,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            multiprocessing_context=loader_context() if self.num_workers else None,
            worker_init_fn=leave_signals_to_training,
            pin_memory=self.pin_memory,
            collate_fn=_Collate(self._collate),
        )


class DigitScenesDataModule(DataModule):
    """Scenes of handwritten digits, synthesized on demand (about 2 ms each); see `DigitScenes` for what an item holds.

    Args:
        train_size, val_size: scenes per training epoch and for validation, over all processes.
        image_size, digits, digit_size: as in `DigitScenes`.
        seed: of the scenes, their order and their augmentation.
        collate: "segmentation" stacks images, "detection" lists them with their targets.
        batch_size, num_workers, pin_memory, train_transforms, val_transforms, val_batch_size: as in `DataModule`.

    Raises:
        ValueError: an argument is outside its range.
    """

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
        collate: str | Callable[[Sequence[Item]], Batch] = "segmentation",
        train_transforms: Callable[[Any], Any] | None = None,
        val_transforms: Callable[[Any], Any] | None = None,
        val_batch_size: int | None = None,
    ) -> None:
        _require_integer("train_size", train_size, at_least=1)
        _require_integer("val_size", val_size, at_least=1)
        _require_integer("seed", seed, at_least=0)
        _require_integer("image_size", image_size, at_least=64)
        _require_range("digits", digits)
        _require_range("digit_size", digit_size)
        scene: dict[str, Any] = {
            "seed": seed,
            "image_size": image_size,
            "digits": tuple(digits),
            "digit_size": tuple(digit_size),
        }
        super().__init__(
            DigitScenes("train", train_size, **scene),
            DigitScenes("val", val_size, **scene),
            batch_size=batch_size,
            num_workers=num_workers,
            pin_memory=pin_memory,
            train_transforms=train_transforms,
            val_transforms=val_transforms,
            seed=seed,
            check="none",
            collate=collate,
            val_batch_size=val_batch_size,
        )


class _Collate:
    """Batches, with what broke on the way."""

    def __init__(self, collate: Callable[[Sequence[Item]], Batch]) -> None:
        self.collate = collate

    def __call__(self, items: list[Item]) -> Batch:
        broken = [fault for item in items for fault in item.pop(BROKEN, [])]
        whole = [item for item in items if set(item) != {"index"}]
        batch = self.collate(whole) if whole else {}
        return batch | {BROKEN: broken} if broken else batch


def _in_a_line(faults: Sequence[Fault]) -> str:
    first, *others = describe(faults).splitlines()
    return f"{first} {'; '.join(line.strip() for line in others)}"


def _require_same(name: str, dataset: Any) -> None:
    """Raises:
    UserError: not all processes have the same items, such as machines with unequal copies of a folder. They would show
        an image twice or never, and wait for each other at the end of an epoch.
    """
    if world_size() == 1:
        return
    digest = hashlib.sha256()
    for index in range(len(dataset) if hasattr(dataset, "name") else 0):
        # Folders may lie elsewhere on each machine.
        digest.update(f"{os.path.basename(dataset.name(index))}\n".encode())
    seen = gather((len(dataset), digest.hexdigest()))
    for other, (size, names) in enumerate(seen):
        if (size, names) != seen[0]:
            what = "as many, but others" if size == seen[0][0] else str(size)
            raise UserError(
                f"{name} data: process 0 finds {seen[0][0]} items, process {other} {what}: copy the same files"
            )


def _require_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def _require_integer(name: str, value: Any, at_least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ValueError(f"{name} must be a whole number of at least {at_least}, got {value!r}")


def _require_range(name: str, value: Any) -> None:
    is_pair = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2
    if not is_pair or not all(isinstance(v, int) for v in value):
        raise ValueError(f"{name} must be two whole numbers [low, high], got {value!r}")
