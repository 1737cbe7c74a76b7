"""What a run leaves: a header that says where the figures come from, tables, rows as JSON, a picture."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .processes import cores

WIDTH = 120
Row = dict[str, Any]
# Every row of every mode has these; None where one has no meaning.
KEYS = ("case", "impl", "layout", "dtype", "fwd_ms", "bwd_ms", "total_ms")


@dataclass
class Report:
    """The result of a run, as it is written to JSON."""

    header: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    summary: list[Row] = field(default_factory=list)


def row(**values: Any) -> Row:
    """A row with all ``KEYS`` in their order, then what the mode adds."""
    return dict.fromkeys(KEYS) | values


def header(mode: str, command: str) -> dict[str, Any]:
    """Machine, versions, command and date, as this process sees them. The process group's are ``world``'s."""
    return {
        "benchmark": mode,
        "command": command,
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu(),
            "cores": cores(),
            "memory_gb": _memory_gb(),
            "system": platform.platform(terse=True),
            "load_average": [round(load, 2) for load in os.getloadavg()],
        },
        "versions": _versions(),
    }


def world(device: torch.device) -> dict[str, Any]:
    """What the header says of the processes and their device; to be asked inside of the process group."""
    backend = dist.distributed_c10d._get_default_group()._get_backend(device)
    facts: dict[str, Any] = {
        "world_size": dist.get_world_size(),
        "backend": f"{dist.get_backend()} ({type(backend).__name__})",
        "device": device.type,
        "threads_per_process": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "gpus": torch.cuda.device_count(), "driver": _driver()}
        facts["gpu_memory_gb"] = round(properties.total_memory / 1e9, 1)
    return facts


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    versions["cuda"] = torch.version.cuda
    if torch.cuda.is_available():
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    packages = ("syncbn", "triton", "torchvision", "fairscale", "inplace-abn", "apex")
    return versions | {package: _version(package) for package in packages}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (ValueError, OSError):
        return None


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


class Column(NamedTuple):
    """A column of a table: names stand left, numbers (with so many digits after the point) right."""

    title: str
    width: int
    digits: int | None = None


class Table:
    """Rows printed as they come, aligned, at most ``WIDTH`` wide."""

    def __init__(self, *columns: Column) -> None:
        assert sum(column.width + 2 for column in columns) - 2 <= WIDTH
        self.columns = columns

    def head(self) -> None:
        self._print([column.title for column in self.columns])

    def line(self, *values: Any) -> None:
        pairs = zip(self.columns, values, strict=True)
        self._print([_text(value, column.digits) for column, value in pairs])

    def _print(self, texts: Sequence[str]) -> None:
        cells = (
            f"{text:<{column.width}}" if column.digits is None else f"{text:>{column.width}}"
            for column, text in zip(self.columns, texts, strict=True)
        )
        print("  ".join(cells).rstrip(), flush=True)


def _text(value: Any, digits: int | None) -> str:
    if value is None:
        return ""
    if digits is None or isinstance(value, str):
        return str(value)
    return f"{value:.{digits}f}"


def show_header(header: dict[str, Any]) -> None:
    """The header in a few lines, so that a table that is copied away still says what it is."""
    machine, versions = header["machine"], header["versions"]
    print(f"$ {header['command']}\n{header['date']}")
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['system']}"
    print(f"{where}, load {machine['load_average'][0]}")
    print(", ".join(f"{name} {value}" for name, value in versions.items() if value is not None), flush=True)


def show_world(facts: dict[str, Any]) -> None:
    gpu = f", {facts['gpu']} x {facts['gpus']}, driver {facts['driver']}" if "gpu" in facts else ""
    print(f"{facts['world_size']} process(es), {facts['backend']}{gpu}", flush=True)


def write(report: Report, json_path: Path | None, plot_path: Path | None) -> None:
    """Writes and draws what was asked for, and says so."""
    if json_path is not None:
        json_path.write_text(_as_json(report))
    if plot_path is not None:
        from .plot import draw

        draw(report, plot_path)
    written = [f"{path}" for path in (json_path, plot_path) if path is not None]
    if written:
        print(f"\nWritten: {', '.join(written)}", flush=True)


def _as_json(report: Report) -> str:
    """One line for a row, so that two runs can be compared by diff."""
    parts = asdict(report)
    lists = {
        name: ",\n".join(f"    {json.dumps(_rounded(entry))}" for entry in parts[name]) for name in ("rows", "summary")
    }
    head = json.dumps(_rounded(parts["header"]), indent=2).replace("\n", "\n  ")
    body = ",\n  ".join(f'"{name}": [\n{lines}\n  ]' for name, lines in lists.items())
    return f'{{\n  "header": {head},\n  {body}\n}}\n'


def _rounded(value: Any) -> Any:
    """Six significant digits: more is noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(entry) for entry in value]
    return value


def read(path: Path) -> Report:
    """What ``write`` has written.

    Raises:
        ValueError: it is something else.
    """
    try:
        parts = json.loads(path.read_text())
        return Report(parts["header"], parts["rows"], parts["summary"])
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"{path} is not the JSON of a benchmark: {error}") from error
