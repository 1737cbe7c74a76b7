"""Parameter groups, the learning rate of the global batch, and schedules; by themselves and through a Trainer."""

import functools
import math
import warnings

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from syncbn.training.errors import UserError
from syncbn.training.models import UNet
from syncbn.training.tasks import SegmentationTask
from syncbn.training.tasks.losses import CrossEntropyLoss
from syncbn.training.tasks.optimization import (
    cosine,
    linear_scale,
    make_schedule,
    multistep,
    one_cycle,
    parameter_groups,
    poly,
    scale_learning_rates,
)


def test_weight_decay_spares_normalization_and_biases():
    model = nn.ModuleDict({"unet": UNet(3), "norm": nn.LayerNorm((3, 4, 4)), "frozen": nn.Linear(2, 2)})
    model["frozen"].requires_grad_(False)
    decayed, kept = parameter_groups(model)
    assert "weight_decay" not in decayed
    assert kept["weight_decay"] == 0
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert {id(p) for p in decayed["params"]} == {id(m.weight) for m in convolutions}
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(decayed["params"]) + len(kept["params"]) == len(trainable)


def test_a_backbone_has_a_learning_rate_of_its_own():
    model = nn.ModuleDict({"backbone": UNet(2, widths=(4, 8)), "head": nn.Conv2d(2, 2, 1)})
    groups = parameter_groups(model, model["backbone"], 0.1)
    optimizer = torch.optim.SGD(groups, lr=0.5, weight_decay=0.1)
    scale_learning_rates(optimizer, 2.0)
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {rate_of[id(p)] for p in model["backbone"].parameters()} == {0.5 * 2.0 * 0.1}
    assert {rate_of[id(p)] for p in model["head"].parameters()} == {1.0}
    assert all((decay_of[id(p)] == 0) == (p.ndim == 1) for p in model.parameters())
    assert len(rate_of) == len(list(model.parameters()))
    assert parameter_groups(model, model["backbone"], 1.0) == parameter_groups(model)


def learning_rates(schedule, steps, count=None, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = make_schedule(functools.partial(schedule, **options), optimizer, total_steps=steps, steps_per_epoch=10)
    rates = []
    for _ in range(count or steps + 2):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_one_cycle_goes_up_and_down_once():
    rates = learning_rates(one_cycle, 100, warmup=0.3, initial=0.1, final=0.01)
    assert math.isclose(rates[0], 0.2)
    assert math.isclose(max(rates), 2.0)
    assert rates.index(max(rates)) == 30
    assert rates[:31] == sorted(rates[:31])
    assert rates[30:] == sorted(rates[30:], reverse=True)
    assert math.isclose(rates[100], 0.02)
    assert rates[101] == rates[100]  # past the end it stays


def torchs(make, steps):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_without_warm_up_the_schedules_are_torchs():
    schedules = torch.optim.lr_scheduler
    for ours, make in [
        (learning_rates(poly, 20, power=0.9), lambda o: schedules.PolynomialLR(o, total_iters=20, power=0.9)),
        (learning_rates(cosine, 20, 21), lambda o: schedules.CosineAnnealingLR(o, T_max=20)),
        (learning_rates(multistep, 40, milestones=[1, 2.5]), lambda o: schedules.MultiStepLR(o, [10, 25])),
    ]:
        assert ours == pytest.approx(torchs(make, len(ours)), abs=1e-12)


def test_warm_up_is_linear_in_steps_or_epochs():
    """The reference recipe for detection: LinearLR over the first iterations, times MultiStepLR."""
    ours = learning_rates(multistep, 40, milestones=[2], warmup_steps=8, warmup_start=0.001)
    schedules = torch.optim.lr_scheduler
    reference = torchs(
        lambda o: schedules.ChainedScheduler(
            [schedules.LinearLR(o, start_factor=0.001, total_iters=8), schedules.MultiStepLR(o, [20])]
        ),
        len(ours),
    )
    assert ours == pytest.approx(reference, abs=1e-9)
    in_epochs = learning_rates(multistep, 40, milestones=[2], warmup_epochs=0.8, warmup_start=0.001)
    assert in_epochs == ours
    for schedule in (poly, cosine):
        rates = learning_rates(schedule, 20, warmup_steps=5, warmup_start=0.2)
        assert rates[0] == pytest.approx(0.4)
        assert rates[5] == 2.0 == max(rates)
        assert rates[5:21] == pytest.approx(learning_rates(schedule, 15)[:16])  # what is left is its whole course


def test_megdets_warm_up_starts_from_the_rate_before_scaling():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.02)
    scale = linear_scale(256, 16)
    scale_learning_rates(optimizer, scale)
    make_schedule(
        functools.partial(multistep, warmup_steps=100, warmup_start=None),
        optimizer,
        total_steps=1000,
        steps_per_epoch=40,
        lr_scale=scale,
    )
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.02)
    assert optimizer.param_groups[0]["initial_lr"] == pytest.approx(0.32)
    assert linear_scale(8, None) == 1


def test_torchs_own_schedules_get_what_they_know():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    length = {"total_steps": 10, "steps_per_epoch": 5, "lr_scale": 1.0}
    cycle = make_schedule(functools.partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0), optimizer, **length)
    assert cycle.total_steps == 10
    step = make_schedule(functools.partial(torch.optim.lr_scheduler.StepLR, step_size=3), optimizer, **length)
    assert step.step_size == 3


@pytest.mark.parametrize("schedule", [one_cycle, poly, cosine])
def test_a_resumed_schedule_takes_the_new_length(schedule):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    short = schedule(optimizer, total_steps=10)
    for _ in range(10):
        optimizer.step()
        short.step()
    longer = schedule(optimizer, total_steps=20)
    longer.load_state_dict(short.state_dict())
    assert longer.last_epoch == 10
    optimizer.step()
    longer.step()
    assert longer.get_last_lr()[0] > 0.4


@pytest.mark.parametrize(
    ("schedule", "wrong"),
    [
        (one_cycle, {"warmup": 2}),
        (poly, {"power": 0}),
        (cosine, {"final": -1}),
        (multistep, {"gamma": 0}),
        (multistep, {"milestones": [22, 16]}),
        (multistep, {"warmup_steps": -1}),
        (multistep, {"warmup_start": 2}),
    ],
)
def test_impossible_schedules_are_refused(schedule, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        learning_rates(schedule, 5, **wrong)


def test_epochs_without_a_length_are_refused_by_name():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ValueError, match="milestones are epochs, but the length of an epoch is not known"):
        multistep(optimizer, total_steps=5)
    with pytest.raises(ValueError, match="warmup_epochs are epochs"):
        poly(optimizer, total_steps=5, warmup_epochs=1)


# Through a Trainer


class Pairs(LightningDataModule):
    """14 images: 7 batches of 2."""

    batch_size = 2
    items = 14

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(self.items, 3, 8, 8, generator=generator)
        return DataLoader(
            [{"image": image, "semantic": (image[0] > 0.5).long(), "index": i} for i, image in enumerate(images)],
            batch_size=self.batch_size,
        )


def fitted(optimizer=None, data=None, trainer=None, ckpt_path=None, **task):
    torch.manual_seed(0)
    made = SegmentationTask(
        UNet(2, widths=(4, 8)),
        CrossEntropyLoss(),
        ["background", "thing"],
        optimizer or functools.partial(torch.optim.SGD, lr=0.1),
        **task,
    )
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    runner = Trainer(**quiet, enable_model_summary=False, **({"max_epochs": 3} | (trainer or {})))
    runner.fit(made, datamodule=data or Pairs(), ckpt_path=ckpt_path)
    return made, runner


def test_accumulation_counts_in_the_schedule_and_in_the_scale():
    seen = {}

    def schedule(optimizer, total_steps, steps_per_epoch, lr_scale):
        seen.update(total=total_steps, epoch=steps_per_epoch, scale=lr_scale, lr=optimizer.param_groups[0]["lr"])
        return poly(optimizer, total_steps)

    task, trainer = fitted(scheduler=schedule, base_batch_size=8, trainer={"accumulate_grad_batches": 2})
    # An epoch of 7 batches ends with a step of one batch.
    assert seen == {"total": 12, "epoch": 4, "scale": 0.5, "lr": 0.05}
    assert trainer.global_step == 12
    assert task.global_batch_size == 4
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0  # the end of the schedule is that of the run


@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_run_resumed_with_another_global_batch_warns(tmp_path, accumulated):
    _, trainer = fitted(base_batch_size=8, trainer={"max_epochs": 1})
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    options = {"max_epochs": 2, "accumulate_grad_batches": accumulated}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        _, resumed = fitted(base_batch_size=8, trainer=options, ckpt_path=tmp_path / "one.ckpt")
    told = [str(each.message) for each in told if "images per step" in str(each.message)]
    assert len(told) == (accumulated == 2)
    assert all("is of a run with 2 images per step, over all processes, and this one has 4" in each for each in told)
    assert resumed.optimizers[0].param_groups[0]["lr"] == 0.025  # as the warning says


def test_clipping_bounds_the_gradient_that_the_optimizer_sees():
    class Recording(torch.optim.SGD):
        norms = []  # noqa: RUF012

        def step(self, closure=None):
            loss = closure()
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))
            super().step()
            return loss

    fitted(functools.partial(Recording, lr=0.1), trainer={"gradient_clip_val": 0.01, "accumulate_grad_batches": 2})
    assert len(Recording.norms) == 12
    assert max(Recording.norms) <= 0.01 + 1e-6
    assert min(Recording.norms) > 0.009  # the gradients were greater


def test_the_global_batch_is_the_loaders_where_the_data_module_has_none():
    class Unknown(Pairs):
        batch_size = None

        def train_dataloader(self):
            self.batch_size = 2
            loader = super().train_dataloader()
            self.batch_size = None
            return loader

    task, _ = fitted(base_batch_size=2, data=Unknown(), trainer={"max_epochs": -1, "max_steps": 2})
    assert task.global_batch_size == 2

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield {"image": torch.rand(2, 3, 8, 8), "semantic": torch.zeros(2, 8, 8, dtype=torch.long)}

    class Nowhere(Pairs):
        batch_size = None

        def train_dataloader(self):
            return DataLoader(Stream(), batch_size=None)

    with pytest.raises(UserError, match=r"task.base_batch_size: neither the data nor its loader says"):
        fitted(base_batch_size=2, data=Nowhere())
    fitted(data=Nowhere())


def test_a_schedule_without_an_end_is_refused():
    with pytest.raises(UserError, match="the schedule needs an end"):
        fitted(scheduler=poly, trainer={"max_epochs": -1, "max_time": "00:00:00:01"})


@pytest.mark.parametrize("wrong", [{"base_batch_size": 0}, {"backbone_lr_factor": -1}, {"backbone_lr_factor": 0.1}])
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        fitted(**wrong)
