"""The benchmark runs and prints what it promises."""

from __future__ import annotations

import os
import subprocess
import sys


def test_the_layer_benchmark() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, "-m", "syncbn.bench.layer", "--rounds", "2"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr
    header, *rows, summary = run.stdout.splitlines()
    assert header.split()[0] == "shape"
    assert len(rows) == 10
    assert all(float(row.split()[5]) > 0 for row in rows)
    assert float(summary.split()[-1]) > 0
