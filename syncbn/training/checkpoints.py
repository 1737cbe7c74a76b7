"""Checkpoints are read as data: tensors, numbers and text, and nothing that could run code."""

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from syncbn.training.errors import UserError


def read_checkpoint(path: Path, key: str = "ckpt_path", device: str = "cpu") -> dict[str, Any]:
    """What a checkpoint holds; on the device "meta" without its numbers, which takes no time.

    Args:
        path: a file that Lightning has saved.
        key: what the user calls it, for the messages.
        device: where its tensors go.

    Raises:
        UserError: it is no checkpoint, a damaged one, or holds anything but tensors and plain values.
    """
    if not path.is_file():
        raise UserError(f"{key}: there is no file {path}")
    if not _is_torch_archive(path):
        raise UserError(f"{key}: {path} is no checkpoint, or a damaged one")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{key}: {path} is not loaded: {refusal(error)}") from error
    except (RuntimeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{key}: {path} is no checkpoint, or a damaged one") from error
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("state_dict"), dict):
        raise UserError(f"{key}: {path} holds no state_dict, so that it is no checkpoint of a training run")
    return checkpoint


def refusal(error: pickle.UnpicklingError) -> str:
    """Why ``weights_only=True`` has refused a file, without PyTorch's advice to switch it off."""
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    what = f"it names {found[1]}" if found else "it holds more than tensors and plain values"
    return f"{what}, and a file that brings its own code could do anything"


def _is_torch_archive(path: Path) -> bool:
    # torch.load takes older formats, too, which no run has written.
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/data.pkl") for name in archive.namelist())
