"""The U-Net and the segmentation task, without processes."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from syncbn.training.models import UNet
from syncbn.training.tasks import SegmentationTask
from syncbn.training.tasks.losses import CrossEntropyDiceLoss, soft_dice_loss
from syncbn.training.tasks.optimization import one_cycle, parameter_groups, poly
from syncbn.training.tasks.segmentation import repeated_items


def make_task(model=None, **changes):
    arguments = {
        "loss": CrossEntropyDiceLoss(),
        "class_names": ["background", "thing"],
        "optimizer": functools.partial(torch.optim.AdamW, lr=1e-3),
    }
    return SegmentationTask(model or UNet(2, widths=(4, 8)), **(arguments | changes))


@pytest.mark.parametrize("size", [(96, 96), (97, 61), (8, 15)])
def test_unet_keeps_height_and_width(size):
    scores = UNet(11)(torch.rand(2, 3, *size))
    assert scores.shape == (2, 11, *size)


def test_unet_is_compact_and_knows_only_ordinary_batch_norm():
    model = UNet(11)
    assert sum(p.numel() for p in model.parameters()) < 500_000
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]
    assert len(norms) == 14
    assert {type(norm) for norm in norms} == {nn.BatchNorm2d}


@pytest.mark.parametrize("wrong", [{"widths": (8,)}, {"widths": (8, 0)}, {"num_classes": 0}])
def test_unet_refuses_impossible_sizes(wrong):
    with pytest.raises(ValueError, match="at least"):
        UNet(**({"num_classes": 2} | wrong))


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


def learning_rates(schedule, steps, **options):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = schedule(optimizer, total_steps=steps, **options)
    rates = []
    for _ in range(steps + 2):
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


def test_poly_is_torchs_polynomial():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    reference = torch.optim.lr_scheduler.PolynomialLR(optimizer, total_iters=20, power=0.9)
    for rate in learning_rates(poly, 20, power=0.9):
        assert math.isclose(rate, reference.get_last_lr()[0], abs_tol=1e-12)
        optimizer.step()
        reference.step()


def test_a_resumed_schedule_takes_the_new_length():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    short = one_cycle(optimizer, total_steps=10)
    for _ in range(10):
        optimizer.step()
        short.step()
    longer = one_cycle(optimizer, total_steps=20)
    longer.load_state_dict(short.state_dict())
    assert longer.last_epoch == 10
    optimizer.step()
    longer.step()
    assert longer.get_last_lr()[0] > 0.5


@pytest.mark.parametrize(("schedule", "wrong"), [(one_cycle, {"warmup": 2}), (poly, {"power": 0})])
def test_impossible_schedules_are_refused(schedule, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        schedule(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), total_steps=5, **wrong)


def test_dice_loss_at_its_ends():
    target = torch.tensor([[[0, 1], [2, 2]]])
    right = nn.functional.one_hot(target, 4).movedim(-1, 1) * 50.0
    assert soft_dice_loss(right, target) < 1e-6
    assert soft_dice_loss(right.roll(1, 1), target) > 0.4


def test_loss_without_dice_is_weighted_cross_entropy():
    scores, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    loss = CrossEntropyDiceLoss(background_weight=0.25, dice_weight=0)(scores, target)
    reference = nn.CrossEntropyLoss(weight=torch.tensor([0.25, 1, 1]))(scores, target)
    torch.testing.assert_close(loss, reference)


def test_any_module_can_be_the_model():
    class LikeTorchvision(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return {"out": self.conv(x)}

    assert make_task(LikeTorchvision())(torch.rand(1, 3, 8, 8)).shape == (1, 2, 8, 8)


def test_a_model_with_other_classes_is_refused_by_name():
    with pytest.raises(ValueError, match=r"scores \[B, 2, H, W\].*got \[1, 5, 8, 8\]"):
        make_task(UNet(5, widths=(4, 8)))(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize(("items", "world"), [(7, 2), (5, 3), (1, 2), (2, 5), (8, 4)])
def test_each_validation_item_counts_once_whatever_the_sampler_repeats(items, world):
    counted = []
    for rank in range(world):
        sampler = DistributedSampler(range(items), num_replicas=world, rank=rank, shuffle=False)
        loader = DataLoader(list(range(items)), sampler=sampler)
        index = torch.cat([torch.as_tensor(batch) for batch in loader])
        counted += index[~repeated_items(index, loader)].tolist()
    assert sorted(counted) == list(range(items))
