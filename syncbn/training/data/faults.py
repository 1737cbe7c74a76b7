"""What is wrong with the files of a dataset: found before training, told with file and reason.

How a dataset of files and its user share the work:

- A dataset's constructor raises `UserError` for what concerns all of it: no such folder, list or instances file.
- `dataset.faults(index)` lists what is wrong with one item, as far as annotations and image headers tell, and
  decodes nothing. A fault of kind "item" makes the whole item useless. A fault of kind "object" concerns one
  object (a box outside its image, an unknown class): the item stays, that object does not.
- `dataset.read(index)` is the item without its faulty objects. It raises `BrokenItem` if there is no such item.
- `dataset[index]` is the same where `dataset.bad_objects == "skip"`; where it is "raise", as at first, a faulty
  object raises `BrokenItem`, too. So an object is never left out unless somebody has chosen that.
- `survey(dataset, indices)` gathers the faults of many items. Who has them decides: tell all (`describe`) and
  stop, or leave out the `index` of each "item" fault, set `bad_objects` to "skip", and tell the counts (`count`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["item", "object", "row"]
OnFault = Literal["raise", "skip"]
ITEM: Kind = "item"
OBJECT: Kind = "object"
ROW: Kind = "row"

_TOLD = 10  # faults that are told one by one


class BrokenItem(Exception):  # noqa: N818 - it says what the item is, as StopIteration does
    """A file that cannot be used, and why.

    A DataLoader builds a worker's exception anew from its traceback's text alone: then that is `file`.
    """

    def __init__(self, file: str, why: str = "") -> None:
        super().__init__(file, why)
        self.file = str(file)
        self.why = why

    def __str__(self) -> str:
        return f"{self.file}: {self.why}" if self.why else self.file


@dataclass(frozen=True, order=True)
class Fault:
    """One thing that is wrong, in plain values, so that processes can exchange it.

    Attributes:
        index: the item's position in its dataset.
        file: the file to look at.
        why: what is wrong with it.
        kind: "item" or "object": what is lost if it is skipped; "row": so many after it as well that nobody would
            want to skip them.
    """

    index: int
    file: str
    why: str
    kind: str = ITEM

    def __str__(self) -> str:
        return f"{self.file}: {self.why}"


def survey(dataset: Any, indices: Iterable[int] | None = None, decode: bool = False) -> list[Fault]:
    """The faults of these items, in their order.

    Args:
        dataset: as above; one that has only `check(index)`, which returns a reason or None, will do, and one that
            has neither is taken to be without faults unless decoded.
        indices: which items; None: all. Processes survey a share each and exchange what they find.
        decode: read each item whole as well, as training will: finds truncated images and wrong mask values, at
            the cost of an epoch of reading.
    """
    found = []
    for index in range(len(dataset)) if indices is None else indices:
        faults = faults_of(dataset, index)
        if decode and not any(fault.kind == ITEM for fault in faults):
            try:
                getattr(dataset, "read", dataset.__getitem__)(index)
            except BrokenItem as broken:
                faults.append(Fault(index, broken.file, broken.why))
        found += faults
    return found


def faults_of(dataset: Any, index: int) -> list[Fault]:
    """The faults of one item that are found without decoding it."""
    if hasattr(dataset, "faults"):
        return list(dataset.faults(index))
    why = dataset.check(index) if hasattr(dataset, "check") else None
    return [] if why is None else [Fault(index, dataset.name(index), why)]


def describe(faults: Sequence[Fault]) -> str:
    """The count, then the first ten, a line each."""
    lines = [f"{count(faults)}:", *(f"  {fault}" for fault in faults[:_TOLD])]
    if len(faults) > _TOLD:
        lines.append(f"  and {len(faults) - _TOLD} more")
    return "\n".join(lines)


def count(faults: Sequence[Fault]) -> str:
    """How many items and objects are affected, in words: "2 broken items and 1 broken object"."""
    items = len({fault.index for fault in faults if fault.kind != OBJECT})
    objects = sum(fault.kind == OBJECT for fault in faults)
    parts = [
        f"{number} broken {word}{'s' * (number != 1)}"
        for number, word in ((items, "item"), (objects, "object"))
        if number
    ]
    return " and ".join(parts) or "no faults"
