"""Validating a checkpoint once more, on the data that it was validated on or on others.

    python -m syncbn.training.evaluate ckpt=runs/digits-seg/<run> data.batch_size=8

The configuration is that of the run's folder; arguments change values in it. There is one process per GPU, as many
as the run had where there is none, or as many as `trainer.devices` says; under torchrun it is one process of several.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, seed_everything
from omegaconf import DictConfig

from syncbn.training import launch
from syncbn.training.afterwards import build_task, command, find, misfit, parse, run_config, run_folder, shown
from syncbn.training.callbacks import FinalTable, ProgressBar
from syncbn.training.checkpoints import read_checkpoint
from syncbn.training.config import register_resolvers
from syncbn.training.environment import World
from syncbn.training.errors import UserError
from syncbn.training.train import build_from, name_classes

USAGE = """\
usage: python -m syncbn.training.evaluate ckpt=FILE|RUN_FOLDER [out=FILE.json] [key=value ...]
  validates a checkpoint; key=value changes the run's configuration, such as data.batch_size=8 or trainer.devices=2"""
_ARGUMENTS = {"ckpt": "", "out": ""}
_LAUNCHED = "WORLD_SIZE"  # set by torchrun


def main(arguments: list[str]) -> None:
    """Console command; starts the processes if that has not been done."""
    register_resolvers()
    values, overrides = parse(arguments, _ARGUMENTS, required=["ckpt"])
    checkpoint = find(values["ckpt"])
    cfg = run_config(checkpoint, overrides)
    if _LAUNCHED not in os.environ:
        read_checkpoint(checkpoint, "ckpt", device="meta")
        if not any(override.startswith("trainer.devices=") for override in overrides):
            # On CPUs the run's own number: which images share a batch, and so their padding, is up to it.
            cfg.trainer.devices = (torch.cuda.device_count() if _may_use_gpus(cfg) else 0) or cfg.trainer.devices
        processes = launch.process_count(cfg)
        if processes > 1:
            launch.stay_on_this_machine()
            raise SystemExit(launch.run(processes, arguments, "syncbn.training.evaluate"))
    out = Path(values["out"]) if values["out"] else run_folder(checkpoint) / "evaluation" / f"{checkpoint.stem}.json"
    try:
        evaluate(cfg, checkpoint, out)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def evaluate(cfg: DictConfig, checkpoint: Path, out: Path) -> dict[str, float]:
    """Validates `checkpoint` on all processes; returns the metrics, which rank 0 prints and writes as JSON.

    Raises:
        UserError: something cannot be built, or the checkpoint does not fit.
    """
    seed_everything(cfg.seed, workers=True, verbose=False)
    world = World.from_environment()
    cfg.trainer.devices, cfg.trainer.num_nodes = world.local_size, world.num_nodes
    cfg.trainer.default_root_dir = str(out.parent)
    cfg.trainer.fast_dev_run = False
    data = build_from("data", cfg.data)
    name_classes(cfg, data)
    task = build_task(cfg)
    callbacks: list[Callback] = [FinalTable()]
    on_terminal = sys.stdout.isatty() or sys.stderr.isatty()
    if on_terminal:
        callbacks.append(ProgressBar())
    trainer = build_from(
        "trainer",
        cfg.trainer,
        callbacks=callbacks,
        logger=False,
        plugins=[],  # in eval mode nothing is synchronized
        enable_checkpointing=False,
        enable_progress_bar=on_terminal,
        enable_model_summary=False,
    )
    try:
        (metrics,) = trainer.validate(
            task, datamodule=data, ckpt_path=str(checkpoint), verbose=False, weights_only=True
        )
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):
            raise
        raise UserError(f"ckpt: {checkpoint} does not fit the model: {misfit(error)}") from error
    if trainer.is_global_zero:
        _write(out, checkpoint, metrics, trainer.world_size)
        print(f"{shown(checkpoint)} on {_processes(trainer.world_size)}: {shown(out)}", flush=True)
    return dict(metrics)


def _write(out: Path, checkpoint: Path, metrics: dict[str, float], processes: int) -> None:
    # JSON knows no NaN, which a metric of nothing is.
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    result: dict[str, Any] = {"checkpoint": str(checkpoint), "processes": processes, "metrics": finite}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")


def _may_use_gpus(cfg: DictConfig) -> bool:
    return cfg.trainer.accelerator in ("auto", "gpu", "cuda")


def _processes(number: int) -> str:
    return f"{number} process{'es' if number > 1 else ''}"


def cli() -> None:
    """The same with the arguments of this process."""
    command(USAGE, main)


if __name__ == "__main__":
    cli()
