"""The command that writes digit scenes as files: what it says, what it refuses, and that what it writes is right."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from jobs import environment
from torchvision.ops import masks_to_boxes

from syncbn.training.data import DigitScenes
from syncbn.training.errors import UserError
from syncbn.training.prepare import FORMATS, Scenes, main, prepare


def test_the_command_says_what_it_wrote_and_how_to_train_on_it(tmp_path):
    out = tmp_path / "my data"
    command = [sys.executable, "-m", "syncbn.training.prepare", str(out), "--train", "2", "--val", "1"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    assert lines[0] == "2 scenes to train on, 1 to validate with, in each of:"
    for name in FORMATS:
        assert f"  {out / name}" in lines
    assert f"    train on it: launch/train.sh data=folders data.train.root='{out}/folders'" in lines


def test_a_folder_with_something_in_it_is_not_touched(tmp_path, capsys):
    theirs = tmp_path / "folders" / "thesis.tex"
    theirs.parent.mkdir()
    theirs.write_text("precious")
    (tmp_path / "coco").mkdir()  # empty: may be used
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), "--train", "1", "--val", "1"])
    assert stop.value.code == 2
    assert f"error: {theirs.parent} is there already and not empty" in capsys.readouterr().err
    assert [*tmp_path.rglob("*.*")] == [theirs]  # nothing of the other formats either


def test_an_interruption_leaves_no_half_of_a_folder(tmp_path, monkeypatch):
    def interrupted(out, split, scenes):
        FORMATS["folders"][0](out, split, scenes)
        if split == "val":
            raise KeyboardInterrupt

    monkeypatch.setitem(FORMATS, "voc", (interrupted, ""))
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), "--train", "2", "--val", "1"])
    assert stop.value.code == 130
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco", "folders"]  # which are whole
    (tmp_path / ".voc.part").mkdir()  # of a process that was killed
    (tmp_path / ".voc.part" / "scrap").touch()
    monkeypatch.undo()
    assert prepare(tmp_path, ["voc"], 2, 1) == [tmp_path / "voc"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coco", "folders", "voc"]
    assert [path.name for path in (tmp_path / "voc").iterdir() if path.name == "scrap"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "yolo"], "invalid choice: 'yolo'"),
        (["--train", "0"], "train must be at least 1 scene"),
        (["--size", "32"], "size must be at least 72"),
        (["--smallest", "100"], "smallest must be from 48 to the size of 96"),
        (["--train", "many"], "--train: invalid int value"),
    ],
)
def test_a_wrong_option_is_one_line(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path / "out"), *options])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        prepare(tmp_path / "out", ("folders",), train=1, val=1)


def test_crops_differ_in_size_and_cut_no_digit():
    assert [Scenes("val", 1, image_size=size)[0]["image"].shape[0] for size in (72, 80, 200)] == [3, 3, 3]
    originals, scenes = DigitScenes("train", 12), Scenes("train", 12)
    sizes = set()
    for original, scene in zip((originals[i] for i in range(12)), scenes, strict=True):
        height, width = scene["semantic"].shape
        sizes.add((height, width))
        assert scene["image"].shape == (3, height, width)
        assert 64 <= min(height, width) <= max(height, width) <= 96
        assert torch.equal(scene["labels"], original["labels"])
        assert torch.equal(scene["masks"].sum((1, 2)), original["masks"].sum((1, 2)))
        assert torch.equal(scene["boxes"][:, 2:] - 1, masks_to_boxes(scene["masks"])[:, 2:])
        assert torch.equal(scene["boxes"][:, :2], masks_to_boxes(scene["masks"])[:, :2])
    assert len(sizes) > 8


def test_uncropped_scenes_are_the_original_ones():
    original, scene = DigitScenes("val", 1)[0], Scenes("val", 1, smallest=96)[0]
    np.testing.assert_allclose(scene["image"] / 255, original["image"], atol=0.5 / 255 + 1e-6)
    assert torch.equal(scene["semantic"], original["semantic"])
    assert torch.equal(scene["boxes"], original["boxes"])


def test_the_same_arguments_write_the_same_files(tmp_path):
    for name in ("a", "b"):
        prepare(tmp_path / name, train=1, val=1)
    files = [file.relative_to(tmp_path / "a") for file in sorted((tmp_path / "a").rglob("*.*"))]
    assert len(files) > 12
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
