"""COCO's average precision over all processes equals pycocotools in one process on all images."""

import contextlib
import functools
import io

import numpy as np
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from syncbn.lightning import SyncBatchNormPlugin
from syncbn.training.data.batches import DetectionBatches
from syncbn.training.models import small_fcos
from syncbn.training.tasks import DetectionTask
from syncbn.training.tasks.average_precision import AveragePrecision

NAMES = ("background", "cat", "dog", "never seen")


def boxes(count, generator, largest=180):
    # Whole numbers: some overlaps are exactly a threshold, such as 0.6.
    corner = torch.randint(0, 200, (count, 2), generator=generator).float()
    return torch.cat([corner, corner + torch.randint(4, largest, (count, 2), generator=generator)], 1)


def image(number):
    """What is predicted for an image and what is true: crowds, areas of masks, equal scores, nothing at all."""
    generator = torch.Generator().manual_seed(number)
    true = boxes(0 if number % 5 == 3 else 4, generator)
    n = len(true)
    labels = torch.randint(1, 3, (n,), generator=generator)
    area = (true[:, 2] - true[:, 0]) * (true[:, 3] - true[:, 1]) * 0.7
    target = {"boxes": true, "labels": labels, "iscrowd": (torch.arange(n) == 2).long(), "area": area}
    near = true + torch.randint(-6, 7, (n, 4), generator=generator)
    near[:, 2:] = torch.maximum(near[:, 2:], near[:, :2] + 1)
    found = near[:0] if number % 5 == 4 else torch.cat([near, near, boxes(3, generator)])
    guessed = torch.cat([labels, labels, torch.randint(1, 3, (3,), generator=generator)])[: len(found)]
    scores = torch.randint(1, 6, (len(found),), generator=generator) / 5
    return {"boxes": found, "labels": guessed, "scores": scores}, target


def pycocotools(images):
    """COCO's first six numbers, and each class's average precision; of what there are objects."""
    truth, found = COCO(), []
    truth.dataset = {
        "info": {},
        "images": [{"id": i} for i in range(len(images))],
        "categories": [{"id": i} for i in range(1, len(NAMES))],
        "annotations": [],
    }
    for i, (prediction, target) in enumerate(images):
        for j in range(len(target["labels"])):
            box = xywh(target["boxes"][j])
            truth.dataset["annotations"].append(
                {
                    "id": len(truth.dataset["annotations"]) + 1,
                    "image_id": i,
                    "category_id": int(target["labels"][j]),
                    "bbox": box,
                    "area": float(target["area"][j]) if "area" in target else box[2] * box[3],
                    "iscrowd": int(target["iscrowd"][j]) if "iscrowd" in target else 0,
                }
            )
        for box, label, score in zip(*(prediction[key] for key in ("boxes", "labels", "scores")), strict=True):
            found.append(
                {"image_id": i, "category_id": int(label), "bbox": xywh(box), "score": float(score)},
            )
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    of_classes = {}
    for k in range(len(NAMES) - 1):
        precision = evaluation.eval["precision"][:, :, k, 0, -1]
        if (precision > -1).any():
            of_classes[f"ap/{NAMES[k + 1]}"] = precision.mean()
    keys = ("map", "map_50", "map_75", "map_small", "map_medium", "map_large")
    values = dict(zip(keys, evaluation.stats[:6], strict=True)) | of_classes
    return {key: value for key, value in values.items() if value > -1}


def xywh(box):
    x1, y1, x2, y2 = box.float()
    return [float(v) for v in (x1, y1, x2 - x1, y2 - y1)]


def evaluated(parts, half=False):
    metric = AveragePrecision()
    for number in parts[dist.get_rank()]:
        prediction, target = image(number)
        if half:
            prediction["scores"] = prediction["scores"].bfloat16()
        metric.update([prediction], [target], torch.tensor([number]))
    first = metric.compute(NAMES)
    metric.reset()
    return first, metric.compute(NAMES)


@pytest.mark.parametrize(
    "parts",
    [
        [[0, 2, 4, 6, 8], [1, 3, 5, 7]],
        [[8, 7, 6, 5, 0], [4, 3, 2, 1, 8, 0]],  # out of order, with repetitions
        [list(range(9)), []],  # a process without any image
        [[], list(range(9))],
    ],
)
def test_two_processes_get_what_pycocotools_gets_of_all_images(processes, parts):
    expected = pycocotools([image(i) for i in range(9)])
    assert expected["map"] > 0.1
    assert set(expected) == {"map", "map_50", "map_75", "map_small", "map_medium", "map_large", "ap/cat", "ap/dog"}
    for found, after_reset in processes(2).run(evaluated, parts):
        assert found == pytest.approx(expected, abs=1e-7)
        assert after_reset == {"map": -1, "map_50": -1, "map_75": -1}


def test_an_overlap_of_exactly_a_threshold_counts():
    """6 of 10 pixels are an IoU of 0.6: found at 0.5, 0.55 and 0.6, by COCO's own thresholds."""
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 1]]), "labels": torch.tensor([1])}
    found = {"boxes": torch.tensor([[0.0, 0, 6, 1]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.5])}
    metric = AveragePrecision()
    metric.update([found], [truth], torch.tensor([0]))
    assert metric.compute()["map"] == pytest.approx(0.3)
    assert pycocotools([(found, truth)])["map"] == pytest.approx(0.3)


def test_without_predictions_it_is_zero_and_without_objects_as_in_pycocotools():
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    some = {"boxes": torch.tensor([[0.0, 0, 50, 50]]), "labels": torch.tensor([1])}
    metric = AveragePrecision()
    metric.update([nothing], [some], torch.tensor([0]))
    assert metric.compute(NAMES) == {"map": 0, "map_50": 0, "map_75": 0, "map_medium": 0, "ap/cat": 0}
    metric.reset()
    metric.update([some | {"scores": torch.tensor([0.9])}], [nothing], torch.tensor([0]))
    assert metric.compute(NAMES) == {"map": -1, "map_50": -1, "map_75": -1}


def test_half_precision_scores_are_taken(processes):
    found, _ = processes(2).run(evaluated, [list(range(9)), []], True)[0]
    assert found["map"] > 0.1


def failing():
    """Process 1 has an image with more labels than boxes."""
    metric = AveragePrecision()
    prediction, target = image(dist.get_rank())
    if dist.get_rank() == 1:
        target["labels"] = torch.ones(99, dtype=torch.long)
    metric.update([prediction], [target], torch.tensor([dist.get_rank()]))
    with pytest.raises(RuntimeError, match=r"could not be computed on process 0: ValueError.*99"):
        metric.compute()


def test_a_failure_is_told_to_all_processes(processes):
    processes(2).run(failing)


# Through a Trainer: a real detector on two processes, 5 images, of which the sampler has to repeat one


def detector():
    torch.manual_seed(3)
    model = small_fcos(3, widths=(8, 8), channels=32, head_convs=1, min_size=64, max_size=96, score_thresh=0.0)
    nn.init.constant_(model.head.regression_head.bbox_reg.bias, 3.0)  # its boxes would have hardly any size
    return model


def items(count=5):
    """Images of different size whose objects are what the untrained detector finds in them; one has none."""
    generator = torch.Generator().manual_seed(0)
    made = []
    model = detector().eval()
    for i in range(count):
        picture = torch.rand(3, 64, 64 + 8 * i, generator=generator)
        with torch.no_grad():
            (found,) = model([picture])
        sizes = found["boxes"][:, 2:] - found["boxes"][:, :2]
        (chosen,) = torch.nonzero((sizes.amin(1) > 3) & (found["labels"] > 0), as_tuple=True)
        chosen = chosen[: 0 if i == 1 else 12 : 4]
        made.append({"image": picture, "boxes": found["boxes"][chosen], "labels": found["labels"][chosen], "index": i})
    return made


class Uneven(IterableDataset):
    """All items on process 1, none on process 0."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        return iter(self.items if dist.get_rank() == 1 else [])


def trained(folder, uneven):
    task = DetectionTask(detector(), NAMES[:3], functools.partial(torch.optim.SGD, lr=1e-3))
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        # DDP would broadcast buffers before each forward, in validation as well, and so wait for process 0.
        strategy=DDPStrategy(broadcast_buffers=not uneven),
        plugins=[SyncBatchNormPlugin(), LightningEnvironment()],
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        num_sanity_val_steps=0,
    )
    data = items()
    # Batches of one: process 0 trains on an image with objects, process 1 on one without.
    train = DataLoader(data[:2], batch_size=1, collate_fn=DetectionBatches())
    # Also in validation, since a detector sees more of an image's padding beside a larger one.
    validation = DataLoader(Uneven(data) if uneven else data, batch_size=1, collate_fn=DetectionBatches())
    trainer.fit(task, train, validation)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return metrics, task.model.state_dict(), trainer.global_step


@pytest.mark.parametrize("uneven", [False, True])
def test_a_detector_on_two_processes_is_evaluated_as_on_one(processes, tmp_path, uneven):
    (metrics, state, steps), (others, other_state, _) = processes(2).run(trained, str(tmp_path), uneven)
    assert steps == 1
    model = detector()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert any(not torch.equal(before[key], state[key]) for key in before)
    assert all(torch.equal(state[key], other_state[key]) for key in state)  # running statistics as well
    with torch.no_grad():
        expected = pycocotools([(model.eval()([item["image"]])[0], item) for item in items()])
    assert expected["map"] > 0.05
    found = {name.removeprefix("val/"): value for name, value in metrics.items() if name.startswith("val/")}
    assert found == pytest.approx(expected, abs=1e-6)
    losses = {name for name in metrics if name.startswith("train/")}
    assert losses == {"train/loss", "train/classification", "train/bbox_regression", "train/bbox_ctrness"}
    parts = sum(metrics[name] for name in losses - {"train/loss"})
    assert metrics["train/loss"] == pytest.approx(parts, rel=1e-5)
    assert metrics == others | {"loss": metrics["loss"]}
    assert not np.isnan(metrics["train/loss"])
