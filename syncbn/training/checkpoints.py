"""Checkpoints on disk: written so that a crash leaves the old or the new one, read as data that cannot run code.

A run keeps `last.ckpt`, `previous.ckpt`, which was the last one before, and `best.ckpt`.
"""

import contextlib
import hashlib
import os
import pickle
import re
import shutil
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from syncbn.training.errors import UserError, one_line

CHECKPOINTS = Path("checkpoints")  # in a run's folder
LAST = "last.ckpt"
PREVIOUS = "previous.ckpt"
BEST = "best.ckpt"
LAST_CHECKPOINT = CHECKPOINTS / LAST
# The launch that a checkpoint comes from: `environment.run_stamp`.
RUN = "run"
_PARTIAL = ".partial"


class DamagedCheckpointError(UserError):
    """A file that is no checkpoint, or one that has changed since it was written."""


def read_checkpoint(path: Path, key: str = "ckpt_path", device: str = "cpu") -> dict[str, Any]:
    """What a checkpoint holds; on the device "meta" without its numbers, which are checked all the same.

    torch.load does not compare the checksums that torch.save has written, and would return whatever the disk has
    made of the weights.

    Args:
        path: a file that Lightning has saved.
        key: what the user calls it, for the messages.
        device: where its tensors go.

    Raises:
        DamagedCheckpointError: it is no checkpoint, or a damaged one; says what is wrong.
        UserError: there is no such file, or it holds anything but tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"{key}: there is no file {path}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{key}: {path} may not be read by this user")
    if damage := _damage(path):
        raise DamagedCheckpointError(f"{key}: {path} is no checkpoint, or a damaged one: {damage}")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{key}: {path} is not loaded: {refusal(error)}") from error
    except (RuntimeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DamagedCheckpointError(f"{key}: {path} is no checkpoint, or a damaged one") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{key}: {path} holds no state_dict, so that it is no checkpoint of a training run")
    return checkpoint


def newest_whole(
    paths: Sequence[Path], key: str = "ckpt_path", warn: Callable[[str], None] | None = None
) -> tuple[Path, dict[str, Any]]:
    """The first of these checkpoints that is whole, and what it holds without its numbers.

    Args:
        paths: the newest first.
        key: what the user calls them, for the messages.
        warn: called with a line for each damaged one that is passed over.

    Raises:
        DamagedCheckpointError: none is whole.
        UserError: one holds anything but tensors and plain values: that is no damage.
    """
    damaged: list[DamagedCheckpointError] = []
    for path in paths:
        try:
            checkpoint = read_checkpoint(path, key, device="meta")
        except DamagedCheckpointError as error:
            damaged.append(error)
            continue
        for passed_over in damaged:
            if warn is not None:
                warn(f"{passed_over}; {path} is used instead, of step {checkpoint.get('global_step')}")
        return path, checkpoint
    raise DamagedCheckpointError("; ".join(map(str, damaged)))


def refusal(error: pickle.UnpicklingError) -> str:
    """Why ``weights_only=True`` has refused a file, without PyTorch's advice to switch it off."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f"it names {found[1]}" if found else "it holds more than tensors and plain values"
    return f"{what}, and a file that brings its own code could do anything"


def kept_in(run_dir: Path) -> list[Path]:
    """The checkpoints that a run in this folder goes on from, the newest first."""
    folder = run_dir / CHECKPOINTS
    return [(folder / name).resolve() for name in (LAST, PREVIOUS) if (folder / name).is_file()]


def fingerprint(path: Path) -> str | None:
    """Equal for equal checkpoints, wherever they lie; None if there is none. Reads no more than the file's end."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [(entry.filename, entry.CRC, entry.file_size) for entry in archive.infolist()]
    except (OSError, zipfile.BadZipFile):
        return None
    return hashlib.sha256(repr(entries).encode()).hexdigest()


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Saves a checkpoint. Whatever happens meanwhile, there is afterwards the old file or the new one, on the disk.

    What is now `last.ckpt` becomes `previous.ckpt` when another `last.ckpt` is complete.

    Raises:
        OSError: it cannot be written; the old file is as it was, and nothing else is left behind.
    """
    with _replacing(path, keep_as=PREVIOUS if path.name == LAST else None) as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            # torch.save goes on after a write that has failed, to close its archive, and fails at that.
            raise _os_error(error) or error from None


def write_text(text: str, path: Path) -> None:
    """The same for a small file.

    Raises:
        OSError: it cannot be written.
    """
    with _replacing(path) as file:
        file.write(text.encode())


def remove_partial(folder: Path) -> None:
    """Removes what a killed process has left of a file it was writing."""
    for path in folder.glob(f".*{_PARTIAL}"):
        path.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> str:
    """What to tell the user."""
    with contextlib.suppress(OSError):
        space = shutil.disk_usage(path.parent)
        return (
            f"{path} could not be written: {error.strerror or error}; "
            f"{_size(space.free)} of {_size(space.total)} are free there"
        )
    return f"{path} could not be written: {error.strerror or error}"


@contextmanager
def _replacing(path: Path, keep_as: str | None = None) -> Iterator[IO[bytes]]:
    """A file to write, which takes the place of `path` when it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own: a process that was given up may still be writing.
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_PARTIAL}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            _rename_copy(path, path.with_name(keep_as))
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _rename_copy(path: Path, other: Path) -> None:
    """Lets `other` be what `path` is, with both of them there at any time where the file system has links."""
    if other.exists() and other.samefile(path):  # a process was killed between this and what comes after it
        return
    link = other.with_name(f".{other.name}.{uuid.uuid4().hex[:8]}{_PARTIAL}")
    try:
        os.link(path, link)
    except OSError:
        path.replace(other)
    else:
        link.replace(other)


def _sync_folder(folder: Path) -> None:
    # Not all systems let a folder be opened, nor all file systems be synced; there the name may be lost, not the file.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _damage(path: Path) -> str | None:
    """What is wrong with an archive of torch.save, or None."""
    try:
        # torch.load takes older formats, too, which no run has written.
        if not zipfile.is_zipfile(path):
            return f"its end is missing after {_size(path.stat().st_size)}, or it is something else"
        with zipfile.ZipFile(path) as archive:
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                return "it was not written by torch.save"
            # Of an entry that is called a folder torch.load reads nothing, and does not say so.
            broken = archive.testzip() or next((e.filename for e in archive.infolist() if e.external_attr & 0x10), None)
    except Exception as error:  # of many classes, depending on which byte is wrong
        return f"{type(error).__name__}: {one_line(str(error))}"
    return f"{broken} has another checksum or kind than when it was written" if broken else None


def _size(count: float) -> str:
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.3g} {units[0]}"
