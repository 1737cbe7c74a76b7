"""Every experiment composes, builds, trains two steps and validates two, on a miniature of the format of its data."""

import math

import miniatures
import pytest
import torch
import torchvision
from omegaconf.errors import MissingMandatoryValue
from torch import nn

from syncbn.training.config import compose_config, config_dir
from syncbn.training.train import build

DETECTOR = ["model.min_size=64", "model.max_size=96"]
FEW_REGIONS = ["+model.rpn_post_nms_top_n_train=20", "+model.rpn_post_nms_top_n_test=20"]
SEGMENTER = ["augmentation.train.base_size=64", "augmentation.train.crop_size=48"]
BACKBONE = "imagenet=null"
# What makes each small: the images, and the files' folder.
SMALL = {
    "digits-seg": (None, ["data.image_size=64", "data.digits=[1,2]", "data.digit_size=[16,24]"]),
    "digits-det": (None, ["data.image_size=64", "data.digits=[1,2]", "data.digit_size=[16,24]"]),
    "coco-fcos": (miniatures.coco, [*DETECTOR, BACKBONE]),
    "coco-fasterrcnn": (miniatures.coco, [*DETECTOR, *FEW_REGIONS, "augmentation.train.size=[64,64]"]),
    "voc-deeplab": (miniatures.voc, [*SEGMENTER, "augmentation.val.size=48", BACKBONE, "data.batch_size=2"]),
    "cityscapes-deeplab": (miniatures.cityscapes, [*SEGMENTER, "augmentation.val.size=48", BACKBONE]),
}
# Not experiments of their own, or tested elsewhere.
OTHERS = {"study"}


def composed(name, tmp_path, *overrides):
    miniature, small = SMALL[name]
    root = [] if miniature is None else [f"data.train.root={miniature(tmp_path)}"]
    return compose_config([f"experiment={name}", "trainer=cpu", f"run_dir={tmp_path}", *root, *small, *overrides])


def test_each_experiment_is_tested():
    assert {path.stem for path in (config_dir() / "experiment").glob("*.yaml")} - OTHERS == set(SMALL)


@pytest.mark.parametrize("name", SMALL)
def test_an_experiment_trains_and_validates(name, tmp_path):
    torch.manual_seed(0)
    config = composed(
        name,
        tmp_path,
        "data.num_workers=0",
        "trainer.max_epochs=1",
        "trainer.max_steps=-1",
        "trainer.limit_train_batches=2",
        "trainer.limit_val_batches=2",
        "trainer.check_val_every_n_epoch=1",
        "logger=none",
        "callbacks.pictures=null",
        "callbacks.curves=null",
    )
    data, task, trainer = build(config)
    before = {key: value.clone() for key, value in task.model.state_dict().items()}
    trainer.fit(task, datamodule=data)
    assert trainer.global_step == 2
    assert math.isfinite(trainer.callback_metrics["train/loss"])
    assert (
        "val/map" if name in ("digits-det", "coco-fcos", "coco-fasterrcnn") else "val/miou"
    ) in trainer.callback_metrics
    moved = [key for key, value in task.model.state_dict().items() if not torch.equal(value, before[key])]
    norms = {name: layer for name, layer in task.model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    assert {f"{name}.running_mean" for name in norms} <= set(moved)
    assert config.num_classes == len(data.class_names)


@pytest.mark.parametrize("name", ["coco-fcos", "voc-deeplab", "cityscapes-deeplab"])
def test_nothing_is_downloaded_for_a_recipe_that_starts_from_imagenet(name, tmp_path):
    miniature, small = SMALL[name]
    small = [override for override in small if override != BACKBONE]
    config = compose_config(
        [f"experiment={name}", f"run_dir={tmp_path}", f"data.train.root={miniature(tmp_path)}", *small]
    )
    with pytest.raises(MissingMandatoryValue, match=r"Missing mandatory value: .*weights_backbone"):
        build(config)


def test_the_recipe_of_fcos_starts_from_a_file(tmp_path):
    path = tmp_path / "resnet50.pth"
    classifier = torchvision.models.resnet50()
    torch.save(classifier.state_dict(), path)
    config = composed("coco-fcos", tmp_path, f"imagenet={path}", "logger=none")
    _, task, _ = build(config)
    body = task.model.backbone.body
    assert torch.equal(body.conv1.weight, classifier.conv1.weight)
    learning = {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad}
    assert learning == {"layer2", "layer3", "layer4"}
