"""The StatisticsMonitor as a group of the training program's callbacks, in a real job."""

import csv

import pytest
from jobs import TINY, TRAIN_SH, run_job


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("monitored")
    monitored = ["callbacks=[default,monitor]", "callbacks.monitor.every_n_steps=1", "callbacks.pictures=null"]
    once = ["trainer.max_epochs=1", f"run_dir={folder / 'run'}"]
    return run_job([str(TRAIN_SH), *TINY, *monitored, *once], folder), folder / "run"


def test_the_run_folder_has_the_report(job):
    done, run_dir = job
    assert done.process.returncode == 0, done.error_output
    assert (run_dir / "statistics.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert not list(run_dir.glob("*.partial*"))


def test_every_layer_is_in_the_log(job):
    _, run_dir = job
    [path] = run_dir.rglob("metrics.csv")
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("statistics/samples")]
    assert len(rows) >= 3
    assert 0 < float(rows[-1]["statistics/exchange_share"]) < 1
    strays = [value for name, value in rows[-1].items() if name.startswith("statistics/mean_stray/")]
    assert len(strays) == 6
    assert all(float(value) > 0 for value in strays)
