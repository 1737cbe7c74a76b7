"""apex in one process with this package, although both want the name ``syncbn``.

apex's CUDA extension is a module of that name at the top level, which ``apex.parallel`` imports. Here it is loaded from
its file and bears the name only while ``apex.parallel`` is imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

NAME = "syncbn"


def extension_file() -> Path | None:
    """apex's compiled extension on the import path."""
    for folder in sys.path:
        for suffix in EXTENSION_SUFFIXES:
            file = Path(folder or ".") / f"{NAME}{suffix}"
            if file.is_file():
                return file
    return None


def apex_sync_batch_norm() -> Any:
    """apex's SyncBatchNorm with its CUDA kernels."""
    if "apex.parallel" not in sys.modules:
        ours = sys.modules[NAME]
        sys.modules[NAME] = _load_extension()
        try:
            importlib.import_module("apex.parallel")
        finally:
            sys.modules[NAME] = ours
    return sys.modules["apex.parallel"].SyncBatchNorm


def _load_extension() -> Any:
    spec = importlib.util.spec_from_file_location(NAME, extension_file())
    assert spec is not None  # it is a file with an extension module's suffix
    assert spec.loader is not None
    extension = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(extension)
    return extension
