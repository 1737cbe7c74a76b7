"""Drawing what a model sees: masks and boxes, on figures that compare with the truth and on single images."""

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

IGNORED = 255  # pixels that count in no loss and no metric
RGB = tuple[int, int, int]
ByteArray = NDArray[np.uint8]
Boxes = Mapping[str, Tensor]  # boxes [n, 4], labels [n] and, of a prediction, scores [n]

# Class 0 is near black, so that colour on a mask always means a thing.
_FIRST_COLOURS = (
    "15181c", "e6194b", "f58231", "ffe119", "bfef45", "3cb44b", "42d4f4", "4363d8", "911eb4", "f032e6", "fabed4",
)  # fmt: skip
_IGNORED_COLOUR: RGB = (200, 200, 200)
_GOLDEN_ANGLE = 0.6180339887  # of the colour circle: the hues that follow one another are never alike
_LEGEND = 20  # classes; more would be smaller than can be read
_LONGEST_NAME = 16
_MOST_BOXES = 40
_PANEL_PIXELS = 640  # a figure's panels have fewer, so that larger images only cost time
_DPI = 120
_READABLE = 400  # pixels of the shorter side, for captions on an image


@dataclass(frozen=True)
class Example:
    """An image with its truth and what a model makes of it, on the CPU.

    Image uint8 or float in 0 to 1, [3, H, W]; truth and prediction: classes int64 [H, W], or boxes.
    """

    image: Tensor
    truth: Tensor | Boxes
    prediction: Tensor | Boxes


def palette(count: int) -> list[RGB]:
    """A colour for each of so many classes, the same for the same class whatever their number."""
    colours = [_rgb(code) for code in _FIRST_COLOURS[:count]]
    for i in range(len(colours), count):
        saturation, value = ((0.9, 0.95), (0.55, 0.85), (0.8, 0.6))[i % 3]
        red, green, blue = colorsys.hsv_to_rgb(i * _GOLDEN_ANGLE % 1, saturation, value)
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colours


def compare(examples: Sequence[Example], class_names: Sequence[str], min_score: float = 0.3) -> Figure:
    """Truth and prediction of each example side by side, and a legend of the classes that occur.

    Args:
        examples: at least one, all with masks or all with boxes.
        class_names: the background first.
        min_score: predicted boxes below it are left out.
    """
    if isinstance(examples[0].prediction, Tensor):
        return _compare_masks(examples, class_names)
    return _compare_boxes(examples, class_names, min_score)


def rendered(figure: Figure) -> ByteArray:
    """A figure's pixels, uint8 [H, W, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def coloured(classes: Tensor, count: int) -> ByteArray:
    """Class numbers [H, W] as colours, uint8 [H, W, 3]; what is no class of `count` is light grey."""
    table = np.full((256, 3), _IGNORED_COLOUR, np.uint8)
    colours = palette(min(count, 256))
    table[: len(colours)] = colours
    table[IGNORED] = _IGNORED_COLOUR
    result: ByteArray = table[classes.clamp(0, IGNORED).to(torch.uint8).numpy()]
    return result


def mask_over(image: Tensor, classes: Tensor, count: int, strength: float = 0.55) -> Image.Image:
    """An image [3, H, W] under its classes [H, W] in colour; the background stays as it is."""
    picture = pixels(image).astype(np.float32)
    colour = coloured(classes, count).astype(np.float32)
    covered = (classes > 0).numpy()[..., None]
    return Image.fromarray(np.where(covered, picture + strength * (colour - picture), picture).astype(np.uint8))


def boxes_over(image: Tensor, boxes: Boxes, class_names: Sequence[str], min_score: float = 0.5) -> Image.Image:
    """An image [3, H, W] with its boxes, each with its class and score; the best score is drawn last, on top."""
    picture = Image.fromarray(pixels(image))
    # Captions can be read from a size on that would cover a tiny image.
    zoom = max(1, _READABLE // min(picture.size))
    picture = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(picture)
    size = max(12, min(picture.size) // 40)
    font = ImageFont.load_default(size)
    width = max(2, size // 7)
    for corners, label, score in reversed(list(_chosen(boxes, min_score))):
        box = tuple(zoom * corner for corner in corners)
        colour = _of_class(label, len(class_names))
        draw.rectangle(box, outline=colour, width=width)
        text = _caption(label, score, class_names)
        left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
        # Above its box, or within it at the image's upper edge; never beyond the right one.
        x = max(0, min(int(box[0]), picture.width - (right - left) - 4))
        y = int(box[1]) - (bottom - top) - 5
        y = y if y >= 0 else max(0, int(box[1]))
        draw.rectangle((x, y, x + right - left + 4, y + bottom - top + 4), fill=colour)
        draw.text((x + 2 - left, y + 2 - top), text, fill=_readable_on(colour), font=font)
    return picture


def describe_boxes(boxes: Boxes, class_names: Sequence[str], min_score: float) -> list[dict[str, Any]]:
    """The boxes as plain values, the best first."""
    return [
        {
            "class": str(class_names[label]) if 0 <= label < len(class_names) else f"class {label}",
            "label": label,
            "score": None if score is None else round(score, 4),
            "box": [round(corner, 2) for corner in box],
        }
        for box, label, score in _chosen(boxes, min_score, most=None)
    ]


def legend(class_names: Sequence[str]) -> Image.Image:
    """The colours of all classes, in columns of twenty."""
    names = [str(name) for name in class_names]
    font = ImageFont.load_default(15)
    column = 45 + int(max(font.getlength(name) for name in names))
    rows = min(len(names), 20)
    picture = Image.new("RGB", (column * -(-len(names) // rows), 24 * rows + 10), "white")
    draw = ImageDraw.Draw(picture)
    for i, (name, colour) in enumerate(zip(names, palette(len(names)), strict=True)):
        x, y = column * (i // rows) + 10, 24 * (i % rows) + 7
        draw.rectangle((x, y, x + 18, y + 16), fill=colour)
        draw.text((x + 26, y - 1), name, fill="black", font=font)
    return picture


def pixels(image: Tensor) -> ByteArray:
    """An image uint8 or float in 0 to 1, [3, H, W] (or one channel), as uint8 [H, W, 3]."""
    if image.dtype != torch.uint8:
        image = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
    result: ByteArray = image.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
    return result


# ---- figures


def _compare_masks(examples: Sequence[Example], class_names: Sequence[str]) -> Figure:
    figure, places = _grid(examples, ("image", "truth", "prediction"), panel_inches=1.9)
    count = len(class_names)
    present: set[int] = set()
    for example, (image, truth, prediction) in zip(examples, places, strict=True):
        image.imshow(pixels(_small(example.image)))
        for axis, classes in ((truth, example.truth), (prediction, example.prediction)):
            assert isinstance(classes, Tensor)
            present |= set(classes.unique().tolist())
            axis.imshow(coloured(_thinned(classes), count), interpolation="nearest")
    _add_legend(figure, present, class_names)
    return figure


def _compare_boxes(examples: Sequence[Example], class_names: Sequence[str], min_score: float) -> Figure:
    figure, places = _grid(examples, ("truth", f"prediction (score ≥ {min_score:g})"), panel_inches=2.9)
    for example, panels in zip(examples, places, strict=True):
        small = _small(example.image)
        scale = small.shape[-1] / example.image.shape[-1]
        for axis, boxes in zip(panels, (example.truth, example.prediction), strict=True):
            assert isinstance(boxes, Mapping)
            axis.imshow(pixels(small))
            axis.set_autoscale_on(False)
            _draw_boxes(axis, boxes, class_names, min_score, scale)
    return figure


def _draw_boxes(axis: Axes, boxes: Boxes, class_names: Sequence[str], min_score: float, scale: float) -> None:
    for (x1, y1, x2, y2), label, score in reversed(list(_chosen(boxes, min_score))):
        colour = _of_class(label, len(class_names))
        edge = [channel / 255 for channel in colour]
        corner = (x1 * scale - 0.5, y1 * scale - 0.5)  # a pixel's middle is its number
        axis.add_patch(Rectangle(corner, (x2 - x1) * scale, (y2 - y1) * scale, fill=False, edgecolor=edge, lw=1.4))
        axis.text(
            max(corner[0], 0),
            max(corner[1], 0),
            _caption(label, score, class_names),
            fontsize=6,
            color=[channel / 255 for channel in _readable_on(colour)],
            va="bottom" if corner[1] > 8 else "top",
            clip_on=True,
            bbox={"facecolor": edge, "edgecolor": "none", "pad": 0.8},
        )


def _grid(
    examples: Sequence[Example], titles: Sequence[str], panel_inches: float
) -> tuple[Figure, list[tuple[Axes, ...]]]:
    """A figure with places for the panels of each example: two examples to a row, or one if they are wide."""
    aspects = sorted(example.image.shape[-1] / example.image.shape[-2] for example in examples)
    aspect = min(max(aspects[len(aspects) // 2], 0.5), 2.5)
    per_row = 1 if aspect > 1.7 or len(examples) == 1 else 2
    panel_inches *= 1.4 if per_row == 1 else 1
    rows = -(-len(examples) // per_row)
    columns = per_row * len(titles)
    size = (panel_inches * columns + 0.3, panel_inches / aspect * rows + 1.0)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for column in range(min(columns, len(examples) * len(titles))):
        axes[0][column].set_title(titles[column % len(titles)], fontsize=10)
    places = []
    for i in range(len(examples)):
        row, place = divmod(i, per_row)
        places.append(tuple(axes[row][place * len(titles) : (place + 1) * len(titles)]))
    return figure, places


def _add_legend(figure: Figure, present: Iterable[int], class_names: Sequence[str]) -> None:
    """The classes that occur, as many as can be read."""
    count = len(class_names)
    colours = palette(count)
    numbers = sorted(number for number in present if 0 <= number < count)
    handles = [Patch(facecolor=_hex(colours[i]), label=_short(str(class_names[i]))) for i in numbers[:_LEGEND]]
    if len(numbers) > _LEGEND:
        handles.append(Patch(facecolor="none", label=f"and {len(numbers) - _LEGEND} more"))
    if IGNORED in present and count <= IGNORED:
        handles.append(Patch(facecolor=_hex(_IGNORED_COLOUR), label="ignored"))
    inches = 0.45 + 0.085 * max(len(str(handle.get_label())) for handle in handles)
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=max(1, min(len(handles), int(figure.get_figwidth() / inches))),
        frameon=False,
        handlelength=1.0,
        columnspacing=1.2,
        fontsize=9,
    )


def _small(image: Tensor) -> Tensor:
    """An image of at most as many pixels as a panel can show."""
    scale = _PANEL_PIXELS / max(image.shape[-2:])
    if scale >= 1:
        return image
    image = image.float() / 255 if image.dtype == torch.uint8 else image.float()
    size = [max(1, round(scale * length)) for length in image.shape[-2:]]
    return F.interpolate(image[None], size=size, mode="area")[0]


def _thinned(classes: Tensor) -> Tensor:
    step = -(-max(classes.shape) // _PANEL_PIXELS)
    return classes[::step, ::step]


# ---- boxes


def _chosen(
    boxes: Boxes, min_score: float, most: int | None = _MOST_BOXES
) -> Iterable[tuple[tuple[float, ...], int, float | None]]:
    """Corners, label and score (None of a truth) of the boxes to draw, the best first."""
    scores = boxes.get("scores")
    if scores is None:
        order = torch.arange(len(boxes["labels"]))
    else:
        order = scores.argsort(descending=True)
        order = order[scores[order] >= min_score]
    for i in order[:most].tolist():
        x1, y1, x2, y2 = boxes["boxes"][i].tolist()
        if x2 >= x1 and y2 >= y1:
            yield (x1, y1, x2, y2), int(boxes["labels"][i]), None if scores is None else float(scores[i])


def _caption(label: int, score: float | None, class_names: Sequence[str]) -> str:
    name = _short(str(class_names[label])) if 0 <= label < len(class_names) else f"class {label}"
    return name if score is None else f"{name} {score:.2f}"


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"


# ---- colours


def _of_class(label: int, count: int) -> RGB:
    return palette(count)[label] if 0 <= label < count else _IGNORED_COLOUR


def _readable_on(colour: RGB) -> RGB:
    """Black or white, whichever stands out (luma of ITU-R BT.601)."""
    red, green, blue = colour
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255, 255, 255)


def _rgb(code: str) -> RGB:
    return int(code[:2], 16), int(code[2:4], 16), int(code[4:], 16)


def _hex(colour: RGB) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)
