"""The study, tiny, from its command to its pictures: real training jobs of one and two processes."""

import csv
import json
import shutil
import subprocess

import pytest
import torch
from jobs import REPOSITORY, Job, environment
from PIL import Image
from torch.nn.parallel import DistributedDataParallel

from syncbn.training.data import DigitScenesDataModule
from syncbn.training.errors import UserError
from syncbn.training.models import UNet
from syncbn.training.study.losses import MeanOverImages
from syncbn.training.study.plan import Run, plan
from syncbn.training.study.results import Row, is_done, read_rows, table, write_rows
from syncbn.training.tasks.losses import CrossEntropyDiceLoss

STUDY_SH = REPOSITORY / "launch" / "study.sh"
REFERENCE, LOCAL, SYNC = "seed0-batch8-local", "seed0-batch4-local", "seed0-batch4-sync"


def run(command, cwd):
    job = Job(command, cwd)
    job.finish(300)
    return job


def row(**changes):
    values = {"seed": 0, "batch": 4, "processes": 2, "norm": "sync", "statistics": "running", "miou": 0.5}
    values |= {"val_loss": 1.25, "steps": 4, "images": 32, "seconds": 9.5, "torch": "2.15.0", "commit": "abc"}
    return Row(**(values | changes))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A study whose first run could not be made, and that Ctrl-C ended in its third."""
    cwd = tmp_path_factory.mktemp("study")
    in_the_way = cwd / "out" / "runs" / REFERENCE
    in_the_way.parent.mkdir(parents=True)
    in_the_way.write_text("")
    job = Job([str(STUDY_SH), "--quick", "--out", "out"], cwd)
    job.wait_for(f"[2/3] {LOCAL}  mIoU", timeout=200)
    job.interrupt()
    job.finish(60)
    rows = read_rows(cwd / "out" / "results.csv")
    in_the_way.unlink()
    return job, rows, cwd


@pytest.fixture(scope="module")
def finished(interrupted):
    """The same command again, to the end."""
    _, _, cwd = interrupted
    return run([str(STUDY_SH), "--quick", "--out", "out"], cwd), cwd / "out"


def test_a_run_that_fails_is_named_and_the_study_goes_on(interrupted):
    job, _, _ = interrupted
    assert job.lines[0].startswith(f"[1/3] {REFERENCE}  FAILED: FileExistsError")
    assert job.lines[1].startswith(f"[2/3] {LOCAL}  mIoU running 0.")


def test_ctrl_c_leaves_whole_rows(interrupted):
    job, rows, _ = interrupted
    assert job.process.returncode == 130
    assert job.lines[-1] == "interrupted; the same command goes on where it was\n"
    assert "Traceback" not in job.output + job.error_output
    assert [(row.batch, row.norm, row.statistics) for row in rows] == [
        (4, "local", "running"),
        (4, "local", "population"),
    ]


def test_the_same_command_makes_what_is_missing_and_nothing_else(interrupted, finished):
    _, before, _ = interrupted
    job, out = finished
    assert job.process.returncode == 0, job.output + job.error_output
    assert job.lines[0].startswith("1 of 3 runs are in ")
    assert [line.split("  ")[0] for line in job.lines[1:3]] == [f"[1/2] {REFERENCE}", f"[2/2] {SYNC}"]
    rows = read_rows(out / "results.csv")
    assert [row for row in rows if (row.batch, row.norm) == (4, "local")] == before
    assert {(row.batch, row.processes, row.norm, row.statistics) for row in rows} == {
        (batch, processes, norm, statistics)
        for batch, processes, norm in ((8, 1, "local"), (4, 2, "local"), (4, 2, "sync"))
        for statistics in ("running", "population")
    }
    for each in rows:
        assert 0 <= each.miou <= 1
        assert each.val_loss > 0
        assert (each.steps, each.images) == (4, 32)
        assert each.seconds > 1
        assert each.torch == torch.__version__


def test_synchronized_training_is_that_of_one_process(finished):
    """Initial weights, scenes, steps and loss are the same, so that nothing but rounding is left; of local, more is."""
    _, out = finished
    one, local, sync = (
        torch.load(out / "runs" / name / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for name in (REFERENCE, LOCAL, SYNC)
    )
    differences = [
        torch.cat([(other[key] - one[key]).double().flatten() for key in one]).square().mean().sqrt().item()
        for other in (sync, local)
    ]
    # AdamW takes a full step wherever a gradient's sign is a matter of rounding, so that a few weights differ.
    assert differences[0] < differences[1] / 20
    losses = {(row.batch, row.norm): row.val_loss for row in read_rows(out / "results.csv")}
    assert losses[4, "sync"] == pytest.approx(losses[8, "local"], abs=3e-4)
    assert losses[4, "local"] != pytest.approx(losses[8, "local"], abs=6e-4)


def test_recalibration_is_of_the_same_weights(finished):
    """The rows equal what the last checkpoint gives in a model of its own, its population counted by hand."""
    _, out = finished
    state = torch.load(out / "runs" / SYNC / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    model = UNet(11, widths=(4, 8)).eval()
    model.load_state_dict({key.removeprefix("model."): v for key, v in state.items() if key.startswith("model.")})
    scenes = {"image_size": 64, "digits": (3, 5), "digit_size": (20, 28)}
    data = DigitScenesDataModule(train_size=16, val_size=8, batch_size=8, **scenes)
    validation = [data.val_set[i] for i in range(8)]
    found = [loss_of(model, validation)]
    set_population(model, [batch["image"] for batch in data.train_dataloader()])
    found.append(loss_of(model.eval(), validation))
    rows = {row.statistics: row for row in read_rows(out / "results.csv") if row.norm == "sync"}
    assert found == pytest.approx([rows["running"].val_loss, rows["population"].val_loss], abs=1e-4)
    assert abs(found[0] - found[1]) > 0.01


def set_population(model, images):
    inputs = {}
    for layer in model.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda layer, args: inputs.setdefault(layer, []).append(args[0]))
    with torch.no_grad():
        for batch in images:
            model.train()((batch - 0.5) / 0.25)
    for layer, found in inputs.items():
        x = torch.cat(found).transpose(0, 1).flatten(1)
        layer.running_mean.copy_(x.mean(1))
        layer.running_var.copy_(x.var(1))


def loss_of(model, scenes):
    loss = CrossEntropyDiceLoss()
    with torch.no_grad():
        return sum(
            loss(model((scene["image"][None] - 0.5) / 0.25), scene["semantic"][None]).item() for scene in scenes
        ) / len(scenes)


def test_the_table_says_what_was_found(finished):
    job, out = finished
    text = (out / "table.md").read_text()
    assert text in job.output
    rows = read_rows(out / "results.csv")
    of_sync = [f"{row.miou:.3f}" for row in rows if row.norm == "sync"]
    assert next(line for line in text.splitlines() if line.startswith("| 4 | 2 |")).endswith(
        f"| {' | '.join(of_sync)} |"
    )


def test_the_pictures_show_something(finished):
    _, out = finished
    for name in ("miou.png", "strays.png"):
        with Image.open(out / name) as picture:
            assert picture.format == "PNG"
            assert min(picture.size) > 400
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


def test_strays_were_measured_at_every_step_of_every_run(finished):
    _, out = finished
    for name, apart in ((REFERENCE, False), (LOCAL, True), (SYNC, True)):
        with (out / "runs" / name / "strays.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["step"] for row in rows if row["layer"] == "model.down.0.0.norm"] == list("0123")
        assert len(rows) == 4 * 6
        assert {row["values"] for row in rows if row["layer"].startswith("model.down.0")} == {"32768"}  # 8 · 64 · 64
        assert all((float(row["mean_stray"]) > 0) == apart for row in rows)
        assert all((float(row["var_stray"]) > 0) == apart for row in rows)


def test_measuring_strays_changes_no_bit_of_a_distributed_run(finished, tmp_path):
    _, out = finished
    overrides = ["model.widths=[4,8]", "data.train_size=16", "trainer.max_epochs=2", "data.batch_size=4"]
    command = [
        str(REPOSITORY / "launch" / "train.sh"),
        "experiment=study",
        *overrides,
        "trainer.devices=2",
        "run_dir=run",
    ]
    job = run([*command, "callbacks.strays=null"], tmp_path)
    assert job.process.returncode == 0, job.output + job.error_output
    assert not (tmp_path / "run" / "strays.csv").exists()
    without, measured = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (tmp_path / "run", out / "runs" / SYNC)
    )
    assert all(torch.equal(without[key], measured[key]) for key in measured)


def test_failures_end_with_status_1(finished):
    """Every run of a second seed is in the way of a file; those of the first are skipped."""
    _, out = finished
    before = (out / "results.csv").read_bytes()
    for each in plan(2, (4, 8))[3:]:
        (out / "runs" / each.name).write_text("")
    job = run([str(STUDY_SH), "--quick", "--out", str(out), "--seeds", "2"], out)
    assert job.process.returncode == 1
    assert job.error_output == "failed: seed1-batch8-local, seed1-batch4-local, seed1-batch4-sync\n"
    assert (out / "results.csv").read_bytes() == before


def test_a_job_that_fails_says_why(tmp_path):
    job = run([str(STUDY_SH), "--quick", "--batches", "8", "--", "optimizer.lr=-1"], tmp_path)
    assert job.process.returncode == 1
    assert "FAILED: exit status 2: error: optimizer" in job.output
    assert not (tmp_path / "runs" / "study" / "results.csv").exists()


def test_another_study_in_the_same_folder_is_refused(tmp_path):
    (tmp_path / "study.json").write_text(json.dumps({"overrides": [], "val_size": 400}))
    job = run([str(STUDY_SH), "--quick", "--out", "."], tmp_path)
    assert job.process.returncode == 2
    assert job.error_output.startswith(f"error: {tmp_path} holds a study with ")
    assert job.error_output.count("\n") == 1


# ---- without any job


def test_the_plan_holds_the_global_batch_fixed():
    runs = plan(3, (1, 2, 4, 8))
    assert len(runs) == len(set(runs)) == 3 * 7
    assert {run.batch * run.processes for run in runs} == {8}
    assert [run.name for run in runs if run.processes == 1] == [f"seed{seed}-batch8-local" for seed in range(3)]
    assert [run.images_seen_by_a_layer for run in (Run(0, 1, "local"), Run(0, 1, "sync"))] == [1, 8]


def test_rows_survive_the_file(tmp_path):
    path = tmp_path / "results.csv"
    rows = [row(), row(statistics="population", miou=0.625)]
    assert read_rows(path) == []
    write_rows(path, rows)
    assert read_rows(path) == rows
    assert is_done(Run(0, 4, "sync"), rows)
    assert not is_done(Run(0, 4, "sync"), rows[:1])
    assert not is_done(Run(1, 4, "sync"), rows)
    path.write_text("seed,batch\n0,eight\n")
    with pytest.raises(UserError, match="does not hold a study's rows"):
        read_rows(path)


def test_the_table_has_mean_and_standard_deviation():
    rows = [row(seed=seed, miou=miou) for seed, miou in enumerate((0.4, 0.5, 0.6))]
    assert "| 4 | 2 | – | – | 0.500 ± 0.100 | – |" in table(rows)


def test_the_loss_does_not_depend_on_how_a_batch_is_spread():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(4, 5, 8, 8, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 5, (4, 8, 8), generator=generator)
    target[0] = 0  # an image without anything on it
    spread = [(scores[i : i + 2], target[i : i + 2]) for i in (0, 2)]
    per_image, plain = MeanOverImages(CrossEntropyDiceLoss()), CrossEntropyDiceLoss()
    assert torch.stack([per_image(*part) for part in spread]).mean().item() == pytest.approx(
        per_image(scores, target).item(), rel=1e-12
    )
    assert torch.stack([plain(*part) for part in spread]).mean().item() != pytest.approx(
        plain(scores, target).item(), rel=1e-3
    )


def running_means_of_two_steps(first, second):
    """On one of two processes, whose batches in two steps of local normalization have these means."""
    model = DistributedDataParallel(torch.nn.BatchNorm1d(1))
    means = []
    for mean in (first, second):
        model(torch.tensor([[mean - 1], [mean + 1]])).sum().backward()
        means.append(round(model.module.running_mean.item(), 6))
    return means


def test_a_local_runs_running_statistics_are_the_first_processs(processes):
    """As docs/study.md says: each step begins with the first process's; what the others have measured is lost."""
    of_first, of_second = processes(2).run(running_means_of_two_steps, per_rank=[(10.0, 20.0), (30.0, 40.0)])
    assert of_first == [1.0, 0.9 * 1 + 0.1 * 20]
    assert of_second == [3.0, 0.9 * 1 + 0.1 * 40]


def test_the_script_is_clean():
    shellcheck = shutil.which("shellcheck", path=environment()["PATH"])
    assert shellcheck is not None
    subprocess.run([shellcheck, str(STUDY_SH)], check=True)


def test_the_command_explains_itself(tmp_path):
    job = run([str(STUDY_SH), "--help"], tmp_path)
    assert job.process.returncode == 0
    assert "launch/study.sh" in job.output
    assert "--quick" in job.output
