"""The whole job, started as a user starts it: launch/train.sh with two processes, and what it leaves."""

import csv
import fcntl
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time

import pytest
import torch
from jobs import TINY, TRAIN_SH, Job, environment, run_job
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CHECKPOINT = "checkpoints/last.ckpt"
ONE_PROCESS = [sys.executable, "-m", "syncbn.training.train", "norm=local"]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    cwd = tmp_path_factory.mktemp("tiny")
    job = run_job([str(TRAIN_SH), *TINY], cwd)
    assert job.process.returncode == 0, job.output + job.error_output
    return job, cwd


@pytest.fixture(scope="module")
def interrupted_run(tmp_path_factory):
    """A run that Ctrl-C ended in its second epoch or later; and the addresses it listened on meanwhile."""
    cwd = tmp_path_factory.mktemp("interrupted")
    job = Job([str(TRAIN_SH), *TINY, "trainer.max_epochs=2000"], cwd)
    job.wait_for("epoch 1/2000")
    addresses = job.listening_addresses()
    job.interrupt()
    job.finish()
    return job, cwd, addresses


@pytest.fixture(scope="module")
def run_dir(tiny_run):
    _, cwd = tiny_run
    (folder,) = (cwd / "runs" / "digits-seg").iterdir()  # one for all processes
    return folder


def load(path):
    return torch.load(path, weights_only=True, map_location="cpu")


def test_the_run_folder_holds_what_was_promised(run_dir):
    for name in ("config.yaml", "checkpoints/best.ckpt", CHECKPOINT):
        assert (run_dir / name).stat().st_size > 0
    for name in ("predictions.png", "curves.png"):
        with Image.open(run_dir / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 200
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50  # something is drawn


def test_the_saved_configuration_is_resolved(run_dir):
    text = (run_dir / "config.yaml").read_text()
    assert "${" not in text
    cfg = OmegaConf.create(text)
    assert cfg.trainer.devices == 2
    assert cfg.run_dir == str(run_dir)


def test_the_csv_log_has_every_epoch(run_dir):
    with (run_dir / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    epochs = [row for row in rows if row["val/miou"]]
    assert len(epochs) == 2
    for row in epochs:
        assert 0 <= float(row["val/miou"]) <= 1
        assert float(row["val/loss"]) > 0
    assert sum(bool(row["train/loss"]) for row in rows) == 2


def test_the_tensorboard_log_has_every_epoch(run_dir):
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("train/loss")) == 2
    assert {"val/loss", "val/miou", "val/iou/background"} <= set(events.Tags()["scalars"])


def test_only_rank_0_speaks_and_in_plain_lines(tiny_run, run_dir):
    job, _ = tiny_run
    assert job.output.count("2 processes on cpu") == 1
    assert [line.split()[1] for line in job.lines if line.startswith("epoch")] == ["1/2", "2/2"]
    assert all("loss" in line and "mIoU" in line for line in job.lines if line.startswith("epoch"))
    assert len([line for line in job.lines if re.match(r" miou +\d\.\d{4}$", line)]) == 1
    assert len([line for line in job.lines if re.match(r" iou/9 +\d\.\d{4}$", line)]) == 1
    assert not re.search(r"[\r\x1b]", job.output + job.error_output)
    assert f"runs/digits-seg/{run_dir.name}" in job.output
    assert not job.error_output, job.error_output


def test_checkpoints_fit_the_ordinary_model(run_dir):
    """A checkpoint outlives the way it was trained: the state_dict is that of plain BatchNorm layers."""
    from syncbn.training.models import UNet

    state = load(run_dir / "checkpoints" / "best.ckpt")["state_dict"]
    weights = {k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")}
    UNet(11, widths=(4, 8)).load_state_dict(weights, strict=True)
    assert weights["down.0.0.norm.num_batches_tracked"] > 0


def test_mean_iou_is_that_of_all_pixels_of_both_processes(run_dir):
    """Counted by hand, in one process, on the five validation scenes; the sampler had to repeat one."""
    from syncbn.training.data import DigitScenes
    from syncbn.training.models import UNet

    state = load(run_dir / CHECKPOINT)["state_dict"]
    model = UNet(11, widths=(4, 8)).eval()
    model.load_state_dict({k.removeprefix("model."): v for k, v in state.items() if k.startswith("model.")})
    scenes = [DigitScenes("val", 5)[i] for i in range(5)]
    with torch.no_grad():
        predicted = torch.stack([model((scene["image"][None] - 0.5) / 0.25)[0].argmax(0) for scene in scenes])
    truth = torch.stack([scene["semantic"] for scene in scenes])
    ious = []
    for category in range(11):
        either = (predicted == category) | (truth == category)
        if either.any():
            ious.append(((predicted == category) & (truth == category)).sum() / either.sum())
    with (run_dir / "csv" / "version_0" / "metrics.csv").open() as file:
        *_, logged = [row["val/miou"] for row in csv.DictReader(file) if row["val/miou"]]
    assert float(logged) == pytest.approx(torch.stack(ious).mean().item(), abs=1e-4)


def test_resuming_at_the_end_of_an_epoch_tells_no_epoch_twice(run_dir, tiny_run):
    _, cwd = tiny_run
    more = ["trainer.max_epochs=3", f"ckpt_path={run_dir}", "run_dir=longer", "logger=none"]
    job = run_job([*ONE_PROCESS, *TINY, *more], cwd)
    assert job.process.returncode == 0, job.output + job.error_output
    assert [line.split()[1] for line in job.lines if line.startswith("epoch")] == ["3/3"]
    assert not (cwd / "longer" / "csv").exists()
    history = next(s["history"] for n, s in load(cwd / "longer" / CHECKPOINT)["callbacks"].items() if n == "Curves")
    assert len({row["step"] for row in history}) == len(history) == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=-1", "error: optimizer: Invalid learning rate: -1"),
        ("scheduler.warmup=2", "error: scheduler: warmup must be a fraction from 0 to 1, got 2"),
        ("model.widths=[4,8,16]", "does not fit the model"),
    ],
)
def test_what_only_the_built_objects_refuse(run_dir, tmp_path, override, message):
    job = run_job([*ONE_PROCESS, *TINY, f"ckpt_path={run_dir}", override], tmp_path)
    assert job.process.returncode == 2
    assert message in job.error_output
    assert job.error_output.count("\n") == 1, job.error_output


def test_ctrl_c_leaves_a_checkpoint_and_says_how_to_go_on(interrupted_run):
    job, cwd, _ = interrupted_run
    assert job.process.returncode == 128 + signal.SIGINT
    (folder,) = (cwd / "runs" / "digits-seg").iterdir()
    (line,) = [line for line in job.lines if line.startswith("interrupted after step")]
    assert load(folder / CHECKPOINT)["global_step"] == int(line.split()[3].rstrip(":"))
    assert f"continue with the same command and ckpt_path=last run_dir=runs/digits-seg/{folder.name}" in job.output
    assert "Traceback" not in job.output + job.error_output


def test_nothing_listens_beyond_this_machine(interrupted_run):
    _, _, addresses = interrupted_run
    assert addresses == {"127.0.0.1"}


def test_last_continues_the_newest_run(interrupted_run):
    _, cwd, _ = interrupted_run
    (folder,) = (cwd / "runs" / "digits-seg").iterdir()
    before = load(folder / CHECKPOINT)
    steps = before["global_step"] + 6  # more than an epoch
    longer = ["ckpt_path=last", "trainer.max_epochs=-1", f"trainer.max_steps={steps}"]
    job = run_job([str(TRAIN_SH), *TINY, *longer], cwd)
    assert job.process.returncode == 0, job.output + job.error_output
    assert f"continuing from: runs/digits-seg/{folder.name}/{CHECKPOINT}" in job.output
    (new,) = set((cwd / "runs" / "digits-seg").iterdir()) - {folder}
    after = load(new / CHECKPOINT)
    assert after["global_step"] == steps
    assert after["lr_schedulers"][0]["last_epoch"] == steps
    assert after["epoch"] > 0
    # The old run is as it was, and the new one's course goes on from its.
    assert load(folder / CHECKPOINT)["global_step"] == before["global_step"]
    histories = [
        next(state["history"] for name, state in checkpoint["callbacks"].items() if name == "Curves")
        for checkpoint in (before, after)
    ]
    assert histories[1][: len(histories[0])] == histories[0]
    assert len(histories[1]) > len(histories[0])


def test_ctrl_c_in_validation_leaves_a_checkpoint_that_validates_anew(tmp_path):
    arguments = ["norm=local", *TINY, "data.train_size=2", "run_dir=run"]
    command = [sys.executable, "-m", "syncbn.training.train", *arguments]
    job = Job([*command, "data.val_size=100000"], tmp_path)
    job.wait_for("run folder")
    time.sleep(6)  # one step of training, then minutes of validation
    job.interrupt()
    assert job.finish() == 128 + signal.SIGINT
    assert "interrupted after step 1:" in job.output
    resumed = run_job([*command, "data.val_size=4", "ckpt_path=last"], tmp_path)
    assert resumed.process.returncode == 0, resumed.output + resumed.error_output
    # The broken-off validation is made up for, and then comes the second epoch.
    steps = [line.split()[3] for line in resumed.lines if line.startswith("epoch")]
    assert steps == ["1", "2"]
    assert all("mIoU" in line for line in resumed.lines if line.startswith("epoch"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.batchsize=1"], "error: data.batchsize: no such key. Did you mean data.batch_size?\n"),
        (["data.batch_size=0"], "error: data: batch_size must be a whole number of at least 1, got 0\n"),
        (["ckpt_path=/nothing/here.ckpt"], "error: ckpt_path: there is no file /nothing/here.ckpt\n"),
    ],
)
def test_a_mistake_ends_with_one_line(tmp_path, overrides, message):
    job = run_job([str(TRAIN_SH), *TINY, *overrides], tmp_path)
    assert job.process.returncode == 2
    assert job.error_output == message
    assert job.output == ""


def test_a_checkpoint_that_brings_code_is_refused_and_the_code_not_run(run_dir, tmp_path):
    """Beside the configuration of a real run, and within a real checkpoint."""
    checkpoint = load(run_dir / CHECKPOINT)
    checkpoint["callbacks"]["mine"] = RunsACommand(f"touch {tmp_path / 'touched'}")
    evil = tmp_path / "evil.ckpt"
    torch.save(checkpoint, evil)
    for command in ([str(TRAIN_SH), *TINY], [*ONE_PROCESS, *TINY]):
        job = run_job([*command, f"ckpt_path={evil}"], tmp_path)
        assert job.process.returncode == 2
        assert job.error_output == (
            f"error: ckpt_path: {evil} is not loaded: it names {os.name}.system, "
            "and a file that brings its own code could do anything\n"
        )
    assert not (tmp_path / "touched").exists()
    torch.load(evil, weights_only=False)  # which would have run it
    assert (tmp_path / "touched").exists()


class RunsACommand:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_summary_comes_first(tiny_run):
    job, _ = tiny_run
    told = [line.split(maxsplit=1) for line in job.lines if line.startswith("  ")]
    told = {name: value.strip() for name, value in told}
    assert told["model"] == "UNet, 1811 parameters"
    assert "6 of 6 layers synchronized over all 2 processes: 4 images in each" in job.output
    assert told["images"] == "16 for training, 5 for validation"
    assert "global batch      4 images (2 per process x 2 processes)" in job.output
    # 2 images of 96x96 and of 48x48 on each of 2 processes
    assert "9216 (layer down.1.0.norm) to 36864" in told["values"]
    assert job.output.index("values") < job.output.index("epoch 1/2")


def test_pictures_of_the_epochs(run_dir):
    assert [path.name for path in sorted((run_dir / "predictions").iterdir())] == ["epoch_002.png"]
    events = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    (image,) = events.Images("predictions")
    assert image.step == 8


def test_on_a_terminal_there_is_a_bar(tmp_path):
    """What is printed stays in lines of its own above it, and no line is longer than the terminal."""
    status, screen = on_a_terminal([str(TRAIN_SH), *TINY, "logger=none"], tmp_path, columns=80)
    assert status == 0, screen
    drawn = [strip_styles(line) for line in re.split(r"[\r\n]+", screen)]
    bars = [line for line in drawn if re.match(r"epoch \d/2 +.*\d/8", line)]
    assert any(re.search(r"8/8 loss \d+\.\d{4}  [\d.]+ images/s  0:00:\d\d left", line) for line in bars), bars
    assert max(map(len, bars)) <= 80
    (first,) = [line for line in drawn if "step 4" in line]
    assert re.fullmatch(r"epoch 1/2  step 4  loss \d\.\d+  val loss \d\.\d+  mIoU \d\.\d+  \d+\.\d s", first)


def on_a_terminal(command, cwd, columns):
    """Runs a command on a terminal of so many columns; returns its status and all that it has written there."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    variables = environment(TERM="xterm-256color") | {"COLUMNS": str(columns)}
    process = subprocess.Popen(
        command, cwd=cwd, env=variables, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    os.close(theirs)
    written = b""
    while True:
        try:
            chunk = os.read(ours, 65536)
        except OSError:  # the last process has closed it
            break
        if not chunk:
            break
        written += chunk
    os.close(ours)
    return process.wait(60), written.decode()


def strip_styles(line):
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", line)


def test_the_command_without_torchrun_reports_a_mistake_alike(tmp_path):
    command = [sys.executable, "-m", "syncbn.training.train", "trainer.precision=7", "norm=local"]
    job = run_job(command, tmp_path)
    assert job.process.returncode == 2
    assert job.error_output.startswith("error: trainer: ")
    assert job.error_output.count("\n") == 1


def test_the_launcher_passes_a_crash_on(tmp_path):
    """A crash keeps its traceback and its status; torchrun adds nothing."""
    job = run_job([str(TRAIN_SH), *TINY, "norm=local", "task.class_names=[a,b]"], tmp_path)
    assert job.process.returncode == 1
    assert "ValueError: the model must return scores [B, 2, H, W]" in job.error_output
    assert "ChildFailedError" not in job.error_output


def test_the_scripts_are_clean():
    shellcheck = shutil.which("shellcheck", path=environment()["PATH"])
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    folder = TRAIN_SH.parent
    scripts = sorted([*folder.glob("*.sh"), *folder.glob("*.sbatch")])
    assert len(scripts) == 5
    subprocess.run([shellcheck, "--external-sources", *map(str, scripts)], check=True)
