"""How long a run will take, and what the summary says of a model."""

import math

import pytest
import torch
from torch import nn

import syncbn
from syncbn.training.callbacks.progress import Pace, images_of
from syncbn.training.callbacks.summary import _normalization as normalization
from syncbn.training.callbacks.summary import aligned, effective_batch


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_the_pace_is_that_of_steps_without_the_first_and_without_validations():
    clock = Clock()
    pace = Pace(clock)
    assert pace.images_per_second == 0
    assert math.isinf(pace.remaining(10, 1))
    for seconds in (30, 2, 2, 2):
        clock.now += seconds
        pace.step(8)
    assert pace.images_per_second == 4
    clock.now += 1  # checkpoints and the like
    pace.start()
    clock.now += 20
    pace.validation()
    clock.now += 2
    pace.step(8)
    assert pace.images_per_second == 4
    assert pace.remaining(steps=10, validations=3) == 10 * 2 + 3 * 20
    assert math.isinf(pace.remaining(math.inf, 0))


@pytest.mark.parametrize(
    ("batch", "number"),
    [
        ({"image": torch.zeros(5, 3, 2, 2)}, 5),
        ({"image": [torch.zeros(3, 2, 2)] * 4, "targets": [{}] * 4}, 4),
        (torch.zeros(6, 3), 6),
        ({"text": "no images"}, 0),
        (7, 0),
    ],
)
def test_images_are_counted(batch, number):
    assert images_of(batch) == number


def test_the_summary_names_what_is_not_synchronized_and_why():
    norms = [nn.BatchNorm2d(4) for _ in range(3)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *norms, nn.GroupNorm(2, 4))
    syncbn.convert(model, include=["1"])
    syncbn.freeze(model, include=["2"])
    told = aligned(normalization(model, batch=2))
    assert told == [
        "  normalization     1 of 3 layers synchronized over this process: 2 images in each",
        "  not synchronized  1 frozen (syncbn.freeze keeps it in eval mode): 2",
        "                    1 local: 2 images in each (not named by include='1'): 3",
    ]


def test_a_model_without_batch_normalization():
    (line,) = normalization(nn.Sequential(nn.GroupNorm(2, 4), nn.Linear(1, 1)), batch=2)
    assert line == ("normalization", "no batch normalization layer (1 GroupNorm)")


def test_groups_by_samples_say_their_number():
    layer = syncbn.SyncBatchNorm(4)
    assert effective_batch(layer, 2) == 2
    assert effective_batch(layer, None) is None
    model = syncbn.convert(nn.Sequential(nn.BatchNorm2d(4)), statistics_batch=32)
    assert effective_batch(model[0], 2) == 32
