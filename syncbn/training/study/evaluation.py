"""Validation of a trained model, in this process and in the same way for all runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

import syncbn
from syncbn.training.checkpoints import LAST_CHECKPOINT
from syncbn.training.study.plan import GLOBAL_BATCH, POPULATION, RUNNING, STATISTICS, Run
from syncbn.training.train import build, quiet

_VALIDATION_SEED = 0  # one set of scenes for all seeds


class Score(NamedTuple):
    """How good a model is with one kind of statistics."""

    miou: float
    val_loss: float


class Evaluation(NamedTuple):
    """What a run's last checkpoint is worth."""

    steps: int
    images: int
    scores: dict[str, Score]  # by kind of statistics


def evaluate(run: Run, folder: Path, val_size: int) -> Evaluation:
    """Validates the last checkpoint with its running statistics, and then with the population's, on the same weights.

    The checkpoint has the running statistics of the first process. The population's are those of all training scenes
    of the run, in batches of as many images as a layer's statistics had in training.

    Args:
        run: a run that has been trained.
        folder: where it was.
        val_size: how many scenes to validate on.
    """
    quiet()
    cfg = _for_one_process(OmegaConf.load(folder / "config.yaml"), run)
    data, task, trainer = build(cfg)
    checkpoint = torch.load(folder / LAST_CHECKPOINT, map_location="cpu", weights_only=True)
    task.load_state_dict(checkpoint["state_dict"])
    validation = _validation_data(cfg, val_size)
    found = {RUNNING: _validate(trainer, task, validation)}
    _recalibrate(trainer, task, data)
    found[POPULATION] = _validate(trainer, task, validation)
    steps = int(checkpoint["global_step"])
    return Evaluation(steps, steps * run.processes * run.batch, {kind: found[kind] for kind in STATISTICS})


def _for_one_process(cfg: Any, run: Run) -> DictConfig:
    """The run's configuration with nothing in it but the model, the data and a bare Trainer."""
    cfg.callbacks, cfg.logger = {}, {}
    cfg.data.batch_size = run.images_seen_by_a_layer
    cfg.trainer.update(
        strategy="auto",
        devices=1,
        num_nodes=1,
        plugins=[],
        limit_val_batches=None,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    return cfg


def _validation_data(cfg: DictConfig, val_size: int) -> LightningDataModule:
    cfg = cfg.copy()
    cfg.data.update(seed=_VALIDATION_SEED, val_size=val_size, batch_size=GLOBAL_BATCH)
    return build(cfg)[0]


def _validate(trainer: Trainer, task: LightningModule, data: LightningDataModule) -> Score:
    try:
        (metrics,) = trainer.validate(task, datamodule=data, verbose=False)
    except SystemExit:  # Lightning's answer to Ctrl-C
        raise KeyboardInterrupt from None
    return Score(metrics["val/miou"], metrics["val/loss"])


def _recalibrate(trainer: Trainer, task: LightningModule, data: LightningDataModule) -> None:
    device = trainer.strategy.root_device
    task.to(device)
    syncbn.recalibrate(task, _images(data, device), forward=lambda model, image: model(image), progress=False)


def _images(data: LightningDataModule, device: torch.device) -> Iterator[Tensor]:
    for batch in data.train_dataloader():
        yield batch["image"].to(device)
