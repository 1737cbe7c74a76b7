"""Gradient accumulation and running statistics.

- pytorch/pytorch#46516: the buffers move once per micro-batch, by that micro-batch's statistics, where the whole batch
  would have moved them once: "tracking buffer statistics when using gradient accumulation" is asked for.
- Lightning-AI/pytorch-lightning#17446: the same of accumulate_grad_batches, mainly with one GPU.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from documentation import blocks
from judge import assert_close
from lightning.pytorch.plugins.environments import LightningEnvironment
from population import population
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import syncbn
from syncbn.checkpoint import checkpoint_contexts
from syncbn.lightning import AccumulateStatisticsCallback, SyncBatchNormPlugin
from syncbn.together import normalize_together

RANKS = 2


def build(momentum: float | None = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=momentum), nn.ReLU(), nn.Linear(4, 4), nn.BatchNorm1d(4)
    ).double()


def micro_batches(rank: int = 0, step: int = 0, counts: tuple[int, ...] = (2, 5, 3)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(10 * step + rank)
    return [
        torch.randn(n + rank, 3, generator=generator, dtype=torch.float64) * (i + 1) + rank
        for i, n in enumerate(counts)
    ]


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in model.named_buffers()}


def moved(before: dict[str, Tensor], toward: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: before[name] * (1 - factor) + each * factor for name, each in toward.items()}


def assert_moved(after: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, each in expected.items():
        assert_close(after[name], each, 1e-10, name)


# ---- pytorch/pytorch#46516


def _one_step(rank: int, through_ddp: bool) -> tuple[dict[str, Tensor], list[Tensor], int]:
    net = syncbn.convert(build())
    model = DistributedDataParallel(net) if through_ddp else net
    batches = micro_batches(rank)
    calls = 0
    with syncbn.accumulate_statistics(model):
        for i, x in enumerate(batches):
            last = i == len(batches) - 1
            with nullcontext() if last or not through_ddp else model.no_sync():
                (model(x).sin().mean() / len(batches)).backward()
        calls = net[1]._exchange.calls
        assert int(net[1].num_batches_tracked) == 0
    assert net[1]._exchange.calls == calls, "the update exchanges nothing"
    return buffers(net), [each.grad for each in net.parameters()], calls


@pytest.mark.parametrize("through_ddp", [False, True], ids=["plain", "DDP"])
def test_one_update_by_the_moments_of_all_micro_batches_of_all_processes(processes: Any, through_ddp: bool) -> None:
    """Weighted by how many values each has. What is normalized by, and so the gradients, stay the micro-batches'."""
    results = processes(RANKS).run(_one_step, through_ddp, per_rank=[(rank,) for rank in range(RANKS)])
    unions = [torch.cat(parts) for parts in zip(*map(micro_batches, range(RANKS)), strict=True)]
    expected = moved(buffers(build()), population(build(), unions), 0.1)
    for after, _, calls in results:
        assert_moved(after, expected)
        assert int(after["1.num_batches_tracked"]) == int(after["4.num_batches_tracked"]) == 1
        assert all(torch.equal(after[name], results[0][0][name]) for name in after)
        assert calls == 3 * 2 * 2
    if not through_ddp:
        without = processes(RANKS).run(_gradients_without, per_rank=[(rank,) for rank in range(RANKS)])
        for (_, grads, _), theirs in zip(results, without, strict=True):
            assert all(map(torch.equal, grads, theirs))


def _gradients_without(rank: int) -> list[Tensor]:
    net = syncbn.convert(build())
    for x in micro_batches(rank):
        (net(x).sin().mean() / 3).backward()
    return [each.grad for each in net.parameters()]


def test_the_first_layer_moves_as_by_the_whole_batch_in_one_forward() -> None:
    """Which is the report's wish; later layers see inputs that were normalized in parts."""
    model, judge = syncbn.convert(build()), build()
    with syncbn.accumulate_statistics(model):
        for x in micro_batches():
            model(x)
    judge(torch.cat(micro_batches()))
    torch.testing.assert_close(buffers(model[1]), buffers(judge[1]))


def test_an_average_of_all_batches_counts_steps() -> None:
    model = syncbn.convert(build(momentum=None))
    expected = torch.zeros(4, dtype=torch.float64)
    for step in range(3):
        x = torch.cat(micro_batches(step=step))
        expected += model[0](x).detach().mean(0) / 3
        with syncbn.accumulate_statistics(model):
            for x in micro_batches(step=step):
                model(x)
    assert_close(model[1].running_mean, expected, 1e-12)
    assert int(model[1].num_batches_tracked) == 3


def _train(rank: int, bound: bool) -> dict[str, Tensor]:
    """Two steps and a half: with the optimizer, the loop stays as it is."""
    model = syncbn.convert(build())
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    if bound:
        with syncbn.accumulate_statistics(model, optimizer):
            for step in range(3):
                for x in micro_batches(rank, step):
                    model(x).sum().backward()
                if step < 2:
                    optimizer.step()
                assert int(model[1].num_batches_tracked) == min(step + 1, 2)
        optimizer.step()
    else:
        for step in range(3):
            with syncbn.accumulate_statistics(model):
                for x in micro_batches(rank, step):
                    model(x).sum().backward()
    return buffers(model)


def test_bound_to_the_optimizer(processes: Any) -> None:
    ours, theirs = (
        processes(RANKS).run(_train, bound, per_rank=[(rank,) for rank in range(RANKS)]) for bound in (True, False)
    )
    for mine, other in zip(ours, theirs, strict=True):
        assert int(mine["1.num_batches_tracked"]) == 3
        assert all(torch.equal(mine[name], other[name]) for name in mine)


# ---- what is left out, and where nothing is added twice


def _with_a_bad_micro_batch(rank: int) -> dict[str, Tensor]:
    model = syncbn.convert(build())
    batches = micro_batches(rank)
    if rank == 1:
        batches[1][0, 0] = torch.nan
    with syncbn.accumulate_statistics(model):
        for x in batches:
            model(x)
    return buffers(model)


def test_a_micro_batch_that_is_not_finite_is_left_out_on_all_processes(processes: Any) -> None:
    results = processes(RANKS).run(_with_a_bad_micro_batch, per_rank=[(rank,) for rank in range(RANKS)])
    unions = [torch.cat(parts) for parts in zip(*map(micro_batches, range(RANKS)), strict=True)]
    for after in results:
        assert_moved(after, moved(buffers(build()), population(build(), unions[::2]), 0.1))


def test_nothing_moves_without_a_micro_batch_or_after_an_exception() -> None:
    model = syncbn.convert(build())
    before = buffers(model)
    with syncbn.accumulate_statistics(model):
        pass

    def failing() -> None:
        with syncbn.accumulate_statistics(model):
            model(micro_batches()[0])
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert all(torch.equal(each, before[name]) for name, each in buffers(model).items())
    model(micro_batches()[0])
    assert int(model[1].num_batches_tracked) == 1


def test_double_backward_adds_nothing() -> None:
    """It forms the moments again, to differentiate them."""
    model = syncbn.convert(build())
    with syncbn.accumulate_statistics(model):
        for x in micro_batches():
            x = x.requires_grad_()
            (dx,) = torch.autograd.grad(model(x).sin().sum(), x, create_graph=True)
            dx.square().sum().backward()
    assert_moved(buffers(model), moved(buffers(build()), population(build(), micro_batches()), 0.1))


def test_activation_checkpointing_adds_nothing() -> None:
    model = syncbn.convert(build())
    with syncbn.accumulate_statistics(model):
        for x in micro_batches():
            x = x.requires_grad_()
            checkpoint(model, x, use_reentrant=False, context_fn=checkpoint_contexts).sin().sum().backward()
    assert_moved(buffers(model), moved(buffers(build()), population(build(), micro_batches()), 0.1))


def test_layers_that_are_normalized_together() -> None:
    layers = [syncbn.SyncBatchNorm(3).double() for _ in range(2)]
    xs = micro_batches()
    with syncbn.accumulate_statistics(nn.ModuleList(layers)):
        for x in xs:
            normalize_together(layers, [x, 2 * x])
    for i, layer in enumerate(layers):
        assert_close(layer.running_mean, 0.1 * (i + 1) * torch.cat(xs).mean(0), 1e-12)


def test_validation_in_between_and_other_models_are_left_alone() -> None:
    model, other = syncbn.convert(build()), syncbn.convert(build())
    with syncbn.accumulate_statistics(model):
        model(micro_batches()[0])
        before = buffers(model)
        model.eval()(micro_batches()[1])
        model.train()
        other(micro_batches()[0])
        assert int(other[1].num_batches_tracked) == 1
        assert all(torch.equal(each, before[name]) for name, each in buffers(model).items())


def test_two_models_with_an_optimizer_each() -> None:
    models = [syncbn.convert(build()), syncbn.convert(build())]
    optimizers = [torch.optim.SGD(each.parameters(), 0.0) for each in models]
    with (
        syncbn.accumulate_statistics(models[0], optimizers[0]),
        syncbn.accumulate_statistics(models[1], optimizers[1]),
    ):
        for x in micro_batches():
            models[0](models[1](x)[:, :3])
        optimizers[0].step()
        assert [int(each[1].num_batches_tracked) for each in models] == [1, 0]
    assert [int(each[1].num_batches_tracked) for each in models] == [1, 1]


def test_in_a_compiled_model() -> None:
    model = syncbn.convert(build())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        before = buffers(model)
        with syncbn.accumulate_statistics(compiled):
            for x in micro_batches(counts=(2, 2, 2)):
                compiled(x).sum().backward()
        assert_moved(buffers(model), moved(before, population(build(), micro_batches(counts=(2, 2, 2))), 0.1))
    compiled(micro_batches()[0])
    assert int(model[1].num_batches_tracked) == 3


def test_mistakes_are_told() -> None:
    with pytest.raises(
        ValueError, match=r"no SyncBatchNorm with running statistics .* also where there is one process"
    ):
        syncbn.accumulate_statistics(build()).__enter__()

    def moving() -> None:
        model = syncbn.convert(build())
        with syncbn.accumulate_statistics(model):
            model.float()

    with pytest.raises(RuntimeError, match="other tensors than when the block began"):
        moving()


# ---- Lightning-AI/pytorch-lightning#17446


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = build()
        self.fails = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.fails and batch_idx == 3:
            raise ArithmeticError("in the middle")
        return self.net(batch[0]).sin().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def _fit(folder: str, fails: bool) -> dict[str, Tensor]:
    rank = dist.get_rank()
    module = Module()
    module.fails = fails
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy="ddp",
        plugins=[SyncBatchNormPlugin(), LightningEnvironment()],
        callbacks=[AccumulateStatisticsCallback()],
        accumulate_grad_batches=2,
        max_epochs=1,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    loader = DataLoader(TensorDataset(torch.cat(micro_batches(rank, counts=(10, 10)))[:20]), batch_size=4)
    try:
        trainer.fit(module, loader)
    except ArithmeticError:
        assert fails
    module.net.train()(micro_batches()[0])  # the block is left: this one moves at once
    return buffers(module.net)


def test_a_trainer_moves_the_statistics_with_its_steps(processes: Any, tmp_path: Any) -> None:
    """Five batches of each process, of which two make a step, and the last one, too."""
    parts = [torch.cat(micro_batches(rank, counts=(10, 10)))[:20].split(4) for rank in range(RANKS)]
    unions = [torch.cat(each) for each in zip(*parts, strict=True)]
    for after in processes(RANKS).run(_fit, str(tmp_path), False):
        expected = buffers(build())
        for step in range(0, 5, 2):
            expected |= moved(expected, population(build(), unions[step : step + 2]), 0.1)
        expected |= moved(expected, population(build(), [micro_batches()[0]]), 0.1)
        assert_moved(after, {name: each for name, each in expected.items() if "running" in name})
        assert int(after["1.num_batches_tracked"]) == 4
    for after in processes(RANKS).run(_fit, str(tmp_path), True):
        assert int(after["1.num_batches_tracked"]) == 2  # one step, and one batch after the exception


def test_the_documentation_runs() -> None:
    names: dict[str, Any] = {}
    for block in blocks("docs/gradient-accumulation.md"):
        exec(block, names)
