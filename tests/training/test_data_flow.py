"""From datasets to batches: order, padding, and what happens to broken files on several processes."""

import json
import shutil
import warnings
from pathlib import Path

import miniatures
import pytest
import torch
from jobs import TRAIN_SH, run_job
from lightning.pytorch import Trainer
from torch.utils.data import Dataset

from syncbn.training.data import DataModule, DigitScenesDataModule
from syncbn.training.data.batches import DetectionBatches, SegmentationBatches
from syncbn.training.data.coco import CocoDetection
from syncbn.training.data.faults import BrokenItem
from syncbn.training.data.folders import FolderSegmentation
from syncbn.training.data.order import EpochOrder, ResumableLoader
from syncbn.training.errors import UserError
from syncbn.training.tasks import SegmentationTask
from syncbn.training.tasks.average_precision import AveragePrecision
from syncbn.training.tasks.losses import CrossEntropyLoss


class Numbers(Dataset):
    """Images whose pixels are the item's number; some turn out broken when they are read."""

    class_names = ("background", "thing")

    def __init__(self, size, broken=(), checked=()):
        self.size, self.broken, self.checked = size, broken, checked

    def __len__(self):
        return self.size

    def name(self, index):
        return f"{index}.jpg"

    def check(self, index):
        return "no header" if index in self.checked else None

    def __getitem__(self, index):
        if index in self.broken:
            raise BrokenItem(self.name(index), "image file is truncated")
        image = torch.full((3, 2, 2), index, dtype=torch.uint8)
        return {"image": image, "semantic": torch.zeros(2, 2, dtype=torch.int64), "index": index}


def orders(size, world, epoch, shuffle=True, drop_last=True, seed=0):
    samplers = [EpochOrder(range(size), world, rank, shuffle, seed, drop_last) for rank in range(world)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    return [[draw.number for draw in sampler] for sampler in samplers]


def test_an_order_is_a_function_of_seed_and_epoch():
    assert orders(10, 2, 1) == orders(10, 2, 1)
    assert len({str(orders(10, 2, epoch, seed=seed)) for epoch in range(3) for seed in range(3)}) == 9


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_global_batch_is_the_same_however_many_processes_share_it(world):
    per_process = 8 // world
    shares = orders(32, world, epoch=3)
    batches = [{i for share in shares for i in share[k : k + per_process]} for k in range(0, 32 // world, per_process)]
    (whole,) = orders(32, 1, epoch=3)
    assert batches == [set(whole[k : k + 8]) for k in range(0, 32, 8)]


@pytest.mark.parametrize(("size", "world"), [(7, 2), (5, 3), (1, 2), (2, 5), (8, 4)])
def test_validation_sees_all_and_training_nothing_twice(size, world):
    shown = orders(size, world, 0, shuffle=False, drop_last=False)
    assert {i for share in shown for i in share} == set(range(size))
    assert len({len(share) for share in shown}) == 1
    if size >= world:
        shown = orders(size, world, 0)
        assert len({len(share) for share in shown}) == 1
        assert len({i for share in shown for i in share}) == world * (size // world)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_in_the_middle_of_an_epoch(workers):
    def loader(epoch):
        data = DataModule(Numbers(10), Numbers(2), batch_size=3, num_workers=workers)
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return loader

    first = loader(1)
    batches = iter(first)
    shown = [next(batches)["index"].tolist() for _ in range(2)]
    state = first.state_dict()
    assert state == {"epoch": 1, "batches": 2}
    second = loader(1)
    second.load_state_dict(state)
    rest = [batch["index"].tolist() for batch in second]
    assert shown + rest == [batch["index"].tolist() for batch in loader(1)]
    assert len(rest) == 1
    # The state is of one epoch; the next one begins at its beginning.
    other = loader(2)
    other.load_state_dict(state)
    assert len(list(other)) == 3
    assert len(list(second)) == 3


def test_a_loader_with_another_sampler_starts_over():
    loader = ResumableLoader(range(4), batch_size=2)
    loader.load_state_dict({"epoch": 0, "batches": 1})
    assert len(list(loader)) == 2


def test_images_of_different_size_are_padded_and_their_region_is_told():
    def item(height, width, index):
        return {
            "image": torch.ones(3, height, width),
            "semantic": torch.ones(height, width, dtype=torch.int64),
            "index": index,
        }

    batch = SegmentationBatches(pad_to=4)([item(5, 8, 7), item(8, 6, 9)])
    assert batch["image"].shape == (2, 3, 8, 8)
    assert batch["valid"].shape == (2, 1, 8, 8)
    assert batch["valid"].dtype == torch.bool
    assert torch.equal(batch["valid"].expand(2, 3, 8, 8), batch["image"] == 1)
    assert torch.equal(batch["valid"][:, 0], batch["semantic"] == 1)
    assert torch.equal(~batch["valid"][:, 0], batch["semantic"] == 255)
    assert batch["index"].tolist() == [7, 9]
    assert "valid" not in SegmentationBatches(pad_to=4)([item(8, 8, 0), item(8, 8, 1)])
    assert "valid" in SegmentationBatches(pad_to=4)([item(6, 8, 0)])


def test_detection_batches_are_lists():
    items = [
        {"image": torch.ones(3, 4, 5 + n), "boxes": torch.ones(n, 4), "labels": torch.ones(n).long(), "index": n}
        for n in range(3)
    ]
    batch = DetectionBatches()(items)
    assert [image.shape[-1] for image in batch["image"]] == [5, 6, 7]
    assert [sorted(target) for target in batch["targets"]] == [["boxes", "labels"]] * 3
    assert [len(target["boxes"]) for target in batch["targets"]] == [0, 1, 2]
    assert batch["index"].tolist() == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_item_is_replaced_and_told(workers):
    data = DataModule(Numbers(4, broken={1, 2}), Numbers(2), batch_size=4, num_workers=workers, faults="skip")
    data.setup("fit")
    (batch,) = list(data.train_dataloader())
    assert sorted(batch["index"].tolist()) == [-1, -1, 0, 3]
    # The image that came is the one that `index` says, or the next whole one.
    shown = (batch["image"][:, 0, 0, 0] * 255).round().long()
    assert torch.equal(shown, torch.where(batch["index"] < 0, 3, batch["index"]))
    with pytest.warns(UserWarning, match=r"1.jpg: image file is truncated; replaced") as told:
        batch = data.on_before_batch_transfer(batch, 0)
    assert len(told) == 2
    assert "broken" not in batch
    assert data.stop_reason is None
    with pytest.warns(UserWarning, match="2 broken items"):
        data.teardown("fit")


def test_a_broken_item_is_a_reason_to_stop():
    data = DataModule(Numbers(4, broken={1}), Numbers(2), batch_size=4)
    data.setup("fit")
    for batch in data.train_dataloader():
        data.on_before_batch_transfer(batch, 0)
    assert data.stop_reason == "1 broken item: 1.jpg: image file is truncated"
    with pytest.raises(UserError, match=r"1.jpg: image file is truncated"):
        data.teardown("fit")


@pytest.mark.parametrize("workers", [0, 1])
def test_when_nothing_can_be_read_the_run_ends_with_one_line(workers):
    data = DataModule(Numbers(3, broken={0, 1, 2}), Numbers(1), num_workers=workers, faults="skip")
    batch = next(iter(data.train_dataloader()))
    with pytest.raises(UserError, match=r"^2 broken items: .\.jpg: image file is truncated; 3 items in a row cannot"):
        data.on_before_batch_transfer(batch, 0)


def test_when_all_is_left_out_the_run_ends():
    with pytest.raises(UserError, match="nothing is left"):
        DataModule(Numbers(2, checked={0, 1}), Numbers(1), faults="skip").setup("fit")


def test_when_nothing_more_can_be_read_all_processes_can_end_together():
    data = DataModule(Numbers(50), Numbers(1), batch_size=2, faults="skip", check="none")
    batches = iter(data.train_dataloader())
    last = data.on_before_batch_transfer(next(batches), 0)
    data.train_set.dataset.broken = set(range(50))  # the disk is gone
    with pytest.warns(UserWarning, match="32 items in a row cannot be read; replaced"):
        batch = data.on_before_batch_transfer(next(batches), 0)
    assert batch["index"].tolist() == [-1, -1]
    assert torch.equal(batch["image"], last["image"][[1, 1]])
    assert "32 items in a row cannot be read" in data.stop_reason
    with pytest.raises(UserError, match="32 items in a row cannot be read"):
        data.teardown("fit")


class Guess(torch.nn.Module):
    """Says of an image of even brightness that it is of class 1, else of class 0."""

    def forward(self, image):
        even = (image.mean(1) * 255).round() % 2 == 0
        return torch.stack([(~even).float(), even.float()], 1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("batch_size", [1, 3])
def test_what_stands_in_for_a_broken_item_counts_in_no_metric(batch_size, tmp_path):
    def validated(**options):
        data = DataModule(Numbers(2), Numbers(5, **options), batch_size=batch_size, faults="skip")
        task = SegmentationTask(
            Guess(), CrossEntropyLoss(), ("background", "thing"), torch.optim.SGD, image_mean=0.0, image_std=1.0
        )
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, **quiet)
        (metrics,) = trainer.validate(task, data, verbose=False)
        return {name: value for name, value in metrics.items() if "iou" in name}

    replaced = validated(broken={1, 2})
    assert replaced == validated(checked={1, 2})
    assert replaced["val/iou/background"] == pytest.approx(1 / 3)  # of the items 0, 3, 4 it is right about 3


def test_what_stands_in_for_a_broken_item_counts_in_no_average_precision():
    thing = {"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([1]), "scores": torch.tensor([0.5])}
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long), "scores": torch.zeros(0)}
    metric = AveragePrecision()
    metric.update([thing, nothing], [thing, thing], torch.tensor([0, -1]))
    assert metric.compute()["map_50"] == 1


def test_objects_are_left_out_where_they_have_been_counted(tmp_path):
    def images(check):
        root = miniatures.coco(tmp_path / check)
        file = root / "annotations" / "instances_train2017.json"
        content = json.loads(file.read_text())
        content["annotations"][0]["bbox"][2] = 0
        file.write_text(json.dumps(content))
        parts = [
            CocoDetection(root, f"{part}2017", f"annotations/instances_{part}2017.json") for part in ("train", "val")
        ]
        data = DataModule(*parts, faults="skip", check=check)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            data.setup("fit")
            for batch in data.train_dataloader():
                data.on_before_batch_transfer(batch, 0)
            data.teardown("fit")
        return " ".join(str(warning.message) for warning in told)

    assert "1 broken object" in images("headers")
    assert "annotation 1: box" in images("none")


def different(rank, roots):
    data = DataModule(*(FolderSegmentation(roots[rank], split) for split in ("train", "val")), check="none")
    try:
        data.setup("fit")
    except UserError as error:
        return str(error)
    return len(data.train_set)


def test_processes_that_find_different_files_do_not_begin(processes, tmp_path):
    roots = [miniatures.folders(tmp_path / str(rank)) for rank in range(2)]
    assert processes(2).run(different, roots, per_rank=[(0,), (1,)]) == [miniatures.TRAIN] * 2
    images = sorted((roots[1] / "train" / "images").iterdir())
    images[0].rename(images[0].with_stem("99999"))
    told = processes(2).run(different, roots, per_rank=[(0,), (1,)])
    assert told[0] == told[1]
    assert f"process 0 finds {miniatures.TRAIN} items, process 1 as many, but others" in told[0]
    images[1].unlink()
    told = processes(2).run(different, roots, per_rank=[(0,), (1,)])
    assert f"process 0 finds {miniatures.TRAIN} items, process 1 {miniatures.TRAIN - 1}: " in told[0]


def test_other_items_keep_their_files_when_some_are_left_out(tmp_path):
    data = DataModule(Numbers(5, checked={1, 3}), Numbers(2), faults="skip")
    data.trainer = Trainer(default_root_dir=tmp_path, logger=False, accelerator="cpu")
    with pytest.warns(UserWarning, match="2 broken items"):
        data.setup("fit")
    assert [int(item["image"][0, 0, 0] * 255) for item in data.train_set] == [0, 2, 4]
    assert [item["index"] for item in data.train_set] == [0, 1, 2]
    assert (tmp_path / "left_out.txt").read_text().splitlines() == [
        "training\titem\t1.jpg\tno header",
        "training\titem\t3.jpg\tno header",
    ]
    data.setup("validate")  # once is enough


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"faults": "ignore"}, "faults must be one of raise, skip"),
        ({"check": "header"}, "check must be one of headers, full, none"),
        ({"collate": "segmentatoin"}, r"collate must be one of .* Did you mean segmentation\?"),
        ({"pad_to": 0}, "pad_to must be a whole number"),
        ({"val_batch_size": 0}, "val_batch_size must be a whole number"),
    ],
)
def test_an_impossible_argument_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        DataModule(Numbers(2), Numbers(2), **wrong)


def test_training_and_validation_must_have_the_same_classes():
    with pytest.raises(ValueError, match=r"the same classes, got 2 .* and 11"):
        DataModule(Numbers(2), DigitScenesDataModule(1, 1).val_set.dataset)


def surveyed(root, faults):
    """What one of several processes learns: the error, or how many items are left."""
    data = DataModule(*(FolderSegmentation(root, split) for split in ("train", "val")), faults=faults)
    try:
        data.setup("fit")
    except UserError as error:
        return str(error)
    return len(data.train_set), len(data.val_set)


@pytest.mark.filterwarnings("ignore")
def test_all_processes_learn_what_one_has_found(processes, tmp_path):
    root = miniatures.folders(tmp_path)
    broken = sorted((root / "train" / "images").iterdir())[1]  # in the second process's share
    broken.write_bytes(b"")
    told = processes(2).run(surveyed, str(root), "raise")
    assert told[0] == told[1]
    assert broken.name in told[0]
    assert "training data: 1 broken item:" in told[0]
    assert processes(2).run(surveyed, str(root), "skip") == [(miniatures.TRAIN - 1, miniatures.VAL)] * 2


@pytest.fixture
def truncated(tmp_path):
    """A folder in which one image breaks off: its header is fine. The second process reads it in its second step."""
    root = miniatures.folders(tmp_path)
    images = sorted((root / "train" / "images").iterdir())
    _, share = orders(len(images), 2, epoch=0)
    path = images[share[1]]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return root, path


FOLDERS = [
    "data=folders",
    "data.batch_size=1",
    "data.num_workers=1",
    "trainer=cpu",
    "trainer.max_epochs=2",
    "model.widths=[4,8]",
    "callbacks.pictures=null",
    "logger=none",
    "run_dir=run",
]


def start(root, *overrides):
    return run_job([str(TRAIN_SH), *FOLDERS, f"data.train.root={root}", *overrides], Path(root).parent)


def test_an_image_that_breaks_off_ends_the_run_on_all_processes_with_a_checkpoint(truncated):
    root, path = truncated
    job = start(root)
    assert job.process.returncode == 2, job.output + job.error_output
    (line,) = [line for line in job.errors if line.startswith("error:")]
    assert f"1 broken item: {path}" in line
    checkpoint = torch.load(root.parent / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] > 0
    assert "Traceback" not in job.error_output
    # The file is mended: the run goes on.
    shutil.copy(next(other for other in path.parent.iterdir() if other != path), path)
    for mask in (root / "train" / "masks").glob(f"{path.stem}.*"):
        other = next(o for o in path.parent.iterdir() if o.read_bytes() == path.read_bytes() and o != path)
        shutil.copy(mask.with_stem(other.stem), mask)
    job = start(root, "ckpt_path=last")
    assert job.process.returncode == 0, job.output + job.error_output


def test_an_image_that_breaks_off_is_replaced_by_choice(truncated):
    root, path = truncated
    job = start(root, "data.faults=skip")
    assert job.process.returncode == 0, job.output + job.error_output
    assert f"{path}: " in job.error_output
    assert "1 broken item" in job.error_output
