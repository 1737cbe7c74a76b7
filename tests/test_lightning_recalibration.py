"""The recalibration callback, with real Trainers in real processes."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from judge import assert_close
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from population import population, running
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import syncbn
from syncbn.lightning import EvenBatchesCallback, RecalibrationCallback, SyncBatchNormPlugin

BATCH = 3  # of each process


class Net(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)
        )
        self.double()


class Module(pl.LightningModule):
    """Keeps the network as validation has seen it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.validated: list[nn.Module] = []
        self.trained = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any) -> Tensor:
        self.trained += 1
        return self(batch[0]).sin().mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.validated.append(syncbn.revert(copy.deepcopy(self.net)))
        assert not self.net.training

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.3)


def samples(rank: int, count: int = 4 * BATCH) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(count, 4, generator=generator, dtype=torch.float64) + 2 * rank


def data(rank: int = 0, count: int = 4 * BATCH, **options: Any) -> DataLoader:
    return DataLoader(TensorDataset(samples(rank, count)), batch_size=BATCH, **options)


def trainer(folder: Any, callbacks: Any, processes: int = 1, **options: Any) -> pl.Trainer:
    several = {"strategy": "ddp", "plugins": [SyncBatchNormPlugin(), LightningEnvironment()]} if processes > 1 else {}
    defaults = {"max_epochs": 1, "num_sanity_val_steps": 0, "enable_progress_bar": False}
    return pl.Trainer(
        accelerator="cpu",
        devices=processes,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **(several | defaults | options),
    )


def assert_population(net: nn.Module, unions: list[Tensor]) -> None:
    judge = Net()
    judge.load_state_dict(net.state_dict())
    expected = population(judge, unions)
    ours = running(net)
    assert ours.keys() == expected.keys()
    for name, each in expected.items():
        assert_close(ours[name], each, 1e-10, name)


def unions(limit: int = 4) -> list[Tensor]:
    parts = [samples(rank).split(BATCH) for rank in range(2)]
    return [torch.cat(step) for step in zip(*parts, strict=True)][:limit]


def _fit(folder: str, when: str | None, limit: int | None) -> tuple[list[nn.Module], nn.Module]:
    module, rank = Module(), dist.get_rank()
    callbacks = [] if when is None else [RecalibrationCallback(when, limit=limit)]
    trainer(folder, callbacks, 2, max_epochs=2).fit(module, data(rank), data(rank))
    return module.validated, module.net


def test_before_each_validation(processes: Any, tmp_path: Any) -> None:
    """Under the plugin: layers are synchronized in the pass, too. What is learned does not change by it."""
    fits = processes(2).run(_fit, str(tmp_path), "validation", None)
    plain = processes(2).run(_fit, str(tmp_path), None, None)
    for (validated, net), (_, without) in zip(fits, plain, strict=True):
        assert len(validated) == 2
        for each in validated:
            assert_population(each, unions())
        for ours, theirs in zip(net.parameters(), without.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        assert type(net[1]) is nn.BatchNorm1d
        assert int(net[1].num_batches_tracked) == 8
        assert net.training


def test_when_training_ends(processes: Any, tmp_path: Any) -> None:
    """The plugin gives the layers their classes back afterwards."""
    for _, net in processes(2).run(_fit, str(tmp_path), "end", 3):
        assert_population(net, unions(3))
        assert type(net[1]) is nn.BatchNorm1d


def _fit_uneven(count: int, folder: str) -> list[nn.Module]:
    module, rank = Module(), dist.get_rank()
    loader = syncbn.even_batches(data(rank, count))
    callbacks = [RecalibrationCallback(), EvenBatchesCallback()]
    trainer(folder, callbacks, 2, val_check_interval=2).fit(module, loader, data(rank))
    assert module.trained == 4
    return module.validated


def test_beside_a_loop_over_even_batches(processes: Any, tmp_path: Any) -> None:
    """In the middle of an epoch, whose batches stay what they are, and with unequal numbers of batches."""
    parts = [samples(0, 4 * BATCH).split(BATCH), samples(1, 2 * BATCH).split(BATCH)]
    expected = [torch.cat([parts[0][i], *parts[1][i : i + 1]]) for i in range(4)]
    for validated in processes(2).run(_fit_uneven, str(tmp_path), per_rank=[(4 * BATCH,), (2 * BATCH,)]):
        assert len(validated) == 2
        for each in validated:
            assert_population(each, expected)


def test_an_epoch_goes_on_after_a_validation_in_its_middle(tmp_path: Any) -> None:
    """Persistent workers have one iteration at a time, which another one would begin anew."""
    module = Module()
    loader = data(num_workers=1, persistent_workers=True, multiprocessing_context="forkserver")
    seen: list[Tensor] = []

    class Notes(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch[0])

    trainer(tmp_path, [RecalibrationCallback(), Notes()], val_check_interval=2).fit(module, loader, data())
    assert torch.equal(torch.cat(seen), samples(0))
    assert_population(module.validated[0], list(samples(0).split(BATCH)))


def test_only_in_fit_and_not_in_the_sanity_check(tmp_path: Any) -> None:
    module = Module()
    callback = RecalibrationCallback()
    trainer(tmp_path, [callback], num_sanity_val_steps=1).fit(module, data(), data())
    assert torch.equal(module.validated[0][1].running_var, Net()[1].running_var)
    before = running(module.net)
    trainer(tmp_path, [callback]).validate(module, data(count=2 * BATCH), verbose=False)
    assert all(torch.equal(each, before[name]) for name, each in running(module.net).items())


def test_layers_that_train_in_eval_mode_stay(tmp_path: Any) -> None:
    """When validation begins, all layers are in eval mode: those that were before are remembered."""

    class NormEval(Module):
        def on_train_epoch_start(self) -> None:
            self.net[1].eval()

    module = NormEval()
    trainer(tmp_path, [RecalibrationCallback()]).fit(module, data(), data())
    assert torch.equal(module.net[1].running_var, Net()[1].running_var)
    assert not torch.equal(module.net[4].running_var, Net()[4].running_var)
    assert not module.net[1].training


def test_batches_and_how_they_are_fed_may_be_chosen(tmp_path: Any) -> None:
    module = Module()
    fed: list[Tensor] = []

    def forward(model: nn.Module, batch: Any) -> None:
        fed.append(batch)
        model(batch)

    callback = RecalibrationCallback("end", batches=lambda: samples(3).split(6), limit=1, forward=forward)
    trainer(tmp_path, [callback]).fit(module, data())
    assert len(fed) == 1
    assert_population(module.net, [samples(3)[:6]])


def test_a_fast_dev_run_is_fast(tmp_path: Any) -> None:
    module = Module()
    trainer(tmp_path, [RecalibrationCallback()], fast_dev_run=1).fit(module, data(), data())
    assert_population(module.validated[0], [samples(0)[:BATCH]])


def test_mistakes_are_told(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="expected when to be one of validation, end, got 'epoch'"):
        RecalibrationCallback("epoch")
    with pytest.raises(ValueError, match="expected a limit of at least 1 batch, or None, got 0"):
        RecalibrationCallback(limit=0)

    class Several(Module):
        def training_step(self, batch: Any) -> Tensor:
            return super().training_step(batch["a"])

    with pytest.raises(MisconfigurationException, match="needs one loader of batches, but the Trainer has a dict of"):
        trainer(tmp_path, [RecalibrationCallback()]).fit(Several(), {"a": data(), "b": data()}, data())


@pytest.mark.parametrize("own_generator", [False, True])
def test_training_goes_on_in_the_order_that_it_would_have_had(tmp_path: Any, own_generator: bool) -> None:
    class Noting(Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[Tensor] = []

        def training_step(self, batch: Any) -> Tensor:
            self.seen.append(batch[0])
            return super().training_step(batch)

    def order(callbacks: list[Any]) -> Tensor:
        torch.manual_seed(0)
        module = Noting()
        generator = torch.Generator().manual_seed(0) if own_generator else None
        loader = data(shuffle=True, generator=generator)
        trainer(tmp_path, callbacks, max_epochs=3).fit(module, loader, data())
        return torch.cat(module.seen)

    assert torch.equal(order([RecalibrationCallback(when="validation")]), order([]))
