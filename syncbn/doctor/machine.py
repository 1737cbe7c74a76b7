"""GPUs, their links, and disks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

from .checks import FAILED, OK, WARNING, Check, by_text, by_value, ranks_in_words, spelled, worst

Facts = dict[str, Any]
_GB = 1e9


def gpus(own: torch.device) -> Facts:
    """What this process sees."""
    if not torch.cuda.is_available():
        return {"gpus": [], "own": None, "driver": None, "peers": [], "links": None}
    count = torch.cuda.device_count()
    return {
        "gpus": [_gpu(index) for index in range(count)],
        "own": own.index,
        "driver": _nvidia_smi("--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        # Row by row: whether GPU i can read GPU j's memory by itself.
        "peers": [[i == j or torch.cuda.can_device_access_peer(i, j) for j in range(count)] for i in range(count)],
        # The same for all of a host.
        "links": _nvidia_smi("topo", "-m") if os.environ.get("LOCAL_RANK", "0") == "0" else None,
    }


def _gpu(index: int) -> Facts:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    return {"name": properties.name, "free_gb": round(free / _GB, 1), "total_gb": round(total / _GB, 1)}


def _nvidia_smi(*arguments: str) -> str | None:
    try:
        run = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip() or None


def judge_gpus(said: list[Facts], hosts: list[str], device: str) -> Check:
    if not any(each["gpus"] for each in said):
        return Check("GPUs", OK, "none on any host: the processes talk over gloo", said)
    names = [_names(each) for each in said]
    if len(set(names)) > 1:
        return Check("GPUs", FAILED, f"not the same on all ranks: {spelled(names)}", said)
    lines = _lines(said, hosts)
    drivers = [each["driver"] for each in said]
    if len(set(drivers)) > 1:
        return Check("GPUs", WARNING, f"driver {spelled(drivers)}", said, lines)
    full = [
        rank for rank, each in enumerate(said) if _own(each) and _own(each)["free_gb"] < 0.5 * _own(each)["total_gb"]
    ]
    if full and device == "cuda":
        return Check(
            "GPUs", WARNING, f"more than half of the memory is taken already on {ranks_in_words(full)}", said, lines
        )
    alone = [hosts[rank] for rank, each in enumerate(said) if not all(map(all, each["peers"]))]
    summary = f"{names[0]} on each host, driver {drivers[0]}"
    if alone:
        summary += f"; not all can read each other's memory on {', '.join(dict.fromkeys(alone))}"
    return Check("GPUs", OK, summary, said, lines)


def _own(facts: Facts) -> Facts:
    return facts["gpus"][facts["own"]] if facts["own"] is not None else {}


def _names(facts: Facts) -> str:
    counts = by_value([gpu["name"] for gpu in facts["gpus"]])
    return ", ".join(f"{len(gpus)} x {name}" for name, gpus in counts.items()) or "none"


def _lines(said: list[Facts], hosts: list[str]) -> list[str]:
    free = [
        f"rank {rank}: GPU {each['own']}, {_own(each)['free_gb']} of {_own(each)['total_gb']} GB free"
        for rank, each in enumerate(said)
        if _own(each)
    ]
    of_hosts: dict[str, dict[str, None]] = {}
    for host, each in zip(hosts, said, strict=True):
        if each["links"]:
            of_hosts.setdefault(each["links"], {})[host] = None
    links = []
    for text, those in of_hosts.items():
        more = f" and {len(those) - 1} more" if len(those) > 1 else ""
        links += [f"links on {next(iter(those))}{more}:", *_matrix(text)]
    return links + free


def _matrix(text: str) -> list[str]:
    """nvidia-smi's, without its escapes, tabs, legend and what is no link."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text).partition("Legend")[0]
    rows = [[cell.strip() for cell in line.split("\t")] for line in text.splitlines() if line.strip()]
    columns = next((i for i, cell in enumerate(rows[0]) if "Affinity" in cell), len(rows[0])) if rows else 0
    return [" ".join(f"{cell:<5}" for cell in row[:columns]).rstrip() for row in rows]


# ---- disks

_NEEDED_GB, _ROOMY_GB, _SHARED_MEMORY_GB = 0.2, 5.0, 1.0


def disks(folder: Path) -> Facts:
    """Free gigabytes where runs are written, and where worker processes hand batches over."""
    there = folder.expanduser().absolute()
    while not there.exists():
        there = there.parent
    shared = Path("/dev/shm")
    return {
        "folder": str(there),
        "free_gb": round(shutil.disk_usage(there).free / _GB, 2),
        "writable": os.access(there, os.W_OK),
        "shared_memory_gb": round(shutil.disk_usage(shared).free / _GB, 2) if shared.is_dir() else None,
    }


def judge_disks(said: list[Facts]) -> Check:
    found = []
    for rank, each in enumerate(said):
        where = each["folder"]
        if not each["writable"]:
            found.append((FAILED, rank, f"{where} is not writable"))
        elif each["free_gb"] < _NEEDED_GB:
            found.append((FAILED, rank, f"{where} has {each['free_gb']} GB left: no checkpoint fits"))
        elif each["free_gb"] < _ROOMY_GB:
            found.append((WARNING, rank, f"{where} has {each['free_gb']} GB left"))
        shared = each["shared_memory_gb"]
        if shared is not None and shared < _SHARED_MEMORY_GB:
            found.append((WARNING, rank, f"/dev/shm has {shared} GB left, which loader processes need"))
    verdict = worst([severity for severity, *_ in found])
    if found:
        text = by_text([(rank, text) for severity, rank, text in found if severity == verdict])
        return Check("disks", verdict, text, said)
    least = min(each["free_gb"] for each in said)
    shared = [each["shared_memory_gb"] for each in said if each["shared_memory_gb"] is not None]
    noted = f", /dev/shm at least {min(shared):.0f} GB" if shared else ""
    return Check("disks", OK, f"{said[0]['folder']} has at least {least:.0f} GB free{noted}", said)
