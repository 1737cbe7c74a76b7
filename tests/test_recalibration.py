"""Population statistics: ``recalibrate`` in one and in several processes.

The judge of the first layer is PyTorch's mean and var of all data in float64. That of later layers is the plain model
in one process on the union of each step's batches, whose inputs to every layer are kept and looked at together.
"""

from __future__ import annotations

import itertools
import random
import re
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from documentation import blocks
from judge import assert_close
from population import population, running
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import syncbn


class Net(nn.Module):
    """Two convolutions, dropout that must not be at work, and a buffer that every forward changes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.dropout = nn.Dropout(0.5)
        self.conv2, self.bn2 = nn.Conv2d(6, 5, 3), nn.BatchNorm2d(5)
        self.head, self.bn3 = nn.Linear(5, 4), nn.BatchNorm1d(4)
        self.register_buffer("calls", torch.zeros(()))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.dropout(self.bn1(self.conv1(x)).relu())
        x = self.bn2(self.conv2(x)).relu().mean((2, 3))
        return self.bn3(self.head(x))


def batches(*counts: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, 3, 9, 8, generator=generator, dtype=torch.float64) * (i + 1) + seed for i, n in enumerate(counts)
    ]


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-10) -> None:
    assert ours.keys() == theirs.keys()
    for name, each in theirs.items():
        assert_close(ours[name], each, tolerance, name)


# ---- several processes


def _recalibrated(parts: list[Tensor], convert: bool, wrapped: bool) -> dict[str, Any]:
    net = Net()
    net = syncbn.convert(net) if convert else net
    model = DistributedDataParallel(net) if wrapped else net
    model(batches(4)[0])
    before = {name: each.clone() for name, each in net.named_buffers() if "running" not in name}
    syncbn.recalibrate(model, iter(parts))
    assert all(torch.equal(before[name], each) for name, each in net.named_buffers() if name in before)
    return running(net)


@pytest.mark.parametrize("wrapped", [False, True], ids=["not wrapped", "DDP"])
def test_the_statistics_are_those_of_all_data_of_all_processes(processes: Any, wrapped: bool) -> None:
    """Batches of different sizes; the variance of all is not the mean of the batches' variances."""
    parts = [batches(4, 2, 3), batches(1, 5, 2, seed=1)]
    states = processes(2).run(_recalibrated, True, wrapped, per_rank=[(each,) for each in parts])
    unions = [torch.cat(step) for step in zip(*parts, strict=True)]
    expected = population(Net(), unions)
    first = Net().conv1(torch.cat(unions)).detach().transpose(0, 1).flatten(1)
    assert_close(expected["bn1.running_mean"], first.mean(1), 1e-12)
    assert_close(expected["bn1.running_var"], first.var(1), 1e-12)
    for state in states:
        assert_same(state, expected)
        assert all(torch.equal(state[name], states[0][name]) for name in state)


def test_processes_may_have_different_numbers_of_batches_or_none(processes: Any) -> None:
    parts = [batches(4, 2, 3), batches(3, seed=1), []]
    states = processes(3).run(_recalibrated, True, False, per_rank=[(each,) for each in parts])
    unions = [torch.cat([parts[0][0], parts[1][0]]), parts[0][1], parts[0][2]]
    for state in states:
        assert_same(state, population(Net(), unions))


def test_layers_that_are_not_converted_are_set_to_the_same_population(processes: Any) -> None:
    """The plain model: each process normalizes by its own batches; the statistics are over all of them."""
    parts = [batches(4, 2, 3), batches(3, 2, seed=1)]
    states = processes(2).run(_recalibrated, False, False, per_rank=[(each,) for each in parts])
    expected = population(Net(), [*parts[0], *parts[1]])
    for state in states:
        assert_same(state, expected)


def _over_groups(part: list[Tensor]) -> dict[str, Tensor]:
    groups = [dist.new_group([0, 1]), dist.new_group([2])]
    rank = dist.get_rank()
    net = syncbn.convert(Net(), groups[rank // 2])
    syncbn.recalibrate(net, part, progress=False)
    over_all = running(net)
    syncbn.recalibrate(net, part, process_group=groups[rank // 2], progress=False)
    result = {"all": over_all, "group": running(net)}
    dist.destroy_process_group(groups[rank // 2])
    return result


def test_over_all_data_where_layers_are_synchronized_over_some_processes(processes: Any) -> None:
    parts = [batches(4, 2), batches(1, 5, seed=1), batches(3, 2, seed=2)]
    states = processes(3).run(_over_groups, per_rank=[(each,) for each in parts])
    pairs = [torch.cat(step) for step in zip(*parts[:2], strict=True)]
    for rank, state in enumerate(states):
        assert_same(state["all"], population(Net(), [*pairs, *parts[2]]))
        assert_same(state["group"], population(Net(), pairs if rank < 2 else parts[2]))


def _loader_of_pairs(rank: int) -> dict[str, Tensor]:
    inputs = torch.cat(batches(7 + rank, seed=rank))
    dataset = TensorDataset(inputs, torch.zeros(len(inputs)))
    net = syncbn.convert(Net())
    with syncbn.valid_region(torch.ones(1, 1, 9, 8)):
        syncbn.recalibrate(net, syncbn.even_batches(DataLoader(dataset, batch_size=3)))
    return running(net)


def test_a_loader_of_inputs_and_targets(processes: Any) -> None:
    """``even_batches``, which the caller may have made with options of its own, is taken as it is."""
    parts = [torch.cat(batches(7 + rank, seed=rank)).split(3) for rank in range(2)]
    unions = [torch.cat(step) for step in itertools.zip_longest(*parts, fillvalue=parts[0][0][:0])]
    for state in processes(2).run(_loader_of_pairs, per_rank=[(0,), (1,)]):
        assert_same(state, population(Net(), unions))


def _with_a_bad_batch(bad: bool, convert: bool) -> Any:
    net = syncbn.convert(Net()) if convert else Net()
    parts = batches(4, 2, 3, seed=dist.get_rank())
    if bad:
        parts[1][0, 0, 0, 0] = torch.inf
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        syncbn.recalibrate(net, parts)
    return running(net), [str(each.message) for each in caught if each.filename == __file__]


def test_a_batch_that_is_not_finite_is_left_out_on_all_processes_and_named(processes: Any) -> None:
    (first, said), (second, silent) = processes(2).run(_with_a_bad_batch, True, per_rank=[(False,), (True,)])
    parts = [batches(4, 2, 3, seed=rank) for rank in range(2)]
    unions = [torch.cat(step) for step in zip(*parts, strict=True)]
    assert_same(first, population(Net(), [unions[0], unions[2]]))
    assert_same(second, first, 0)
    assert silent == []
    assert "left out" in said[0]
    assert "bn1 (1), bn2 (1), bn3 (1)" in said[0]


def test_unsynchronized_layers_leave_out_the_batch_of_the_process_that_has_it(processes: Any) -> None:
    (first, said), _ = processes(2).run(_with_a_bad_batch, False, per_rank=[(False,), (True,)])
    parts = [batches(4, 2, 3), batches(4, 2, 3, seed=1)]
    del parts[1][1]
    assert_same(first, population(Net(), [*parts[0], *parts[1]]))
    assert "bn1 (1)" in said[0]


def _in_the_middle_of_a_stand_in_s_step(rank: int) -> list[float]:
    """In each step of a loop in which the second process soon runs out; over the same data each time."""
    layer, means = syncbn.SyncBatchNorm(1), []
    own = [torch.tensor([[0.0 + rank], [2.0 + rank]])]
    for x in syncbn.even_batches([torch.randn(2, 1)] * (3 - 2 * rank), empty="dummy"):
        layer(x)
        syncbn.recalibrate(layer, own, progress=False)
        means.append(layer.running_mean.item())
    return means


def test_the_step_of_a_stand_in_does_not_leave_out_other_data(processes: Any) -> None:
    means = processes(2).run(_in_the_middle_of_a_stand_in_s_step, per_rank=[(0,), (1,)])
    assert means == [[1.5] * 3, [1.5] * 3]


@pytest.mark.parametrize("own_generator", [False, True])
def test_a_shuffling_loader_goes_on_as_it_would_have(own_generator: bool) -> None:
    def orders(recalibrated: bool) -> list[list[float]]:
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(0) if own_generator else None
        loader = DataLoader(torch.arange(12.0).view(12, 1), 4, shuffle=True, generator=generator)
        layer, seen = syncbn.SyncBatchNorm(1), []
        for _ in range(3):
            seen += [x.flatten().tolist() for x in loader]
            if recalibrated:
                syncbn.recalibrate(layer, loader, progress=False)
        return seen

    assert orders(recalibrated=True) == orders(recalibrated=False)


def _different_models() -> None:
    net = syncbn.convert(Net())
    if dist.get_rank() == 1:
        net.bn2.eval()
    syncbn.recalibrate(net, batches(4))


def test_processes_that_would_set_different_layers_say_so(processes: Any) -> None:
    with pytest.raises(Exception, match=r"models differ in synchronized layer 1: rank 0 has bn2.*rank 1 has bn3"):
        processes(2).run(_different_models)


# ---- one process


def test_one_process_without_torch_distributed() -> None:
    net = syncbn.convert(Net())
    syncbn.recalibrate(net, batches(4, 2, 3))
    assert_same(running(net), population(Net(), batches(4, 2, 3)))


def test_batch_moments_far_from_zero_keep_their_digits() -> None:
    """Float32 values around 1e4, of different batches: sums in float32 would have no digit of the variance left."""
    generator = torch.Generator().manual_seed(1)
    xs = [torch.randn(50, 2, 8, generator=generator) + 1e4 + i for i in range(20)]
    layer = syncbn.SyncBatchNorm(2)
    syncbn.recalibrate(layer, xs)
    values = torch.cat(xs).double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_mean, values.mean(1).float())
    torch.testing.assert_close(layer.running_var, values.var(1).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_buffers(dtype: torch.dtype) -> None:
    layer = syncbn.SyncBatchNorm(2).to(dtype)
    xs = [torch.randn(50, 2, 8).to(dtype) for _ in range(3)]
    syncbn.recalibrate(layer, xs)
    values = torch.cat(xs).double().transpose(0, 1).flatten(1)
    assert layer.running_var.dtype == dtype
    assert torch.equal(layer.running_mean, values.mean(1).to(dtype))
    assert torch.equal(layer.running_var, values.var(1).to(dtype))


def test_a_padded_place_does_not_count() -> None:
    """What ``valid_region`` says of the batches holds for the population."""
    x = torch.cat(batches(4))
    mask = torch.zeros(4, 1, 9, 8, dtype=torch.bool)
    mask[:, :, :5] = True
    layer = syncbn.SyncBatchNorm(3).double()

    def forward(model: nn.Module, batch: Tensor) -> None:
        with syncbn.valid_region(mask):
            model(batch)

    syncbn.recalibrate(layer, [x, x + 1], forward=forward)
    valid = torch.cat([x, x + 1])[:, :, :5].transpose(0, 1).flatten(1)
    assert_close(layer.running_mean, valid.mean(1), 1e-12)
    assert_close(layer.running_var, valid.var(1), 1e-12)


def test_running_statistics_that_have_become_nan_are_mended() -> None:
    net = syncbn.convert(Net())
    net.bn2.running_var.fill_(torch.nan)
    syncbn.recalibrate(net, batches(4, 2))
    assert_same(running(net), population(Net(), batches(4, 2)))


@pytest.mark.parametrize("training", [True, False])
def test_everything_else_is_left_as_it_was(training: bool) -> None:
    net = syncbn.convert(Net()).train(training)
    net.dropout.train(not training)
    net.bn1.num_batches_tracked.fill_(7)
    modes = {name: each.training for name, each in net.named_modules()}
    state = {name: each.clone() for name, each in net.state_dict().items() if "running" not in name}
    vars_of_layer = set(vars(net.bn1))
    hooks = len(net.bn1._forward_pre_hooks)
    random_state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()

    def forward(model: nn.Module, batch: Tensor) -> None:
        assert not torch.is_grad_enabled()
        assert not model.dropout.training
        random.random(), np.random.rand(), torch.rand(1)
        model(batch[0])

    syncbn.recalibrate(net, DataLoader(TensorDataset(torch.cat(batches(4, 2))), 3, shuffle=True), forward=forward)
    assert {name: each.training for name, each in net.named_modules()} == modes
    after = {name: each for name, each in net.state_dict().items() if "running" not in name}
    assert after.keys() == state.keys()
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert torch.equal(torch.get_rng_state(), random_state[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == random_state[1:]
    assert set(vars(net.bn1)) == vars_of_layer
    assert len(net.bn1._forward_pre_hooks) == hooks
    assert all(p.grad is None for p in net.parameters())


def test_after_an_exception_the_model_is_as_it_was() -> None:
    net = Net()  # not converted: these layers move their statistics themselves
    net(batches(4)[0])
    before = {name: each.clone() for name, each in net.state_dict().items()}

    def broken() -> Iterator[Tensor]:
        yield batches(4)[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        syncbn.recalibrate(net, broken())
    assert all(torch.equal(each, before[name]) for name, each in net.state_dict().items())
    assert all(module.training for module in net.modules())
    net(batches(4)[0])
    assert not torch.equal(net.bn1.running_mean, before["bn1.running_mean"])
    assert net.bn1.running_mean.is_inference() is False


def test_in_a_trainers_inference_mode() -> None:
    net = syncbn.convert(Net())
    with torch.inference_mode():
        syncbn.recalibrate(net, [each.clone() for each in batches(4, 2)])
    assert_same(running(net), population(Net(), batches(4, 2)))
    net(batches(4)[0]).sum().backward()


def test_a_model_in_training_keeps_layers_that_are_in_eval() -> None:
    """As mmdetection's norm_eval and many training scripts do; ``syncbn.freeze`` and frozen classes, too."""
    net = syncbn.convert(Net())
    net.bn1.eval()
    syncbn.freeze(net, "bn2")
    before = running(net)
    syncbn.recalibrate(net, batches(4, 2))
    after = running(net)
    assert {name for name in after if not torch.equal(after[name], before[name])} == {
        "bn3.running_mean",
        "bn3.running_var",
    }
    expected = population(Net(), batches(4, 2), frozen=("bn1", "bn2"))
    assert_close(after["bn3.running_var"], expected["bn3.running_var"], 1e-10)


def test_a_model_in_eval_is_recalibrated_but_for_frozen_layers() -> None:
    net = syncbn.freeze(syncbn.convert(Net()).eval(), "bn1")
    before = running(net)
    syncbn.recalibrate(net, batches(4, 2), exclude="bn2")
    changed = {name.split(".")[0] for name, each in running(net).items() if not torch.equal(each, before[name])}
    assert changed == {"bn3"}


def test_a_cumulative_average_goes_on_from_the_population() -> None:
    """num_batches_tracked is left, which is the weight that the population has in an average with momentum=None."""
    layer = nn.BatchNorm1d(2, momentum=None).double()
    xs = [torch.randn(8, 2, dtype=torch.float64) for _ in range(4)]
    for x in xs[:3]:
        layer(x)
    syncbn.recalibrate(syncbn.convert(layer), xs[:2])
    mean = torch.cat(xs[:2]).mean(0)
    layer(xs[3])
    assert_close(layer.running_mean, mean * 3 / 4 + xs[3].mean(0) / 4, 1e-12)


def test_a_model_that_only_uses_a_branch_in_training() -> None:
    class Auxiliary(Net):
        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.BatchNorm2d(3).double()

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.aux(x) if self.training else x)

    net = syncbn.convert(Auxiliary())
    before = running(net)
    with pytest.warns(
        UserWarning, match=re.escape("no finite value and keep the running statistics that they had: aux.")
    ):
        syncbn.recalibrate(net, batches(4, 2))
    assert torch.equal(net.aux.running_var, before["aux.running_var"])

    def forward(model: nn.Module, batch: Tensor) -> None:
        model.training = True
        model(batch)

    syncbn.recalibrate(net, batches(4, 2), forward=forward)
    assert_close(net.aux.running_var, torch.cat(batches(4, 2)).var((0, 2, 3)), 1e-12)


def test_how_batches_are_fed() -> None:
    class TakesTwo(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = syncbn.SyncBatchNorm(3).double()

        def forward(self, x: Any, y: Tensor | None = None) -> Tensor:
            x = x["x"] if isinstance(x, dict) else x
            return self.bn(x if y is None else x + y)

    xs = batches(4, 2)
    mean = torch.cat(xs).mean((0, 2, 3))
    for fed in ([(x, "target") for x in xs], [[x] for x in xs], [{"x": x} for x in xs], (x for x in xs)):
        net = TakesTwo()
        syncbn.recalibrate(net, fed)
        assert_close(net.bn.running_mean, mean, 1e-12)
    net = TakesTwo()
    syncbn.recalibrate(net, [(x, x) for x in xs], forward=lambda model, batch: model(*batch))
    assert_close(net.bn.running_mean, 2 * mean, 1e-12)


def test_torchvisions_detector_needs_no_targets() -> None:
    """It is in eval mode but for its normalization; with targets in training mode it would compute losses."""
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=3, norm_layer=nn.BatchNorm2d, min_size=32, max_size=32
    )
    net.backbone.body["0"][1] = nn.BatchNorm2d(16)
    syncbn.convert(net)
    images = [torch.rand(3, 32, 32), torch.rand(3, 32, 32)]
    batch = images, [{"boxes": torch.tensor([[1.0, 1.0, 9.0, 9.0]]), "labels": torch.tensor([1])}] * 2
    syncbn.recalibrate(net, [batch] * 2)
    stem = net.backbone.body["0"]
    x = stem[0](net.transform(images)[0].tensors).detach()
    torch.testing.assert_close(stem[1].running_mean, x.double().mean((0, 2, 3)).float())


def test_timms_layers() -> None:
    timm = pytest.importorskip("timm")
    layer = timm.layers.BatchNormAct2d(3, drop_layer=nn.Dropout2d).double()
    for each in (layer, syncbn.convert(layer)):
        each.reset_running_stats()
        syncbn.recalibrate(each, batches(4, 2))
        assert_close(each.running_var, torch.cat(batches(4, 2)).var((0, 2, 3)), 1e-12)


def test_a_compiled_model_is_not_compiled_for_it() -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("compiled")

    net = syncbn.convert(Net())
    syncbn.recalibrate(torch.compile(net, backend=refuse), batches(4, 2))
    assert_same(running(net), population(Net(), batches(4, 2)))


def test_a_fused_model() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU())
    xs = [torch.randn(n, 3, dtype=torch.float64) for n in (5, 3)]
    expected = population(net.double(), xs)
    for each in net:
        each._forward_pre_hooks.clear()
    syncbn.recalibrate(syncbn.fuse(syncbn.convert(net)), xs)
    assert_same(running(net), expected)


def test_a_progress_bar(capsys: Any) -> None:
    syncbn.recalibrate(syncbn.convert(Net()), batches(4, 2))
    assert "Recalibrating" in capsys.readouterr().err
    syncbn.recalibrate(syncbn.convert(Net()), batches(4, 2), progress=False)
    assert capsys.readouterr().err == ""


# ---- what is refused


def test_no_batches_is_an_error() -> None:
    """A generator that has been used up would otherwise leave everything as it was, in silence."""
    net = syncbn.convert(Net())
    with pytest.raises(ValueError, match="no layer has seen a finite value: expected batches"):
        syncbn.recalibrate(net, [])


def _no_batches() -> None:
    syncbn.recalibrate(syncbn.convert(Net()), [])


def test_no_batches_on_any_process_is_an_error(processes: Any) -> None:
    with pytest.raises(Exception, match="no layer has seen a finite value"):
        processes(2).run(_no_batches)


def test_a_model_without_layers_to_set_is_an_error() -> None:
    with pytest.raises(ValueError, match="there are no running statistics to set in the Linear"):
        syncbn.recalibrate(nn.Linear(2, 2), [torch.randn(2, 2)])
    with pytest.raises(ValueError, match="all of them are frozen"):
        syncbn.recalibrate(syncbn.freeze(Net()), batches(4))


def test_layers_whose_input_cannot_be_seen_are_named() -> None:
    net = Net()
    net.bn2 = torch.jit.script(net.bn2)
    with pytest.raises(TypeError, match="cannot recalibrate bn2, compiled or traced already"):
        syncbn.recalibrate(net, batches(4))
    with pytest.raises(TypeError, match="cannot recalibrate bn, which has not seen an input yet"):
        syncbn.recalibrate(nn.ModuleDict({"bn": nn.LazyBatchNorm2d()}), batches(4))


def test_the_documentation_runs() -> None:
    names: dict[str, Any] = {}
    for block in blocks("docs/population-statistics.md"):
        exec(block, names)
