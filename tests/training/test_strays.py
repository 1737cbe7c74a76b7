"""How far local statistics are from the global ones: against values worked out by hand, and without any effect."""

import csv
import math

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

import syncbn
from syncbn.strays import StrayWatch
from syncbn.training.callbacks.strays import COLUMNS, StatisticsStrays

# Means 1 and 6, variances 1 and 4; together mean 3.5 and variance 8.75.
BATCHES = [[0.0, 2.0], [4.0, 8.0]]
EPS = 1e-5


def two_layers(synchronized):
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Flatten(), nn.BatchNorm1d(1))
    return syncbn.convert(model) if synchronized else model


def strays_of(values, synchronized):
    """On one of two processes: mean, var and values of the first layer, and how many all-reduces measuring took."""
    model = two_layers(synchronized)
    with StrayWatch(model) as watch:
        model(torch.tensor(values).view(-1, 1))
    calls, all_reduce = [], dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: calls.append(1) or all_reduce(*args, **kwargs)
    try:
        strays = watch.measure()
    finally:
        dist.all_reduce = all_reduce
    return watch.names, [each[0].item() for each in strays], len(calls)


@pytest.mark.parametrize("synchronized", [False, True])
def test_two_processes_equal_a_hand_computation(processes, synchronized):
    answers = processes(2).run(strays_of, synchronized, per_rank=[(values,) for values in BATCHES])
    mean = 2.5 / math.sqrt(8.75 + EPS)
    logs = [math.log((var + EPS) / (8.75 + EPS)) for var in (1, 4)]
    var = math.sqrt(sum(log**2 for log in logs) / 2)
    for names, found, all_reduces in answers:
        assert names == ["0", "2"]
        assert found == pytest.approx([mean, var, 4], rel=1e-12)
        assert all_reduces == 1  # for both layers


def test_a_process_without_values_is_left_out(processes):
    for _, found, _ in processes(2).run(strays_of, True, per_rank=[([],), ([4.0, 8.0],)]):
        assert found == pytest.approx([0, 0, 2], abs=1e-7)


def strays_of_padded(values, synchronized):
    model = two_layers(synchronized)
    with syncbn.valid_region(torch.tensor([True, True, False])), StrayWatch(model) as watch:
        model(torch.tensor([*values, 100.0]).view(-1, 1))
    return watch.measure().values[0].item()


def test_padding_counts_where_it_counts_in_the_layer(processes):
    per_rank = [(values,) for values in BATCHES]
    assert processes(2).run(strays_of_padded, True, per_rank=per_rank) == [4, 4]
    assert processes(2).run(strays_of_padded, False, per_rank=per_rank) == [6, 6]


def test_one_process_is_the_union():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5).eval())
    with StrayWatch(model) as watch:
        model(torch.randn(4, 3, 8, 8) * 3 + 20)
    strays = watch.measure()
    assert watch.names == ["1", "3"]
    assert watch.channels == [5, 5]
    assert [each[0].item() for each in strays] == [0, 0, 144]
    assert strays.mean[1].isnan()  # in eval mode: it has no batch statistics
    assert not model[1]._forward_pre_hooks
    assert StrayWatch(nn.ReLU()).measure().mean.shape == (0,)


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 1))
        self.hooks = []

    def training_step(self, batch, batch_idx):
        self.hooks.append(len(self.layers[1]._forward_pre_hooks))
        return self.layers(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trained(callbacks, folder, epochs=2, ckpt_path=None, **options):
    model = Regression()
    data = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=folder,
        **options,
    )
    torch.manual_seed(2)
    trainer.fit(model, DataLoader(data, batch_size=4), ckpt_path=ckpt_path)
    return model, trainer


def rows(path):
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        assert tuple(reader.fieldnames) == COLUMNS
        return list(reader)


def test_only_sampled_steps_have_hooks_and_no_bit_of_training_changes(tmp_path):
    path = tmp_path / "strays.csv"
    observed, _ = trained([StatisticsStrays(str(path), every_n_steps=4)], tmp_path)
    alone, _ = trained([], tmp_path)
    assert observed.hooks == [1, 0, 0, 0, 1, 0, 0, 0, 1, 0]  # two epochs of five steps
    assert alone.hooks == [0] * 10
    for one, other in zip(observed.state_dict().values(), alone.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert [(row["step"], row["layer"], row["channels"], row["values"]) for row in rows(path)] == [
        (step, "layers.1", "4", "4") for step in "048"
    ]
    assert {(row["mean_stray"], row["var_stray"]) for row in rows(path)} == {("0", "0")}


def test_accumulated_gradients_are_one_step(tmp_path):
    path = tmp_path / "strays.csv"
    model, _ = trained([StatisticsStrays(str(path), every_n_steps=2)], tmp_path, accumulate_grad_batches=2)
    assert model.hooks == [1, 0, 0, 0, 1, 0, 0, 1, 0, 0]  # an epoch's fifth batch is a step of its own
    assert [row["step"] for row in rows(path)] == ["0", "2", "4"]


def test_a_resumed_run_keeps_the_rows_before_it(tmp_path):
    path, checkpoint = tmp_path / "strays.csv", tmp_path / "half.ckpt"
    _, trainer = trained([StatisticsStrays(str(path), every_n_steps=2)], tmp_path, epochs=1)
    trainer.save_checkpoint(checkpoint)
    path.write_text(path.read_text() + "6,layers.1,4,4,0,0\n")  # of a step that is not in the checkpoint
    trained([StatisticsStrays(str(path), every_n_steps=2)], tmp_path, epochs=2, ckpt_path=checkpoint)
    assert [row["step"] for row in rows(path)] == ["0", "2", "4", "6", "8"]


def test_an_exception_leaves_no_hooks_and_writes_what_was_measured(tmp_path):
    class Failing(Regression):
        def on_before_zero_grad(self, optimizer):
            if self.global_step == 2:
                raise RuntimeError("on purpose")

    model, path = Failing(), tmp_path / "strays.csv"
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "accelerator": "cpu"}
    callback = StatisticsStrays(str(path), every_n_steps=1)
    with pytest.raises(RuntimeError, match="on purpose"):
        Trainer(callbacks=[callback], enable_model_summary=False, **options).fit(
            model, DataLoader(torch.randn(20, 3), 4)
        )
    assert not model.layers[1]._forward_pre_hooks
    assert [row["step"] for row in rows(path)] == ["0", "1"]


def test_a_wrong_interval_is_refused(tmp_path):
    with pytest.raises(ValueError, match="every_n_steps must be at least 1, got 0"):
        StatisticsStrays(str(tmp_path / "strays.csv"), every_n_steps=0)
