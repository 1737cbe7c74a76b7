"""What a run begins with: nothing, or a checkpoint that is whole, the same one on all processes."""

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from syncbn.training.checkpoints import (
    BEST,
    CHECKPOINTS,
    LAST,
    LAST_CHECKPOINT,
    RUN,
    fingerprint,
    kept_in,
    newest_whole,
)
from syncbn.training.environment import run_stamp
from syncbn.training.errors import UserError
from syncbn.training.processes import gather, rank

# A shared file system may show another machine's file a little late.
_LATE_FILE_S = 10.0


@dataclass(frozen=True)
class Start:
    """A checkpoint to continue from."""

    path: Path
    step: int
    same_run: bool  # it is the run folder's own, which goes on
    fingerprint: str | None  # of what is in it, whatever the path on this machine


def find_start(cfg: DictConfig, again: bool | None = None, warn: Callable[[str], None] | None = None) -> Start | None:
    """The newest whole one of `checkpoints_to_try`, read to its end; None for a fresh start.

    Args:
        cfg: the job's configuration.
        again: whether the job has been started before; None asks the environment.
        warn: called with a line for each damaged checkpoint that is passed over, and where a fresh start will overwrite
            the best one of a run that has left no other.

    Raises:
        UserError: there is none, none is whole, or the run folder has those of another run.
    """
    checkpoints = checkpoints_to_try(cfg, again)
    kept = kept_in(Path(cfg.run_dir))
    same_run = bool(kept) and kept[:1] == checkpoints[:1]
    if kept and not same_run and not cfg.overwrite:
        raise UserError(
            f"run_dir: {cfg.run_dir} has a run whose checkpoints would be lost; ckpt_path=last continues it, "
            "overwrite=true starts over"
        )
    if not checkpoints:
        best = Path(cfg.run_dir) / CHECKPOINTS / BEST
        if warn is not None and best.is_file() and not cfg.overwrite:
            warn(
                f"run_dir: there is a {best} and no {LAST} beside it, so that training starts anew and will overwrite "
                f"it; ckpt_path={best} goes on from there"
            )
        return None
    path, contents = newest_whole(checkpoints, warn=warn)
    return Start(path, int(contents.get("global_step", 0)), same_run, fingerprint(path))


def checkpoints_to_try(cfg: DictConfig, again: bool | None = None) -> list[Path]:
    """The checkpoints that `ckpt_path` stands for, of which the first that is whole is to be taken; the newest first.

    "auto" stands for those of the run folder, if it has any; "last" for those of the run folder if one is given, else
    of the newest run of the same name; a folder for those of the run in it; a file for itself. A job that torchrun has
    started once more goes on with what it has done, whatever was asked for at first.

    Args:
        cfg: the job's configuration.
        again: whether the job has been started before; None asks the environment.

    Raises:
        UserError: there is no such file.
    """
    own = kept_in(Path(cfg.run_dir))
    again = restarted() if again is None else again
    # With overwrite=true they may also be those that are to be given up.
    if own and again and (not cfg.overwrite or newest_whole(own)[1].get(RUN) == run_stamp()):
        return own
    if cfg.ckpt_path is None:
        return []
    if cfg.ckpt_path == "auto":
        return own
    path = last_run(cfg) if cfg.ckpt_path == "last" else Path(cfg.ckpt_path).expanduser()
    checkpoints = kept_in(path) if path.is_dir() else [path.resolve()] if path.is_file() else []
    if not checkpoints:
        raise UserError(f"ckpt_path: there is no file {path / LAST_CHECKPOINT if path.is_dir() else path}")
    return checkpoints


def restarted() -> bool:
    """Whether torchrun has started this process in place of one that has ended.

    It does not say so on a machine where none had ended, which it starts over for the sake of the others.
    """
    count = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return count.isdigit() and int(count) > 0


def last_run(cfg: DictConfig) -> Path:
    """The folder of the run that `ckpt_path=last` continues.

    Raises:
        UserError: no run has left a checkpoint.
    """
    run_dir = Path(cfg.run_dir)
    if kept_in(run_dir):
        return run_dir
    if not OmegaConf.is_interpolation(cfg, "run_dir"):
        raise UserError(f"ckpt_path=last: the run in {run_dir} has left no {LAST_CHECKPOINT}")
    runs = {run: kept_in(run) for run in run_dir.parent.glob("*") if run.is_dir()}
    runs = {run: kept for run, kept in runs.items() if kept}
    if not runs:
        raise UserError(f"ckpt_path=last: no run in {run_dir.parent} has left a {LAST_CHECKPOINT}")
    return max(runs, key=lambda run: runs[run][0].stat().st_mtime)


def agree_on_start(cfg: DictConfig, warn: Callable[[str], None]) -> tuple[Start | None, bool]:
    """What process 0 finds, on all processes, and whether the job has been started before. To be called by all.

    Args:
        cfg: the job's configuration.
        warn: called on process 0 with a line for each damaged checkpoint that is passed over.

    Raises:
        UserError: process 0 finds none where one is asked for, or another machine has other files than its one.
    """
    again = any(gather(restarted()))
    start: Start | None = None
    problem: str | None = None
    if rank() == 0:
        try:
            start = find_start(cfg, again, warn)
        except UserError as error:
            problem = str(error)
    start, problem = gather((start, problem))[0]
    if problem is not None:
        raise UserError(problem)
    _require_the_same(start, cfg)
    return start, again


def _require_the_same(start: Start | None, cfg: DictConfig) -> None:
    """Raises:
    UserError: a process does not see the checkpoint that process 0 has found, or one where that has found none.
    """
    if start is not None:
        deadline = time.monotonic() + _LATE_FILE_S
        while (seen := fingerprint(start.path)) != start.fingerprint and time.monotonic() < deadline:
            time.sleep(0.2)
        agrees = seen == start.fingerprint
        what = f"not the checkpoint to continue from, {start.path}, unlike process 0"
    else:
        agrees = cfg.overwrite or not kept_in(Path(cfg.run_dir))
        what = f"checkpoints in {cfg.run_dir}, unlike process 0"
    views = gather((socket.gethostname(), agrees, what))
    for other, (host, same, theirs) in enumerate(views):
        if not same:
            raise UserError(
                f"run_dir: process {other} on {host} sees {theirs} on {views[0][0]}; give a folder that all "
                "machines share, since process 0 alone writes checkpoints"
            )
