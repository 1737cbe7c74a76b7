"""conf/: every option composes, and mistakes are told in one line."""

import inspect
import os
import zipfile
from pathlib import Path

import pytest
import torch
from hydra.utils import get_object
from lightning.pytorch import Trainer
from omegaconf import DictConfig, ListConfig, OmegaConf

from syncbn.training.config import check, compose_config, config_dir
from syncbn.training.environment import RUN_STAMP_VARIABLE, World, run_stamp
from syncbn.training.errors import UserError
from syncbn.training.launch import arguments_for_hydra, process_count
from syncbn.training.start import checkpoints_to_try

# Where conf/trainer departs from Lightning's defaults, and says so.
DEPARTURES = {
    "devices": 1,
    "max_epochs": 6,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "default_root_dir": "runs/digits-seg/now",
}
GROUPS = [
    "augmentation",
    "callbacks",
    "data",
    "experiment",
    "logger",
    "loss",
    "model",
    "norm",
    "optimizer",
    "scheduler",
]
GROUPS += ["task", "trainer"]
OPTIONS = [(group, path.stem) for group in GROUPS for path in sorted((config_dir() / group).glob("*.yaml"))]


@pytest.fixture(autouse=True)
def _one_stamp(monkeypatch):
    monkeypatch.setenv(RUN_STAMP_VARIABLE, "now")
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def targets(node):
    """All `_target_` under a configuration node."""
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield node._target_
        for key in node:
            yield from targets(node[key])
    elif isinstance(node, ListConfig):
        for item in node:
            yield from targets(item)


def test_every_group_is_tested():
    assert sorted(path.name for path in config_dir().iterdir() if path.is_dir()) == sorted(GROUPS)


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=[f"{group}={option}" for group, option in OPTIONS])
def test_every_option_composes_to_things_that_exist(group, option):
    cfg = compose_config([f"{group}={option}"])
    if "train" in cfg.data and OmegaConf.is_missing(cfg.data.train, "root"):
        cfg.data.train.root = "/data"  # where it is, only its owner knows
    if OmegaConf.is_missing(cfg, "imagenet"):
        cfg.imagenet = None
    check(cfg)
    for target in targets(cfg):
        get_object(target)


def test_every_trainer_argument_is_there_to_override():
    parameters = inspect.signature(Trainer.__init__).parameters
    expected = {name: p.default for name, p in parameters.items() if name != "self"} | DEPARTURES
    cfg = compose_config(["norm=local"])
    actual = {k: v for k, v in OmegaConf.to_container(cfg.trainer, resolve=True).items() if k != "_target_"}
    # Lightning's "none given" for plugins is None or an empty list.
    assert actual.pop("plugins") == []
    expected.pop("plugins")
    assert actual == expected


def test_norm_decides_the_plugins():
    assert compose_config(["norm=local"]).trainer.plugins == []
    (plugin,) = compose_config([]).trainer.plugins
    assert plugin._target_ == "syncbn.lightning.SyncBatchNormPlugin"


def test_the_named_experiment_is_the_default():
    assert compose_config(["experiment=digits-seg"]) == compose_config([])


def test_the_model_and_the_schedule_reach_the_task():
    cfg = compose_config(["model._target_=torch.nn.Identity", "scheduler=poly"])
    assert cfg.task.model._target_ == "torch.nn.Identity"
    assert cfg.task.scheduler.power == 0.9


def test_torchruns_world_becomes_devices_and_nodes(monkeypatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    cfg = compose_config([])
    assert (cfg.trainer.devices, cfg.trainer.num_nodes) == (4, 2)
    assert World.from_environment() == World(rank=5, size=8, local_size=4)


@pytest.mark.parametrize(
    ("variables", "message"),
    [({"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "2"}, "no multiple"), ({"RANK": "x"}, "whole numbers")],
)
def test_an_impossible_world_is_refused(monkeypatch, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        World.from_environment()


def test_the_stamp_is_chosen_once(monkeypatch):
    assert run_stamp() == "now"
    monkeypatch.delenv(RUN_STAMP_VARIABLE)
    assert run_stamp() == run_stamp() != "now"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.batchsize=1", "data.batchsize: no such key. Did you mean data.batch_size?"),
        ("trainer.max_epoch=1", "trainer.max_epoch: no such key. Did you mean trainer.max_epochs?"),
        ("nrom=local", "nrom: no such key. Did you mean norm?"),
        ("norm=lokal", "Could not find 'norm/lokal'; Available options in 'norm':; local; sync"),
        ("data.batch_size=[", "data.batch_size"),
        ("experiment=nothing", "nothing"),
        ("optimizer=lion", "adamw; sgd"),
    ],
)
def test_a_wrong_override_is_told_in_one_line(override, message):
    with pytest.raises(UserError) as error:
        compose_config([override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_checkpoint_is_told(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        check(compose_config([f"ckpt_path={tmp_path}/nothing.ckpt"]))
    with pytest.raises(UserError, match=f"the run in {tmp_path} has left no checkpoints/last.ckpt"):
        check(compose_config(["ckpt_path=last", f"run_dir={tmp_path}"]))
    with pytest.raises(UserError, match=r"no run in .* has left a"):
        check(compose_config(["ckpt_path=last", f"name={tmp_path.name}"]))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", "seed must be a whole number"),
        ("seed=abc", "seed must be a whole number"),
        ("run_dir={file}", "is a file; give the name of a folder"),
        ("ckpt_path={file}", "is no checkpoint, or a damaged one"),
        ("model=null", "a group cannot be null"),
    ],
)
def test_an_impossible_value_is_told(tmp_path, override, message):
    file = tmp_path / "file"
    file.write_text("no checkpoint")
    with pytest.raises(UserError, match=message) as error:
        check(compose_config([override.format(file=file)]))
    assert "\n" not in str(error.value)


def test_all_that_is_left_to_the_user_is_told_at_once():
    with pytest.raises(UserError, match=r"^data.train.root, imagenet must be given$"):
        check(compose_config(["experiment=coco-fcos"]))


def test_another_runs_checkpoints_are_not_overwritten(tmp_path):
    last = tmp_path / "checkpoints" / "last.ckpt"
    last.parent.mkdir()
    torch.save({"state_dict": {}}, last)
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": {}}, other)
    for overrides in ([], [f"ckpt_path={other}"]):
        overrides = [f"run_dir={tmp_path}", *overrides]
        with pytest.raises(UserError, match=r"ckpt_path=last continues it, overwrite=true starts over"):
            check(compose_config(overrides))
        check(compose_config([*overrides, "overwrite=true"]))
    for checkpoint in ("last", tmp_path, last):
        check(compose_config([f"run_dir={tmp_path}", f"ckpt_path={checkpoint}"]))


def test_hydras_options_do_not_hide_the_overrides():
    arguments = ["--config-dir", "x", "trainer.devices=3", "--config-name=train", "norm=local"]
    assert arguments_for_hydra(arguments) == ["trainer.devices=3", "norm=local"]


def test_last_is_the_newest_run_of_the_name_or_the_folder_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, run, age in [("a", "old", 1), ("a", "new", 3), ("b", "newest", 5), ("a", "middle", 2)]:
        path = tmp_path / "runs" / name / run / "checkpoints" / "last.ckpt"
        path.parent.mkdir(parents=True)
        zipfile.ZipFile(path, "w").close()
        os.utime(path, (age, age))

    def found(*overrides):
        (checkpoint,) = checkpoints_to_try(compose_config(list(overrides)))
        return checkpoint.relative_to(tmp_path / "runs").parts[:2]

    assert found("ckpt_path=last", "name=a") == ("a", "new")
    assert found("ckpt_path=last", "name=b") == ("b", "newest")
    assert found("ckpt_path=last", "name=a", "run_dir=runs/a/old") == ("a", "old")
    assert found("ckpt_path=runs/a/middle") == ("a", "middle")
    assert found("ckpt_path=runs/a/middle/checkpoints/last.ckpt") == ("a", "middle")
    assert checkpoints_to_try(compose_config([])) == []


def test_process_count_follows_the_configuration():
    assert process_count(compose_config(["trainer=cpu"])) == 2
    assert process_count(compose_config(["trainer=cpu", "trainer.devices=3"])) == 3
    with pytest.raises(UserError, match=r"trainer.devices must be a number"):
        process_count(compose_config(["trainer=cpu", "trainer.devices=-1"]))


def test_the_configuration_is_found_in_the_checkout():
    assert config_dir() == Path(__file__).parents[2] / "conf"


@pytest.mark.parametrize(("cores", "local_size", "workers"), [(2, 1, 2), (2, 2, 1), (2, 8, 1), (64, 8, 4), (16, 8, 2)])
def test_loaders_share_the_cores_of_their_machine(monkeypatch, cores, local_size, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    monkeypatch.setenv("WORLD_SIZE", str(local_size))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_size))
    assert compose_config(["data=folders", "data.train.root=somewhere"]).data.num_workers == workers
