"""COCO, Pascal VOC, Cityscapes and plain folders: items are what was written, and what torchvision reads."""

import json
import pickle
import shutil

import miniatures
import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from torchvision import datasets, tv_tensors
from torchvision.datasets import wrap_dataset_for_transforms_v2

from syncbn.training.config import check, compose_config
from syncbn.training.data.cityscapes import CityscapesSegmentation
from syncbn.training.data.coco import CocoDetection, CocoSegmentation, number_classes
from syncbn.training.data.digits import CLASS_NAMES
from syncbn.training.data.faults import survey
from syncbn.training.data.files import IGNORED
from syncbn.training.data.folders import FolderSegmentation
from syncbn.training.data.voc import VOC_CLASSES, VOCDetection, VOCSegmentation
from syncbn.training.errors import UserError
from syncbn.training.prepare import CATEGORY_IDS

COCO_TRAIN = ("train2017", "annotations/instances_train2017.json")
JPEG_ERROR = 12  # of 255, in mean


@pytest.fixture
def coco(tmp_path):
    return miniatures.coco(tmp_path)


@pytest.fixture
def voc(tmp_path):
    return miniatures.voc(tmp_path)


def edit(root, change, split="train"):
    """Changes COCO's instances json by `change(content)`."""
    file = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


def assert_image(item, scene, exact):
    image, truth = item["image"], scene["image"]
    assert isinstance(image, tv_tensors.Image)
    assert image.dtype == torch.uint8
    error = (image.int() - truth.int()).abs()
    assert error.max() == 0 if exact else error.float().mean() < JPEG_ERROR


def assert_detection(item, scene, index):
    assert_image(item, scene, exact=False)
    assert isinstance(item["boxes"], tv_tensors.BoundingBoxes)
    assert item["boxes"].canvas_size == tuple(scene["semantic"].shape)
    assert item["boxes"].dtype == torch.float32
    assert torch.equal(torch.as_tensor(item["boxes"]), scene["boxes"])
    assert torch.equal(item["labels"], scene["labels"])
    assert item["iscrowd"].tolist() == [0] * len(scene["labels"])
    assert item["area"].dtype == torch.float32
    assert item["index"] == index


def assert_segmentation(item, truth, scene, index, exact):
    assert_image(item, scene, exact)
    assert isinstance(item["semantic"], tv_tensors.Mask)
    assert item["semantic"].dtype == torch.int64
    assert torch.equal(torch.as_tensor(item["semantic"]), truth)
    assert item["index"] == index


# COCO


def test_coco_detection_is_the_scenes(coco):
    dataset = CocoDetection(coco, *COCO_TRAIN, masks=True)
    assert dataset.class_names == CLASS_NAMES
    assert len(dataset) == miniatures.TRAIN
    assert survey(dataset, decode=True) == []
    for i, scene in enumerate(miniatures.scenes()):
        assert_detection(dataset[i], scene, i)
        assert isinstance(dataset[i]["masks"], tv_tensors.Mask)
        assert torch.equal(torch.as_tensor(dataset[i]["masks"]), scene["masks"])
        assert torch.equal(dataset[i]["area"], scene["masks"].sum((1, 2)).float())
        assert dataset.name(i) == str(coco / "train2017" / f"{i + 1:012}.jpg")
    assert "masks" not in CocoDetection(coco, *COCO_TRAIN)[0]
    with pytest.raises(IndexError, match="item 6 of 6"):
        dataset[6]


def test_coco_detection_agrees_with_torchvision(coco):
    images, annotations = coco / "train2017", coco / "annotations" / "instances_train2017.json"
    theirs = wrap_dataset_for_transforms_v2(
        datasets.CocoDetection(images, annotations), target_keys=("boxes", "labels", "masks", "area", "iscrowd")
    )
    ours = CocoDetection(coco, *COCO_TRAIN, category_ids="file", masks=True)
    assert len(ours) == len(theirs)
    for i in range(len(ours)):
        image, target = theirs[i]
        assert np.array_equal(np.asarray(image), ours[i]["image"].permute(1, 2, 0).numpy())
        assert torch.equal(torch.as_tensor(target["boxes"]), torch.as_tensor(ours[i]["boxes"]))
        assert torch.equal(target["labels"], ours[i]["labels"])
        assert torch.equal(target["masks"].bool(), ours[i]["masks"])
        assert target["area"] == ours[i]["area"].tolist()
        assert target["iscrowd"] == ours[i]["iscrowd"].tolist()


def test_coco_segmentation_is_the_scenes(coco):
    dataset = CocoSegmentation(coco, *COCO_TRAIN)
    assert dataset.class_names == CLASS_NAMES
    for i, scene in enumerate(miniatures.scenes()):
        assert_segmentation(dataset[i], scene["semantic"], scene, i, exact=False)


def test_coco_class_numbers(coco):
    assert number_classes({7: "b", 3: "a"}, None, "contiguous") == ({3: 1, 7: 2}, ("background", "a", "b"))
    assert number_classes({7: "b", 3: "a"}, ["b", "a"], "contiguous") == ({7: 1, 3: 2}, ("background", "b", "a"))
    names = CocoDetection(coco, *COCO_TRAIN, category_ids="file").class_names
    assert len(names) == max(CATEGORY_IDS.values()) + 1
    assert [names[i] for i in CATEGORY_IDS.values()] == list(CLASS_NAMES[1:])
    assert names[6] == "N/A"
    # torchvision's models of COCO: 91 classes, whose names its weights bear.
    from torchvision.models.detection import FCOS_ResNet50_FPN_Weights

    theirs = FCOS_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    categories = {i: name for i, name in enumerate(theirs) if i and name != "N/A"}
    ours = number_classes(categories, None, "file")[1]
    assert (len(ours), ours[1:]) == (91, tuple(theirs[1:]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"classes": ["sevn"]}, "there is no category 'sevn'"),
        ({"category_ids": "dense"}, "category_ids must be one of contiguous, file, got 'dense'"),
        ({"crowd": "maybe"}, "crowd must be"),
        ({"empty": "maybe"}, "empty must be"),
        ({"orientation": "left"}, "orientation must be"),
    ],
)
def test_coco_names_the_wrong_argument(coco, wrong, message):
    with pytest.raises(ValueError, match=message):
        CocoDetection(coco, *COCO_TRAIN, **wrong)


def test_coco_classes_chosen_by_name(coco):
    dataset = CocoDetection(coco, *COCO_TRAIN, classes=["7", "1"])
    assert dataset.class_names == ("background", "7", "1")
    for i, scene in enumerate(miniatures.scenes()):
        truth = [{8: 1, 2: 2}[label] for label in scene["labels"].tolist() if label in (8, 2)]
        assert dataset[i]["labels"].tolist() == truth
    assert survey(dataset) == []  # what was not asked for is no fault
    with_some = CocoDetection(coco, *COCO_TRAIN, classes=["7", "1"], empty="drop")
    assert 0 < len(with_some) < len(dataset)
    assert all(len(with_some[i]["labels"]) for i in range(len(with_some)))


def test_coco_crowds_and_empty_images(coco):
    def change(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 2]
        for annotation in content["annotations"]:
            if annotation["image_id"] == 3 or annotation["id"] == 1:
                annotation["iscrowd"] = 1

    edit(coco, change)
    kept = CocoDetection(coco, *COCO_TRAIN)
    assert len(kept) == 6
    assert kept[0]["iscrowd"].tolist()[:2] == [1, 0]
    assert kept[1]["boxes"].shape == (0, 4)
    assert kept[1]["labels"].dtype == torch.int64
    assert CocoDetection(coco, *COCO_TRAIN, masks=True)[1]["masks"].shape[0] == 0
    dropped = CocoDetection(coco, *COCO_TRAIN, crowd="drop", empty="drop")
    assert len(dropped) == 4  # nothing is left of images 2 and 3
    assert len(dropped[0]["boxes"]) == len(kept[0]["boxes"]) - 1
    assert dropped.name(1) == kept.name(3)
    assert len(CocoDetection(coco, *COCO_TRAIN, empty="drop")) == 5


def test_coco_segmentation_drops_images_of_little_area(coco):
    areas = [int((scene["semantic"] > 0).sum()) for scene in miniatures.scenes()]
    limit = sorted(areas)[2]
    dataset = CocoSegmentation(coco, *COCO_TRAIN, empty="drop", min_area=limit)
    assert len(dataset) == sum(area > limit for area in areas) == 3


def square(x, y, side):
    return [x, y, x + side, y, x + side, y + side, x, y + side]


def test_coco_polygons_and_both_kinds_of_run_lengths(coco):
    def change(content):
        height, width = content["images"][0]["height"], content["images"][0]["width"]
        before, first_column = 5, height * 2
        shapes = [
            [square(10, 20, 8), square(30, 20, 4)],
            {"size": [height, width], "counts": [before, first_column, height * width - before - first_column]},
        ]
        content["annotations"] = [
            {"id": i, "image_id": 1, "category_id": i, "bbox": [1, 1, 9, 9], "segmentation": shape}
            for i, shape in enumerate(shapes, 1)
        ]

    edit(coco, change)
    polygons, runs = CocoDetection(coco, *COCO_TRAIN, masks=True)[0]["masks"]
    expected = torch.zeros_like(polygons)
    expected[20:28, 10:18] = True
    expected[20:24, 30:34] = True
    assert torch.equal(polygons, expected)
    height = len(runs)
    assert runs.T.flatten().nonzero().flatten().tolist() == list(range(5, 5 + 2 * height))  # column by column
    item = CocoDetection(coco, *COCO_TRAIN)[0]
    assert item["area"].tolist() == [81.0, 81.0]  # none is given: the box's
    assert item["iscrowd"].tolist() == [0, 0]


def test_coco_segmentation_ignores_where_classes_overlap(coco):
    def change(content):
        content["annotations"] = [
            {"id": i, "image_id": 1, "category_id": category, "segmentation": [square(x, 10, 10)], "iscrowd": 0}
            for i, (category, x) in enumerate([(1, 10), (1, 15), (2, 22)])
        ]

    edit(coco, change)
    row = CocoSegmentation(coco, *COCO_TRAIN)[0]["semantic"][12]
    assert row[10:32].tolist() == [1] * 12 + [IGNORED] * 3 + [2] * 7
    assert row[:10].unique().tolist() == row[32:].unique().tolist() == [0]


def test_boxes_that_overhang_by_a_rounding_are_clamped(coco):
    def change(content):
        width, height = content["images"][0]["width"], content["images"][0]["height"]
        content["annotations"][0]["bbox"] = [-0.6, -0.9, width + 1.2, height + 1.5]

    edit(coco, change)
    dataset = CocoDetection(coco, *COCO_TRAIN)
    assert survey(dataset) == []
    height, width = dataset[0]["image"].shape[1:]
    assert dataset[0]["boxes"][0].tolist() == [0, 0, width, height]


def test_a_dataset_travels_to_a_worker_process(coco):
    dataset = CocoDetection(coco, *COCO_TRAIN, masks=True)
    loader = torch.utils.data.DataLoader(dataset, num_workers=1, collate_fn=list, multiprocessing_context="fork")
    assert [len(items[0]["boxes"]) for items in loader] == [len(dataset[i]["boxes"]) for i in range(6)]
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[2]["boxes"], dataset[2]["boxes"])


# Pascal VOC


def test_voc_detection_is_the_scenes(voc):
    dataset = VOCDetection(voc, "train")
    assert dataset.class_names == CLASS_NAMES
    for i, scene in enumerate(miniatures.scenes()):
        assert_detection(dataset[i], scene, i)
    assert len(VOCDetection(voc, "val", year=2012)) == miniatures.VAL


def test_voc_detection_agrees_with_torchvision(voc):
    theirs, ours = datasets.VOCDetection(voc, "2012", "train"), VOCDetection(voc, "train")
    assert (theirs.images, theirs.annotations) == (ours.images, ours.annotations)
    for i in range(len(ours)):
        image, target = theirs[i]
        assert np.array_equal(np.asarray(image), ours[i]["image"].permute(1, 2, 0).numpy())
        things = target["annotation"]["object"]
        boxes = [[int(thing["bndbox"][side]) for side in ("xmin", "ymin", "xmax", "ymax")] for thing in things]
        # torchvision leaves pixels counted from 1.
        assert torch.equal(torch.tensor(boxes) - torch.tensor([1, 1, 0, 0]), torch.as_tensor(ours[i]["boxes"]))
        assert [thing["name"] for thing in things] == [ours.class_names[label] for label in ours[i]["labels"]]
    assert torch.equal(VOCDetection(voc, "train", one_based=False)[0]["boxes"][:, 0], ours[0]["boxes"][:, 0] + 1)


def border(semantic):
    """The background pixels with a digit above, below or beside them."""
    inked = torch.nn.functional.pad(semantic > 0, (1, 1, 1, 1))
    return (inked[:-2, 1:-1] | inked[2:, 1:-1] | inked[1:-1, :-2] | inked[1:-1, 2:]) & (semantic == 0)


def test_voc_segmentation_is_the_scenes_and_ignores_borders(voc):
    dataset = VOCSegmentation(voc, "train")
    assert dataset.class_names == CLASS_NAMES
    for i, scene in enumerate(miniatures.scenes()):
        truth = scene["semantic"].masked_fill(border(scene["semantic"]), IGNORED)
        assert_segmentation(dataset[i], truth, scene, i, exact=False)


def test_voc_segmentation_agrees_with_torchvision(voc):
    theirs = wrap_dataset_for_transforms_v2(datasets.VOCSegmentation(voc, "2012", "train"))
    ours = VOCSegmentation(voc, "train")
    assert (theirs.images, theirs.masks) == (ours.images, ours.masks)
    for i in range(len(ours)):
        assert torch.equal(theirs[i][1].long().squeeze(0), ours[i]["semantic"])


def test_voc_of_ones_own(voc):
    """The folder by itself, a png among the images, a list with two columns, difficult objects, no objects."""
    folder = voc / "VOCdevkit" / "VOC2012"
    first = folder / "JPEGImages" / "train_000000.jpg"
    Image.open(first).save(first.with_suffix(".png"))
    first.unlink()
    (folder / "ImageSets" / "Main" / "mine.txt").write_text("train_000000  1\n\ntrain_000001 -1\n")
    annotation = folder / "Annotations" / "train_000000.xml"
    annotation.write_text(annotation.read_text().replace("<difficult>0</difficult>", "<difficult>1</difficult>", 1))
    (folder / "Annotations" / "train_000001.xml").write_text("<annotation><filename>x.jpg</filename></annotation>")
    dataset = VOCDetection(folder, "mine")
    assert survey(dataset) == []
    assert dataset.name(0) == str(first.with_suffix(".png"))
    assert dataset[0]["iscrowd"].tolist()[0] == 1
    assert dataset[1]["boxes"].shape == (0, 4)
    assert len(VOCDetection(folder, "mine", crowd="drop")[0]["boxes"]) == len(dataset[0]["boxes"]) - 1
    image = folder / "JPEGImages" / "train_000002.jpg"
    image.rename(image.with_name("a photo 1.jpg"))
    (folder / "ImageSets" / "Main" / "mine.txt").write_text("a photo 1\ntrain_000001\n")
    assert VOCDetection(folder, "mine").name(0).endswith("a photo 1.jpg")
    (folder / "classes.txt").unlink()
    assert VOCDetection(folder, "mine").class_names == VOC_CLASSES
    from torchvision.models.segmentation import DeepLabV3_ResNet50_Weights

    theirs = DeepLabV3_ResNet50_Weights.COCO_WITH_VOC_LABELS_V1.meta["categories"]
    assert list(VOC_CLASSES[1:]) == theirs[1:]


# Cityscapes


def test_cityscapes_is_the_scenes(tmp_path):
    root = miniatures.cityscapes(tmp_path)
    dataset = CityscapesSegmentation(root, "train")
    assert len(dataset.class_names) == 19
    assert dataset.class_names[:2] + dataset.class_names[-1:] == ("road", "sidewalk", "bicycle")
    scenes = list(miniatures.scenes())
    # Sorted by city, which is every other scene.
    for i, number in enumerate([0, 2, 4, 1, 3, 5]):
        assert_segmentation(dataset[i], scenes[number]["semantic"], scenes[number], i, exact=True)


def test_cityscapes_agrees_with_torchvision(tmp_path):
    root = miniatures.cityscapes(tmp_path)
    theirs = wrap_dataset_for_transforms_v2(datasets.Cityscapes(root, "train", target_type="semantic"))
    ours = CityscapesSegmentation(root, "train")
    assert sorted(theirs.images) == ours.images
    train_ids = {label.id: label.train_id for label in datasets.Cityscapes.classes}
    for i, image in enumerate(theirs.images):
        mapped = theirs[i][1].long().squeeze(0).apply_(lambda label: train_ids[label])
        assert torch.equal(mapped, ours[ours.images.index(image)]["semantic"])


def test_cityscapes_ignores_all_that_is_not_evaluated(tmp_path):
    root = miniatures.cityscapes(tmp_path)
    (root / "leftImg8bit" / "train" / ".DS_Store").write_text("torchvision's listing stops here")
    dataset = CityscapesSegmentation(root, "train")
    labels = np.array(Image.open(dataset.masks[0]))
    labels[:34, 0] = np.arange(34)
    labels[34, 0] = 255
    Image.fromarray(labels).save(dataset.masks[0])
    expected = [label.train_id for label in datasets.Cityscapes.classes if label.id >= 0]
    assert dataset[0]["semantic"][:35, 0].tolist() == [*expected, IGNORED]


# Folders


@pytest.fixture
def folders(tmp_path):
    return miniatures.folders(tmp_path)


def test_folders_are_the_scenes(folders):
    dataset = FolderSegmentation(folders, "train")
    assert dataset.class_names == CLASS_NAMES
    for i, scene in enumerate(miniatures.scenes()):
        assert_segmentation(dataset[i], scene["semantic"], scene, i, exact=True)


def test_folders_pair_files_by_name_at_any_depth(folders):
    split = folders / "train"
    for kind in ("images", "masks"):
        (split / kind / "a").mkdir()
        shutil.move(split / kind / "00000.png", split / kind / "a" / "00003.png")
        (split / kind / ".DS_Store").write_text("")
        (split / kind / "notes.md").write_text("")
    mask = split / "masks" / "00001.png"
    palette = Image.open(mask)
    palette = Image.fromarray(np.asarray(palette), mode="P")
    palette.putpalette([255 - i // 3 for i in range(768)])
    palette.save(mask)
    dataset = FolderSegmentation(split, classes=str(folders / "classes.txt"))
    assert survey(dataset, decode=True) == []
    scenes = miniatures.scenes()
    for i, number in enumerate([1, 2, 3, 4, 5, 0]):
        assert torch.equal(dataset[i]["semantic"], scenes[number]["semantic"]), dataset.name(i)


def test_black_and_white_masks_are_asked_about_and_then_understood(folders):
    truths = []
    for mask in sorted((folders / "train" / "masks").iterdir()):
        ink = np.asarray(Image.open(mask)) > 0
        truths.append(torch.from_numpy(ink).long())
        Image.fromarray(ink.astype(np.uint8) * 255).save(mask)
    names = ["background", "ink"]
    with pytest.raises(UserError, match=r"values=\{255:1\}"):
        FolderSegmentation(folders, "train", classes=names)
    dataset = FolderSegmentation(folders, "train", classes=names, values={255: 1})
    assert all(torch.equal(dataset[i]["semantic"], truth) for i, truth in enumerate(truths))
    cfg = compose_config(["data=folders", f"data.train.root={folders}", "data.train.values={255: 1}"])
    assert torch.equal(instantiate(cfg.data.train, classes=names)[0]["semantic"], truths[0])
    # Masks of one bit have no such doubt.
    for mask, truth in zip(sorted((folders / "train" / "masks").iterdir()), truths, strict=True):
        Image.fromarray(truth.numpy().astype(bool)).save(mask)
    dataset = FolderSegmentation(folders, "train", classes=names)
    assert all(torch.equal(dataset[i]["semantic"], truth) for i, truth in enumerate(truths))


def test_folders_name_the_wrong_value(folders):
    for values in ({"a": 1}, {255: 11}, {-1: 0}, {1.5: 1}):
        with pytest.raises(ValueError, match="values: "):
            FolderSegmentation(folders, "train", values=values)


# Configuration

WRITTEN_AS = {"coco-seg": "coco", "voc-det": "voc"}
DETECTION = ("coco", "voc-det")


@pytest.mark.parametrize("data", ["coco", "coco-seg", "voc", "voc-det", "cityscapes", "folders"])
def test_each_configuration_gives_batches(tmp_path, data):
    root = getattr(miniatures, WRITTEN_AS.get(data, data))(tmp_path)
    cfg = compose_config([f"data={data}", f"data.train.root={root}", "data.num_workers=0"])
    check(cfg)
    module = instantiate(cfg.data)
    assert (len(module.train_set), len(module.val_set)) == (miniatures.TRAIN, miniatures.VAL)
    for loader in (module.train_dataloader(), module.val_dataloader()):
        for batch in loader:
            if data in DETECTION:
                assert len(batch["image"]) == len(batch["targets"]) == 2
                assert all(len(target["boxes"]) == len(target["labels"]) for target in batch["targets"])
            else:
                assert batch["image"].shape[-2:] == batch["semantic"].shape[-2:]
                assert batch["image"].is_floating_point()
    # Different sizes, so that padding happens.
    sizes = {tuple(module.train_set.dataset[i]["image"].shape) for i in range(miniatures.TRAIN)}
    assert len(sizes) > 3
