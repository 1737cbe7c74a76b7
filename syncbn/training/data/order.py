"""In which order an epoch shows the items of a dataset, and a loader that resumes within it."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from syncbn.training.randomness import seed_of


class Draw(NamedTuple):
    """What the order asks a dataset for: an item, and the epoch that it is drawn for.

    The epoch travels with the request, since worker processes that outlive an epoch have no other way to learn it.
    """

    number: int
    epoch: int


class EpochOrder(DistributedSampler[Draw]):
    """Gives process r of P the draws r, r + P, r + 2P, ... of an order that is a function of (seed, epoch).

    So the union of all processes' batches k is the same however many processes share a global batch. Being a
    DistributedSampler, it is left in place by Lightning and told each epoch's number.

    Args:
        dataset: its length counts.
        num_replicas, rank: processes, and which of them this is.
        shuffle: another order each epoch; False keeps the dataset's own.
        seed: another seed gives other orders.
        drop_last: leave out up to P - 1 items, others each epoch, so that all processes have equally many; False
            repeats the first ones instead.
    """

    def __init__(
        self, dataset: Dataset[Any], num_replicas: int, rank: int, shuffle: bool, seed: int, drop_last: bool
    ) -> None:
        super().__init__(dataset, num_replicas, rank, shuffle=shuffle, seed=seed, drop_last=drop_last)
        # Draws of this process to leave out at the start of the next iteration.
        self.skip = 0

    def __iter__(self) -> Iterator[Draw]:
        size = len(self.dataset)  # type: ignore[arg-type]
        if self.shuffle:
            generator = torch.Generator().manual_seed(seed_of(self.seed, self.epoch))
            order = torch.randperm(size, generator=generator)
        else:
            order = torch.arange(size)
        positions = torch.arange(self.rank, self.total_size, self.num_replicas) % size
        return (Draw(number, self.epoch) for number in order[positions[self.skip :]].tolist())


class ResumableLoader(DataLoader[Any]):
    """A DataLoader whose state_dict is the place within the epoch.

    The place is counted in batches that were handed out, not in those that workers have prepared ahead. It is
    meant for an `EpochOrder` as sampler; with another one an epoch starts over.
    """

    # Not in __init__: Lightning builds a loader of this class anew where it has to exchange the sampler.
    _handed_out = 0
    _resume_at: dict[str, int] | None = None

    def state_dict(self) -> dict[str, int]:
        return {"epoch": getattr(self.sampler, "epoch", 0), "batches": self._handed_out}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._resume_at = dict(state_dict)

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # Nothing happens before the first batch is asked for. Lightning creates an iterator before it tells the
        # epoch, and workers must not begin with another epoch's items.
        self._handed_out = self._start()
        for batch in super().__iter__():
            self._handed_out += 1
            yield batch

    def _start(self) -> int:
        place, self._resume_at = self._resume_at, None
        if not isinstance(self.sampler, EpochOrder):
            return 0
        same_epoch = place is not None and place["epoch"] == self.sampler.epoch
        batches = place["batches"] if place is not None and same_epoch else 0
        self.sampler.skip = batches * (self.batch_size or 1)
        return batches
