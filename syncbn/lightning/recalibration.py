"""The callback that gives a LightningModule the running statistics of the data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader

from ..kept_state import generators_kept
from ..recalibration import Forward, feed, recalibrate
from ..selection import Selection, batch_norms
from ..uneven import EvenBatches

_WHEN = ("validation", "end")
_ENOUGH = 200  # batches: Wu and Johnson find 10³ to 10⁴ samples sufficient


class RecalibrationCallback(Callback):
    """Sets the running statistics to those of the data before each validation of a fit, or when its training ends.

    Training itself is not touched: it normalizes by its batches, and goes on as it would have. Layers that were in eval
    mode in training keep what they have. Checkpoints that are written after a validation have what it has seen; those
    that Lightning writes before training has ended do not have what ``when="end"`` finds: save again after ``fit``, or
    recalibrate before validations.

    Args:
        when: "validation", before each one but the sanity check; or "end", of training.
        batches: a loader, or a function without arguments that makes one, called on each process for its own data; None
            for the Trainer's training data, in an iteration of its own.
        limit: how many batches each process runs at most; None for all.
        forward: how a batch is fed, called as ``forward(model, batch)``; None for ``model(batch)``, or
            ``model(batch[0])`` of a list or tuple. The model is what the strategy runs: the LightningModule, or what
            shards it.
        include: as in ``syncbn.recalibrate``; so are ``exclude`` and ``process_group``.
        progress: whether to show a progress bar; None for where the Trainer shows one.

    Raises:
        ValueError: there is no such ``when``, or the limit is not positive.
    """

    def __init__(
        self,
        when: str = "validation",
        batches: Iterable[Any] | Callable[[], Iterable[Any]] | None = None,
        limit: int | None = _ENOUGH,
        forward: Forward | None = None,
        include: Selection = None,
        exclude: Selection = None,
        process_group: Any = None,
        progress: bool | None = None,
    ) -> None:
        if when not in _WHEN:
            raise ValueError(f"expected when to be one of {', '.join(_WHEN)}, got {when!r}")
        if limit is not None and limit < 1:
            raise ValueError(f"expected a limit of at least 1 batch, or None, got {limit}")
        self.when = when
        self.batches = batches
        self.limit = limit
        self.forward = forward
        self.include = include
        self.exclude = exclude
        self.process_group = process_group
        self.progress = progress
        self._layers: list[nn.Module] = []
        self._in_eval: set[nn.Module] | None = None  # while training; None before its first batch

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._layers = [each.layer for each in batch_norms(pl_module)]
        self._in_eval = None

    def on_train_batch_end(self, *_: Any) -> None:
        # When validation begins, the Trainer has put all of them into eval mode.
        self._in_eval = {layer for layer in self._layers if not layer.training}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when == "validation" and trainer.state.fn is TrainerFn.FITTING and not trainer.sanity_checking:
            self._recalibrate(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.when == "end":
            self._recalibrate(trainer)
        self._layers, self._in_eval = [], None

    def _recalibrate(self, trainer: Trainer) -> None:
        if self._in_eval is None:  # nothing has been learned
            return
        model = trainer.strategy.model
        assert model is not None
        loader = self._loader(trainer)
        with generators_kept(loader):  # training goes on in the order that it would have had
            recalibrate(
                model,
                _on_device(trainer, loader, _limit(self.limit, trainer)),
                forward=self._forward_of(trainer),
                include=self.include,
                exclude=[*_several(self.exclude), *self._names_in_eval(model)],
                process_group=self.process_group,
                progress=trainer.progress_bar_callback is not None if self.progress is None else self.progress,
            )

    def _names_in_eval(self, model: nn.Module) -> list[str]:
        return [each.name for each in batch_norms(model) if each.layer in (self._in_eval or ())]

    def _forward_of(self, trainer: Trainer) -> Forward:
        def forward(model: nn.Module, batch: Any) -> None:
            with trainer.precision_plugin.forward_context():
                (self.forward or feed)(model, batch)

        return forward

    def _loader(self, trainer: Trainer) -> Iterable[Any]:
        if self.batches is not None:
            return self.batches() if callable(self.batches) else self.batches
        loader = trainer.train_dataloader
        if isinstance(loader, EvenBatches):  # whose numbers are those of the training step
            loader = loader.loader
        if loader is None or isinstance(loader, (dict, list, tuple)):
            raise MisconfigurationException(
                f"the RecalibrationCallback needs one loader of batches, but the Trainer has "
                f"{'none' if loader is None else f'a {type(loader).__name__} of several'} for training: pass batches="
            )
        return _again(loader)


def _again(loader: Any) -> Any:
    """The loader for an iteration beside the one under way, which persistent workers would otherwise begin anew."""
    if not isinstance(loader, DataLoader):
        return loader
    again = copy.copy(loader)
    again._iterator = None
    return again


def _limit(limit: int | None, trainer: Trainer) -> int | None:
    """No more than the Trainer trains with, as in a fast_dev_run."""
    limits = [each for each in (limit, trainer.num_training_batches) if each is not None and each != float("inf")]
    return min(map(int, limits), default=None)


def _on_device(trainer: Trainer, loader: Iterable[Any], limit: int | None) -> Iterator[Any]:
    for batch in islice(loader, limit):  # not before the first is asked for: it begins with a random number
        yield trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))


def _several(selection: Selection) -> list[Any]:
    if selection is None:
        return []
    return [selection] if isinstance(selection, (str, type)) else list(selection)
