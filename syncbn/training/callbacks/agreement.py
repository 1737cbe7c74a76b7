"""Refuses to train where the processes do not train the same."""

import warnings
from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from omegaconf import DictConfig

from syncbn.training import agreement
from syncbn.training.errors import UserError
from syncbn.training.processes import rank, world_size

_START_ALIKE = "start the same command with the same code on every node"
_EQUAL_BATCHES = (
    "every process must make as many steps: give each as many batches, or wrap the loader in syncbn.even_batches"
)


class Agreement(Callback):
    """Compares over all processes, before the first step, what has to be equal on them.

    - Before the data is looked at, where ``agree_on_configuration`` is called: the configuration, the code that its
      ``_target_`` keys name, and the releases of packages.
    - Before DistributedDataParallel wraps the model, which fails on one process and hangs on the others where they
      differ: its layers, their options, the names, shapes and dtypes of its tensors, and the source code of syncbn and
      of the user's modules.
    - When the data is loaded and the checkpoint restored: the optimizer's hyper-parameters, the numbers of batches, and
      the step that the run stands at.

    A difference is a ``UserError`` on every process, which names the first one rank by rank. Versions that differ by
    less than a release, such as Python 3.11.7 and 3.11.9, are a warning. It costs a few exchanges of 32 bytes.
    """

    # Lightning calls it when torch.distributed is there and the model is not yet the strategy's.
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit" or world_size() == 1:
            return
        releases, versions = agreement.software()
        callbacks, data = trainer.callbacks, getattr(trainer, "datamodule", None)  # type: ignore[attr-defined]
        # The code first: what else differs may follow from it.
        _require(releases, _START_ALIKE)
        _require(agreement.source([*pl_module.modules(), *callbacks, data]), _START_ALIKE)
        _require(agreement.layers(pl_module) | agreement.tensors(pl_module), _START_ALIKE)
        told = agreement.difference(versions)
        if told and rank() == 0:
            warnings.warn(f"the processes run different software: {told}", stacklevel=2)

    # Once more, since a model may be built in `configure_model`. Its tensors may be sharded by now.
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if world_size() > 1:
            _require(agreement.layers(pl_module), _START_ALIKE)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if world_size() > 1:
            _require(agreement.optimizers(trainer), _START_ALIKE)
            _require(agreement.batches(trainer), _EQUAL_BATCHES)


def agree_on_configuration(trainer: Trainer, cfg: DictConfig) -> None:
    """The first comparison of an ``Agreement`` among the trainer's callbacks; before ``fit``.

    It starts the communication that ``fit`` would start next. Where Lightning itself starts the other processes,
    there are none yet: they will have this one's arguments.

    Raises:
        UserError: the processes were started differently.
    """
    wanted = any(isinstance(callback, Agreement) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    if not wanted or not started_by_others(trainer):
        return
    trainer.strategy.setup_environment()
    if world_size() > 1:
        releases, _ = agreement.software()
        _require(releases, _START_ALIKE)
        _require(agreement.source(cfg=cfg), _START_ALIKE)
        _require(agreement.configuration(cfg), _START_ALIKE)


def started_by_others(trainer: Trainer) -> bool:
    """Whether all processes are there before ``fit``. Where Lightning itself starts the others, the first one has none
    to talk to yet, so that its children must not talk either."""
    environment: Any = getattr(trainer.strategy, "cluster_environment", None)
    return environment is not None and not isinstance(environment, LightningEnvironment)


def _require(facts: Mapping[str, str], advice: str) -> None:
    told = agreement.difference(facts)
    if told:
        raise UserError(f"the processes do not train the same: {told}; {advice}")
