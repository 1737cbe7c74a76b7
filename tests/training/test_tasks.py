"""The tasks and their losses."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torch.utils.data.distributed import DistributedSampler

from syncbn.lightning import SyncBatchNormPlugin
from syncbn.training.data.batches import SegmentationBatches
from syncbn.training.models import UNet, detection_model
from syncbn.training.tasks import DetectionTask, SegmentationTask
from syncbn.training.tasks.losses import CrossEntropyDiceLoss, CrossEntropyLoss, soft_dice_loss
from syncbn.training.tasks.task import repeated_items

SGD = functools.partial(torch.optim.SGD, lr=1e-3)


def segmentation(model=None, **changes):
    arguments = {"loss": CrossEntropyDiceLoss(), "class_names": ["background", "thing"], "optimizer": SGD}
    return SegmentationTask(model or UNet(2, widths=(4, 8)), **(arguments | changes))


# Losses


def test_dice_loss_at_its_ends():
    target = torch.tensor([[[0, 1], [2, 2]]])
    right = nn.functional.one_hot(target, 4).movedim(-1, 1) * 50.0
    assert soft_dice_loss(right, target) < 1e-6
    assert soft_dice_loss(right.roll(1, 1), target) > 0.4


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}, {"background_weight": 0.25}])
def test_cross_entropy_is_torchs(options):
    scores, target = torch.randn(2, 3, 4, 4, dtype=torch.float64), torch.randint(0, 3, (2, 4, 4))
    target[0, 1] = 255
    weight = torch.tensor([options.get("background_weight", 1), 1, 1], dtype=torch.float64)
    smoothing = options.get("label_smoothing", 0)
    reference = nn.CrossEntropyLoss(weight, ignore_index=255, label_smoothing=smoothing)
    torch.testing.assert_close(CrossEntropyLoss(**options)(scores, target), reference(scores, target))


def test_without_dice_it_is_weighted_cross_entropy():
    scores, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    loss = CrossEntropyDiceLoss(background_weight=0.25, dice_weight=0)(scores, target)
    reference = nn.CrossEntropyLoss(weight=torch.tensor([0.25, 1, 1]))(scores, target)
    torch.testing.assert_close(loss, reference)


@pytest.mark.parametrize("loss", [CrossEntropyLoss(), CrossEntropyDiceLoss()])
def test_ignored_pixels_count_in_no_loss(loss):
    """Padding at the right, marked 255, changes neither the loss nor its gradient."""
    scores, target = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    padded = torch.cat([scores, torch.randn(2, 3, 4, 2)], 3).requires_grad_()
    value = loss(padded, nn.functional.pad(target, (0, 2), value=255))
    scores.requires_grad_()
    torch.testing.assert_close(value, loss(scores, target))
    value.backward()
    loss(scores, target).backward()
    torch.testing.assert_close(padded.grad[..., :4], scores.grad)
    assert not padded.grad[..., 4:].any()


@pytest.mark.parametrize("loss", [CrossEntropyLoss(0.1), CrossEntropyDiceLoss()])
def test_a_batch_without_any_labelled_pixel_is_zero_not_nan(loss):
    scores = torch.randn(2, 3, 4, 4, requires_grad=True)
    value = loss(scores, torch.full((2, 4, 4), 255))
    value.backward()
    assert value == 0
    assert torch.equal(scores.grad, torch.zeros_like(scores))


@pytest.mark.parametrize(
    ("loss", "wrong"),
    [(CrossEntropyLoss, {"label_smoothing": 2}), (CrossEntropyLoss, {"background_weight": -1})],
)
def test_impossible_losses_are_refused_by_name(loss, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        loss(**wrong)


# Segmentation


class TwoHeads(nn.Module):
    """As torchvision's: a dict with an auxiliary head."""

    def __init__(self):
        super().__init__()
        self.out, self.aux = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x):
        return {"out": self.out(x), "aux": self.aux(x)}


def test_any_module_can_be_the_model():
    assert segmentation(TwoHeads())(torch.rand(1, 3, 8, 8)).shape == (1, 2, 8, 8)
    assert segmentation().predict_step({"image": torch.rand(1, 3, 8, 8)}, 0).shape == (1, 8, 8)


@pytest.mark.parametrize("options", [{}, {"aux_weight": 0.25}])
def test_an_auxiliary_head_is_trained_along(options):
    model, loss = TwoHeads(), CrossEntropyLoss()
    task = segmentation(model, loss=loss, image_mean=[0.1, 0.2, 0.3], image_std=[1, 2, 4], **options)
    batch = {"image": torch.rand(2, 3, 8, 8), "semantic": torch.randint(0, 2, (2, 8, 8))}
    seen = (batch["image"] - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([1.0, 2, 4]).view(3, 1, 1)
    expected = loss(model.out(seen), batch["semantic"])
    expected = expected + options.get("aux_weight", 0.5) * loss(model.aux(seen), batch["semantic"])
    torch.testing.assert_close(task.training_step(batch, 0), expected)
    assert set(task.state_dict()) == {f"model.{name}" for name in model.state_dict()}


@pytest.mark.parametrize(
    ("model", "got"), [(UNet(5, widths=(4, 8)), r"\[1, 5, 8, 8\]"), (nn.Conv2d(3, 2, 3), r"\[1, 2, 6, 6\]")]
)
def test_scores_of_another_shape_are_refused_by_name(model, got):
    with pytest.raises(ValueError, match=r"scores \[B, 2, H, W\], here \[1, 2, 8, 8\].*got " + got):
        segmentation(model)(torch.rand(1, 3, 8, 8))


@pytest.mark.parametrize(
    "wrong",
    [{"class_names": ["one"]}, {"image_std": 0}, {"image_std": [1, 1, 0]}, {"image_mean": [1, 2]}, {"aux_weight": -1}],
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        segmentation(**wrong)


def test_the_validation_loss_is_the_mean_over_images_whatever_the_batches():
    """torchmetrics' MeanMetric(nan_strategy="disable") takes a short last batch for a whole one."""
    torch.manual_seed(0)
    images, targets = torch.rand(3, 3, 8, 8), torch.randint(0, 2, (3, 8, 8))
    items = [{"image": images[i], "semantic": targets[i], "index": i} for i in range(3)]
    task = segmentation(loss=CrossEntropyLoss())
    trainer = Trainer(logger=False, accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False)
    (metrics,) = trainer.validate(
        task, DataLoader(items, batch_size=2, collate_fn=SegmentationBatches()), verbose=False
    )
    with torch.no_grad():
        expected = CrossEntropyLoss()(task.eval()(images), targets)
    assert metrics["val/loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("items", "world"), [(7, 2), (5, 3), (1, 2), (2, 5), (8, 4)])
def test_each_validation_item_counts_once_whatever_the_sampler_repeats(items, world):
    counted = []
    for rank in range(world):
        sampler = DistributedSampler(range(items), num_replicas=world, rank=rank, shuffle=False)
        loader = DataLoader(list(range(items)), sampler=sampler)
        index = torch.cat([torch.as_tensor(batch) for batch in loader])
        counted += index[~repeated_items(index, loader)].tolist()
    assert sorted(counted) == list(range(items))


# On two processes, through a Trainer


def images(count=5, seed=0):
    """Of different size; in the last one only a corner is labelled."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        image = torch.rand(3, 8, 8 + 2 * i, generator=generator)
        semantic = (image[0] > 0.5).long()
        if i == count - 1:
            semantic[2:] = 255
        made.append({"image": image, "semantic": semantic, "index": i})
    return made


class OnProcess1(IterableDataset):
    def __iter__(self):
        return iter(images() if dist.get_rank() == 1 else [])


class Padded(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.classify = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

    def forward(self, x):
        return self.classify(self.norm(x))


def trained(folder, uneven):
    torch.manual_seed(0)
    # torch's own is NaN of process 1's last batch in validation, which is a repetition.
    task = segmentation(Padded(), loss=nn.CrossEntropyLoss(ignore_index=255), image_mean=0, image_std=1)
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        plugins=[SyncBatchNormPlugin(), LightningEnvironment()],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    rank = dist.get_rank()
    # Two images on process 0, of which it pads one, and two on process 1 that need no padding.
    own = [images()[:2], [images()[3], images(seed=1)[3]]][rank]
    trainer.fit(task, DataLoader(own, batch_size=2, collate_fn=SegmentationBatches()))
    items = OnProcess1() if uneven else images()
    sampler = None if uneven else DistributedSampler(items, shuffle=False)
    validation = DataLoader(items, batch_size=2, sampler=sampler, collate_fn=SegmentationBatches())
    # What a validation that was broken off leaves behind.
    task.val_pixels.update(torch.zeros(1, 8, 8).long(), torch.ones(1, 8, 8).long())
    trainer.validate(task, validation, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return metrics, {name: value.clone() for name, value in task.model.state_dict().items()}


@pytest.mark.parametrize("uneven", [False, True])
def test_two_processes_see_each_valid_pixel_once(processes, tmp_path, uneven):
    (metrics, state), (others, _) = processes(2).run(trained, str(tmp_path), uneven)
    # Training: the statistics are those of the four images, without what pads them.
    values = torch.cat([item["image"].flatten(1) for item in [*images()[:2], images()[3], images(seed=1)[3]]], 1)
    torch.testing.assert_close(state["norm.running_mean"], 0.1 * values.mean(1))
    torch.testing.assert_close(state["norm.running_var"], 0.9 + 0.1 * values.var(1))
    # Validation: five images, of which the sampler repeats one; or a process that has none at all.
    model = Padded()
    model.load_state_dict(state)
    with torch.no_grad():
        scores = [model.eval()(item["image"][None])[0].flatten(1) for item in images()]
    pairs = torch.cat([s.argmax(0) for s in scores]), torch.cat([item["semantic"].flatten() for item in images()])
    counted = pairs[1] != 255
    prediction, truth = (each[counted] for each in pairs)
    ious = [((prediction == c) & (truth == c)).sum() / ((prediction == c) | (truth == c)).sum() for c in (0, 1)]
    assert metrics["val/iou/thing"] == pytest.approx(ious[1].item(), abs=1e-6)
    assert metrics["val/miou"] == pytest.approx(sum(ious).item() / 2, abs=1e-6)
    assert 0 < metrics["val/loss"] < 5
    assert metrics == others


# Detection


def targets(kind):
    boxes = {
        "without objects": torch.zeros(0, 4),
        "an object that no anchor meets": torch.tensor([[0.0, 0.0, 0.5, 0.5]]),
    }[kind]
    return [{"boxes": boxes.clone(), "labels": torch.ones(len(boxes), dtype=torch.long)} for _ in range(2)]


@pytest.mark.parametrize("name", ["fcos_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fasterrcnn_resnet50_fpn_v2"])
def test_every_parameter_takes_part_whatever_the_targets(name):
    """Under DistributedDataParallel a parameter without a gradient lets the other processes wait forever."""
    task = DetectionTask(detection_model(name, 3, min_size=64, max_size=64), ("background", "one", "two"), SGD)
    batch = {"image": [torch.rand(3, 64, 64), torch.rand(3, 64, 48)]}
    for kind in ("without objects", "an object that no anchor meets"):
        task.zero_grad(set_to_none=True)
        loss = task.training_step(batch | {"targets": targets(kind)}, 0)
        assert torch.isfinite(loss), kind
        loss.backward()
        assert not [n for n, p in task.named_parameters() if p.requires_grad and p.grad is None], kind


@pytest.mark.parametrize("objects", [0, 1])
def test_a_detector_without_any_region_learns_that_the_images_are_background(objects):
    """All proposals are below the threshold: without an object, torchvision's own losses are NaN."""
    torch.manual_seed(0)
    model = detection_model("fasterrcnn_resnet50_fpn_v2", 3, min_size=64, max_size=64, rpn_score_thresh=1.1)
    images = [torch.rand(3, 64, 64), torch.rand(3, 64, 48)]
    told = [{"boxes": torch.tensor([[4.0, 4, 40, 40]])[:objects], "labels": torch.ones(objects, dtype=torch.long)}] * 2
    torch.manual_seed(1)  # anchors are drawn
    torchvisions = sum(copy.deepcopy(model)(images, told).values())
    task = DetectionTask(model, ("background", "one", "two"), SGD)
    torch.manual_seed(1)
    loss = task.training_step({"image": images, "targets": told}, 0)
    assert torch.isfinite(loss)
    assert torch.equal(loss, torchvisions) if objects else torch.isnan(torchvisions)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)
    assert [len(each["boxes"]) for each in task.eval()(images)] == [0, 0]


class Echo(nn.Module):
    """Notes what it is told."""

    def __init__(self, losses):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.losses = losses

    def forward(self, images, targets=None):
        self.told = targets
        return self.losses


def test_a_detector_learns_nothing_from_crowds():
    model = Echo({"a": torch.tensor(1.0), "loss": torch.tensor(2.0)})
    task = DetectionTask(model, ("background", "one"), SGD)
    target = {
        "boxes": torch.tensor([[0.0, 0, 1, 1], [0, 0, 2, 2]]),
        "labels": torch.tensor([1, 1]),
        "iscrowd": torch.tensor([1, 0]),
        "area": torch.tensor([1.0, 4.0]),
    }
    assert task.training_step({"image": [torch.rand(3, 8, 8)], "targets": [target]}, 0) == 3
    assert model.told[0]["boxes"].tolist() == [[0, 0, 2, 2]]
    assert model.told[0]["labels"].tolist() == [1]


def test_a_model_with_another_protocol_is_refused():
    task = DetectionTask(Echo([]), ("background", "one"), SGD)
    with pytest.raises(TypeError, match=r"must return a dict of losses in training, .* got list"):
        task.training_step({"image": [torch.rand(3, 8, 8)], "targets": targets("without objects")}, 0)
