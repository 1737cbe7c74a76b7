"""launch/slurm.sbatch with stand-ins for Slurm's commands: what it starts, and when it is queued again."""

import os
import signal
import subprocess
import time

import pytest
from jobs import REPOSITORY, environment

# The step notes what it was asked to run, and lives until it is signalled or told to end.
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" "timeout $TORCH_ELASTIC_SHUTDOWN_TIMEOUT" > started
echo $$ > step
trap 'sleep 0.3; echo saved > checkpoint; exit 143' TERM
while [[ ! -e end ]]; do sleep 0.05; done
exit "$(cat end)"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ "$1" == show ]]; then printf '%s\\n' node7 node8; else echo "$@" >> requeued; fi
"""
SCANCEL = """#!/usr/bin/env bash
[[ "$*" == "--signal=TERM 1234567" ]] && kill -TERM "$(cat step)"
"""


@pytest.fixture
def batch(tmp_path):
    """The running batch script, in a folder of its own."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    variables = environment(
        SLURM_SUBMIT_DIR=str(tmp_path),
        SLURM_JOB_ID="1234567",
        SLURM_JOB_NUM_NODES="2",
        SLURM_JOB_NODELIST="node[7-8]",
        SLURM_CPUS_PER_TASK="4",
    )
    variables["PATH"] = f"{programs}{os.pathsep}{variables['PATH']}"
    script = str(REPOSITORY / "launch" / "slurm.sbatch")
    process = subprocess.Popen(
        [script, "norm=local", "name=a b"], env=variables, start_new_session=True, stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "step").exists() or not (tmp_path / "step").read_text():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.1)  # the step's own trap
    yield process, tmp_path
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()


def test_every_node_runs_the_line_that_a_user_would_run(batch):
    process, folder = batch
    (folder / "end").write_text("0")
    assert process.wait(20) == 0
    assert (folder / "started").read_text().splitlines() == [
        "launch/multinode.sh",
        "--nnodes=2",
        "--rdzv-endpoint=node7:24567",
        "--rdzv-id=slurm-1234567",
        "--max-restarts=3",
        "ckpt_path=auto",
        "norm=local",
        "name=a b",
        "timeout 120",
    ]
    assert not (folder / "requeued").exists()


def test_before_the_end_of_its_time_it_saves_and_is_queued_again(batch):
    process, folder = batch
    process.send_signal(signal.SIGUSR1)
    assert process.wait(20) == 0
    assert (folder / "checkpoint").read_text() == "saved\n"  # it has waited for that
    assert (folder / "requeued").read_text() == "requeue 1234567\n"


def test_cancelled_it_saves_and_stays_cancelled(batch):
    process, folder = batch
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert (folder / "checkpoint").exists()
    assert not (folder / "requeued").exists()


def test_a_failure_is_not_tried_for_ever(batch):
    process, folder = batch
    (folder / "end").write_text("1")
    assert process.wait(20) == 1
    assert not (folder / "requeued").exists()


def test_a_job_that_ends_while_it_is_told_to_is_not_queued_again(batch):
    process, folder = batch
    (folder / "bin" / "scancel").write_text("#!/usr/bin/env bash\nexit 1\n")
    process.send_signal(signal.SIGUSR1)
    time.sleep(0.2)
    (folder / "end").write_text("0")
    assert process.wait(20) == 0
    assert not (folder / "requeued").exists()
