"""Weights from files and by explicit words: what fits is loaded, what does not is named, nothing else is fetched."""

import argparse
import io
import logging
import pickle
import socket

import lightning
import pytest
import torch
import torchvision
from torch import nn

from syncbn.training.models import detection_model, segmentation_model, skip_weights
from syncbn.training.models.weights import read_state_dict

NAME = "lraspp_mobilenet_v3_large"  # the smallest of the six


class Task(lightning.LightningModule):
    """Has its network under "model.", as this package's tasks do."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.loss = nn.CrossEntropyLoss(weight=torch.ones(3))


class RunsCode:
    def __reduce__(self):
        return print, ("code of the file has run",)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_):
        raise OSError("a test wanted to reach the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def own_file(tmp_path, content):
    path = tmp_path / "weights.pth"
    torch.save(content, path)
    return path


def assert_equal_states(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key


def lightning_checkpoint(model):
    trainer = lightning.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", barebones=False)
    trainer.strategy.connect(Task(model))
    return trainer._checkpoint_connector.dump_checkpoint()


WRAPPINGS = {
    "plain": lambda model: model.state_dict(),
    "torchvision's training script": lambda model: {"model": model.state_dict(), "args": argparse.Namespace(lr=0.1)},
    "DistributedDataParallel": lambda model: {f"module.{key}": value for key, value in model.state_dict().items()},
    "Lightning": lightning_checkpoint,
    "DDP in a checkpoint": lambda model: {
        "epoch": 3,
        "state_dict": {f"model.module.{key}": value for key, value in model.state_dict().items()},
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_file_is_loaded_however_its_weights_are_wrapped(wrapping, tmp_path):
    trained = segmentation_model(NAME, 3)
    path = own_file(tmp_path, WRAPPINGS[wrapping](trained))
    assert_equal_states(segmentation_model(NAME, 3, weights=str(path)), trained)


def test_the_format_before_zip_is_read(tmp_path):
    path = tmp_path / "old.pth"
    torch.save({"conv.weight": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    assert torch.equal(read_state_dict(path)["conv.weight"], torch.ones(2))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused(zipped, tmp_path, capsys):
    path = tmp_path / "malicious.pth"
    torch.save({"state_dict": {"a": torch.ones(1)}, "more": RunsCode()}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=r"weights: .*malicious.pth is refused: .* would run print,"):
        segmentation_model(NAME, 3, weights=path)
    assert "code of the file" not in capsys.readouterr().out


def garbage():
    buffer = io.BytesIO()
    torch.save({"a": torch.ones(1000)}, buffer)
    return {
        "empty": b"",
        "text": b"<html>not found</html>\n",
        "truncated": buffer.getvalue()[:-500],
        "bytes": bytes(range(256)) * 10,
        "pickle": pickle.dumps([1, 2], protocol=2),
    }


@pytest.mark.parametrize("kind", garbage())
def test_a_file_that_cannot_be_read_is_named(kind, tmp_path):
    path = tmp_path / "broken.pth"
    path.write_bytes(garbage()[kind])
    with pytest.raises(ValueError, match=r"weights: .*broken.pth (cannot be read as weights|holds no state_dict)"):
        segmentation_model(NAME, 3, weights=path)


def test_a_file_that_is_missing_is_named_with_the_words_that_download():
    with pytest.raises(
        ValueError, match=r"weights: there is no file nowhere.pth; .* download, COCO_WITH_VOC_LABELS_V1"
    ):
        segmentation_model(NAME, 3, weights="nowhere.pth")
    with pytest.raises(ValueError, match=r"weights_backbone: there is no file IMAGENET; .* IMAGENET1K_V2, DEFAULT"):
        segmentation_model(NAME, 3, weights_backbone="IMAGENET")


def test_a_checkpoint_without_weights_says_what_it_holds(tmp_path):
    with pytest.raises(ValueError, match=r"holds no state_dict: a mapping of epoch, optimizer"):
        segmentation_model(NAME, 3, weights=own_file(tmp_path, {"epoch": 1, "optimizer": {}}))


def test_keys_that_do_not_fit_are_counted_and_named(tmp_path):
    state = segmentation_model(NAME, 3).state_dict()
    del state["backbone.0.0.weight"]
    state |= {"extra.weight": torch.ones(1), "classifier.cbr.1.weight": torch.ones(5)}
    with pytest.raises(
        ValueError,
        match=r"does not fit the model.*1 missing \(backbone.0.0.weight\); 1 unexpected \(extra.weight\); "
        r"1 of another shape \(classifier.cbr.1.weight \[5\] instead of \[128\]\)",
    ):
        segmentation_model(NAME, 3, weights=own_file(tmp_path, state))
    with pytest.raises(ValueError, match=r"272 missing .*2 unexpected"):
        segmentation_model(NAME, 3, weights=own_file(tmp_path, {"a": torch.ones(1), "b": torch.ones(1)}))


def test_other_classes_leave_the_class_heads_alone_and_say_so(tmp_path, caplog):
    trained = segmentation_model(NAME, 21)
    path = own_file(tmp_path, trained.state_dict())
    heads = [f"classifier.{level}_classifier.{kind}" for level in ("low", "high") for kind in ("weight", "bias")]
    with caplog.at_level(logging.WARNING):
        model = segmentation_model(NAME, 3, weights=path)
    (line,) = caplog.messages
    assert line.endswith(", ".join(heads))
    own, theirs = model.state_dict(), trained.state_dict()
    assert [key for key in own if own[key].shape != theirs[key].shape] == heads
    assert all(torch.equal(own[key], theirs[key]) for key in own if key not in heads)
    with pytest.raises(ValueError, match=r"4 of another shape .*class_heads=auto"):
        segmentation_model(NAME, 3, weights=path, class_heads="kept")


def test_as_many_classes_of_other_names_can_be_left_alone_too(tmp_path, caplog):
    trained = segmentation_model(NAME, 3)
    path = own_file(tmp_path, trained.state_dict())
    with caplog.at_level(logging.WARNING):
        model = segmentation_model(NAME, 3, weights=path, class_heads="fresh")
    assert not torch.equal(model.classifier.low_classifier.weight, trained.classifier.low_classifier.weight)
    assert torch.equal(model.classifier.cbr[0].weight, trained.classifier.cbr[0].weight)
    assert "low_classifier" in caplog.text


def test_an_auxiliary_classifier_may_be_in_the_file_or_the_model_alone(tmp_path, caplog):
    with_aux = segmentation_model("fcn_resnet50", 3, aux_loss=True)
    path = own_file(tmp_path, with_aux.state_dict())
    plain = segmentation_model("fcn_resnet50", 3, weights=path)
    assert plain.aux_classifier is None
    assert torch.equal(plain.classifier[4].weight, with_aux.classifier[4].weight)
    assert not caplog.messages
    path = own_file(tmp_path, plain.state_dict())
    segmentation_model("fcn_resnet50", 3, weights=path, aux_loss=True)
    assert "initialized: aux_classifier.0.weight" in caplog.text


def test_a_classifiers_weights_fill_a_segmenters_backbone(tmp_path):
    classifier = torchvision.models.mobilenet_v3_large()
    path = own_file(tmp_path, classifier.state_dict())
    model = segmentation_model(NAME, 3, weights_backbone=path)
    theirs = classifier.features.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in model.backbone.state_dict().items())


def test_a_classifiers_weights_fill_a_detectors_backbone(tmp_path):
    classifier = torchvision.models.resnet50()
    nn.init.normal_(classifier.bn1.running_mean)
    state = {key: value for key, value in classifier.state_dict().items() if not key.endswith("num_batches_tracked")}
    path = own_file(tmp_path, state)  # as files of before PyTorch 0.4.1 are
    body = detection_model("fcos_resnet50_fpn", 3, weights_backbone=path).backbone.body
    assert torch.equal(body.bn1.running_mean, classifier.bn1.running_mean)
    assert torch.equal(body.layer4[2].conv3.weight, classifier.layer4[2].conv3.weight)


def test_another_architecture_is_no_backbone(tmp_path):
    path = own_file(tmp_path, torchvision.models.resnet18().state_dict())
    with pytest.raises(ValueError, match=r"weights_backbone: .* missing \(.*shape \(layer1.0.conv1.weight"):
        detection_model("fcos_resnet50_fpn", 3, weights_backbone=path)
    path = own_file(tmp_path, torchvision.models.resnet101().state_dict())
    with pytest.raises(ValueError, match=r"306 unexpected \(layer3.6.conv1.weight"):
        detection_model("fcos_resnet50_fpn", 3, weights_backbone=path)


def test_weights_come_before_those_of_the_backbone(tmp_path):
    trained = segmentation_model(NAME, 3)
    path = own_file(tmp_path, trained.state_dict())
    assert_equal_states(segmentation_model(NAME, 3, weights=path, weights_backbone="not.read"), trained)


@pytest.mark.parametrize("word", ["download", "IMAGENET1K_V1", "MobileNet_V3_Large_Weights.IMAGENET1K_V1"])
def test_a_word_asks_for_a_download_which_is_torchs(word, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"cannot download https://.*reach the network.*give the path of a file"):
        segmentation_model(NAME, 3, weights_backbone=word)
    published = torchvision.models.MobileNet_V3_Large_Weights
    weights = published.DEFAULT if word == "download" else published.IMAGENET1K_V1
    classifier = torchvision.models.mobilenet_v3_large()
    torch.save(classifier.state_dict(), tmp_path / "checkpoints" / weights.url.rpartition("/")[2])
    model = segmentation_model(NAME, 3, weights_backbone=word)  # it is in torch.hub's cache now
    assert torch.equal(model.backbone["0"][0].weight, classifier.features[0][0].weight)


def test_before_a_checkpoint_no_weights_are_read():
    with skip_weights():
        model = detection_model("fcos_resnet50_fpn", 3, weights="gone.pth")
        segmentation_model(NAME, 3, weights_backbone="download")
    assert not model.backbone.body.layer1[0].conv1.weight.requires_grad  # as where the weights are
    with pytest.raises(ValueError, match=r"no file gone.pth"):
        detection_model("fcos_resnet50_fpn", 3, weights="gone.pth")
