"""Normalization that stays frozen.

- pytorch/pytorch#66073: "BatchNorm frozen mode in core": layers in eval "can still be put in train() by further calls
  on parent modules", and FrozenBatchNorm2d has a state_dict and a class of its own.
- pytorch/pytorch#86590: parameters with requires_grad=False, and running statistics that go on to move all the same.
- open-mmlab/mmengine#1624: a conversion forgets that layers were in eval mode while the model trains: they then wait
  for the other processes until a timeout.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from documentation import blocks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torchvision.ops import FrozenBatchNorm2d

import syncbn


def build() -> nn.Sequential:
    torch.manual_seed(1)
    backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model = nn.Sequential(backbone, nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))
    for layer in norms(model):
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(0.5, 2)
        nn.init.uniform_(layer.weight)
    return model


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [each for each in model.modules() if isinstance(each, nn.BatchNorm2d)]


def images(n: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def statistics(model: nn.Module) -> list[Tensor]:
    return [each.clone() for layer in norms(model) for each in layer.buffers()]


def assert_frozen(model: nn.Module, which: tuple[bool, ...] = (True, True, True)) -> None:
    """These layers do not move in a step in training, and normalize by what they have."""
    model.train()
    assert [not layer.training for layer in norms(model)] == list(which)
    before = statistics(model)
    model(images()).sin().sum().backward()
    moved = [not torch.equal(a, b) for a, b in zip(before, statistics(model), strict=True)]
    assert [not any(moved[i : i + 3]) for i in range(0, len(moved), 3)] == list(which)


# ---- pytorch/pytorch#66073


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_train_of_parent_modules_does_not_reach_frozen_layers(converted: bool) -> None:
    model = build()
    model = syncbn.freeze(syncbn.convert(model) if converted else model, include="0")
    keys = list(build().state_dict())
    for _ in range(2):
        assert model.train() is model
        assert model[0].train().training
        assert model[0][1].train() is model[0][1]
        model.requires_grad_(True)
        assert_frozen(model, (True, True, False))
        model.eval()
    assert list(model.state_dict()) == keys
    expected = [model[0][1].running_mean.clone(), model[0][1].weight.clone()]
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert torch.equal(model[0][1].running_mean, expected[0])
    assert not torch.equal(model[0][1].weight, expected[1]), "γ learns unless affine=True"


def test_it_computes_what_torchvisions_frozen_layer_computes() -> None:
    layer = norms(build())[0]
    x = torch.randn(2, 4, 5, 5, requires_grad=True)
    judge = FrozenBatchNorm2d(4, eps=layer.eps)
    judge.load_state_dict({name: each for name, each in layer.state_dict().items() if "num" not in name})
    frozen = syncbn.freeze(syncbn.convert(layer), affine=True).train()
    torch.testing.assert_close(frozen(x), judge(x))
    (dx,) = torch.autograd.grad(frozen(x).sin().sum(), x)
    (expected,) = torch.autograd.grad(judge(x).sin().sum(), x)
    torch.testing.assert_close(dx, expected)
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


# ---- pytorch/pytorch#86590


def test_a_network_of_which_only_the_last_layer_learns() -> None:
    """The report: all parameters of the rest are frozen, and its statistics are to stay what they are."""
    net = syncbn.freeze(build(), include="0", affine=True)
    for parameter in net[0].parameters():
        parameter.requires_grad = False
    before = {name: each.clone() for name, each in net[0].state_dict().items()}
    optimizer = torch.optim.SGD([each for each in net.parameters() if each.requires_grad], 0.1)
    for _ in range(2):
        net.train()
        net(images()).square().mean().backward()
        optimizer.step()
        net.eval()
    assert all(torch.equal(each, before[name]) for name, each in net[0].state_dict().items())


def test_parameters_learn_again_if_they_did_before() -> None:
    model = build()
    model[0][1].bias.requires_grad_(False)
    syncbn.freeze(model)
    assert model[0][1].weight.requires_grad
    syncbn.freeze(model, affine=True)
    syncbn.freeze(model)  # again, and with less: what is frozen stays so
    assert not any(each.requires_grad for layer in norms(model) for each in layer.parameters())
    syncbn.unfreeze(model)
    assert [each.requires_grad for each in model[0][1].parameters()] == [True, False]
    assert all(each.requires_grad for layer in norms(model)[1:] for each in layer.parameters())
    assert_frozen(model, (False, False, False))


@pytest.mark.parametrize("mode", [False, True])
def test_unfreezing_gives_the_mode_that_was_last_asked_for(mode: bool) -> None:
    model = syncbn.freeze(build()).train(mode)
    syncbn.unfreeze(model, exclude="3")
    assert [each.training for each in norms(model)] == [mode, mode, False]
    assert "train" not in vars(model[0][1])


# ---- whatever else happens to a model


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _loaded(model: nn.Module) -> nn.Module:
    model.load_state_dict(build().state_dict())
    return model


CHANGES = [copy.deepcopy, _pickled, _saved, _loaded, syncbn.convert, nn.Module.double, nn.Module.half]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_layers_stay_frozen(change: Any) -> None:
    model = syncbn.freeze(syncbn.convert(build()))
    changed = change(model).float()
    assert_frozen(changed)
    assert_frozen(model)
    syncbn.unfreeze(changed)
    assert_frozen(changed, (False, False, False))
    if changed is not model:
        assert_frozen(model)


def test_before_and_after_convert_fuse_and_revert() -> None:
    expected = syncbn.freeze(build()).train()(images())
    model = syncbn.freeze(build())
    for change in (syncbn.convert, syncbn.fuse, syncbn.convert, syncbn.revert, syncbn.convert, syncbn.fuse):
        change(model)
        assert_frozen(model)
        torch.testing.assert_close(model(images()), expected)
    assert model[0][1]._fused_activation == "relu"
    syncbn.unfreeze(model)
    assert_frozen(model, (False, False, False))
    syncbn.freeze(model)
    torch.testing.assert_close(model(images()), syncbn.revert(model)(images()))


def test_a_compiled_model() -> None:
    model = syncbn.convert(build())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(images()).sum().backward()
    syncbn.freeze(compiled)
    assert_frozen(compiled)
    torch.testing.assert_close(compiled(images()), model(images()))
    syncbn.unfreeze(compiled, "3")
    assert_frozen(compiled, (True, True, False))


def test_what_is_inside_of_a_frozen_layer_follows_train() -> None:
    timm = pytest.importorskip("timm")
    layer = syncbn.freeze(timm.layers.BatchNormAct2d(4, drop_layer=nn.Dropout2d))
    assert layer.train().drop.training
    assert not layer.training
    assert not layer.eval().drop.training


def test_train_with_something_else_than_a_mode() -> None:
    with pytest.raises(ValueError, match="training mode is expected to be boolean"):
        syncbn.freeze(build()).train("yes")


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = syncbn.freeze(build())
        self.modes: list[bool] = []

    def training_step(self, batch: Any) -> Tensor:
        self.modes.append(any(layer.training for layer in norms(self.net)))
        return self.net(batch[0]).square().mean()

    def validation_step(self, batch: Any) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01)


def test_a_trainer_that_switches_between_train_and_eval(tmp_path: Any) -> None:
    module, loader = Module(), DataLoader(TensorDataset(images(4)), 2)
    before = statistics(module)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    pl.Trainer(accelerator="cpu", max_epochs=2, default_root_dir=tmp_path, **quiet).fit(module, loader, loader)
    assert module.modes == [False] * 4
    assert all(torch.equal(a, b) for a, b in zip(before, statistics(module), strict=True))


def test_they_are_described_as_frozen() -> None:
    for model in (build(), syncbn.convert(build())):
        for mode in (True, False):
            described = syncbn.describe(syncbn.freeze(model, include="0").train(mode))
            assert described.names("frozen") == ["0.1", "0.4"]
            assert described.rows[0].reason == "syncbn.freeze keeps it in eval mode"


# ---- several processes: open-mmlab/mmengine#1624


def _train_with_frozen_layers(first: str) -> tuple[int, list[Tensor]]:
    model = build()
    if first == "eval":  # the report: a backbone in eval mode, then the conversion
        for layer in norms(model)[:2]:
            layer.eval()
    else:
        syncbn.freeze(model, include="0")
    syncbn.convert(model)
    if first == "train after":
        model.train()
    frozen = statistics(model)[:6]
    model = DistributedDataParallel(model)
    exchange = norms(model)[2]._exchange
    rank = dist.get_rank()
    for _ in range(2):
        model(images(rank + 1, rank)).square().mean().backward()
    assert all(torch.equal(a, b) for a, b in zip(frozen, statistics(model)[:6], strict=True))
    return exchange.calls, statistics(model)[6:]


@pytest.mark.parametrize("first", ["eval", "freeze", "train after"])
def test_frozen_layers_exchange_nothing(processes: Any, first: str) -> None:
    (calls, ours), (_, theirs) = processes(2).run(_train_with_frozen_layers, first)
    assert calls == 2 * 2  # of the one layer that is not frozen
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _freeze_on_one(when: str) -> None:
    model = build()
    if when != "before":
        syncbn.convert(model)
    if dist.get_rank() == 1:
        syncbn.freeze(model, "0.4")
    if when != "after":
        syncbn.convert(model)
    model(images())


@pytest.mark.parametrize("when", ["before", "after", "between"])
def test_a_layer_that_is_frozen_on_one_process_only_is_named(processes: Any, when: str) -> None:
    """Whether it was frozen before it was converted, after that, or between two of these."""
    with pytest.raises(Exception, match=r"synchronized layer 1: rank 0 has 0\.4.*rank 1 has 0\.4.*frozen"):
        processes(2).run(_freeze_on_one, when)


# ---- what is refused


def test_layers_that_cannot_be_frozen_are_named() -> None:
    model = build()
    model[3] = nn.BatchNorm2d(2, track_running_stats=False)
    with pytest.raises(ValueError, match="cannot freeze 3, which have no running statistics to normalize by"):
        syncbn.freeze(model)
    assert norms(model)[0].training
    assert [each.training for each in norms(syncbn.freeze(model, exclude="3").train())] == [False, False, True]
    scripted = nn.Sequential(torch.jit.script(nn.BatchNorm2d(2)))
    with pytest.raises(TypeError, match="cannot freeze 0, compiled or traced already"):
        syncbn.freeze(scripted)
    with pytest.raises(ValueError, match="no batch normalization layer to freeze in the Linear"):
        syncbn.freeze(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="matches no batch normalization layer"):
        syncbn.freeze(build(), "backbone")
    syncbn.unfreeze(build())


def test_the_documentation_runs() -> None:
    names: dict[str, Any] = {}
    for block in blocks("docs/freezing.md"):
        exec(block, names)
