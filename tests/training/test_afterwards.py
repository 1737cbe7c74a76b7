"""evaluate, predict and export, started as a user starts them, on runs of two processes."""

import importlib
import json
import os
import subprocess
import sys

import pytest
import torch
from jobs import TINY, TRAIN_SH, Job, environment
from omegaconf import OmegaConf
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from syncbn.training.afterwards import find, override, run_config
from syncbn.training.data import DigitScenes
from syncbn.training.errors import UserError

DETECTION = [
    "task=detection",
    "model=small_fcos",
    "model.widths=[8,8,16]",
    "model.channels=32",
    "model.score_thresh=0.0",
]
DETECTION += ["data.collate=detection", "trainer=cpu", "trainer.max_epochs=1", "data.train_size=8", "data.val_size=3"]
# Outside of it nothing of this package can be imported.
WITHOUT_THE_PACKAGE = "import sys; sys.modules['syncbn'] = None\n"


def run_job(command, cwd):
    job = Job(command, cwd)
    job.finish(240)  # some of these commands are several jobs' work
    return job


def run(module, *arguments, cwd):
    return run_job([sys.executable, "-m", f"syncbn.training.{module}", *arguments], cwd)


@pytest.fixture(scope="module")
def segmenter(tmp_path_factory):
    """What a run of segmentation printed, and its folder."""
    folder = tmp_path_factory.mktemp("segmenter") / "run"
    job = run_job([str(TRAIN_SH), *TINY, f"run_dir={folder}"], folder.parent)
    assert job.process.returncode == 0, job.error_output
    return job.output, folder


@pytest.fixture(scope="module")
def detector(tmp_path_factory):
    """The folder of a run of detection with averaged weights."""
    folder = tmp_path_factory.mktemp("detector") / "run"
    job = run_job([str(TRAIN_SH), *DETECTION, "callbacks=[default,ema]", f"run_dir={folder}"], folder.parent)
    assert job.process.returncode == 0, job.error_output
    assert (folder / "predictions.png").is_file()
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three images of different kind and size, two of the same name, one of them in a folder; and a broken one."""
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    scenes = DigitScenes("val", 3)
    to_pil_image(scenes[0]["image"]).save(folder / "a.png")
    to_pil_image(scenes[1]["image"]).convert("L").resize((130, 97)).save(folder / "a.jpg")
    to_pil_image(scenes[2]["image"]).crop((0, 0, 70, 80)).save(folder / "more" / "b.png")
    (folder / "broken.jpg").write_bytes(b"nothing")
    (folder / "notes.txt").write_text("no image")
    return folder


def table_of(output):
    """The metrics of the final table: name -> text."""
    rows = [line.split() for line in output.splitlines() if line.startswith(" ") and not line.startswith("  ")]
    return {name: value for name, value in rows if name != "validation"}


def test_evaluate_finds_what_the_run_found(segmenter, tmp_path):
    output, folder = segmenter
    out = tmp_path / "result.json"
    job = run("evaluate", f"ckpt={folder}", f"out={out}", "data.num_workers=1", cwd=tmp_path)
    assert job.process.returncode == 0, job.error_output
    assert not job.error_output
    assert table_of(job.output) == table_of(output)
    result = json.loads(out.read_text())
    assert result["processes"] == 2
    assert result["checkpoint"] == str(folder / "checkpoints" / "best.ckpt")
    assert f"{result['metrics']['val/miou']:.4f}" == table_of(output)["miou"]


def test_evaluate_alone_and_with_other_batches_finds_the_same(segmenter, tmp_path):
    output, folder = segmenter
    job = run(
        "evaluate", f"ckpt={folder}/checkpoints/best.ckpt", "data.batch_size=3", "trainer.devices=1", cwd=tmp_path
    )
    assert job.process.returncode == 0, job.error_output
    expected = {name: value for name, value in table_of(output).items() if "iou" in name}
    assert {name: value for name, value in table_of(job.output).items() if "iou" in name} == expected
    assert json.loads((folder / "evaluation" / "best.json").read_text())["processes"] == 1


def test_predict_writes_masks(segmenter, images, tmp_path):
    _, folder = segmenter
    out = tmp_path / "out"
    job = run("predict", f"ckpt={folder}", f"images={images}", f"out={out}", cwd=tmp_path)
    assert job.process.returncode == 0, job.error_output
    assert job.error_output.startswith(f"skipped {images / 'broken.jpg'}: ")
    assert job.error_output.count("\n") == 1
    assert "3 images, 1 skipped" in job.output
    written = {str(path.relative_to(out)) for path in out.rglob("*.png")}
    assert written >= {"a.png.png", "a.png_classes.png", "a.jpg.png", "more/b.png", "more/b_classes.png", "legend.png"}
    with Image.open(out / "a.jpg_classes.png") as classes:
        assert classes.size == (130, 97)
        assert classes.mode == "P"
        assert set(classes.getdata()) <= set(range(11))
    results = json.loads((out / "predictions.json").read_text())
    assert [len(results["images"]), len(results["skipped"])] == [3, 1]
    for result in results["images"]:
        assert sum(result["share_of_pixels"].values()) == pytest.approx(1, abs=1e-4)


def test_predict_needs_nothing_of_the_training_data(segmenter, images, tmp_path):
    """Nor the weights that the model began with."""
    _, folder = segmenter
    copy = tmp_path / "copy"
    (copy / "checkpoints").mkdir(parents=True)
    (copy / "checkpoints" / "best.ckpt").write_bytes((folder / "checkpoints" / "best.ckpt").read_bytes())
    cfg = OmegaConf.load(folder / "config.yaml")
    cfg.data = {"_target_": "not.there.Data", "root": "/nothing"}
    OmegaConf.save(cfg, copy / "config.yaml")
    job = run("predict", f"ckpt={copy}", f"images={images / 'a.png'}", cwd=tmp_path)
    assert job.process.returncode == 0, job.error_output
    assert (copy / "predict" / "a.png").is_file()


def test_what_was_predicted_is_no_input_of_the_next_time(segmenter, images, tmp_path):
    _, folder = segmenter
    out = images / "out"
    for _ in range(2):
        job = run("predict", f"ckpt={folder}", f"images={images}", f"out={out}", cwd=tmp_path)
        assert "3 images, 1 skipped" in job.output, job.error_output


def test_export_gives_the_same_without_the_package(segmenter, tmp_path):
    """The state_dict in a model built without it, and the ONNX file, against what the trained task computes."""
    from syncbn.training.afterwards import load_trained

    _, folder = segmenter
    job = run("export", f"ckpt={folder}", f"out={tmp_path}", cwd=tmp_path)
    assert job.process.returncode == 0, job.error_output
    assert not job.error_output
    assert "weights as trained" in job.output
    image = torch.rand(3, 3, 96, 112)
    with torch.no_grad():
        scores = load_trained(str(folder)).task(image)
    torch.save({"image": image, "scores": scores}, tmp_path / "expected.pt")
    script = WITHOUT_THE_PACKAGE + (
        "import torch, onnxruntime\n"
        "expected = torch.load('expected.pt', weights_only=True)\n"
        "session = onnxruntime.InferenceSession('model.onnx')\n"
        "(found,) = session.run(None, {'image': expected['image'].numpy()})\n"
        "torch.testing.assert_close(torch.from_numpy(found), expected['scores'], rtol=1e-4, atol=1e-4)\n"
        "state = torch.load('model.pt', weights_only=True)\n"
        "assert 'down.0.0.norm.running_mean' in state and not any('model.' in key for key in state)\n"
        "assert {type(value) for value in state.values()} == {torch.Tensor}\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=environment())


def test_torchvisions_own_model_takes_the_exported_weights(tmp_path):
    """With torchvision alone, a segmentation model of its own computes what was trained here."""
    from syncbn.training.afterwards import load_trained

    folder = tmp_path / "run"
    model = ["model=lraspp_mobilenet_v3_large", "data.image_size=64", "data.digit_size=[16,32]", "data.digits=[1,2]"]
    tiny = ["data.train_size=2", "data.val_size=1", "trainer.max_epochs=1", "trainer=cpu", "logger=none"]
    command = [sys.executable, "-m", "syncbn.training.train", "norm=local", *model, *tiny, f"run_dir={folder}"]
    job = run_job(command, tmp_path)
    assert job.process.returncode == 0, job.error_output
    job = run("export", f"ckpt={folder}", f"out={tmp_path}", "onnx=False", cwd=tmp_path)
    assert job.process.returncode == 0, job.error_output
    trained = load_trained(str(folder))
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.save({"image": image, "out": trained.task.model(image)["out"]}, tmp_path / "expected.pt")
    script = WITHOUT_THE_PACKAGE + (
        "import torch\n"
        "from torchvision.models.segmentation import lraspp_mobilenet_v3_large as build\n"
        "model = build(weights=None, weights_backbone=None, num_classes=11)\n"
        "model.load_state_dict(torch.load('model.pt', weights_only=True), strict=True)\n"
        "expected = torch.load('expected.pt', weights_only=True)\n"
        "with torch.no_grad():\n"
        "    torch.testing.assert_close(model.eval()(expected['image'])['out'], expected['out'])\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=environment())


def test_a_detector_is_evaluated_predicts_and_is_exported(detector, images, tmp_path):
    job = run("evaluate", f"ckpt={detector}", f"out={tmp_path / 'r.json'}", cwd=tmp_path)
    assert job.process.returncode == 0, job.error_output
    assert "val/map" in json.loads((tmp_path / "r.json").read_text())["metrics"]

    job = run("predict", f"ckpt={detector}", f"images={images}", f"out={tmp_path}", "score=0.001", cwd=tmp_path)
    assert job.process.returncode == 0, job.error_output
    assert "averaged weights (EMA)" in job.output
    results = json.loads((tmp_path / "predictions.json").read_text())
    objects = results["images"][0]["objects"]
    assert objects
    assert [o["score"] for o in objects] == sorted((o["score"] for o in objects), reverse=True)
    assert all(1 <= o["label"] <= 10 and o["class"] == str(o["label"] - 1) for o in objects)

    job = run("export", f"ckpt={detector}", f"out={tmp_path}", cwd=tmp_path)
    assert job.process.returncode == 0, job.error_output
    assert "averaged weights (EMA)" in job.output
    script = WITHOUT_THE_PACKAGE + (
        "import numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession('model.onnx')\n"
        "image = numpy.random.default_rng(0).random((3, 96, 128), dtype=numpy.float32)\n"
        "boxes, labels, scores = session.run(None, {'image': image})\n"
        "assert boxes.shape == (len(scores), 4) and len(scores) > 0\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, env=environment())


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("predict", ["ckpt={run}", "images={run}/nowhere"], "images: there is no folder {run}/nowhere"),
        ("predict", ["ckpt={run}", "images={run}/checkpoints"], "images: no image in {run}/checkpoints"),
        ("predict", ["ckpt={run}"], "images=... is missing"),
        ("predict", ["ckpt={run}", "imags=x", "images=x"], "imags: no such key. Did you mean images?"),
        ("predict", ["ckpt={run}", "images={run}", "score=high"], "score must be such as 0.5, got 'high'"),
        ("export", ["ckpt={run}", "size=3"], "size must be such as 480x640"),
        ("export", ["{run}"], "expected key=value, such as ckpt=..."),
        ("evaluate", ["ckpt={run}", "data.batchsize=1"], "data.batchsize: no such key. Did you mean data.batch_size?"),
        ("evaluate", ["ckpt={run}", "model=unet"], "groups cannot be exchanged, only values in them"),
        ("evaluate", ["ckpt={run}", "trainer.devices=1", "model.widths=[4,4]"], "does not fit the model"),
        ("evaluate", ["ckpt=/nowhere.ckpt"], "ckpt: there is no file /nowhere.ckpt"),
    ],
)
def test_a_mistake_is_the_users(segmenter, module, arguments, message):
    _, folder = segmenter
    with pytest.raises(UserError) as error:
        main_of(module)([argument.format(run=folder) for argument in arguments])
    assert message.format(run=folder) in str(error.value)
    assert "\n" not in str(error.value)


def main_of(module):
    return importlib.import_module(f"syncbn.training.{module}").main


def test_a_mistake_ends_with_one_line(segmenter, tmp_path):
    _, folder = segmenter
    job = run("predict", f"ckpt={folder}", "images=/nowhere", cwd=tmp_path)
    assert job.process.returncode == 2
    assert job.error_output == "error: images: there is no folder /nowhere\n"


@pytest.mark.parametrize("module", ["evaluate", "predict", "export"])
def test_without_arguments_there_is_a_usage_line(monkeypatch, capsys, module):
    command = importlib.import_module(f"syncbn.training.{module}")
    monkeypatch.setattr(sys, "argv", [module])
    with pytest.raises(SystemExit, match="2"):
        command.cli()
    assert capsys.readouterr().err.startswith(f"usage: python -m syncbn.training.{module} ckpt=")


class RunsACommand:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("module", ["evaluate", "predict", "export"])
def test_a_checkpoint_that_brings_code_is_refused(segmenter, images, tmp_path, module):
    _, folder = segmenter
    evil = folder / "checkpoints" / "evil.ckpt"
    torch.save({"state_dict": {}, "loops": RunsACommand(f"touch {tmp_path / 'touched'}")}, evil)
    with pytest.raises(UserError, match=r"is not loaded: it names posix.system"):
        main_of(module)([f"ckpt={evil}", *([f"images={images}"] if module == "predict" else [])])
    assert not (tmp_path / "touched").exists()


def test_a_folder_stands_for_its_best_checkpoint_or_its_last(segmenter, tmp_path):
    _, folder = segmenter
    assert find(str(folder)).name == "best.ckpt"
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"has no checkpoints/best.ckpt or checkpoints/last.ckpt"):
        find(str(tmp_path))
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    assert find(str(tmp_path)).name == "last.ckpt"
    with pytest.raises(UserError, match="a checkpoint needs that of its run"):
        run_config(find(str(tmp_path)))


def test_an_override_reaches_the_task_as_well():
    cfg = OmegaConf.create({"model": {"a": 1}, "task": {"model": {"a": 1}}, "data": {"b": [1, 2]}})
    override(cfg, ["model.a=2", "data.b.0=5", "+data.c=x"])
    assert cfg == {"model": {"a": 2}, "task": {"model": {"a": 2}}, "data": {"b": [5, 2], "c": "x"}}
    with pytest.raises(UserError, match="no such key"):
        override(cfg, ["data.d=x"])
