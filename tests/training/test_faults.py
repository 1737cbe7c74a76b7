"""Every way in which files are wrong, made for real on disk: named with file and reason, at the right time, and skipped
without taking anything good along."""

import contextlib
import io
import json
import math
import pickle
import zlib
from pathlib import Path

import miniatures
import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection.transform import resize_boxes

from syncbn.training.data import DigitScenes
from syncbn.training.data.cityscapes import CityscapesSegmentation
from syncbn.training.data.coco import CocoDetection, CocoSegmentation, unpack_runs
from syncbn.training.data.faults import ITEM, OBJECT, BrokenItem, Fault, count, describe, survey
from syncbn.training.data.files import box_fault
from syncbn.training.data.folders import FolderSegmentation
from syncbn.training.data.reading import read_image
from syncbn.training.data.voc import VOCDetection, VOCSegmentation
from syncbn.training.errors import UserError

COCO_TRAIN = ("train2017", "annotations/instances_train2017.json")
DATASETS = {
    "coco": lambda path: CocoDetection(miniatures.coco(path), *COCO_TRAIN, masks=True),
    "coco-seg": lambda path: CocoSegmentation(miniatures.coco(path), *COCO_TRAIN),
    "voc": lambda path: VOCSegmentation(miniatures.voc(path), "train"),
    "voc-det": lambda path: VOCDetection(miniatures.voc(path), "train"),
    "cityscapes": lambda path: CityscapesSegmentation(miniatures.cityscapes(path), "train"),
    "folders": lambda path: FolderSegmentation(miniatures.folders(path), "train"),
}
DETECTION = ("coco", "voc-det")
MASKED = ("voc", "cityscapes", "folders")
BROKEN = 2  # the item that is broken


@pytest.fixture(params=DATASETS)
def dataset(request, tmp_path):
    return DATASETS[request.param](tmp_path)


@pytest.fixture(params=MASKED)
def masked(request, tmp_path):
    return DATASETS[request.param](tmp_path)


@pytest.fixture
def coco(tmp_path):
    return miniatures.coco(tmp_path)


@pytest.fixture
def voc(tmp_path):
    return miniatures.voc(tmp_path)


def edit(root, change):
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    return file


def assert_only_this_item(dataset, file, why, decode=False):
    """The survey tells one fault, reading raises it, and all other items come."""
    (fault,) = survey(dataset, decode=decode)
    assert (fault.index, fault.kind) == (BROKEN, ITEM)
    assert fault.file == str(file)
    assert why in fault.why
    if decode:
        assert survey(dataset) == []  # nothing that a header would tell
    else:
        assert survey(dataset, decode=True) == [fault]
        assert dataset.check(BROKEN) == f"{file}: {fault.why}"
        assert survey(dataset, [0, 1]) == []
    for read in (dataset.read, dataset.__getitem__):
        with pytest.raises(BrokenItem) as raised:
            read(BROKEN)
        assert (raised.value.file, raised.value.why) == (fault.file, fault.why)
    for index in set(range(len(dataset))) - {BROKEN}:
        assert dataset.check(index) is None
        assert dataset[index]["index"] == index


# Images


def test_an_image_that_is_missing(dataset):
    file = Path(dataset.name(BROKEN))
    file.unlink()
    assert_only_this_item(dataset, file, "there is no such file")


def test_an_empty_image(dataset):
    file = Path(dataset.name(BROKEN))
    file.write_bytes(b"")
    assert_only_this_item(dataset, file, "is empty")


def test_an_image_that_is_none(dataset):
    file = Path(dataset.name(BROKEN))
    file.write_text("<html>404 Not Found</html>")
    assert_only_this_item(dataset, file, "is no image that Pillow can read")


def test_a_truncated_image(dataset):
    file = Path(dataset.name(BROKEN))
    data = file.read_bytes()
    file.write_bytes(data[: len(data) * 2 // 3])
    assert_only_this_item(dataset, file, "cannot be decoded", decode=True)


@pytest.mark.parametrize("kept", [3, 9, 20, 40, 150, 300, 600])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif", ".bmp"])
def test_wherever_an_image_is_cut_off_it_is_a_broken_item(tmp_path, suffix, kept):
    file = tmp_path / f"image{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(file)
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(BrokenItem) as raised:
        read_image(file)
    assert raised.value.file == str(file)


def test_an_image_with_a_byte_changed_reads_or_is_a_broken_item(tmp_path):
    rng = np.random.default_rng(0)
    file = tmp_path / "image.png"
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, "png")
    for _ in range(200):
        data = bytearray(buffer.getvalue())
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        file.write_bytes(data)
        with contextlib.suppress(BrokenItem):
            assert read_image(file).dtype == torch.uint8


def test_an_image_that_is_a_folder(tmp_path):
    with pytest.raises(BrokenItem, match="is a folder"):
        read_image(tmp_path)


def test_an_image_of_another_size_than_its_annotation_says(dataset):
    file = Path(dataset.name(BROKEN))
    width, height = Image.open(file).size
    Image.new("RGB", (width, height + 1)).save(file)
    (fault,) = survey(dataset)
    assert (fault.index, fault.kind) == (BROKEN, ITEM)
    told = fault.file + fault.why
    assert str(file) in told
    assert f"{width}x{height}" in told
    assert f"{width}x{height + 1}" in told
    with pytest.raises(BrokenItem, match=f"{width}x{height + 1}"):
        dataset.read(BROKEN)


# Pixels


def test_every_kind_of_image_becomes_rgb(tmp_path):
    rgb = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    picture = Image.fromarray(rgb)

    def read(image, suffix):
        image.save(tmp_path / f"image{suffix}")
        tensor = read_image(tmp_path / f"image{suffix}")
        assert tensor.shape == (3, 9, 7)
        assert tensor.dtype == torch.uint8
        return tensor.permute(1, 2, 0).numpy()

    grey = picture.convert("L")
    assert np.array_equal(read(grey, ".png"), np.asarray(grey)[..., None].repeat(3, 2))
    assert np.array_equal(read(grey.convert("1"), ".png"), np.asarray(grey.convert("1").convert("RGB")))
    see_through = picture.copy()
    see_through.putalpha(Image.fromarray(rgb[..., 0]))
    assert np.array_equal(read(see_through, ".png"), rgb)
    few = picture.quantize(16)
    assert np.array_equal(read(few, ".png"), np.asarray(few.convert("RGB")))
    few.info["transparency"] = bytes(range(16))
    assert np.array_equal(read(few, ".png"), np.asarray(few.convert("RGBA").convert("RGB")))
    assert np.array_equal(read(picture.convert("CMYK"), ".tif"), rgb)
    assert read(picture.convert("CMYK"), ".jpg").std() > 10
    # 16 bits: the upper eight. Pillow's own conversion makes white of all that is above 255.
    deep = (np.arange(63).reshape(9, 7) * 1040).astype(np.uint16)
    for suffix in (".png", ".tif"):
        assert np.array_equal(read(Image.fromarray(deep), suffix)[..., 1], deep >> 8)


@pytest.mark.parametrize(("dtype", "reason"), [(np.float32, "floating-point"), (np.int32, "32 bits")])
def test_pixels_of_unknown_range_are_refused(tmp_path, dtype, reason):
    Image.fromarray(np.full((4, 4), 2**20, dtype)).save(tmp_path / "a.tif")
    with pytest.raises(BrokenItem, match=reason):
        read_image(tmp_path / "a.tif")


def tagged(file, pixels, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, exif=exif)
    return file


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_picture_is_turned_as_its_annotation_wants(tmp_path, orientation, suffix):
    from PIL import ImageOps

    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)
    file = tagged(tmp_path / f"photo{suffix}", pixels, orientation)
    stored = np.asarray(Image.open(file).convert("RGB"))
    upright = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))

    def read(**how):
        return read_image(file, **how).permute(1, 2, 0).numpy()

    assert np.array_equal(read(), stored)
    assert np.array_equal(read(orientation="stored"), stored)
    assert np.array_equal(read(orientation="exif"), upright)
    assert np.array_equal(read(stated=(9, 6)), stored)
    if orientation >= 5:
        assert np.array_equal(read(stated=(6, 9)), upright)
        with pytest.raises(BrokenItem, match="is 9x6 pixels, but its annotation is for 6x9"):
            read(stated=(6, 9), orientation="stored")
        with pytest.raises(BrokenItem, match="is 6x9 pixels, but its annotation is for 9x6"):
            read(stated=(9, 6), orientation="exif")


def test_a_damaged_exif_note_does_not_damage_the_picture(tmp_path):
    Image.new("RGB", (5, 4)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    assert read_image(tmp_path / "a.jpg").shape == (3, 4, 5)


def test_masks_for_the_upright_picture_turn_it(tmp_path):
    dataset = DATASETS["folders"](tmp_path)
    image, mask = dataset.images[0], dataset.masks[0]
    upright = np.asarray(Image.open(image))
    if upright.shape[0] == upright.shape[1]:
        pytest.fail("the first scene must not be square")
    tagged(image, np.rot90(upright), 6)  # turned to the left; 6: turn right to see it
    assert survey(dataset, decode=True) == []
    assert np.array_equal(dataset[0]["image"].permute(1, 2, 0).numpy(), upright)
    assert dataset[0]["semantic"].shape == np.asarray(Image.open(mask)).shape


# Masks


def test_a_mask_that_is_missing(masked):
    Path(masked.masks[BROKEN]).unlink()
    assert_only_this_item(masked, masked.masks[BROKEN], "there is no such file")


def test_a_mask_of_another_size_than_its_image(masked):
    file = Path(masked.masks[BROKEN])
    width, height = Image.open(file).size
    Image.open(file).crop((0, 0, width - 3, height)).save(file)
    why = f"is {width - 3}x{height} pixels, but its image {masked.name(BROKEN)} is {width}x{height}"
    assert_only_this_item(masked, file, why)


def test_a_mask_of_colours(masked):
    file = Path(masked.masks[BROKEN])
    Image.open(file).convert("RGB").save(file)
    assert_only_this_item(masked, file, "one channel of class numbers, or a palette; this is a RGB image")


def test_a_truncated_mask(masked):
    file = Path(masked.masks[BROKEN])
    data = file.read_bytes()
    file.write_bytes(data[:-40])  # the header and the palette are whole
    assert_only_this_item(masked, file, "cannot be decoded", decode=True)


def test_a_mask_value_outside_the_classes(masked):
    file = Path(masked.masks[BROKEN])
    mask = Image.open(file)
    mask.putpixel((5, 7), 77)
    mask.putpixel((6, 7), 99)
    mask.save(file)
    classes = {
        VOCSegmentation: "0 to 10, 255",
        FolderSegmentation: "0 to 10, 255",
        CityscapesSegmentation: "0 to 33, 255",
    }
    assert_only_this_item(masked, file, f"holds 77, 99; its classes are {classes[type(masked)]}", decode=True)


def test_a_mask_without_an_image(tmp_path):
    root = miniatures.folders(tmp_path)
    (root / "train" / "images" / "00003.png").unlink()
    dataset = FolderSegmentation(root, "train")
    assert len(dataset) == miniatures.TRAIN - 1
    (fault,) = survey(dataset)
    assert fault.kind == OBJECT  # no item is lost by it
    assert fault.file == str(root / "train" / "masks" / "00003.png")


# Objects: boxes, classes, outlines


def broken_box(x, y, width, height):
    return lambda annotation: annotation.update(bbox=[x, y, width, height])


def with_outline(outline):
    return lambda annotation: annotation.update(segmentation=outline)


OBJECT_FAULTS = {
    "beyond": (broken_box(80, 5, 40, 10), "box [80, 5, 120, 15] is outside its image of"),
    "negative": (broken_box(-20, 5, 30, 10), "box [-20, 5, 10, 15] is outside its image of"),
    "elsewhere": (broken_box(-0.9, 5, 0.5, 10), "box [-0.9, 5, -0.4, 15] is outside its image of"),
    "no height": (broken_box(5, 5, 10, 0), "box [5, 5, 15, 5] has no area"),
    "negative width": (broken_box(25, 5, -10, 9), "box [25, 5, 15, 14] has no area"),
    "not a number": (broken_box(5, 5, math.nan, 9), "is not finite"),
    "three numbers": (lambda a: a.update(bbox=[1, 2, 3]), "has no bbox of four numbers"),
    "words": (lambda a: a.update(bbox=["1", "2", "3", "4"]), "has no bbox of four numbers"),
    "no box": (lambda a: a.pop("bbox"), "has no bbox of four numbers"),
    "unknown class": (lambda a: a.update(category_id=99), "there is no category with the id 99"),
    "no class": (lambda a: a.pop("category_id"), "there is no category with the id null"),
    "class of many": (lambda a: a.update(category_id=[1, 2]), "there is no category with the id [1, 2]"),
    "no outline": (lambda a: a.pop("segmentation"), "has no segmentation"),
    "empty outline": (with_outline([]), "has no segmentation"),
    "two corners": (with_outline([[1, 1, 5, 5]]), "has a polygon of 4 numbers"),
    "half a corner": (with_outline([[1, 1, 5, 5, 9, 1, 3]]), "has a polygon of 7 numbers"),
    "polygon of words": (with_outline([["a"] * 6]), "has a polygon that is no list of numbers"),
    "another size": (with_outline({"size": [5, 5], "counts": [25]}), "mask of size [5, 5] in an image of"),
}


@pytest.mark.parametrize("name", OBJECT_FAULTS)
def test_a_faulty_object_in_coco(coco, name):
    change, why = OBJECT_FAULTS[name]
    whole = CocoDetection(coco, *COCO_TRAIN, masks=True)[0]
    file = edit(coco, lambda content: change(content["annotations"][1]))
    dataset = CocoDetection(coco, *COCO_TRAIN, masks=True)
    (fault,) = survey(dataset)
    assert (fault.index, fault.file, fault.kind) == (0, str(file), OBJECT)
    assert fault.why.startswith("annotation 2: ")
    assert why in fault.why
    assert survey(dataset, decode=True) == [fault]
    assert dataset.check(0) is None  # the image stays
    with pytest.raises(BrokenItem, match="annotation 2: "):
        dataset[0]
    dataset.bad_objects = "skip"
    for item in (dataset[0], dataset.read(0)):
        for key in ("boxes", "labels", "masks", "iscrowd", "area"):
            kept = torch.cat([whole[key][:1], whole[key][2:]])
            assert torch.equal(torch.as_tensor(item[key]), torch.as_tensor(kept)), key


@pytest.mark.parametrize("name", ["unknown class", "no outline", "two corners", "another size"])
def test_a_faulty_object_in_coco_segmentation(coco, name):
    change, why = OBJECT_FAULTS[name]
    whole = CocoSegmentation(coco, *COCO_TRAIN)[0]["semantic"]
    edit(coco, lambda content: change(content["annotations"][1]))
    dataset = CocoSegmentation(coco, *COCO_TRAIN)
    (fault,) = survey(dataset, decode=True)
    assert (fault.index, fault.kind) == (0, OBJECT)
    assert why in fault.why
    with pytest.raises(BrokenItem, match="annotation 2: "):
        dataset[0]
    dataset.bad_objects = "skip"
    lost = miniatures.scenes()[0]["masks"][1]
    assert torch.equal(torch.as_tensor(dataset[0]["semantic"]), torch.as_tensor(whole).masked_fill(lost, 0))


def test_boxes_do_not_matter_to_segmentation_nor_outlines_to_boxes(coco):
    edit(coco, lambda content: content["annotations"][1].pop("bbox"))
    assert survey(CocoSegmentation(coco, *COCO_TRAIN)) == []
    edit(coco, lambda content: content["annotations"][2].pop("segmentation"))
    assert [fault.why.split(":")[0] for fault in survey(CocoDetection(coco, *COCO_TRAIN))] == ["annotation 2"]


@pytest.mark.parametrize("counts", ["garbage", "", "0" * 50, "P" * 21, "\u00e9", "Zb0Qo", "~~", 7, None])
def test_packed_run_lengths_that_are_none(coco, counts):
    edit(coco, lambda content: content["annotations"][1]["segmentation"].update(counts=counts))
    dataset = CocoDetection(coco, *COCO_TRAIN, masks=True)
    (fault,) = survey(dataset)
    assert fault.why.startswith("annotation 2: ")
    with pytest.raises(BrokenItem, match="annotation 2: "):
        dataset[0]
    dataset.bad_objects = "skip"
    boxes = miniatures.scenes()[0]["boxes"]
    assert torch.equal(torch.as_tensor(dataset[0]["boxes"]), torch.cat([boxes[:1], boxes[2:]]))


def test_packed_run_lengths_are_what_pycocotools_packs():
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(0)
    for side, chance in [(1, 0.5), (5, 0.5), (40, 0.02), (40, 0.98), (300, 0.0001), (700, 0.3)]:
        mask = rng.random((side, side + 3)) < chance
        columns = mask.flatten(order="F")
        changes = np.flatnonzero(np.diff(columns, prepend=False))
        runs = np.diff(changes, prepend=0, append=mask.size)
        packed = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"].decode()
        assert unpack_runs(packed) == runs.tolist(), (side, chance)


def test_run_lengths_of_too_many_or_too_few_pixels(coco):
    def change(content):
        outline = content["annotations"][1]["segmentation"]
        content["annotations"][1]["segmentation"] = {"size": outline["size"], "counts": [10, 10**7]}
        content["annotations"][2]["segmentation"] = {"size": outline["size"], "counts": [3, 4]}

    edit(coco, change)
    found = survey(CocoDetection(coco, *COCO_TRAIN, masks=True))
    assert [fault.why.split(" in an image")[0] for fault in found] == [
        "annotation 2: run lengths of 10000010 pixels",
        "annotation 3: run lengths of 7 pixels",
    ]


def test_annotations_of_no_image_are_told_once(coco):
    def change(content):
        content["annotations"][1]["image_id"] = 4000
        content["annotations"].append("surprise")

    edit(coco, change)
    dataset = CocoDetection(coco, *COCO_TRAIN)
    found = survey(dataset)
    assert [fault.why for fault in found] == [
        "annotation 2: there is no image with the id 4000",
        found[1].why,
    ]
    assert "surprise" in found[1].why
    assert survey(dataset, range(1, len(dataset))) == []
    assert len(dataset[0]["boxes"]) == len(miniatures.scenes()[0]["boxes"]) - 1


def test_an_image_that_goes_for_want_of_good_objects_takes_no_fault_along(coco):
    def change(content):
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 1]
        content["annotations"].append({"id": 900, "image_id": 1, "category_id": 1, "bbox": [3, 3, 0, 5]})
        content["annotations"].append({"id": 901, "image_id": 1, "category_id": 77, "bbox": [3, 3, 5, 5]})

    edit(coco, change)
    dataset = CocoDetection(coco, *COCO_TRAIN, empty="drop")
    assert len(dataset) == miniatures.TRAIN - 1
    assert [(fault.kind, fault.why.split(":")[0]) for fault in survey(dataset)] == [
        (OBJECT, "annotation 900"),
        (OBJECT, "annotation 901"),
    ]


VOC_FAULTS = {
    "unknown class": ("<name>", "<name>x", "unknown class 'x"),
    "no class": ("name>", "nom>", "has no name"),
    "no box": ("bndbox>", "box>", "has no bndbox of four numbers"),
    "no number": ("<xmin>", "<xmin>about ", "has no bndbox of four numbers"),
    "outside": ("<xmax>", "<xmax>9", "is outside its image of"),
    "inside out": ("<xmin>", "<xmin>9", "has no area"),
}


@pytest.mark.parametrize("name", VOC_FAULTS)
def test_a_faulty_object_in_voc(voc, name):
    old, new, why = VOC_FAULTS[name]
    file = voc / "VOCdevkit" / "VOC2012" / "Annotations" / "train_000000.xml"
    before, tag, after = file.read_text().partition("<object>")
    thing, end, rest = after.partition("</object>")
    file.write_text(before + tag + thing.replace(old, new) + end + rest)
    dataset = VOCDetection(voc, "train")
    (fault,) = survey(dataset, decode=True)
    assert (fault.index, fault.file, fault.kind) == (0, str(file), OBJECT)
    assert fault.why.startswith("object[0]")
    assert why in fault.why
    with pytest.raises(BrokenItem):
        dataset[0]
    dataset.bad_objects = "skip"
    assert torch.equal(torch.as_tensor(dataset[0]["boxes"]), miniatures.scenes()[0]["boxes"][1:])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "there is no such file"),
        ("", "is no xml"),
        ("<annotation><object></annotation>", "is no xml"),
        ("<html></html>", "is no VOC annotation"),
    ],
)
def test_a_voc_annotation_that_cannot_be_read(voc, content, why):
    file = voc / "VOCdevkit" / "VOC2012" / "Annotations" / f"train_{BROKEN:06}.xml"
    file.unlink() if content is None else file.write_text(content)
    assert_only_this_item(VOCDetection(voc, "train"), file, why)


def test_voc_annotations_without_a_size_or_with_zeros_say_nothing_of_it(voc):
    for i, size in enumerate(["", "<size><width>0</width><height>0</height></size>"]):
        file = voc / "VOCdevkit" / "VOC2012" / "Annotations" / f"train_{i:06}.xml"
        before, _, rest = file.read_text().partition("<size>")
        file.write_text(before + size + rest.partition("</size>")[2])
    assert survey(VOCDetection(voc, "train"), decode=True) == []


def test_boxes():
    assert box_fault((-1, -1, 101, 51), (100, 50)) is None  # a rounding
    for box in (
        (99.999, 0, 100.9, 5),
        (-1.1, 0, 5, 5),
        (0, 0, 101.5, 5),
        (0, 0, 5, 52),
        (100.2, 0, 100.8, 5),
        (0, -0.8, 5, -0.1),
    ):
        assert "outside" in box_fault(box, (100, 50)), box
    # The last two hardly have a side: none in float32 at a large coordinate.
    for box in ((5, 5, 5, 9), (9, 5, 5, 9), (99, 5, 99.000001, 9), (5, 49.9, 9, 49.905)):
        assert "no area" in box_fault(box, (100, 50)), box
    assert "not finite" in box_fault((0, 0, math.inf, 5), (100, 50))


def test_a_detector_takes_the_narrowest_box_that_is_no_fault():
    """torchvision's stop at a box without area, on the one process that has it, and see it in float32, resized."""
    for x in (0.0, 99.98, 1999.98, 9999.98, 59999.98):
        width = int(x) + 1
        box = (x, 7.0, x + 0.011, 9.0)
        assert box_fault(box, (width, 100)) is None
        for side in (64, 800, 1333, 70000):
            (resized,) = resize_boxes(torch.tensor([box]), [100, width], [100, side])
            assert resized[0] < resized[2], (x, side)


# Whole datasets


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: CocoDetection(p / "no", *COCO_TRAIN), "root: there is no folder {}/no"),
        (lambda p: CocoDetection(miniatures.coco(p), "test", COCO_TRAIN[1]), "images: there is no folder {}/coco/test"),
        (
            lambda p: CocoDetection(miniatures.coco(p), "val2017", "a.json"),
            "annotations: there is no file {}/coco/a.json",
        ),
        (lambda p: CocoSegmentation(p, ".", "a.json"), "annotations: there is no file {}/a.json"),
        (lambda p: VOCDetection(p, "train"), "root: there is no ImageSets in {} nor in {}/VOCdevkit/VOC2012"),
        (lambda p: VOCDetection(miniatures.voc(p), "test"), "Main/test.txt; there are: train, val"),
        (lambda p: VOCSegmentation(miniatures.voc(p), "test"), "Segmentation/test.txt; there are: train, val"),
        (lambda p: VOCSegmentation(miniatures.voc(p), "val", year=2007), "nor in {}/voc/VOCdevkit/VOC2007"),
        (lambda p: VOCSegmentation(miniatures.voc(p), "val", classes="no.txt"), "classes: there is no file no.txt"),
        (lambda p: VOCSegmentation(miniatures.voc(p), "val", classes=["a", "a"]), "classes: 'a' is named twice"),
        (lambda p: CityscapesSegmentation(p, "train"), "root: there is no folder {}/leftImg8bit/train"),
        (
            lambda p: CityscapesSegmentation(miniatures.cityscapes(p), "train", mode="coarse"),
            "root: there is no folder {}/cityscapes/gtCoarse/train",
        ),
        (lambda p: FolderSegmentation(p, "train"), "split: there is no folder {}/train"),
        (lambda p: FolderSegmentation(miniatures.folders(p), "train", masks="m"), "masks: there is no folder {}"),
        (
            lambda p: FolderSegmentation(miniatures.folders(p), "train", classes=["one"]),
            "classes: at least two names are needed",
        ),
    ],
)
def test_what_is_missing_is_told_at_once(tmp_path, make, message):
    with pytest.raises(UserError) as raised:
        make(tmp_path)
    assert message.replace("{}", str(tmp_path)) in str(raised.value)


def test_folders_without_names_or_images(tmp_path):
    root = miniatures.folders(tmp_path)
    (root / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"classes: give a list of names.*classes\.txt"):
        FolderSegmentation(root, "train")
    image = root / "train" / "images" / "00001.png"
    Image.open(image).save(image.with_suffix(".jpg"))
    with pytest.raises(UserError, match=r"images: .*00001\.jpg and .*00001\.png have the same name"):
        FolderSegmentation(root, "train", classes=["a", "b"])
    for file in image.parent.iterdir():
        file.unlink()
    with pytest.raises(UserError, match="images: there is no image in"):
        FolderSegmentation(root, "train", classes=["a", "b"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is no json"),
        ("\xff\xfe", "it has no list 'images'|is no json"),
        ("[]", "it has no list 'images'"),
        ('{"images": [], "categories": []}', "it has no list 'annotations'"),
        ('{"images": [], "annotations": [], "categories": []}', "lists no categories"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}', "lists no images"),
        ('{"images": [], "annotations": [], "categories": [{"id": "1"}]}', r"categories\[0\] has no id or no name"),
        (
            '{"images": [{"id": 1}], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
            r"images\[0\] has no id or no file_name",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a"}, {"id": 1, "file_name": "b"}], "annotations": [], '
            '"categories": [{"id": 1, "name": "a"}]}',
            r"images\[1\] has the id 1 of another one",
        ),
    ],
)
def test_a_json_that_is_no_instances_file(coco, content, message):
    (coco / COCO_TRAIN[1]).write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=message) as raised:
        CocoDetection(coco, *COCO_TRAIN)
    assert str(coco / COCO_TRAIN[1]) in str(raised.value)


def test_a_category_with_the_backgrounds_number(coco):
    edit(coco, lambda content: content["categories"][0].update(id=0))
    assert len(CocoDetection(coco, *COCO_TRAIN).class_names) == 11
    with pytest.raises(ValueError, match="category_ids=file: the category '0' has the id 0"):
        CocoDetection(coco, *COCO_TRAIN, category_ids="file")


def test_segmentation_has_no_class_255(tmp_path, coco):
    with pytest.raises(ValueError, match="at most 255 classes"):
        FolderSegmentation(miniatures.folders(tmp_path), "train", classes=[str(i) for i in range(256)])
    edit(coco, lambda content: content["categories"].append({"id": 300, "name": "x"}))
    assert len(CocoDetection(coco, *COCO_TRAIN, category_ids="file").class_names) == 301
    with pytest.raises(ValueError, match="at most 255 classes"):
        CocoSegmentation(coco, *COCO_TRAIN, category_ids="file")


def test_images_whose_size_the_json_does_not_say(coco):
    def change(content):
        for image in content["images"]:
            del image["width"]

    edit(coco, change)
    assert survey(CocoDetection(coco, *COCO_TRAIN, masks=True), decode=True) == []
    edit(coco, lambda content: content["images"][1].update(width=7.0, height=9.0))
    assert "its annotation is for 7x9" in str(survey(CocoDetection(coco, *COCO_TRAIN))[0])


# The protocol


def test_faults_in_words():
    faults = [Fault(i, f"{i}.jpg", "is empty") for i in range(11)] + [Fault(0, "a.json", "x", OBJECT)] * 2
    told = describe(faults).splitlines()
    assert told[0] == "11 broken items and 2 broken objects:"
    assert told[1] == "  0.jpg: is empty"
    assert len(told) == 12
    assert told[-1] == "  and 3 more"
    assert count(faults[:1]) == "1 broken item"
    assert count([*faults[:1], Fault(0, "0.png", "is empty")]) == "1 broken item"
    assert count([]) == "no faults"


def test_a_survey_takes_datasets_that_know_less(tmp_path):
    assert survey(DigitScenes("train", 3), decode=True) == []

    class Checked:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            if index == 2:
                raise BrokenItem("2.jpg", "is torn")
            return {}

        def name(self, index):
            return f"{index}.jpg"

        def check(self, index):
            return "is wet" if index == 1 else None

    assert survey(Checked()) == [Fault(1, "1.jpg", "is wet")]
    assert survey(Checked(), decode=True) == [Fault(1, "1.jpg", "is wet"), Fault(2, "2.jpg", "is torn")]


def test_a_broken_item_comes_whole_out_of_a_worker_process(tmp_path):
    broken = pickle.loads(pickle.dumps(BrokenItem("a.jpg", "is torn")))
    assert (broken.file, broken.why, str(broken)) == ("a.jpg", "is torn", "a.jpg: is torn")
    dataset = DATASETS["folders"](tmp_path)
    Path(dataset.name(0)).write_bytes(b"")
    loader = torch.utils.data.DataLoader(dataset, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(BrokenItem, match=r"00000\.png: is empty"):
        next(iter(loader))


def test_a_bomb_is_a_broken_item(tmp_path):
    """A small file that says it is 60000 pixels wide and high is refused before it takes 10 GB."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    side = (60_000).to_bytes(4, "big")
    header = chunk(b"IHDR", side + side + bytes([8, 2, 0, 0, 0]))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")))
    with pytest.raises(BrokenItem, match="decompression bomb"):
        read_image(tmp_path / "a.png")
