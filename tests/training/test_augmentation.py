"""Augmentation: what happens to an image happens to all that is said of it; random numbers come from nowhere else."""

import random

import numpy as np
import pytest
import torch
from torchvision.ops import masks_to_boxes

from syncbn.training.config import compose_config
from syncbn.training.data import DigitScenes, DigitScenesDataModule, augmentation
from syncbn.training.data.augmentation import CropAtMost, DropUnusable, typed
from syncbn.training.data.items import Items
from syncbn.training.data.order import Draw
from syncbn.training.randomness import reseed, reseeded
from syncbn.training.train import build_from

RECIPES = {
    "segmentation": augmentation.segmentation_training(96, 80, distort=0.5),
    "detection": augmentation.detection_training(distort=0.5),
    "multiscale": augmentation.detection_multiscale((64, 80), 100),
    "scale jitter": augmentation.detection_scale_jitter((90, 90), scale=(0.5, 2.0)),
}


def scenes(recipe=None, seed=0):
    return Items(DigitScenes("train", 6), recipe, seed)


@pytest.mark.parametrize("name", RECIPES)
def test_an_item_is_a_function_of_seed_epoch_and_number(name):
    items = scenes(RECIPES[name])
    first = items[Draw(2, 3)]["image"]
    items[Draw(4, 0)]
    torch.rand(5), np.random.rand(5), random.random()
    assert torch.equal(scenes(RECIPES[name])[Draw(2, 3)]["image"], first)
    others = [scenes(RECIPES[name], seed)[Draw(2, epoch)]["image"] for seed in range(2) for epoch in range(4)]
    assert len({image.numpy().tobytes() for image in others}) >= 3


def test_the_process_goes_on_with_its_own_random_numbers():
    def drawn():
        return float(torch.rand(())), float(np.random.rand()), random.random()

    reseed(7)
    expected = [drawn() for _ in range(2)]
    reseed(7)
    actual = [drawn()]
    scenes(RECIPES["segmentation"])[Draw(0, 0)]
    with pytest.raises(IndexError), reseeded(1, 2, 3):
        [drawn()][1]
    assert [*actual, drawn()] == expected


@pytest.mark.parametrize("name", RECIPES)
def test_masks_boxes_and_classes_follow_the_image(name):
    """Digits' masks lie in their boxes, before and after."""
    for index in range(6):
        for epoch in range(4):
            item = scenes(RECIPES[name])[Draw(index, epoch)]
            height, width = item["image"].shape[-2:]
            assert item["image"].dtype == torch.float32
            assert 0 <= item["image"].min() <= item["image"].max() <= 1 + 1e-5
            assert item["semantic"].shape == (height, width)
            assert all(type(value) is torch.Tensor for value in item.values() if isinstance(value, torch.Tensor))
            assert item["masks"].shape[1:] == (height, width)
            assert item["masks"].dtype == torch.bool
            n = len(item["boxes"])
            assert len(item["masks"]) == n or name == "segmentation"
            assert len(item["labels"]) == len(item["masks"])
            semantic = (item["masks"] * item["labels"][:, None, None]).amax(0) if len(item["masks"]) else 0
            kept = item["semantic"] > 0
            assert (semantic == item["semantic"])[kept].float().mean() > 0.99 or name != "segmentation"
            visible = item["masks"].flatten(1).any(1)
            if n and len(item["masks"]) == n:
                expected = masks_to_boxes(item["masks"][visible])
                # What is cropped away of a digit may leave a mask that is smaller than the cropped box.
                assert (expected[:, :2] > item["boxes"][visible][:, :2] - 2).all()
                assert (expected[:, 2:] < item["boxes"][visible][:, 2:] + 1).all()
            if n:
                assert (item["boxes"] >= 0).all()
                assert (item["boxes"][:, 2] <= width).all()
                assert (item["boxes"][:, 3] <= height).all()


def test_a_crop_never_pads():
    torch.manual_seed(0)
    sizes = {tuple(CropAtMost((40, 200))(typed(DigitScenes("train", 1)[0]))["image"].shape) for _ in range(3)}
    assert sizes == {(3, 40, 96)}


def test_crowds_and_slivers_are_no_examples():
    item = {
        "image": torch.zeros(3, 10, 10),
        "boxes": torch.tensor([[0, 0, 5, 5], [1, 1, 6, 6], [2, 2, 2.5, 8], [3, 3, 9, 9]]).float(),
        "labels": torch.arange(4),
        "masks": torch.zeros(4, 10, 10, dtype=torch.bool),
        "iscrowd": torch.tensor([0, 1, 0, 0]),
        "area": torch.ones(4),
        "semantic": torch.zeros(10, 10, dtype=torch.int64),
    }
    out = DropUnusable()(typed(item))
    assert out["labels"].tolist() == [0, 3]
    assert out["boxes"].tolist() == [[0, 0, 5, 5], [3, 3, 9, 9]]
    assert len(out["masks"]) == 2
    assert "iscrowd" not in out
    assert out["semantic"].shape == (10, 10)
    assert DropUnusable()({"image": item["image"]}).keys() == {"image"}


def test_bytes_become_fractions():
    image = torch.full((3, 4, 4), 255, dtype=torch.uint8)
    assert torch.equal(augmentation.unchanged()(typed({"image": image}))["image"], torch.ones(3, 4, 4))


@pytest.mark.parametrize(
    ("make", "wrong", "message"),
    [
        (augmentation.segmentation_training, {"scale": [2, 1]}, "scale must be"),
        (augmentation.segmentation_training, {"crop_size": 0}, "crop_size must be at least 1"),
        (augmentation.segmentation_training, {"base_size": 0}, "base_size must be at least 1"),
        (augmentation.segmentation_training, {"flip": 2}, "flip must be a probability"),
        (augmentation.detection_training, {"distort": -1}, "distort must be a probability"),
        (augmentation.detection_scale_jitter, {"scale": [0, 1]}, "scale must be"),
    ],
)
def test_impossible_values_are_named(make, wrong, message):
    with pytest.raises(ValueError, match=message):
        make(**wrong)


@pytest.mark.parametrize("option", ["none", "segmentation", "detection", "detection_multiscale", "detection_lsj"])
def test_every_option_reaches_the_data(option):
    data = build_from("data", compose_config([f"augmentation={option}", "data.train_size=2", "data.val_size=1"]).data)
    assert isinstance(data, DigitScenesDataModule)
    assert data.train_set[0]["image"].dtype == torch.float32
    names = {type(step).__name__ for step in data.train_set.transforms.transforms}
    assert ("RandomHorizontalFlip" in names) == (option != "none")
