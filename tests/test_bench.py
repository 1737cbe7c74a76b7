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
    for row in rows:
        ours, idle, local, ratio = (float(cell) for cell in row.split()[2:6])
        assert min(ours, idle, local) > 0
        # Each is printed to two places; small times make the ratio of the printed ones coarse.
        assert abs(ratio - (ours - idle) / local) <= 0.01 + 0.02 * (1 + abs(ratio)) / local
    assert summary.split()[:2] == ["geometric", "mean"]
