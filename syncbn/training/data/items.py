"""The items of a dataset as a loader draws them: without those left out, augmented, and whole."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from torch.utils.data import Dataset

from syncbn.training.data.augmentation import typed, unchanged
from syncbn.training.data.faults import ROW, BrokenItem, Fault
from syncbn.training.data.order import Draw
from syncbn.training.randomness import reseeded

# So many broken ones in a row are no accident of single files.
_MOST_IN_A_ROW = 32

# Key of an item, and of a batch, with the faults of those that it stands in for. Only present if there are any.
BROKEN = "broken"
STAND_IN = -1  # the index of such an item: it counts in no metric


class Items(Dataset[dict[str, Any]]):
    """`dataset`'s items, transformed; numbered anew, from 0, without those that are left out.

    An item is a function of (seed, epoch, number): transforms draw their random numbers from generators set to that.
    An item that turns out broken when it is read is replaced by the next one that is not. That has the index -1 and
    names what it replaces under `broken`: processes wait for each other, so none may come away without an item.
    Where many in a row are broken, the last whole one that was read stands in; before there is any, only `index` and
    `broken` come. It raises nothing, since out of a worker process nothing but a traceback's text would arrive.

    Args:
        dataset: gives items as dicts; `index` is replaced by this class's numbers.
        transforms: from item to item; None makes images float and changes nothing else.
        seed: another seed gives other random numbers.
    """

    def __init__(self, dataset: Any, transforms: Callable[[Any], Any] | None, seed: int) -> None:
        self.dataset = dataset
        self.transforms = transforms or unchanged()
        self.seed = seed
        self._kept: list[int] | None = None  # None: all
        self._last: dict[str, Any] = {}  # the last whole item that this process has read

    def __len__(self) -> int:
        return len(self.dataset) if self._kept is None else len(self._kept)

    def __getitem__(self, draw: Draw | int) -> dict[str, Any]:
        index, epoch = draw if isinstance(draw, Draw) else (draw, 0)
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        broken: list[Fault] = []
        for step in range(min(len(self), _MOST_IN_A_ROW)):
            number = (index + step) % len(self)
            try:
                self._last = self._read(number, epoch)
            except BrokenItem as fault:
                broken.append(Fault(self._number(number), fault.file, fault.why))
                continue
            return {**self._last, "index": STAND_IN, BROKEN: broken} if broken else {**self._last}
        why = f"{broken[0].why}; {len(broken)} items in a row cannot be read"
        return {**self._last, "index": STAND_IN, BROKEN: [replace(broken[0], why=why, kind=ROW)]}

    def leave_out(self, numbers: Collection[int]) -> None:
        """Leaves out items by their number in the dataset."""
        left_out = set(numbers)
        self._kept = [i for i in range(len(self.dataset)) if i not in left_out] if left_out else None

    def _read(self, number: int, epoch: int) -> dict[str, Any]:
        # Reading, too: a dataset may draw random numbers.
        with reseeded(self.seed, epoch, number):
            item = self.dataset[self._number(number)]
            return {**self.transforms(typed(item)), "index": number}

    def _number(self, number: int) -> int:
        """The dataset's own number of an item."""
        return number if self._kept is None else self._kept[number]
