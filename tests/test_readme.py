"""What the README says can be typed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from documentation import ROOT, blocks
from torch import nn

import syncbn

README = (ROOT / "README.md").read_text()


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))


def test_the_python_code_runs(processes: Any) -> None:
    plain, with_lightning = blocks("README.md")
    assert processes(2).run(_run_plain, plain) == [True, True]
    names: dict[str, Any] = {"lightning": lightning}
    exec(with_lightning.replace("devices=8", 'devices=2, accelerator="cpu", logger=False'), names)
    assert names["trainer"].num_devices == 2


def _run_plain(code: str) -> bool:
    names: dict[str, Any] = {"model": network(), "device": "cpu", "torch": torch}
    exec(code, names)
    names["model"](torch.randn(2, 3, 8, 8)).sum().backward()
    return isinstance(names["model"].module[1], syncbn.SyncBatchNorm)


def test_the_names_exist() -> None:
    for name in re.findall(r"`(?:print\()?syncbn\.(\w+)\(", README):
        assert name in syncbn.__all__


def make(*arguments: str) -> str:
    return subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_make_commands() -> None:
    for target in ("train", "test", "lint", "setup"):
        assert f"make {target}" in make("help")
    assert "launch/train.sh norm=local data.batch_size=1" in make("-n", "train", "ARGS=norm=local data.batch_size=1")
    assert "-m pytest" in make("-n", "test")


def test_the_environment_is_made_once(tmp_path: Path) -> None:
    """Set up again only when pyproject.toml changes."""
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    (tmp_path / ".venv").mkdir()
    ready = tmp_path / ".venv/.ready"
    plan = ["make", "-n", "test"]

    def installs() -> bool:
        run = subprocess.run(plan, cwd=tmp_path, capture_output=True, text=True, check=True)
        return "pip install" in run.stdout

    assert installs()
    ready.touch()
    assert not installs()
    later = ready.stat().st_mtime + 10
    import os

    os.utime(tmp_path / "pyproject.toml", (later, later))
    assert installs()


def test_the_configuration_prints() -> None:
    pytest.importorskip("hydra")
    (line,) = [line for line in README.splitlines() if "--cfg job" in line]
    command = line.split("#")[0].split()
    run = subprocess.run([sys.executable, *command[1:]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "syncbn.lightning.SyncBatchNormPlugin" in run.stdout
