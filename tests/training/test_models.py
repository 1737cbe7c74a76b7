"""torchvision's networks as the configuration builds them: what normalizes, what learns, what is downloaded."""

import socket

import pytest
import torch
from hydra.utils import instantiate
from torch import nn
from torchvision.models import detection
from torchvision.models.resnet import ResNet50_Weights
from torchvision.ops import FrozenBatchNorm2d

import syncbn
from syncbn.training.config import compose_config
from syncbn.training.models import (
    detection_model,
    segmentation_model,
    small_fcos,
    trainable_batch_norm,
    trainable_detector,
)

SEGMENTERS = ["deeplabv3_resnet50", "fcn_resnet50", "lraspp_mobilenet_v3_large"]
DETECTORS = ["fcos_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn_v2"]
LAYERS = {
    "deeplabv3_resnet50": 60,
    "fcn_resnet50": 54,
    "lraspp_mobilenet_v3_large": 47,
    "fcos_resnet50_fpn": 53,
    "retinanet_resnet50_fpn_v2": 53,
    "fasterrcnn_resnet50_fpn_v2": 65,
    "small_fcos": 16,
}
# A small size, and few of Faster R-CNN's regions, for the sake of time.
SMALL = {
    "fcos_resnet50_fpn": ["min_size=64", "max_size=64"],
    "retinanet_resnet50_fpn_v2": ["min_size=64", "max_size=64"],
    "fasterrcnn_resnet50_fpn_v2": [
        "min_size=64",
        "max_size=64",
        "rpn_post_nms_top_n_train=20",
        "rpn_post_nms_top_n_test=20",
        "box_batch_size_per_image=16",
    ],
    "small_fcos": [],
}


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a model wanted to reach the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def configured(name, *overrides):
    """The model of conf/model/<name>.yaml."""
    keys = [
        f"+model.{override}" if "rpn" in override or "box_b" in override else f"model.{override}"
        for override in overrides
    ]
    return instantiate(compose_config([f"model={name}", "class_names=[background,one,two]", *keys]).model)


def batch(*sizes):
    images = [torch.rand(3, *size) for size in sizes]
    boxes = torch.tensor([[5.0, 5.0, 30.0, 40.0], [20.0, 10.0, 36.0, 30.0]])
    return images, [{"boxes": boxes.clone(), "labels": torch.tensor([1, 2])} for _ in images]


def norms(model):
    return [layer for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._NormBase)]


def assert_learns_with_plain_batch_norm(model, name):
    assert not any(isinstance(layer, FrozenBatchNorm2d) for layer in model.modules())
    assert [type(layer) for layer in norms(model)] == [nn.BatchNorm2d] * LAYERS[name]
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(layer.num_batches_tracked >= 1 for layer in norms(model))
    syncbn.convert(model)
    assert all(isinstance(layer, syncbn.SyncBatchNorm) for layer in norms(model))


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_segmenter_trains_and_evaluates(name):
    model = configured(name)
    images = torch.rand(2, 3, 48, 64)
    scores = model(images)["out"]
    assert scores.shape == (2, 3, 48, 64)
    nn.functional.cross_entropy(scores, torch.randint(0, 3, (2, 48, 64))).backward()
    assert_learns_with_plain_batch_norm(model, name)
    with torch.no_grad():
        assert model.eval()(images[:1])["out"].shape == (1, 3, 48, 64)


@pytest.mark.parametrize("name", [*DETECTORS, "small_fcos"])
def test_a_detector_trains_and_evaluates(name):
    model = configured(name, *SMALL[name])
    images, targets = batch((64, 50), (40, 64))
    losses = model(images, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert_learns_with_plain_batch_norm(model, name)
    with torch.no_grad():
        detections = model.eval()(images)
    assert [set(found) for found in detections] == [{"boxes", "labels", "scores"}] * 2


def test_an_auxiliary_head_is_an_option():
    scores = segmentation_model("fcn_resnet50", 3, aux_loss=True).eval()(torch.rand(1, 3, 32, 32))
    assert scores["aux"].shape == scores["out"].shape
    with pytest.raises(ValueError, match="lraspp_mobilenet_v3_large has no auxiliary classifier"):
        segmentation_model("lraspp_mobilenet_v3_large", 3, aux_loss=True)


def test_a_detectors_image_sizes_come_from_the_configuration():
    model = configured("fcos_resnet50_fpn", "min_size=[64,96]", "max_size=128", "image_mean=[0.1,0.2,0.3]")
    assert (model.transform.min_size, model.transform.max_size) == ((64, 96), 128)
    assert model.transform.image_mean == (0.1, 0.2, 0.3)
    images, _ = model.eval().transform([torch.rand(3, 32, 40)])
    assert images.image_sizes == [(96, 120)]  # the last of the sizes
    model = detection_model("fcos_resnet50_fpn", 3, skip_resize=True, min_size=64).train()
    images, _ = model.transform([torch.rand(3, 32, 40)])
    assert images.image_sizes == [(32, 40)]


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (detection_model, {"name": "fcos_resnet5_fpn"}, "name must be one of .* Did you mean fcos_resnet50_fpn"),
        (detection_model, {"num_classes": 1}, "num_classes must be at least 2"),
        (detection_model, {"num_classes": None}, "num_classes must be at least 2.* got None"),
        (detection_model, {"backbone_norm": "none"}, "backbone_norm must be one of batch, frozen"),
        (detection_model, {"trainable_backbone_layers": 6}, "trainable_backbone_layers must be 0 to 5, got 6"),
        (segmentation_model, {"name": "deeplabv3"}, "name must be one of .* Did you mean deeplabv3_resnet50"),
        (segmentation_model, {"weights": "x", "class_heads": "none"}, "class_heads must be one of auto, fresh, kept"),
        (small_fcos, {"channels": 48}, "channels must be a multiple of 32, got 48"),
        (small_fcos, {"widths": []}, "expected positive widths"),
    ],
)
def test_wrong_arguments_are_named(make, arguments, message):
    name = {detection_model: "fcos_resnet50_fpn", segmentation_model: "fcn_resnet50"}.get(make)
    with pytest.raises(ValueError, match=message):
        make(**({"name": name} if name else {}) | {"num_classes": 3} | arguments)


def test_an_option_that_torchvision_would_ignore_is_an_error():
    with pytest.raises(TypeError, match=r"fcos_resnet50_fpn has no option min_sise\. Did you mean min_size"):
        detection_model("fcos_resnet50_fpn", 3, min_sise=64)


# ---- which layers learn


def frozen_fcos(**options):
    """torchvision's own with FrozenBatchNorm2d, which it has only where it downloads; statistics that tell."""
    model = detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, num_classes=3, min_size=64, max_size=64)
    body = detection.backbone_utils.resnet_fpn_backbone(backbone_name="resnet50", weights=None, **options).body
    for layer in body.modules():
        if isinstance(layer, FrozenBatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.0)
            nn.init.normal_(layer.bias, std=0.1)
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
            layer.eps = 1e-3
    model.backbone.body = detection.backbone_utils.IntermediateLayerGetter(
        body, {"layer2": "0", "layer3": "1", "layer4": "2"}
    )
    return model


def test_frozen_layers_become_trainable_ones_with_the_same_output():
    model = frozen_fcos(trainable_layers=3).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        before = model.backbone(images)
        state = model.state_dict()
        assert trainable_batch_norm(model) is model
        after = model.backbone(images)
    for level in before:
        torch.testing.assert_close(after[level], before[level], rtol=1e-4, atol=1e-4)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert {type(layer) for layer in norms(model)} == {nn.BatchNorm2d}
    assert {layer.eps for layer in norms(model)} == {1e-3}


def test_of_frozen_layers_those_learn_whose_stage_does():
    model = trainable_detector(frozen_fcos(trainable_layers=3)).train()
    images, targets = batch((64, 64))
    before = {name: value.clone() for name, value in model.backbone.body.named_buffers()}
    sum(model(images, targets).values()).backward()
    for name, layer in model.backbone.body.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            learns = name.startswith(("layer2", "layer3", "layer4"))
            assert layer.training == layer.weight.requires_grad == layer.bias.requires_grad == learns, name
            moved = not torch.equal(layer.running_mean, before[f"{name}.running_mean"])
            assert moved == learns, name


def test_a_frozen_layer_alone_and_one_in_two_places():
    frozen = FrozenBatchNorm2d(4, eps=0.1)
    assert isinstance(trainable_batch_norm(frozen), nn.BatchNorm2d)
    twice = trainable_batch_norm(nn.ModuleDict({"a": nn.Sequential(frozen), "b": nn.Sequential(frozen)}))
    assert twice["a"][0] is twice["b"][0]
    assert twice["a"][0].eps == 0.1
    assert twice["a"][0].weight.requires_grad


@pytest.mark.parametrize("stages", [0, 2, 5, None])
def test_stages_that_do_not_learn_keep_their_statistics(stages):
    model = detection_model("fcos_resnet50_fpn", 3, trainable_backbone_layers=stages)
    learning = ("layer4", "layer3", "layer2", "layer1", "conv1", "bn1")[: 6 if stages in (5, None) else stages]
    body = model.train().backbone.body
    for name, parameter in body.named_parameters():
        assert parameter.requires_grad == name.startswith(learning), name
    for name, layer in body.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            assert layer.training == name.startswith(learning), name


def test_from_weights_three_stages_learn_as_in_torchvision(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(detection_model("fcos_resnet50_fpn", 3).state_dict(), path)
    ours = detection_model("fcos_resnet50_fpn", 3, weights=path)
    theirs = frozen_fcos(trainable_layers=3)
    theirs = {name for name, p in theirs.named_parameters() if p.requires_grad}
    learning = {name for name, p in ours.named_parameters() if p.requires_grad}
    assert theirs <= learning
    assert all("bn" in name or "downsample.1" in name for name in learning - theirs)


def test_the_whole_backbone_can_stay_as_it_was_loaded():
    for model in (
        detection_model("fcos_resnet50_fpn", 3, backbone_norm="frozen").train().backbone.body,
        segmentation_model("lraspp_mobilenet_v3_large", 3, backbone_norm="frozen").train().backbone,
    ):
        assert not any(layer.training or layer.weight.requires_grad for layer in norms(model))
        assert all(layer.weight.requires_grad for layer in model.modules() if isinstance(layer, nn.Conv2d))


def test_torchvisions_own_builder_would_have_downloaded():
    with pytest.raises(AssertionError, match="network"):  # which is why ours never leave it the choice
        detection.fcos_resnet50_fpn(num_classes=3, weights_backbone=ResNet50_Weights.IMAGENET1K_V1)
