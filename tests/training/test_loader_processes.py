"""Loading processes start where no thread holds a lock, and leave signals to the process that trains."""

import os
import signal
import subprocess
import sys
import threading

from jobs import environment

from syncbn.training.data import DataModule

_PROGRAM = """
import os, signal, threading, time
import torch

from syncbn.training.data import DataModule, DigitScenesDataModule

if __name__ == "__main__":
    data = DigitScenesDataModule(train_size=40, val_size=4, batch_size=1, num_workers=2)
    batches = iter(data.train_dataloader())
    next(batches)
    os.killpg(0, signal.SIGTERM), os.killpg(0, signal.SIGINT)
    print("read", 1 + sum(1 for _ in batches))
"""


class Whoami:
    """Items that tell which process has read them, and what threads it has."""

    class_names = ("background", "thing")

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"index": index, "who": (os.getpid(), os.getppid(), signal.getsignal(signal.SIGINT))}


def who_reads(items):
    return {"who": [item["who"] for item in items]}


def test_workers_are_not_forked_from_the_process_that_trains():
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    data = DataModule(Whoami(), Whoami(), batch_size=2, num_workers=2, train_transforms=dict, collate=who_reads)
    who = [reader for batch in data.train_dataloader() for reader in batch["who"]]
    stop.set()
    assert len(who) == 4
    for pid, parent, on_interrupt in who:
        assert os.getpid() not in (pid, parent)
        assert on_interrupt == signal.SIG_IGN


def test_signals_to_the_whole_job_do_not_end_the_loading(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(f"import signal\n[signal.signal(s, signal.SIG_IGN) for s in (2, 15)]\n{_PROGRAM}")
    run = subprocess.run(
        [sys.executable, program],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=240,
        start_new_session=True,
    )
    assert run.stdout.split() == ["read", "40"], run.stderr
