"""Killed, preempted, with a damaged checkpoint, on a full disk: what a run loses then, and how it goes on."""

import csv
import ctypes
import os
import shutil
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import interrupted
import pytest
import torch
from documentation import blocks
from jobs import TRAIN_SH, Job
from lightning.pytorch import Callback, Trainer
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import JOB, Draws, differences, load, training_state

from syncbn.training import start as start_module
from syncbn.training.callbacks import GracefulStop, LastCheckpoint
from syncbn.training.callbacks.checkpoints import DurableCheckpointIO, install
from syncbn.training.checkpoints import (
    DamagedCheckpointError,
    fingerprint,
    newest_whole,
    read_checkpoint,
    remove_partial,
    write_checkpoint,
)
from syncbn.training.config import check, compose_config
from syncbn.training.environment import RUN_STAMP_VARIABLE
from syncbn.training.errors import UserError
from syncbn.training.loggers import CSVLogger
from syncbn.training.start import checkpoints_to_try, find_start

EVERY_N_STEPS = 2
# Two epochs of 4 optimizer steps, two batches each; an epoch's last step has one.
RECORDED = [
    *(argument for argument in JOB if not argument.startswith(("run_dir=", "logger="))),
    "trainer.log_every_n_steps=1",
    f"checkpoint.every_n_steps={EVERY_N_STEPS}",
    "+callbacks.record._target_=interrupted.StepRecord",
    "+callbacks.record.path=steps.txt",
]


def fault(name, **fields):
    fields = {"_target_": "interrupted.Fault"} | fields
    return f"+callbacks.{name}={{{','.join(f'{key}:{value}' for key, value in fields.items())}}}"


def start(folder, *arguments):
    folder.mkdir(exist_ok=True)
    shutil.copy(interrupted.__file__, folder)
    return Job([str(TRAIN_SH), *RECORDED, "run_dir=run", *arguments], folder)


def finished(job):
    job.finish(400)
    return job


@pytest.fixture
def mount(tmp_path):
    """A file system of 1 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if done.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """Jobs by name, both at work at the same time: one that nothing happens to, and one that is killed in its first
    epoch, then, with a damaged checkpoint, in its second, and preempted at last.
    """
    folder = tmp_path_factory.mktemp("recovery")
    jobs = {
        "whole": start(folder / "whole"),
        "killed": start(
            folder / "killed",
            "max_restarts=2",
            fault("kill", kind="kill", batch=6, rank=1),
            fault("damage", kind="corrupt", batch=9, rank=0, attempt=1, path="run/checkpoints/last.ckpt"),
            fault("preempt", kind="preempt", batch=9, rank=0, attempt=2),
        ),
    }
    yield folder, jobs
    for job in jobs.values():
        job.kill()


@pytest.fixture(scope="module")
def whole(started):
    folder, jobs = started
    job = finished(jobs["whole"])
    assert job.process.returncode == 0, job.output + job.error_output
    return folder / "whole" / "run"


@pytest.fixture(scope="module")
def killed(started):
    folder, jobs = started
    return finished(jobs["killed"]), folder / "killed"


@pytest.fixture(scope="module")
def recovered(killed):
    """The killed job, when the scheduler has started it again with the same command, now without faults."""
    _, folder = killed
    taken = steps(folder)
    job = finished(start(folder, "ckpt_path=auto"))
    assert job.process.returncode == 0, job.output + job.error_output
    return job, folder / "run", taken


def steps(folder):
    return [int(line) for line in (folder / "steps.txt").read_text().splitlines()]


@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_by_itself_and_ends_as_if_nothing_had_happened(whole, killed, recovered):
    job, _ = killed
    assert "process 1 was ended by SIGKILL" in job.error_output
    _, run, _ = recovered
    for name in ("last.ckpt", "best.ckpt"):
        expected, actual = (load(folder / "checkpoints" / name) for folder in (whole, run))
        assert not differences(training_state(expected), training_state(actual)), name
    last = [load(folder / "checkpoints" / "last.ckpt") for folder in (whole, run)]
    histories = [checkpoint["callbacks"]["Curves"]["history"] for checkpoint in last]
    assert len(histories[0]) == 2
    assert not differences(*histories)


def test_at_most_every_n_steps_are_repeated(killed, recovered):
    _, _, taken = recovered
    # Killed after step 3; after step 5, with the checkpoint of step 4 damaged; preempted.
    ends = [i for i, step in enumerate(taken) if i + 1 == len(taken) or taken[i + 1] <= step]
    repeated = [taken[end] - taken[end + 1] + 1 for end in ends[:-1]]
    assert repeated[0] == 1 <= EVERY_N_STEPS
    assert taken[: ends[0] + 1] == [1, 2, 3]
    assert taken[ends[0] + 1] == 3
    assert taken[ends[1]] == 5
    assert taken[ends[1] + 1] == 3  # of `previous.ckpt`, of step 2


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(killed):
    job, folder = killed
    checkpoints = folder / "run" / "checkpoints"
    (warning,) = [line for line in job.errors if line.startswith("warning:")]
    assert f"{checkpoints}/last.ckpt is no checkpoint, or a damaged one: " in warning
    assert "has another checksum or kind than when it was written" in warning
    assert f"{checkpoints}/previous.ckpt is used instead, of step 2" in warning
    assert "continuing from: run/checkpoints/previous.ckpt" in job.output


def test_preemption_saves_and_ends_with_the_signals_status(killed, recovered):
    job, _ = killed
    assert job.process.returncode == 128 + signal.SIGTERM
    (line,) = [line for line in job.lines if line.startswith("interrupted after step")]
    again, _, taken = recovered
    assert "continuing from: run/checkpoints/last.ckpt" in again.output
    saved = int(line.split()[3].rstrip(":"))
    assert taken[-1] in (saved, saved - 1)  # the step that is saved is not recorded
    assert saved < 8


def test_the_logs_of_all_starts_are_one(whole, recovered):
    """No row is lost and none is there twice; CSVLogger by itself deletes or begins another file."""
    _, run, _ = recovered
    texts = [(folder / "csv" / "version_0" / "metrics.csv").read_text() for folder in (whole, run)]
    assert texts[0].count("\n") > 16
    assert texts[0] == texts[1]
    assert [path.name for path in (run / "csv").iterdir()] == ["version_0"]
    curves = []
    for folder in (whole, run):
        events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        assert len(events.Tags()["scalars"]) > 5
        curves.append({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]})
    assert curves[0] == curves[1]


def test_nothing_else_is_left(recovered):
    _, run, _ = recovered
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    step = {path.stem: load(path)["global_step"] for path in (run / "checkpoints").iterdir()}
    assert step["last"] == 8
    assert 8 - EVERY_N_STEPS <= step["previous"] < 8


@pytest.mark.timeout(400)
def test_a_full_disk_ends_the_run_on_all_processes_and_keeps_the_checkpoint_before(mount, tmp_path):
    run = mount / "run"
    fill = fault("fill", kind="fill", batch=9, rank=0, path=mount / "rubbish")
    job = finished(start(tmp_path, f"run_dir={run}", fill))
    assert job.process.returncode == 2, job.output + job.error_output
    (line,) = [line for line in job.errors if line.startswith("error:")]
    assert f"{run}/checkpoints/last.ckpt could not be written: No space left on device; " in line
    assert "of 1.05 MB are free there; make room and continue with ckpt_path=last" in line
    assert "Traceback" not in job.error_output
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["best.ckpt", "last.ckpt", "previous.ckpt"]
    assert [read_checkpoint(run / "checkpoints" / name)["global_step"] for name in names] == [4, 4, 2]


def states(seed, size=1000):
    generator = torch.Generator().manual_seed(seed)
    tensors = {str(i): torch.randn(size, generator=generator) for i in range(3)}
    return {"state_dict": tensors, "global_step": seed}


def test_a_process_that_is_killed_while_it_writes_leaves_a_whole_checkpoint(tmp_path):
    """Again and again, wherever it is at that moment."""
    last, previous = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    write_checkpoint(states(0, size=50_000), last)
    seen = 0
    for attempt in range(20):
        writer = os.fork()
        if writer == 0:
            for step in range(seen + 1, 1 << 30):
                write_checkpoint(states(step, size=50_000), last)
        time.sleep(0.02 + 0.003 * attempt)
        os.kill(writer, signal.SIGKILL)
        os.waitpid(writer, 0)
        step = newest_whole([last])[1]["global_step"]
        assert step >= seen
        assert not differences(read_checkpoint(last), states(step, size=50_000))
        if previous.exists():
            assert read_checkpoint(previous)["global_step"] in (step, step - 1)
        seen = step
        remove_partial(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} <= {"last.ckpt", "previous.ckpt"}
    assert seen > 20


def test_no_room_for_a_checkpoint_leaves_the_ones_before(mount):
    folder = mount / "checkpoints"
    path = folder / "last.ckpt"
    for step in (1, 2):
        write_checkpoint(states(step), path)
    with pytest.raises(OSError, match="No space left on device"):
        write_checkpoint(states(3, size=200_000), path)
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "previous.ckpt"]
    assert [read_checkpoint(folder / name)["global_step"] for name in ("last.ckpt", "previous.ckpt")] == [2, 1]


def test_every_damage_is_noticed_that_changes_anything(tmp_path):
    """Any byte inverted, or the file cut off anywhere: it is refused, or what is read is what was written."""
    path = tmp_path / "last.ckpt"
    write_checkpoint(states(1, size=20), path)
    whole = path.read_bytes()
    refused = 0
    for place in range(0, len(whole), 3):
        for damaged in (bytes([*whole[:place], whole[place] ^ 0xFF, *whole[place + 1 :]]), whole[:place]):
            path.write_bytes(damaged)
            try:
                checkpoint = read_checkpoint(path)
            except DamagedCheckpointError:
                refused += 1
            else:
                assert len(damaged) == len(whole)
                assert not differences(checkpoint, states(1, size=20))
    assert refused > len(whole) / 3
    write_checkpoint(states(1), path)
    interrupted.flip_a_bit(path)
    torch.load(path, weights_only=True)  # notices nothing
    with pytest.raises(DamagedCheckpointError, match="has another checksum or kind than when it was written"):
        read_checkpoint(path)


def test_what_is_not_damaged_but_brings_code_is_not_passed_over(tmp_path):
    evil, good = tmp_path / "last.ckpt", tmp_path / "previous.ckpt"
    torch.save(states(2) | {"callbacks": Path}, evil)
    write_checkpoint(states(1), good)
    with pytest.raises(UserError, match="is not loaded: it names pathlib") as error:
        newest_whole([evil, good])
    assert not isinstance(error.value, DamagedCheckpointError)


def config(folder, **values):
    return OmegaConf.create({"run_dir": str(folder), "ckpt_path": None, "overwrite": False} | values)


def test_auto_takes_the_newest_whole_one_or_starts_anew(tmp_path):
    assert find_start(config(tmp_path, ckpt_path="auto")) is None
    last, previous = (tmp_path / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt"))
    for step in (1, 2):
        write_checkpoint(states(step), last)
    for given in ("auto", "last", tmp_path):
        start = find_start(config(tmp_path, ckpt_path=str(given)))
        assert (start.path, start.step, start.same_run) == (last, 2, True)
    told = []
    last.write_bytes(last.read_bytes()[:-100])
    start = find_start(config(tmp_path, ckpt_path="auto"), warn=told.append)
    assert (start.path, start.step, start.same_run) == (previous, 1, True)
    assert len(told) == 1
    with pytest.raises(DamagedCheckpointError):  # the user has asked for this one
        find_start(config(tmp_path, ckpt_path=str(last)))
    previous.unlink()
    for overwrite in (False, True):  # starting anew would lose weeks
        with pytest.raises(DamagedCheckpointError, match="its end is missing after "):
            find_start(config(tmp_path, ckpt_path="auto", overwrite=overwrite))


def test_a_best_checkpoint_without_a_last_one_is_not_overwritten_silently(tmp_path):
    """As after a crash in the middle of the first epoch, or when somebody has made room."""
    best = tmp_path / "checkpoints" / "best.ckpt"
    write_checkpoint(states(3), best)
    for values, count in (({"ckpt_path": "auto"}, 1), ({}, 1), ({"overwrite": True}, 0)):
        told = []
        assert find_start(config(tmp_path, **values), warn=told.append) is None
        assert len(told) == count
    assert find_start(config(tmp_path, ckpt_path=str(best))).step == 3


def test_of_two_jobs_in_a_run_folder_the_one_started_last_goes_on(tmp_path):
    """A scheduler may start a job again on other nodes while it cannot reach the ones that still run it."""
    path = tmp_path / "last.ckpt"
    old, new = DurableCheckpointIO(), DurableCheckpointIO()
    for job, step in ((old, 1), (old, 2), (new, 3), (new, 4)):
        job.save_checkpoint(states(step), path)
        assert job.failure is None
    old.save_checkpoint(states(5), path)
    assert old.failure == f"{path}: another job has written it since this one has; this one ends, and that one goes on"
    path.unlink()  # what is not there is nobody's
    for step in (5, 6):
        new.save_checkpoint(states(step), path)
    assert new.failure is None
    assert [load(tmp_path / name)["global_step"] for name in ("last.ckpt", "previous.ckpt")] == [6, 5]


def test_what_torchrun_starts_again_goes_on_whatever_it_was_told(tmp_path, monkeypatch):
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    other = tmp_path / "other.ckpt"
    write_checkpoint(states(1), other)
    monkeypatch.setenv(RUN_STAMP_VARIABLE, "now")
    settings = [{}, {"ckpt_path": str(other)}, {"overwrite": True}, {"ckpt_path": str(other), "overwrite": True}]
    for values in settings:
        assert checkpoints_to_try(config(last.parents[1], **values), again=True) == checkpoints_to_try(
            config(last.parents[1], **values), again=False
        )
    write_checkpoint(states(5) | {"run": "now"}, last)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    for values in settings:
        assert find_start(config(last.parents[1], **values)).path == last
    # Those of the run that is to be overwritten are not this run's.
    write_checkpoint(states(5) | {"run": "yesterday"}, last)
    assert find_start(config(last.parents[1], overwrite=True)) is None
    assert find_start(config(last.parents[1], overwrite=True, ckpt_path=str(other))).path == other
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    with pytest.raises(UserError, match="has a run whose checkpoints would be lost"):
        find_start(config(last.parents[1]))


def _agreed(folder, hidden, late):
    """The step to go on from, or what is wrong, and the warnings; with a file system of its own over ``hidden``."""
    start_module._LATE_FILE_S = late
    if hidden is not None:
        if ctypes.CDLL(None).unshare(0x00020000) != 0:  # CLONE_NEWNS
            return None, []
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(hidden)], check=True)
    told = []
    try:
        start, _ = start_module.agree_on_start(config(folder, ckpt_path="auto"), told.append)
        return start.step, told
    except UserError as error:
        return str(error), told
    finally:
        if hidden is not None:
            subprocess.run(["umount", str(hidden)], check=True)


def test_processes_agree_and_one_reads_for_all(processes, tmp_path):
    for step in (1, 2):
        write_checkpoint(states(step), tmp_path / "checkpoints" / "last.ckpt")
    interrupted.flip_a_bit(tmp_path / "checkpoints" / "last.ckpt")
    (first, told), (second, nothing) = processes(2).run(_agreed, tmp_path, None, 10.0)
    assert (first, second) == (1, 1)
    assert (len(told), nothing) == (1, [])


@pytest.mark.parametrize("written_by", ["process 0 here", "process 0 when it was on the other machine"])
def test_machines_that_share_no_folder_are_told(processes, tmp_path, written_by):
    write_checkpoint(states(1), tmp_path / "mine" / "checkpoints" / "last.ckpt")
    mine, empty = tmp_path / "mine", tmp_path / "empty"
    if written_by == "process 0 here":
        if os.geteuid() != 0:
            pytest.skip("only root can give a process a file system of its own")
        arguments = [(mine, None), (mine, mine)]
    else:
        arguments = [(empty, None), (mine, None)]
    answers = processes(2).run(_agreed, 0.2, per_rank=arguments)
    (message,) = {answer for answer, _ in answers}
    assert message.startswith("run_dir: process 1 on ")
    assert "give a folder that all machines share, since process 0 alone writes checkpoints" in message


def test_a_step_count_that_cannot_be_is_told():
    for value in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="every_n_steps must be a whole number of at least 1, or null"):
            LastCheckpoint("last.ckpt", value)


class SignalsItself(Callback):
    def on_train_batch_start(self, *_):
        os.kill(os.getpid(), signal.SIGUSR1)


def train(folder, *callbacks, **arguments):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(accelerator="cpu", max_epochs=2, callbacks=list(callbacks), **(quiet | arguments))
    install(trainer)
    trainer.fit(Draws())


@pytest.mark.filterwarnings("ignore")
def test_the_schedulers_warning_saves_as_well(tmp_path):
    stop = GracefulStop(str(tmp_path / "last.ckpt"))
    before = signal.getsignal(signal.SIGUSR1)
    try:
        with pytest.raises(SystemExit):
            train(tmp_path, stop, SignalsItself(), enable_checkpointing=False)
    finally:
        signal.signal(signal.SIGUSR1, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert stop.signal == signal.SIGUSR1
    assert load(tmp_path / "last.ckpt")["global_step"] == 1


@pytest.mark.filterwarnings("ignore")
def test_a_run_that_starts_over_leaves_nothing_of_the_one_before(tmp_path):
    """Else a later crash would go on from there."""
    for name in ("last.ckpt", "previous.ckpt", ".last.ckpt.0123.partial"):
        write_checkpoint(states(7), tmp_path / name)
    seen = []

    class Look(Callback):
        def on_train_batch_start(self, *_):
            seen.append(sorted(path.name for path in tmp_path.iterdir()))

    train(tmp_path, Look(), LastCheckpoint(str(tmp_path / "last.ckpt"), every_n_steps=2))
    assert seen == [[], [], ["last.ckpt"], *[["last.ckpt", "previous.ckpt"]] * 2, ["last.ckpt", "previous.ckpt"]]
    assert [load(tmp_path / name)["global_step"] for name in ("last.ckpt", "previous.ckpt")] == [6, 5]


def rows(path):
    with path.open(newline="") as file:
        return [(int(row["step"]), {k: v for k, v in row.items() if v and k != "step"}) for row in csv.DictReader(file)]


def test_rows_of_a_continued_run_go_on_in_their_file(tmp_path):
    path = tmp_path / "csv" / "version_0" / "metrics.csv"
    first = CSVLogger(tmp_path, "csv")
    first.continue_from(None)
    for step in range(5):
        first.log_metrics({"loss": torch.tensor(step / 2)}, step)
    first.save()
    with path.open("a") as file:
        file.write("0.")  # killed in the middle of a row
    second = CSVLogger(tmp_path, "csv")
    second.continue_from(3)
    second.log_metrics({"loss": 1.5, "miou": 0.25}, 3)  # a column that was not there before
    second.save()
    kept = [(step, {"loss": str(step / 2)}) for step in range(3)]
    assert rows(path) == [*kept, (3, {"loss": "1.5", "miou": "0.25"})]
    other = CSVLogger(tmp_path, "csv")  # another run in this folder, with overwrite=true
    other.continue_from(None)
    other.log_metrics({"loss": 9.0}, 0)
    other.finalize("success")
    assert rows(tmp_path / "csv" / "version_1" / "metrics.csv") == [(0, {"loss": "9.0"})]
    assert len(rows(path)) == 4


def test_rows_wait_for_room_on_the_disk(mount):
    logger = CSVLogger(mount, "csv")
    logger.continue_from(None)
    logger.log_metrics({"loss": 1.0}, 0)
    logger.save()
    rubbish = mount / "rubbish_of_rows"
    interrupted.fill(rubbish)
    path = Path(logger.log_dir, "metrics.csv")
    with pytest.warns(UserWarning, match="could not be written: No space left on device.*rows are kept"):
        _log_a_thousand_rows(logger)
    assert path.read_bytes().endswith(b"\n")
    assert len(rows(path)) < 1000
    logger.save()  # says it once
    rubbish.unlink()
    logger.save()
    assert [step for step, _ in rows(path)] == list(range(1000))


def _log_a_thousand_rows(logger):
    for step in range(1, 1000):
        logger.log_metrics({"loss": 2.0}, step)


def test_equal_checkpoints_have_equal_fingerprints(tmp_path):
    paths = [tmp_path / f"{i}.ckpt" for i in range(3)]
    for path, step in zip(paths, (1, 1, 2), strict=True):
        write_checkpoint(states(step), path)
    assert fingerprint(paths[0]) == fingerprint(paths[1]) != fingerprint(paths[2])
    paths[0].write_bytes(paths[0].read_bytes()[:500])
    assert fingerprint(paths[0]) is None is fingerprint(tmp_path / "nothing")
    assert zipfile.is_zipfile(paths[1])


@pytest.mark.parametrize("command", [line for block in blocks("docs/recovery.md", "sh") for line in block.splitlines()])
def test_every_command_of_the_page_composes(command):
    check(compose_config(command.split()[1:]))
