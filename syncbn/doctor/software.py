"""Versions and environment: what every process runs, and whether it is the same."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from .checks import FAILED, OK, WARNING, Check, ranks_in_words, spelled, those_who_differ

Facts = dict[str, Any]


def versions() -> Facts:
    return {
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        "NCCL": nccl_version() if dist.is_available() and dist.is_nccl_available() else None,
        "gloo": bool(dist.is_available() and dist.is_gloo_available()),
        "syncbn": f"{_installed('syncbn')} ({code_digest()})",
        "Python": platform.python_version(),
    }


def nccl_version() -> str | None:
    try:
        return ".".join(map(str, torch.cuda.nccl.version()))
    except (AttributeError, RuntimeError):  # built without it
        return None


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


@cache
def code_digest() -> str:
    """Of the package's own code: two checkouts may have one version."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def judge_versions(said: list[Facts]) -> Check:
    different = [name for name in said[0] if len({str(each[name]) for each in said}) > 1]
    if different:
        summary = "; ".join(f"{name} differs: {spelled([each[name] for each in said])}" for name in different)
        return Check("versions", FAILED, summary, said)
    values = ", ".join(f"{name} {_word(value)}" for name, value in said[0].items())
    return Check("versions", OK if said[0]["gloo"] else FAILED, values, said)


def _word(value: Any) -> str:
    return {None: "none", True: "yes", False: "no"}.get(value, str(value))


# What decides how processes compute and talk. No other variable is shown: it may be a secret.
_MATTERS = re.compile(r"(NCCL|GLOO|TORCH|TORCH_[A-Z_]+|PYTORCH|SYNCBN|OMP|MKL|CUDA|CUBLAS|KMP|TP)_\w+")
_MAY_DIFFER = re.compile(
    r"TORCHELASTIC_.*|.*_SOCKET_IFNAME|CUDA_VISIBLE_DEVICES|SYNCBN_(LAUNCHER|STARTS_BEFORE)"
    r"|.*(HOSTID|_FILE|_DIR|_PATH|_HOME|_HCA)"
)
_LAUNCH_ORDER = "NCCL_LAUNCH_ORDER_IMPLICIT"


def environment() -> Facts:
    values = {name: value[:200] for name, value in os.environ.items() if _MATTERS.fullmatch(name)}
    return {name: values[name] for name in sorted(values) if not name.startswith("TORCHELASTIC_")}


def judge_environment(said: list[Facts], backend: str) -> Check:
    names = sorted({name for each in said for name in each if not _MAY_DIFFER.fullmatch(name)})
    different = [name for name in names if len({each.get(name) for each in said}) > 1]
    lines = [f"{name}={spelled([each.get(name, '(not set)') for each in said])}" for name in names]
    if different:
        name = different[0]
        values = [each.get(name, "not set") for each in said]
        others = f"; so do {', '.join(different[1:])}" if different[1:] else ""
        odd = ranks_in_words(those_who_differ(values))
        return Check("environment", FAILED, f"{name} differs on {odd}: {spelled(values)}{others}", said, lines)
    warnings = _warnings(said[0], len(said), backend)
    if warnings:
        return Check("environment", WARNING, "; ".join(warnings), said, lines)
    return Check("environment", OK, f"{len(names)} variables that matter, the same everywhere", said, lines)


def _warnings(values: Facts, processes: int, backend: str) -> list[str]:
    found = []
    if processes > 1 and "OMP_NUM_THREADS" not in values:
        found.append("OMP_NUM_THREADS is not set: each process starts a thread per core")
    if "nccl" in backend and values.get(_LAUNCH_ORDER) != "1":
        found.append(f"{_LAUNCH_ORDER} is not 1: layers share DistributedDataParallel's communicator")
    slow = {"CUDA_LAUNCH_BLOCKING": "1", "TORCH_DISTRIBUTED_DEBUG": "DETAIL", "SYNCBN_CHECK": "1"}
    found += [
        f"{name}={value} is for finding errors, and slow" for name, value in slow.items() if values.get(name) == value
    ]
    return found
