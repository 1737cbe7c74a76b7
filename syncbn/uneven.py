"""``even_batches``: processes with unequal numbers of batches finish together, and learn from the union of all samples.

DistributedDataParallel's ``join`` stands in for the collectives of a process that has run out of data, but only for its
own: it excludes layers that communicate in forward (pytorch/pytorch#42577). Here such a process goes on with batches
that have no samples, so that it takes part in whatever the model does.

Before a batch is handed out, the processes have agreed who has one and how many samples each has. That message is
under way while the step before it runs, on the host and on a group of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import GeneratorType
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from .exchange import Exchange
from .lockstep import Lockstep, Reader
from .samples import LAYOUTS, Layout
from .steps import Run, Steps

Batch = TypeVar("Batch")
REDUCTIONS = ("mean", "sum")


def even_batches(
    loader: Iterable[Batch],
    process_group: Any = None,
    *,
    empty: Literal["dummy"] | Callable[[Batch], Batch] | None = None,
    size: Callable[[Batch], int] | None = None,
    layout: Layout | None = None,
) -> EvenBatches[Batch]:
    """The loader's batches, then batches without samples until every process has come to the end of its own.

    ::

        batches = syncbn.even_batches(loader)
        for images, labels in batches:
            loss = batches.weigh(cross_entropy(model(images), labels))
            loss.backward()

    Every process of the group makes it and runs the loop; each loop over it is an epoch. Every batch of every process
    is handed out exactly once, there. ``weigh`` turns the mean over this process's samples into what
    DistributedDataParallel has to average for the gradient of the union's mean.

    Args:
        loader: what can be iterated over again and again, such as a DataLoader.
        process_group: over whom DistributedDataParallel averages; see ``syncbn.convert``. Where it cannot take CPU
            tensors, every process of the program must call this at the same time, each with its own group.
        empty: what a process without data gets. None: a batch of the same structure with no samples in it. "dummy":
            one sample that it has had before, for models that refuse a batch without any; inside of the loop's body it
            counts in no synchronized layer's statistics, and ``weigh`` gives it no weight. Or a function that makes it
            from one of the loader's batches.
        size: how many samples one of the loader's batches has, where that cannot be told.
        layout: "stacked" if tensors have the samples in dimension 0, "listed" if lists have one element for each sample
            (``[sample, ...]`` or ``(images, targets)``). None: told by the first batch, which raises if in doubt.

    Raises:
        ValueError: there is no such ``empty`` or ``layout``.
        TypeError: the loader is no iterable, or a generator, which only has one epoch.
    """
    return EvenBatches(loader, process_group, empty=empty, size=size, layout=layout)


class EvenBatches(Generic[Batch]):
    """What ``even_batches`` returns: the batches, and the numbers of the step under way."""

    def __init__(
        self,
        loader: Iterable[Batch],
        process_group: Any = None,
        *,
        empty: Literal["dummy"] | Callable[[Batch], Batch] | None = None,
        size: Callable[[Batch], int] | None = None,
        layout: Layout | None = None,
    ) -> None:
        if isinstance(loader, GeneratorType) or (
            not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__")
        ):
            raise TypeError(
                f"expected a loader that can be iterated over in every epoch, such as a DataLoader, got a "
                f"{type(loader).__name__}"
            )
        if empty is not None and empty != "dummy" and not callable(empty):
            raise ValueError(f"expected empty to be None, 'dummy' or a function of a batch, got {empty!r}")
        if layout is not None and layout not in LAYOUTS:
            raise ValueError(f"expected layout to be None or one of {', '.join(LAYOUTS)}, got {layout!r}")
        self.steps = Steps()
        self._exchange = Exchange(process_group)
        self._exchange.register("the numbers of values that even_batches weighs losses by")
        self._lockstep = Lockstep(loader, self._exchange, Reader(loader, empty, size, layout))
        self._lockstep.meet()

    # ---- the numbers of the step under way

    @property
    def count(self) -> int:
        """How many samples this process has in the step."""
        samples = self.steps.current.count
        if isinstance(samples, Exception):
            raise samples
        return samples

    @property
    def total(self) -> int:
        """How many samples all processes have in the step: the size of the union batch."""
        return self.count if self.steps.current.processes == 1 else self.steps.current.total

    @property
    def weight(self) -> float:
        """By what ``weigh`` multiplies a mean over this process's samples: their share of the union's, times the number
        of processes, over which DistributedDataParallel averages. 0 where the process has none."""
        return self.count * self.steps.current.processes / self.total if self.count else 0.0

    def weigh(
        self, loss: Tensor, count: Tensor | float | None = None, reduction: Literal["mean", "sum"] = "mean"
    ) -> Tensor:
        """The loss whose gradient, averaged over the processes, is that of the mean over the union batch.

        A loss of no values, often NaN, becomes 0. It stays connected to the graph, so that the process takes part in
        backward. A NaN of a process that has values stays.

        Args:
            loss: [] floating, of this process's batch.
            count: how many values (pixels that are not ignored, boxes) the loss is of, where it is not one for each
                sample; a number or a tensor of one element, which the host does not wait for. It costs a small
                all-reduce, so that all processes pass it or none.
            reduction: "mean" if the loss is the mean of its values, "sum" if it is their sum.

        Returns:
            [] in the loss's dtype.

        Raises:
            TypeError: the loss is no floating tensor.
            ValueError: the loss or the count has more than one element, or there is no such reduction.
            RuntimeError: no step is under way.
        """
        if reduction not in REDUCTIONS:
            raise ValueError(f"expected reduction to be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
        if not isinstance(loss, Tensor) or not loss.is_floating_point():
            got = loss.dtype if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(
                f"expected the loss to be a floating tensor of one element (the sum of several losses), got {got}"
            )
        if loss.numel() != 1:
            raise ValueError(f"expected a loss of one element, its mean or sum over the batch, got {list(loss.shape)}")
        if count is not None:
            return self._weigh_by(loss, count, reduction)
        if self.count == 0:
            return torch.nan_to_num(loss, 0.0, 0.0, 0.0) * 0.0
        return loss * (self.weight if reduction == "mean" else self.steps.current.processes / self.total)

    def _weigh_by(self, loss: Tensor, count: Tensor | float, reduction: str) -> Tensor:
        """On the device alone."""
        step = self.steps.current
        own = torch.zeros((), dtype=torch.float64, device=loss.device)
        if isinstance(count, Tensor):
            if count.numel() != 1:
                raise ValueError(
                    f"expected the count to be a number or a tensor of one element, got {list(count.shape)}"
                )
            own += count.detach().to(own).reshape(())
        else:
            own += count
        if step.is_dummy:
            own.zero_()
        total = own.clone()
        if step.processes > 1:
            with torch.no_grad():
                self._exchange.all_reduce(total)
        share = own if reduction == "mean" else torch.ones_like(own)
        factor = torch.where(total > 0, share * step.processes / total, 0.0)
        loss_or_0 = torch.where(own.reshape(loss.shape) > 0, loss, torch.zeros_like(loss))
        return (loss_or_0.double() * factor).to(loss.dtype)

    # ---- as a loader

    def __len__(self) -> int:
        """The steps of an epoch: the greatest of the processes' loaders' lengths.

        The processes have agreed on it when this was made, or, if torch.distributed was not initialized then, do so
        now; and anew at the start of each epoch.

        Raises:
            TypeError: there is a process whose loader has no length.
        """
        return len(self._lockstep)

    @property
    def loader(self) -> Iterable[Batch]:
        """Whose batches these are."""
        return self._lockstep.loader

    @property
    def sampler(self) -> Any:
        """The loader's, None if it has none; and so for ``batch_sampler`` and ``batch_size``."""
        return getattr(self.loader, "sampler", None)

    @property
    def batch_sampler(self) -> Any:
        return getattr(self.loader, "batch_sampler", None)

    @property
    def batch_size(self) -> Any:
        return getattr(self.loader, "batch_size", None)

    def set_epoch(self, epoch: int) -> None:
        """Tells the epoch to whatever wants to know it: the loader, its sampler, its batch sampler, its dataset."""
        parts = [self.loader, self.sampler, self.batch_sampler, getattr(self.batch_sampler, "sampler", None)]
        parts.append(getattr(self.loader, "dataset", None))
        for part in {id(part): part for part in parts}.values():
            if callable(getattr(part, "set_epoch", None)):
                part.set_epoch(epoch)

    def __iter__(self) -> Iterator[Batch]:
        run, exhausted = Run(), False
        try:
            for step, batch in self._lockstep.steps(run):
                self.steps.hand_out(step)
                yield batch
                self.steps.came_back(run)
            exhausted = True
        finally:
            self.steps.finish(run, exhausted)

    def __getstate__(self) -> dict[str, Any]:
        """All but the loop that is running."""
        return self.__dict__ | {"steps": Steps()}
