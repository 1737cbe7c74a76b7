"""docs/train.md: its commands are commands, and its options exist."""

import re
import shlex
from importlib import import_module

import pytest
from documentation import ROOT, blocks
from hydra.utils import instantiate
from omegaconf import OmegaConf

from syncbn.training.config import check, compose_config
from syncbn.training.errors import UserError
from syncbn.training.start import checkpoints_to_try

PAGE = "docs/train.md"
COMMANDS = [
    shlex.split(line, comments=True) for block in blocks(PAGE, "sh") for line in block.splitlines() if line.strip()
]
JOBS = [command[1:] for command in COMMANDS if command[0] == "launch/train.sh"]
MODULES = [command[2:] for command in COMMANDS if command[:2] == ["python", "-m"]]
TABLE = re.findall(r"^\| (`.+?`) \|", (ROOT / PAGE).read_text().partition("## What to set")[2], re.MULTILINE)


def test_the_ten_commands_are_ten():
    assert len(blocks(PAGE, "sh")[0].strip().splitlines()) == 10
    assert len(JOBS) >= 4
    assert len(MODULES) >= 5


@pytest.mark.parametrize("arguments", JOBS, ids=" ".join)
def test_every_training_command_composes(arguments, monkeypatch):
    overrides = [argument for argument in arguments if not argument.startswith(("ckpt_path=", "--cfg", "job"))]
    check(compose_config(overrides))
    for argument in arguments:
        if argument.startswith("ckpt_path="):  # a run's folder, which the command before has made
            with pytest.raises(UserError, match="ckpt_path: there is no file"):
                checkpoints_to_try(compose_config([*overrides, argument]))


@pytest.mark.parametrize("command", MODULES, ids=" ".join)
def test_every_other_command_has_these_arguments(command):
    module = import_module(command[0])
    keys = [argument.partition("=")[0] for argument in command[1:]]
    if command[0] == "syncbn.training.prepare":
        assert {key for key in keys if key.startswith("--")} <= {"--format"}
        return
    assert set(keys) <= set(module._ARGUMENTS)


@pytest.mark.parametrize("cell", TABLE)
def test_every_option_of_the_table_exists(cell):
    detector = "trainable_backbone_layers" in cell
    base = ["experiment=coco-fcos", "imagenet=null"] if detector else ["data=folders", "model=deeplabv3_resnet50"]
    for option in re.findall(r"`(.+?)`", cell):
        for part in option.split(" "):
            override = f"{part}auto" if part.endswith("=") else part
            check(compose_config([*base, "data.train.root=mine", override]))


def test_another_detector_of_torchvisions_builds():
    (text,) = blocks(PAGE, "yaml")
    cfg = OmegaConf.merge(OmegaConf.create(text), {"num_classes": 3})
    model = instantiate(cfg.model)
    assert model.roi_heads.box_predictor.cls_score.out_features == 3
