"""Pictures of masks and boxes, whatever the dataset."""

import pytest
import torch

from syncbn.training.callbacks.pictures import Pictures, examples
from syncbn.training.drawing import (
    Example,
    boxes_over,
    coloured,
    compare,
    describe_boxes,
    legend,
    mask_over,
    palette,
    pixels,
    rendered,
)

NAMES = ("background", "cat", "dog")


def boxes(*corners, labels, scores=None):
    found = {"boxes": torch.tensor(corners, dtype=torch.float32).reshape(-1, 4), "labels": torch.tensor(labels)}
    return found if scores is None else found | {"scores": torch.tensor(scores)}


def has_colour(picture, colour):
    return bool((torch.from_numpy(picture) == torch.tensor(colour)).all(-1).any())


def test_a_class_has_the_same_colour_however_many_there_are():
    assert palette(200)[:11] == palette(11)
    assert len(set(palette(133))) == 133


def test_what_is_ignored_is_no_class():
    drawn = coloured(torch.tensor([[0, 1, 255], [2, 7, 2]]), 3)
    colours = palette(3)
    assert tuple(drawn[0, 1]) == colours[1]
    assert tuple(drawn[0, 2]) == tuple(drawn[1, 1]) == (200, 200, 200)


def test_bytes_and_floats_are_the_same_image():
    image = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)
    assert (pixels(image) == pixels(image.float() / 255)).all()
    assert pixels(image[:1]).shape == (5, 7, 3)


def test_masks_of_different_size_and_many_classes():
    names = ("background", *(f"a rather long name of class {i}" for i in range(1, 150)))
    items = []
    for height, width in ((40, 60), (90, 30), (1500, 900)):
        classes = torch.arange(height * width).reshape(height, width) % 150
        classes[0] = 255
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        items.append(Example(image, classes, classes.roll(1, 1)))
    figure = compare(items, names)
    drawn = rendered(figure)
    assert drawn.shape[1] < 2500
    assert has_colour(drawn, palette(150)[1])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[-2:] == ["and 130 more", "ignored"]
    assert len(labels) == 22


@pytest.mark.parametrize("count", [1, 2, 3])
def test_boxes_and_images_without_any(count):
    truth = boxes((5, 5, 20, 30), labels=[1])
    found = boxes((6, 5, 20, 30), (0, 0, 60, 40), (1, 1, 2, 2), labels=[1, 2, 99], scores=[0.9, 0.8, 0.1])
    nothing = boxes(labels=torch.zeros(0, dtype=torch.int64).tolist())
    items = [Example(torch.zeros(3, 40, 60), truth, found), Example(torch.zeros(3, 40, 60), nothing, nothing)]
    figure = compare((items * 2)[:count], NAMES, min_score=0.5)
    drawn = rendered(figure)
    assert has_colour(drawn, palette(3)[1])
    captions = [text.get_text() for axis in figure.axes for text in axis.texts]
    assert captions[:3] == ["cat", "dog 0.80", "cat 0.90"]  # the best on top; that of 0.1 not at all


def test_boxes_on_an_image():
    found = boxes((30, 2, 60, 40), (0, 0, 9, 9), labels=[1, 2], scores=[0.9, 0.2])
    picture = boxes_over(torch.zeros(3, 500, 700), found, NAMES, 0.5)
    assert picture.size == (700, 500)
    assert picture.getpixel((30, 20)) == palette(3)[1]
    assert palette(3)[2] not in {colour for _, colour in picture.getcolors(1 << 24)}
    assert boxes_over(torch.zeros(3, 50, 70), found, NAMES, 0.5).size == (560, 400)  # captions can be read
    (told,) = describe_boxes(found, NAMES, 0.5)
    assert told == {"class": "cat", "label": 1, "score": 0.9, "box": [30.0, 2.0, 60.0, 40.0]}


def test_background_stays_as_it_is():
    image = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    picture = mask_over(image, torch.tensor([[0, 0], [0, 1]]), 3)
    assert picture.getpixel((0, 0)) == (100, 100, 100)
    assert picture.getpixel((1, 1)) != (100, 100, 100)
    assert legend(NAMES).size[0] > 50


def test_padding_is_not_shown():
    valid = torch.zeros(2, 1, 8, 9, dtype=torch.bool)
    valid[0, :, :5, :7] = True
    valid[1] = True
    batch = {"image": torch.rand(2, 3, 8, 9), "semantic": torch.zeros(2, 8, 9, dtype=torch.int64), "valid": valid}
    shown = examples(batch, torch.ones(2, 8, 9, dtype=torch.int64))
    assert [tuple(each.image.shape[1:]) for each in shown] == [(5, 7), (8, 9)]
    assert [tuple(each.truth.shape) for each in shown] == [(5, 7), (8, 9)]
    assert [tuple(each.prediction.shape) for each in shown] == [(5, 7), (8, 9)]


@pytest.mark.parametrize("wrong", [{"images": 0}, {"every_n_epochs": 0}, {"min_score": 2}])
def test_impossible_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Pictures("x.png", **wrong)
