"""The Lightning plugin, with real Trainers in real processes."""

from __future__ import annotations

import subprocess
import sys
import warnings
from datetime import timedelta
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any
from weakref import WeakSet

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import syncbn
from syncbn import SyncBatchNorm
from syncbn.lightning import SyncBatchNormGuard, SyncBatchNormPlugin

INSTALLED = pytest.mark.skipif(
    "syncbn" not in entry_points(group="lightning.pytorch.callbacks_factory").names,
    reason="the guard is an entry point, which needs the package installed",
)

BATCH = 3  # of each process


class Activated(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Module(pl.LightningModule):
    """A small network that notes the classes of its layers at every hook."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), Activated(5), nn.Linear(5, 1))
        self.double()
        self.seen: dict[str, list[str]] = {}
        self.fails = False

    def classes(self) -> list[str]:
        return [type(self.net[i]).__name__ for i in (1, 3)]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any) -> Tensor:
        self.seen["train"] = self.classes()
        if self.fails:
            raise ArithmeticError("in the middle")
        return self(batch[0]).sin().mean()

    def validation_step(self, batch: Any) -> None:
        self.seen["validate"] = self.classes()
        self.log("loss", self(batch[0]).sin().mean(), sync_dist=True)

    def test_step(self, batch: Any) -> None:
        self.seen["test"] = self.classes()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ConfiguredModule(Module):
    """For strategies that want ``configure_model``."""

    def configure_model(self) -> None:
        pass


class ConvertedInConfigureModel(Module):
    """With the documented line."""

    def configure_model(self) -> None:
        syncbn.convert(self, self.device_mesh["data_parallel"])


def samples(rank: int) -> Tensor:
    """Each process has data of its own, unlike the others'."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(4 * BATCH, 4, generator=generator, dtype=torch.float64) + 2 * rank


def data() -> DataLoader:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return DataLoader(TensorDataset(samples(rank)), batch_size=BATCH)


def trainer(folder: Any, plugins: Any, processes: int = 2, **options: Any) -> pl.Trainer:
    environment = [LightningEnvironment()] if processes > 1 else []
    defaults = {"strategy": "ddp"} if processes > 1 else {}
    return pl.Trainer(
        accelerator="cpu",
        devices=processes,
        plugins=[*plugins, *environment],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **(defaults | options),
    )


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


PLAIN, CONVERTED = ["BatchNorm1d", "Activated"], ["SyncBatchNorm1d", "SyncActivated"]


# ---- two processes: fit, validate, test, fit again, in one program


def life(folder: Any) -> dict[str, Any]:
    module = Module()
    keys, before = list(module.state_dict()), vars(module.net[1]).keys()
    fitting = trainer(folder, [SyncBatchNormPlugin()])
    fitting.fit(module, data(), data())
    first, seen = state(module), dict(module.seen)
    added = vars(module.net[1]).keys() - before
    path = Path(folder) / "first.ckpt"
    fitting.save_checkpoint(path)
    loss = fitting.validate(module, data(), verbose=False)[0]["loss"]
    after_validate = dict(module.seen)
    fitting.test(module, data(), verbose=False)
    trainer(folder, [SyncBatchNormPlugin()]).fit(module, data())
    return {
        "keys": keys,
        "first": first,
        "seen in fit": seen,
        "added": added,
        "loss": loss,
        "seen after fit": {"validate": after_validate["validate"], "test": module.seen["test"]},
        "seen in second fit": module.seen["train"],
        "after": module.classes(),
        "second": state(module),
    }


@pytest.fixture(scope="module")
def lives(processes: Any, tmp_path_factory: Any) -> tuple[list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("life")
    return processes(2).run(life, str(folder)), folder


def on_the_union(fits: int) -> dict[str, Tensor]:
    """What one process, without this package, makes of the whole batches."""
    module = Module()
    batches = [torch.cat(parts) for parts in zip(*(samples(rank).split(BATCH) for rank in range(2)), strict=True)]
    for _ in range(fits):
        optimizer = module.configure_optimizers()
        for batch in batches:
            optimizer.zero_grad()
            module(batch).sin().mean().backward()
            optimizer.step()
    return state(module)


def test_the_plugin_passes_the_timeout_on() -> None:
    layer = SyncBatchNormPlugin(timeout_s=90).apply(nn.Sequential(nn.BatchNorm1d(3)))[0]
    assert layer._exchange.timeout == timedelta(seconds=90)
    with pytest.raises(ValueError, match="expected timeout_s to be a number of seconds greater than 0, got 0"):
        SyncBatchNormPlugin(timeout_s=0)


def test_fit_trains_as_one_process_would_on_the_union(lives: Any) -> None:
    for each in lives[0]:
        torch.testing.assert_close(each["first"], on_the_union(1))
        torch.testing.assert_close(each["second"], on_the_union(2))


def test_layers_are_converted_during_fit_only(lives: Any) -> None:
    for each in lives[0]:
        assert each["seen in fit"] == {"train": CONVERTED, "validate": CONVERTED}
        assert each["seen after fit"] == {"validate": PLAIN, "test": PLAIN}
        assert each["seen in second fit"] == CONVERTED
        assert each["after"] == PLAIN
        assert each["added"] == set()


def test_checkpoints_are_those_of_the_plain_model(lives: Any) -> None:
    """weights_only: loading them imports nothing of this package."""
    (one, _), folder = lives
    checkpoint = torch.load(folder / "first.ckpt", weights_only=True)
    assert list(checkpoint["state_dict"]) == one["keys"]
    module = Module()
    module.load_state_dict(checkpoint["state_dict"], strict=True)
    torch.testing.assert_close(state(module), one["first"])


# ---- what the user has said and done


def chosen(folder: Any) -> dict[str, Any]:
    """Options, and layers that the user has converted."""
    classes = {}
    module = Module()
    trainer(folder, [SyncBatchNormPlugin(exclude="net.3")]).fit(module, data())
    classes["exclude"] = module.seen["train"]

    module = Module()
    trainer(folder, [SyncBatchNormPlugin(include=Activated)]).fit(module, data())
    classes["include"] = module.seen["train"]

    module = Module()
    trainer(folder, [SyncBatchNormPlugin(include=nn.BatchNorm3d)]).fit(module, data())
    classes["none"] = module.seen["train"]

    module = Module()
    group = dist.new_group([dist.get_rank()], use_local_synchronization=True)
    own = syncbn.convert(module.net[1], group)._exchange
    trainer(folder, [SyncBatchNormPlugin(dist.group.WORLD)]).fit(module, data())
    classes["users"] = [module.seen["train"], module.classes(), module.net[1]._exchange is own]
    return classes


def test_the_plugins_options_and_the_users_own_conversions_are_respected(processes: Any, tmp_path: Any) -> None:
    for classes in processes(2).run(chosen, str(tmp_path)):
        assert classes["exclude"] == ["SyncBatchNorm1d", "Activated"]
        assert classes["include"] == ["BatchNorm1d", "SyncActivated"]
        assert classes["none"] == PLAIN, "what the user has not named is nothing to complain of"
        assert classes["users"] == [CONVERTED, ["SyncBatchNorm1d", "Activated"], True]


def failing(folder: Any) -> tuple[list[str], list[str], str]:
    module = Module()
    module.fails = True
    fitting = trainer(folder, [SyncBatchNormPlugin()])
    with pytest.raises(ArithmeticError):
        fitting.fit(module, data())
    after_failure, seen = module.classes(), module.seen["train"]
    module.net[3].forward = module.net[3].forward  # what convert refuses
    with pytest.raises(TypeError) as error:
        fitting.fit(module, data())
    return seen, after_failure + module.classes(), str(error.value)


def test_a_fit_that_fails_leaves_the_plain_model(processes: Any, tmp_path: Any) -> None:
    for seen, classes, message in processes(2).run(failing, str(tmp_path)):
        assert seen == CONVERTED
        assert classes == PLAIN + PLAIN
        assert "net.3 (Activated): a forward was set on this one object" in message


# ---- strategies that ignore layer plugins


def model_parallel(folder: Any) -> dict[str, Any]:
    """The strategy itself, without a stand-in: it never asks a layer plugin for anything."""
    outcome: dict[str, Any] = {}
    module = ConfiguredModule()
    with pytest.raises(MisconfigurationException) as error:
        trainer(folder, [SyncBatchNormPlugin()], strategy=ModelParallelStrategy()).fit(module, data())
    outcome["message"], outcome["trained"] = str(error.value), "train" in module.seen

    module = ConvertedInConfigureModel()
    strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    trainer(folder, [SyncBatchNormPlugin()], strategy=strategy).fit(module, data())
    outcome["converted in configure_model"] = [module.seen["train"], module.classes()]
    outcome["over"] = {row.over for row in syncbn.describe(module).rows}
    outcome["running mean"] = module.net[1].running_mean

    module = ConfiguredModule()
    trainer(folder, [], strategy=ModelParallelStrategy()).fit(module, data())
    outcome["without the plugin"] = module.seen["train"]
    return outcome


@INSTALLED
def test_a_strategy_that_ignores_the_plugin_is_refused(processes: Any, tmp_path: Any) -> None:
    outcomes = processes(2).run(model_parallel, str(tmp_path))
    for outcome in outcomes:
        assert "ModelParallelStrategy does not use layer plugins" in outcome["message"]
        assert "def configure_model(self):\n        syncbn.convert(self)" in outcome["message"]
        assert not outcome["trained"]
        assert outcome["converted in configure_model"] == [CONVERTED, CONVERTED]
        assert outcome["over"] == {"all 2 processes"}
        torch.testing.assert_close(outcome["running mean"], outcomes[0]["running mean"])
        assert outcome["without the plugin"] == PLAIN


def single_device(folder: Any) -> str:
    """Processes that Lightning does not know of: each would train alone."""
    with pytest.raises(MisconfigurationException) as error:
        trainer(folder, [SyncBatchNormPlugin()], processes=1).fit(Module(), data())
    return str(error.value)


@INSTALLED
def test_a_single_device_among_several_processes_is_refused(processes: Any, tmp_path: Any) -> None:
    for message in processes(2).run(single_device, str(tmp_path)):
        assert message.startswith("SingleDeviceStrategy does not use layer plugins")


def test_a_single_process_just_trains(tmp_path: Any) -> None:
    with_plugin, without = Module(), Module()
    trainer(tmp_path, [SyncBatchNormPlugin()], processes=1).fit(with_plugin, data())
    trainer(tmp_path, [], processes=1).fit(without, data())
    assert with_plugin.seen["train"] == PLAIN
    torch.testing.assert_close(state(with_plugin), state(without))


def test_lightnings_own_option_beside_the_plugin_is_refused(tmp_path: Any) -> None:
    with pytest.raises(MisconfigurationException, match="sync_batchnorm=True"):
        trainer(tmp_path, [SyncBatchNormPlugin()], processes=1, sync_batchnorm=True)


@INSTALLED
def test_only_trainers_of_programs_with_the_plugin_get_the_guard(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(syncbn.lightning.plugin, "_in_use", WeakSet())
    guards = [[c for c in trainer(tmp_path, [], 1).callbacks if isinstance(c, SyncBatchNormGuard)]]
    plugin = SyncBatchNormPlugin()
    guards += [[c for c in trainer(tmp_path, [plugin], 1).callbacks if isinstance(c, SyncBatchNormGuard)]]
    assert [len(each) for each in guards] == [0, 1]


@INSTALLED
def test_a_missing_guard_is_told(monkeypatch: Any) -> None:
    """As where the package is on the path without being installed."""
    monkeypatch.setattr(syncbn.lightning.plugin, "_FACTORIES", "a group without entries")
    with pytest.warns(UserWarning, match=r"pass Trainer\(callbacks=\[SyncBatchNormGuard"):
        SyncBatchNormPlugin()
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        SyncBatchNormPlugin()


def test_the_plugin_reverts_only_what_it_has_converted() -> None:
    plugin = SyncBatchNormPlugin()
    model = nn.ModuleList([nn.BatchNorm1d(2), SyncBatchNorm(2), syncbn.convert(nn.BatchNorm2d(2))])
    exchanges = [layer._exchange for layer in model[1:]]
    assert plugin.revert(model) is model, "a fit that failed before it was set up"
    assert plugin.apply(plugin.apply(model)) is model
    assert len({layer._exchange for layer in model}) == 1
    plugin.revert(model)
    assert [type(layer).__name__ for layer in model] == ["BatchNorm1d", "SyncBatchNorm", "SyncBatchNorm2d"]
    assert [layer._exchange for layer in model[1:]] == exchanges


def test_importing_the_package_does_not_import_lightning() -> None:
    program = "import sys, syncbn; print([m for m in sys.modules if m.startswith(('lightning', 'pytorch_lightning'))])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
