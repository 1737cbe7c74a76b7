"""The digit scenes: deterministic, consistent, disjoint, and what they claim to hold."""

import numpy as np
import pytest
import torch
from torchvision.ops import masks_to_boxes

from syncbn.training.data import DigitScenes, DigitScenesDataModule
from syncbn.training.data.batches import AnyBatches
from syncbn.training.data.digits import load_scans

SCENES = 24


@pytest.fixture(scope="module")
def scenes():
    dataset = DigitScenes("train", SCENES)
    return [dataset[i] for i in range(SCENES)]


def test_a_scene_depends_on_seed_and_index_alone():
    first, again = DigitScenes("train", 10, seed=3), DigitScenes("train", 4, seed=3)
    again[0]  # what was drawn before does not matter
    for key, value in first[2].items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(again[2][key])), key
    assert not torch.equal(first[2]["image"], first[3]["image"])
    assert not torch.equal(first[2]["image"], DigitScenes("train", 10, seed=4)[2]["image"])
    assert not torch.equal(first[2]["image"], DigitScenes("val", 10, seed=3)[2]["image"])


def test_training_and_validation_share_no_scan():
    train, train_labels = load_scans("train")
    val, val_labels = load_scans("val")
    assert len(train) + len(val) == 1797
    assert not {scan.tobytes() for scan in train} & {scan.tobytes() for scan in val}
    assert set(train_labels) == set(val_labels) == set(range(10))


def test_shapes_and_types(scenes):
    for i, scene in enumerate(scenes):
        n = len(scene["labels"])
        assert scene["image"].shape == (3, 96, 96)
        assert scene["image"].dtype == torch.float32
        assert 0 <= scene["image"].min() < scene["image"].max() <= 1
        assert scene["semantic"].shape == (96, 96)
        assert scene["semantic"].dtype == torch.int64
        assert scene["boxes"].shape == (n, 4)
        assert scene["boxes"].dtype == torch.float32
        assert scene["labels"].dtype == torch.int64
        assert scene["masks"].shape == (n, 96, 96)
        assert scene["masks"].dtype == torch.bool
        assert scene["index"] == i


def test_masks_boxes_and_labels_tell_the_same(scenes):
    for scene in scenes:
        assert scene["masks"].sum(0).max() == 1  # visible ink belongs to one digit
        semantic = (scene["masks"] * scene["labels"][:, None, None]).sum(0)
        assert torch.equal(semantic, scene["semantic"])
        expected = masks_to_boxes(scene["masks"])  # its far edges are inclusive
        expected[:, 2:] += 1
        assert torch.equal(scene["boxes"], expected)


def test_scenes_hold_two_to_six_digits_of_all_classes_and_varied_size():
    dataset = DigitScenes("train", 150)
    all_scenes = [dataset[i] for i in range(150)]
    counts = {len(scene["labels"]) for scene in all_scenes}
    assert counts == {2, 3, 4, 5, 6}
    labels = torch.cat([scene["labels"] for scene in all_scenes])
    assert labels.bincount(minlength=11)[1:].min() > 20
    boxes = torch.cat([scene["boxes"] for scene in all_scenes])
    heights = boxes[:, 3] - boxes[:, 1]
    assert heights.quantile(0.9) > 1.4 * heights.quantile(0.1)


def test_ink_cannot_be_found_by_brightness_alone(scenes):
    """Not even with each scene's best threshold, chosen with the truth in hand; and that names no digit."""
    ious = []
    for scene in scenes:
        grey, ink = scene["image"].mean(0), scene["semantic"] > 0
        thresholds = np.linspace(0.05, 0.95, 40)
        candidates = [mask for t in thresholds for mask in (grey > t, grey < t)]
        ious.append(max(float((m & ink).sum() / (m | ink).sum()) for m in candidates))
    assert np.mean(ious) < 0.92


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"split": "test"}, "split must be one of train, val"),
        ({"size": 0}, "at least 1"),
        ({"image_size": 20}, "at least 64"),
        ({"digits": (3, 2)}, "fewest <= most"),
        ({"digits": (60, 60)}, "at most 12 fit"),
        ({"digit_size": (20, 90)}, "digit_size"),
        ({"seed": -1}, "seed"),
    ],
)
def test_impossible_scenes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        DigitScenes(**({"split": "train", "size": 1} | wrong))


def test_the_fullest_scene_is_finished():
    assert len(DigitScenes("train", 1, digits=(12, 12))[0]["labels"]) == 12


def test_an_index_outside_is_refused():
    with pytest.raises(IndexError, match="scene 3 of 3"):
        DigitScenes("val", 3)[3]


def test_batches_stack_images_and_list_instances():
    dataset = DigitScenes("train", 3)
    batch = AnyBatches()([dataset[i] for i in range(3)])
    assert batch["image"].shape == (3, 3, 96, 96)
    assert batch["semantic"].shape == (3, 96, 96)
    assert batch["index"].tolist() == [0, 1, 2]
    assert [len(boxes) for boxes in batch["boxes"]] == [len(labels) for labels in batch["labels"]]


def test_the_data_module_shuffles_only_training_and_keeps_splits_apart():
    data = DigitScenesDataModule(train_size=10, val_size=5, batch_size=4)
    assert [len(batch["image"]) for batch in data.train_dataloader()] == [4, 4]  # no odd batch
    assert torch.cat([batch["index"] for batch in data.val_dataloader()]).tolist() == [0, 1, 2, 3, 4]
    assert data.train_set.dataset.split == "train"
    assert data.val_set.dataset.split == "val"


@pytest.mark.parametrize(
    "wrong", [{"batch_size": 0}, {"batch_size": "two"}, {"num_workers": -1}, {"digits": 3}, {"val_size": 1.5}]
)
def test_the_data_module_names_the_wrong_argument(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be"):
        DigitScenesDataModule(**wrong)
