"""Training with any task, data and model that the configuration names.

    python -m syncbn.training.train norm=local data.batch_size=1

runs in this process; under torchrun (`launch/train.sh`) it is one process of several. Everything is built
from `conf/`.
"""

import errno
import logging
import os
import pickle
import re
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import hydra
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ProgressBar
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from syncbn.training.callbacks import GracefulStop
from syncbn.training.callbacks.agreement import agree_on_configuration, started_by_others
from syncbn.training.callbacks.checkpoints import install
from syncbn.training.callbacks.graceful_stop import SIGNALS
from syncbn.training.checkpoints import LAST_CHECKPOINT, refusal, write_text
from syncbn.training.config import CONFIG_NAME, check_values, config_dir, explain, register_resolvers
from syncbn.training.environment import World, rank_of_this_process
from syncbn.training.errors import UserError, fail, few, one_line
from syncbn.training.loggers import CSVLogger, TensorBoardLogger
from syncbn.training.models.weights import skip_weights
from syncbn.training.resolution import resolve_but_environment
from syncbn.training.start import agree_on_start, checkpoints_to_try, find_start, last_run

_FULL_ERROR = "HYDRA_FULL_ERROR" in os.environ
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
# Rank 0 must have told the user's mistake before another process's end makes torchrun stop all.
_AFTER_RANK_0_S = 3.0
_NOISE = (
    ".*does not have many workers.*",
    ".*sync_dist=True.*",
    ".*exists and is not empty.*",  # the folder of a resumed run
    ".*The dirpath has changed from.*",  # resumed into a new folder
    ".*dataloader is not resumable.*",
    ".*DistributedSampler.*",  # its repetitions are taken out of the metrics
    ".*could not find the monitored key.*",  # a run that ends before its first validation
    ".*LeafSpec.*",
    ".*callbacks used to create the checkpoint need to be provided.*",  # a checkpoint that is only evaluated
    ".*number of training batches.*is smaller than the logging interval.*",
)


def main() -> None:
    """Console command `syncbn-train`.

    Exit status: 0, 1 after a crash, 2 after a user's mistake, 128 plus the signal's number after one that has saved a
    checkpoint: 130 after Ctrl-C, 143 after SIGTERM, 138 after SIGUSR1. HYDRA_FULL_ERROR=1 in the environment shows
    where a user's mistake was noticed.
    """
    # Ends a process even within a collective. While it trains, GracefulStop saves its work first.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    with mistakes_in_one_line():
        # Hydra then hands its errors on instead of printing them in several lines.
        os.environ["HYDRA_FULL_ERROR"] = "1"
        register_resolvers()
        entry = hydra.main(version_base="1.3", config_path=str(config_dir()), config_name=CONFIG_NAME)
        entry(run)()


def run(cfg: DictConfig) -> None:
    """One job of Hydra's: checks the configuration, trains, leaves no process group behind."""
    # Here as well, since Hydra prints a line of its own for an exception that leaves a job.
    with mistakes_in_one_line():
        check_values(cfg)
        if World.from_environment().size == 1:
            find_start(cfg)  # before the model is built; of several processes one reads the checkpoint for all
        if cfg.ckpt_path == "last":
            cfg.ckpt_path = str(last_run(cfg))
        # Hydra's word is final: in a sweep every job has a folder of its own.
        cfg.run_dir = HydraConfig.get().runtime.output_dir
        try:
            train(cfg)
        except OSError as error:
            if error.errno not in _DISK_IS_FULL:
                raise
            raise _cause(error) or UserError(str(error)) from error
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


@contextmanager
def mistakes_in_one_line() -> Iterator[None]:
    """Ends the process with one line for what the user can put right; other exceptions pass."""
    try:
        yield
    except (UserError, HydraException, OmegaConfBaseException) as error:
        if _FULL_ERROR:
            raise
        rank = rank_of_this_process()
        if rank > 0:
            time.sleep(_AFTER_RANK_0_S)
        fail(explain(error), rank)


def train(cfg: DictConfig) -> dict[str, float]:
    """Builds what `cfg` describes, trains it, and validates the best checkpoint.

    Returns the metrics of that last validation by name; none if there is nothing to validate.

    Raises:
        UserError: something cannot be built from its configuration.
        SystemExit: status 128 plus the signal's number after an interruption.
    """
    if not cfg.verbose:
        quiet()
    seed_everything(cfg.seed, workers=True, verbose=False)
    data, task, trainer = build(cfg)
    agree_on_configuration(trainer, cfg)
    choose_start(trainer, cfg)
    if trainer.is_global_zero:
        introduce(cfg, trainer)
        write_text(OmegaConf.to_yaml(resolve_but_environment(cfg)), Path(cfg.run_dir) / "config.yaml")
    fit(trainer, task, data, cfg)
    return evaluate_best(trainer, task, data, cfg)


def build(cfg: DictConfig) -> tuple[LightningDataModule, LightningModule, Trainer]:
    """Data, task (with its model) and trainer (with callbacks, loggers and plugins)."""
    data = build_from("data", cfg.data)
    name_classes(cfg, data)
    # A checkpoint brings all weights.
    with skip_weights() if checkpoints_to_try(cfg) else nullcontext():
        task = build_from("task", cfg.task)
    if cfg.monitor is None:
        cfg.monitor = getattr(task, "best_metric", None)
    # An explicit trainer.logger=false switches all of them off.
    chosen = {} if cfg.trainer.logger is False else cfg.logger or {}
    loggers = [build_from(f"logger.{name}", node) for name, node in chosen.items() if node]
    callbacks = [build_from(f"callbacks.{name}", node) for name, node in (cfg.callbacks or {}).items() if node]
    if not loggers:  # Lightning refuses it then
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    # Control characters belong on a terminal; in a file the epoch lines tell the same.
    bar = cfg.trainer.enable_progress_bar
    bar = sys.stdout.isatty() or sys.stderr.isatty() if bar is None else bool(bar)
    if not bar:  # Lightning refuses a bar that is not enabled
        callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    trainer = build_from(
        "trainer",
        cfg.trainer,
        callbacks=callbacks,
        logger=loggers or False,
        enable_progress_bar=bar,
        # The callback Summary says more.
        enable_model_summary=bool(cfg.trainer.enable_model_summary),
    )
    install(trainer)
    return data, task, trainer


def choose_start(trainer: Trainer, cfg: DictConfig) -> None:
    """Sets `ckpt_path` to what process 0 finds whole, on all processes, and tells the loggers.

    Raises:
        UserError: process 0 finds none where one is asked for, or another machine has other files than its one.
    """
    if started_by_others(trainer):
        trainer.strategy.setup_environment()
    start, again = agree_on_start(cfg, warn=lambda line: print(f"warning: {line}", file=sys.stderr, flush=True))
    cfg.ckpt_path = str(start.path) if start else None
    same_run = start.same_run if start else again  # again, and nothing was saved before
    for logger in trainer.loggers:
        if isinstance(logger, (CSVLogger, TensorBoardLogger)):
            logger.continue_from((start.step if start else 0) if same_run else None)


def name_classes(cfg: DictConfig, data: LightningDataModule) -> None:
    """Fills in the class names that the configuration leaves to the data.

    Raises:
        UserError: the data has another number of classes than are named, or names none where they are asked for.
    """
    known = getattr(data, "class_names", None)
    if cfg.class_names is None and known is not None:
        cfg.class_names = [str(name) for name in known]
    if cfg.class_names is None:
        parts = [OmegaConf.to_yaml(part, resolve=False) for part in (cfg.model, cfg.task)]
        if any(re.search(r"\$\{(class_names|num_classes)\}", part) for part in parts):
            raise UserError("class_names: the data names no classes; give a list, the background first")
    elif known is not None and len(known) != len(cfg.class_names):
        raise UserError(
            f"class_names: the data has {len(known)} classes ({few(known)}), "
            f"but {len(cfg.class_names)} are named ({few(cfg.class_names)})"
        )


def build_from(key: str, node: DictConfig, **extra: Any) -> Any:
    """What the configuration under a key describes.

    Raises:
        UserError: it cannot be built; says the key and why.
    """
    try:
        return instantiate(node, **extra)
    except InstantiationException as error:
        reason = error.__cause__ or error
        raise UserError(f"{key}: {reason}") from error
    except MisconfigurationException as error:
        raise UserError(f"{key}: {error}") from error


def fit(trainer: Trainer, task: LightningModule, data: LightningDataModule, cfg: DictConfig) -> None:
    """Trains; a signal ends the process with status 128 plus its number."""
    try:
        trainer.fit(task, datamodule=data, ckpt_path=cfg.ckpt_path, weights_only=True)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except pickle.UnpicklingError as error:  # the file has changed since it was checked
        raise UserError(f"ckpt_path: {_shown(cfg.ckpt_path)} is not loaded: {refusal(error)}") from error
    except ValueError as error:
        if not str(error).startswith("loaded state dict"):
            raise
        raise UserError(f"ckpt_path: {_shown(cfg.ckpt_path)} does not fit the optimizer: {error}") from error
    except RuntimeError as error:
        if "Error(s) in loading state_dict" not in str(error):
            raise
        first = one_line(str(error).partition(":")[2].strip().splitlines()[0])
        raise UserError(f"ckpt_path: {_shown(cfg.ckpt_path)} does not fit the model: {first}") from error
    except SystemExit:
        # Lightning's answer to KeyboardInterrupt, after its own clean-up. The work is saved; a process that has ended
        # lets torchrun stop the others, which may still have a word to say.
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if trainer.is_global_zero and Path(cfg.run_dir, LAST_CHECKPOINT).exists():
            print(f"continue with the same command and ckpt_path=last run_dir={_shown(cfg.run_dir)}", flush=True)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        stops = [callback.signal for callback in callbacks if isinstance(callback, GracefulStop)]
        raise SystemExit(128 + next(filter(None, stops), signal.SIGINT)) from None


def evaluate_best(
    trainer: Trainer, task: LightningModule, data: LightningDataModule, cfg: DictConfig
) -> dict[str, float]:
    """Validates the checkpoint with the best monitored metric, or the present weights if none was kept."""
    monitored = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint) and c.monitor]
    best = monitored[0].best_model_path if monitored else ""
    # A run that was cut short before its first validation has none.
    best = best if Path(best).is_file() else ""
    trainer.loggers = []  # these numbers are in the logs already
    metrics: list[Any] = []
    if trainer.limit_val_batches:
        metrics = list(
            trainer.validate(task, datamodule=data, ckpt_path=best or None, verbose=False, weights_only=True)
        )
    if trainer.is_global_zero:
        print(f"run folder: {_shown(cfg.run_dir)}", flush=True)
        if best:
            print(f"best checkpoint: {_shown(best)}", flush=True)
    return dict(metrics[0]) if metrics else {}


def introduce(cfg: DictConfig, trainer: Trainer) -> None:
    """Says in a few lines what is about to run; the callback Summary follows when all of it is known."""
    processes = f"{trainer.world_size} process" + ("es" if trainer.world_size > 1 else "")
    print(f"{cfg.name}: {processes} on {trainer.strategy.root_device.type}")
    print(f"run folder: {_shown(cfg.run_dir)}")
    if cfg.ckpt_path:
        print(f"continuing from: {_shown(cfg.ckpt_path)}")
    sys.stdout.flush()


def quiet() -> None:
    """Keeps Lightning's notes to its developers from a user's console; `verbose=true` brings them back."""
    for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in _NOISE:
        warnings.filterwarnings("ignore", message=message)


def _cause(error: BaseException | None) -> UserError | None:
    """The user's mistake after which something else went wrong as well."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__ or error.__context__
    return error


def _shown(path: str | Path) -> str:
    """The path as short as it can be pasted back."""
    path = Path(path)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    main()
