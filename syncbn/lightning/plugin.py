"""The Lightning plugin, and the callback that says aloud where Lightning would not use it.

``Trainer(plugins=[SyncBatchNormPlugin()])`` hands the plugin to the strategy, but only the DDP and FSDP
strategies ever ask a plugin to change the model. The others ignore it: nothing of the plugin is called, so
that it could not even complain. Lightning does, however, give every Trainer the callbacks that installed
packages bring along (the entry points "lightning.pytorch.callbacks_factory"): ``guards`` is this package's.
"""

from __future__ import annotations

from datetime import timedelta
from importlib.metadata import entry_points
from typing import Any, Literal
from weakref import WeakSet

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins import LayerSync
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import nn

from ..exchange import Exchange
from ..groups import grouping
from ..layer import SyncBatchNorm
from ..selection import Selection, find
from ..surgery import convert, revert_layer
from .uneven import EvenBatchesCallback


class SyncBatchNormPlugin(LayerSync):
    """Synchronizes a LightningModule's batch normalization while it is fitted.

    ``Trainer(strategy="ddp", plugins=[SyncBatchNormPlugin()])`` converts the model when ``fit`` sets it up,
    and gives the layers their own classes back when ``fit`` ends, also by an exception. Checkpoints have the
    keys of the plain model. Layers that the user has converted, or built as ``SyncBatchNorm``, stay so.

    Under a strategy that does not use layer plugins, such as ModelParallelStrategy, ``fit`` raises if there
    is more than one process; there, convert in ``configure_model``, before anything is sharded::

        def configure_model(self):
            syncbn.convert(self, self.device_mesh["data_parallel"])

    Args:
        process_group: as in ``syncbn.convert``. It is read when ``fit`` sets the model up, so that a group
            made in the LightningModule's ``setup`` can still be assigned to the plugin's ``process_group``.
        include: as in ``syncbn.convert``.
        exclude: as in ``syncbn.convert``.
        group_size: as in ``syncbn.convert``.
        statistics_batch: as in ``syncbn.convert``; the first batch of each ``fit`` counts.
        timeout_s: how many seconds an exchange may take before the process says where all processes are, and ends:
            more than the slowest of them may ever need between two exchanges, for a checkpoint or a validation that
            the others do not take part in. None for the process group's timeout.

    Raises:
        ValueError: two options say over whom to form the statistics, or a number is less than 1, or ``timeout_s`` is
            not positive.
        TypeError: a number is not whole.
    """

    def __init__(
        self,
        process_group: Any = None,
        include: Selection = None,
        exclude: Selection = None,
        *,
        group_size: int | Literal["node"] | None = None,
        statistics_batch: int | None = None,
        timeout_s: float | None = None,
    ) -> None:
        grouping(process_group, group_size, statistics_batch)
        if timeout_s is not None and not timeout_s > 0:
            raise ValueError(f"expected timeout_s to be a number of seconds greater than 0, got {timeout_s!r}")
        self.timeout_s = timeout_s
        self.process_group = process_group
        self.group_size = group_size
        self.statistics_batch = statistics_batch
        self.include = include
        self.exclude = exclude
        self._converted: list[nn.Module] = []
        self._users: dict[SyncBatchNorm, tuple[Exchange, int]] = {}
        self.applied = False  # to the model that is being fitted
        _in_use.add(self)
        _require_guard()

    def apply(self, model: nn.Module) -> nn.Module:
        """Converts ``model`` in place; called by the strategy when it sets up for ``fit``.

        Raises:
            MisconfigurationException: an option does not fit the model or the number of processes.
        """
        self.revert(model)
        self._users = {layer: (layer._exchange, layer._index) for layer in _synchronized(model)}
        what = model, self.process_group, self.include, self.exclude
        timeout = None if self.timeout_s is None else timedelta(seconds=self.timeout_s)
        try:
            convert(*what, group_size=self.group_size, statistics_batch=self.statistics_batch, timeout=timeout)
        except ValueError as error:
            raise MisconfigurationException(f"SyncBatchNormPlugin: {error}") from error
        self._converted = [layer for layer in _synchronized(model) if layer not in self._users]
        self.applied = True
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """Undoes what ``apply`` did, if it did; called by the strategy when ``fit`` ends, in whatever way."""
        for layer in self._converted:
            revert_layer(layer)
        for users, (exchange, index) in self._users.items():
            users._exchange, users._index = exchange, index
        self._converted, self._users, self.applied = [], {}, False
        return model


_in_use: WeakSet[SyncBatchNormPlugin] = WeakSet()


def _synchronized(model: nn.Module) -> list[SyncBatchNorm]:
    return [module for module in model.modules() if isinstance(module, SyncBatchNorm)]


_FACTORIES = "lightning.pytorch.callbacks_factory"


def guards() -> list[Callback]:
    """The callbacks for a new Trainer; the guard only where a plugin exists that it could have been given."""
    return [EvenBatchesCallback(), *([SyncBatchNormGuard()] if _in_use else [])]


def _require_guard() -> None:
    """Says that the guard is missing where syncbn is imported without being installed."""
    factories = entry_points(group=_FACTORIES)
    if not any(factory.value == f"{__name__}:{guards.__name__}" for factory in factories):
        rank_zero_warn(
            "syncbn is not installed with its entry points, so that a Trainer whose strategy ignores the "
            "SyncBatchNormPlugin would train without synchronization in silence: install it (pip install), "
            "or pass Trainer(callbacks=[SyncBatchNormGuard()])"
        )


class SyncBatchNormGuard(Callback):
    """Refuses to train in several processes if the Trainer's SyncBatchNormPlugin has not been used."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Called after the strategy has set the model up, and so after ``apply``, if it is called at all.

        Raises:
            MisconfigurationException: it was not, there are several processes, and no layer is synchronized.
        """
        plugin = getattr(trainer._accelerator_connector, "_layer_sync", None)
        if not isinstance(plugin, SyncBatchNormPlugin) or plugin.applied:
            return
        if _processes(trainer) == 1 or _synchronized(pl_module) or not _unsynchronized(pl_module):
            return
        raise MisconfigurationException(
            f"{type(trainer.strategy).__name__} does not use layer plugins (only DDPStrategy and FSDPStrategy "
            f"do), so that the SyncBatchNormPlugin has no effect. Convert in the LightningModule instead, "
            f"before anything is sharded:\n\n"
            f"    def configure_model(self):\n"
            f'        syncbn.convert(self)  # or (self, self.device_mesh["data_parallel"])\n'
        )


def _processes(trainer: Trainer) -> int:
    """How many train: a single-device strategy does not know of those that were started around it."""
    initialized = dist.is_available() and dist.is_initialized()
    return max(trainer.world_size, dist.get_world_size() if initialized else 1)


def _unsynchronized(model: nn.Module) -> bool:
    return bool(find(model, lambda module: isinstance(module, nn.modules.batchnorm._BatchNorm)))
