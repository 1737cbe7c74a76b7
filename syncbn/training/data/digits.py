"""Scenes of handwritten digits: scans of scikit-learn's bundled collection, scattered over an uneven
background.

A scene is a function of (split, seed, index) alone: no files, no download, the same on every machine and
process.
"""

import functools
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

BACKGROUND = 0
# Class 1 is the digit 0, class 10 the digit 9.
CLASS_NAMES = ("background", *(str(digit) for digit in range(10)))

_SPLITS = {"train": 0, "val": 1}
_VAL_FRACTION = 0.2
_SMALLEST_DIGIT = 16  # pixels; smaller ones cannot be told apart
_SCAN_SIZE = 8  # the collection's scans are 8x8 with values 0 to 16
_SCAN_MARGIN = 1
_INK_EDGE = (0.25, 0.6)  # scan values between which ink goes from transparent to opaque
_MIN_INSTANCE_PIXELS = 24
_PLACEMENT_TRIES = 40
_MAX_BOX_OVERLAP = 0.08  # of the smaller box
_MIN_CONTRAST = 0.4  # between ink and paper, in mean over the colours

FloatArray = NDArray[np.float32]
ByteArray = NDArray[np.uint8]


class DigitScenes(Dataset[dict[str, Any]]):
    """`size` scenes with 2 to 6 digits each.

    The scans fall into two parts: the first four fifths of each class make training scenes, the rest
    validation scenes, whatever the seed is. The collection is ordered by writer, so most hands in
    validation are new as well.

    Each item is a dict:

    - `image`: float32 [3, H, W] in 0 to 1
    - `semantic`: int64 [H, W], 0 = background, 1 to 10 = the digits 0 to 9
    - `boxes`: float32 [n, 4], x1 y1 x2 y2 in pixels, x2 and y2 exclusive, around the visible ink
    - `labels`: int64 [n], 1 to 10
    - `masks`: bool [n, H, W], the visible ink of each digit; their union is `semantic > 0`
    - `index`: int, the position in this dataset

    Args:
        split: "train" or "val".
        size: number of scenes, at least 1.
        seed: another seed gives other scenes.
        image_size: height and width in pixels, at least 64.
        digits: fewest and most digits in a scene.
        digit_size: smallest and largest height of a digit's scan in pixels; crowded scenes use smaller ones.

    Raises:
        ValueError: an argument is outside its range.
        IndexError: an item is asked for that is not in 0 to size - 1.
    """

    def __init__(
        self,
        split: str,
        size: int,
        seed: int = 0,
        image_size: int = 96,
        digits: tuple[int, int] = (2, 6),
        digit_size: tuple[int, int] = (28, 44),
    ) -> None:
        if split not in _SPLITS:
            raise ValueError(f"split must be one of {', '.join(_SPLITS)}, got {split!r}")
        if size < 1:
            raise ValueError(f"size must be at least 1 scene, got {size}")
        if seed < 0:
            raise ValueError(f"seed must be 0 or more, got {seed}")
        if image_size < 64:
            raise ValueError(f"image_size must be at least 64 pixels, got {image_size}")
        if not 1 <= digits[0] <= digits[1]:
            raise ValueError(f"digits must be [fewest, most] with 1 <= fewest <= most, got {list(digits)}")
        if not _SMALLEST_DIGIT <= digit_size[0] <= digit_size[1] <= image_size // 2:
            raise ValueError(
                f"digit_size must be [smallest, largest] within {_SMALLEST_DIGIT} to {image_size // 2} pixels "
                f"(half the image), got {list(digit_size)}"
            )
        most = image_size**2 // 3 // _SMALLEST_DIGIT**2
        if digits[1] > most:
            raise ValueError(f"digits: at most {most} fit into a scene of {image_size} pixels, got {list(digits)}")
        self.split = split
        self.class_names = CLASS_NAMES
        self.size = size
        self.seed = seed
        self.image_size = image_size
        self.digits = (digits[0], digits[1])
        self.digit_size = (digit_size[0], digit_size[1])
        self.scans, self.scan_labels = load_scans(split)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.size:
            raise IndexError(f"scene {index} of {self.size}")
        rng = np.random.default_rng([self.seed, _SPLITS[self.split], index])
        image, instances, labels = self._compose(rng)
        masks = torch.from_numpy(instances)[None] == torch.arange(1, len(labels) + 1)[:, None, None]
        # Row 0 is the background's, so instance numbers index their classes.
        class_of = np.concatenate(([BACKGROUND], labels))
        return {
            "image": torch.from_numpy(image).permute(2, 0, 1).contiguous(),
            "semantic": torch.from_numpy(class_of[instances]),
            "boxes": _boxes(masks),
            "labels": torch.from_numpy(labels),
            "masks": masks,
            "index": index,
        }

    def name(self, index: int) -> str:
        """What stands in for a file's name."""
        return f"{self.split} scene {index} of seed {self.seed}"

    def check(self, index: int) -> str | None:
        """Why an item cannot be used: never, since there are no files."""
        return None

    def _compose(self, rng: np.random.Generator) -> tuple[FloatArray, ByteArray, NDArray[np.int64]]:
        """Returns image [H, W, 3], instance numbers [H, W] (0 = none, i + 1 = label i) and labels [n]."""
        while True:
            image = _paper(rng, self.image_size)
            ink_is_dark = bool(image.mean() > 0.5)
            image = _distractors(rng, image, ink_is_dark)
            instances = np.zeros((self.image_size, self.image_size), np.uint8)
            labels = []
            for x, y, size in self._layout(rng):
                scan = rng.integers(len(self.scans))
                alpha = _pose(rng, self.scans[scan], size)
                window = (slice(y, y + size), slice(x, x + size))
                colour = _ink_colour(rng, image[window].mean((0, 1)), ink_is_dark)
                image[window] += alpha[..., None] * (colour - image[window])
                labels.append(self.scan_labels[scan] + 1)
                instances[window][alpha > 0.5] = len(labels)
            visible = np.bincount(instances.ravel(), minlength=len(labels) + 1)[1:]
            # A digit that a neighbour covers would be a label without pixels: start again.
            if visible.min() >= _MIN_INSTANCE_PIXELS:
                break
        image = _light(rng, image)
        return np.clip(image, 0, 1, dtype=np.float32), instances, np.asarray(labels, np.int64)

    def _layout(self, rng: np.random.Generator) -> list[tuple[int, int, int]]:
        """Places 2 to 6 squares (x, y, size) that hardly overlap."""
        count = int(rng.integers(self.digits[0], self.digits[1] + 1))
        smallest, largest = self.digit_size
        largest = max(smallest, min(largest, int(0.85 * self.image_size / np.sqrt(count))))
        placed: list[tuple[int, int, int]] = []
        while len(placed) < count:
            size = int(rng.integers(smallest, largest + 1))
            for _ in range(_PLACEMENT_TRIES):
                x, y = (int(v) for v in rng.integers(0, self.image_size - size + 1, 2))
                if all(_overlap((x, y, size), other) <= _MAX_BOX_OVERLAP for other in placed):
                    placed.append((x, y, size))
                    break
            else:
                # No room left: smaller digits, and from scratch, since the first ones may stand badly.
                largest = max(_SMALLEST_DIGIT, largest - 2)
                smallest = min(smallest, largest)
                placed.clear()
        return placed


@functools.cache
def load_scans(split: str) -> tuple[FloatArray, NDArray[np.int64]]:
    """The scans of one split: values float32 [n, 8, 8] in 0 to 1 and digits int64 [n]."""
    from sklearn.datasets import load_digits  # a second to import: only for those who draw scenes

    collection = load_digits()
    parts = []
    for digit in range(10):
        (of_digit,) = np.nonzero(collection.target == digit)
        first_val = round(len(of_digit) * (1 - _VAL_FRACTION))
        parts.append(of_digit[:first_val] if split == "train" else of_digit[first_val:])
    chosen = np.concatenate(parts)
    return (collection.images[chosen] / 16).astype(np.float32), collection.target[chosen].astype(np.int64)


def _overlap(a: tuple[int, int, int], b: tuple[int, int, int]) -> float:
    """Common area of two squares (x, y, size) as a fraction of the smaller one."""
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[2], b[1] + b[2]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0) / min(a[2], b[2]) ** 2


def _pose(rng: np.random.Generator, scan: FloatArray, size: int) -> FloatArray:
    """Enlarges a scan [8, 8] to opacity [size, size], slightly rotated, slanted and stretched."""
    side = _SCAN_SIZE + 2 * _SCAN_MARGIN
    angle, slant = rng.uniform(-0.25, 0.25), rng.uniform(-0.2, 0.2)
    # Half of the collection's digits are about five columns wide: widen more than heighten.
    zoom = np.array([rng.uniform(0.75, 1.05), rng.uniform(0.85, 1.0)]) * side / size
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    to_scan = (turn @ np.array([[1, slant], [0, 1]])) * zoom[:, None]
    offset = side / 2 - to_scan @ np.full(2, size / 2)
    padded = Image.fromarray(np.pad(scan, _SCAN_MARGIN))
    coefficients = (*to_scan[0], offset[0], *to_scan[1], offset[1])
    posed = padded.transform((size, size), Image.Transform.AFFINE, coefficients, resample=Image.Resampling.BICUBIC)
    low, high = _INK_EDGE
    return np.clip((np.asarray(posed) - low) / (high - low), 0, 1)


def _noise(rng: np.random.Generator, cells: int, image_size: int) -> FloatArray:
    """Smooth noise [image_size, image_size] of about unit variance with features image_size / cells wide."""
    coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((image_size, image_size), Image.Resampling.BICUBIC))


def _paper(rng: np.random.Generator, image_size: int) -> FloatArray:
    """A tinted, textured background [H, W, 3], dark in one of two scenes."""
    brightness = rng.uniform(0.6, 0.9) if rng.random() < 0.5 else rng.uniform(0.1, 0.4)
    tint = brightness + rng.uniform(-0.15, 0.15, 3)
    texture = 0.05 * _noise(rng, 12, image_size) + 0.035 * _noise(rng, 40, image_size)
    return (tint + texture[..., None]).astype(np.float32)


def _ink_colour(rng: np.random.Generator, paper: FloatArray, dark: bool) -> FloatArray:
    """A colour [3] that stands out from the mean colour of the paper [3]."""
    target = float(paper.mean()) + (-1 if dark else 1) * rng.uniform(_MIN_CONTRAST, 0.75)
    return (target + rng.uniform(-0.25, 0.25, 3)).clip(0, 1).astype(np.float32)


def _distractors(rng: np.random.Generator, image: FloatArray, dark: bool) -> FloatArray:
    """Draws strokes under the digits that look like ink but are none: arcs, lines, dots."""
    height, width = image.shape[:2]
    layer = Image.new("RGBA", (width, height))
    draw = ImageDraw.Draw(layer)
    for _ in range(rng.integers(4, 9)):
        colour = np.clip(_ink_colour(rng, image.mean((0, 1)), dark) * 255, 0, 255).astype(int)
        fill = (*(int(c) for c in colour), int(rng.integers(90, 230)))
        x, y = (int(v) for v in rng.integers(0, (width, height)))
        span = int(rng.integers(8, 40))
        kind = rng.random()
        if kind < 0.45:
            start = int(rng.integers(0, 360))
            box = (x - span // 2, y - span // 2, x + span // 2, y + span // 2)
            draw.arc(box, start, start + int(rng.integers(50, 170)), fill, int(rng.integers(1, 4)))
        elif kind < 0.9:
            dx, dy = (int(v) for v in rng.integers(-span, span + 1, 2))
            draw.line((x, y, x + dx, y + dy), fill, int(rng.integers(1, 4)))
        else:
            radius = int(rng.integers(1, 4))
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill)
    drawn: FloatArray = np.asarray(layer, np.float32) / np.float32(255)
    return image + drawn[..., 3:] * (drawn[..., :3] - image)


def _light(rng: np.random.Generator, image: FloatArray) -> FloatArray:
    """Uneven light (a slope and a soft spot) and the grain of a camera over image [H, W, 3]."""
    height, width = image.shape[:2]
    y = np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    x = np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    angle = rng.uniform(0, 2 * np.pi)
    slope = rng.uniform(0.05, 0.3) * (np.cos(angle) * x + np.sin(angle) * y)
    spot_x, spot_y = rng.uniform(-1, 1, 2)
    spot = rng.uniform(-0.25, 0.25) * np.exp(-3 * ((x - spot_x) ** 2 + (y - spot_y) ** 2))
    grain = rng.standard_normal(image.shape, dtype=np.float32) * rng.uniform(0.01, 0.04)
    lit: FloatArray = (image * (1 + slope + spot)[..., None] + grain).astype(np.float32)
    return lit


def _boxes(masks: Tensor) -> Tensor:
    """Boxes float32 [n, 4] around masks bool [n, H, W], none of them empty; x2 and y2 are exclusive."""
    columns, rows = masks.any(1).int(), masks.any(2).int()
    width, height = columns.shape[1], rows.shape[1]
    x1, y1 = columns.argmax(1), rows.argmax(1)
    x2, y2 = width - columns.flip(1).argmax(1), height - rows.flip(1).argmax(1)
    return torch.stack([x1, y1, x2, y2], 1).float()
