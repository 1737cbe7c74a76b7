"""Image and mask files to arrays, whatever kind of image they are; what cannot be read says so as `BrokenItem`.

Images become RGB of 8 bits: grey is repeated, palettes are looked up, CMYK and YCbCr are converted, 16 bits are
scaled down (Pillow's own conversion would clip them to white), and alpha is left out, as by torchvision.

A camera may store a picture turned and note in EXIF how to turn it back. Whether annotations were drawn on the
stored or on the upright picture depends on the tool. `orientation` says it:

- "auto": where the annotation's size (or the mask's) fits only one of the two, that one; otherwise as stored.
- "stored": as stored, which is what torchvision and COCO's own tools read.
- "exif": upright, which is what browsers and most annotation tools show.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from syncbn.training.data.faults import BrokenItem

ORIENTATIONS = ("auto", "stored", "exif")
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

_EXIF_ORIENTATION = 0x0112
_UPRIGHT = 1
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIDES_SWAPPED = frozenset({5, 6, 7, 8})

Size = tuple[int, int]  # width, height


class Header(NamedTuple):
    """What an image file says before its pixels.

    Attributes:
        size: width and height as stored.
        exif: EXIF's orientation, 1 (upright) to 8.
        mode: Pillow's name of the pixel format.
    """

    size: Size
    exif: int
    mode: str


def read_header(file: str | Path) -> Header:
    """Opens an image without decoding it.

    Raises:
        BrokenItem: there is no such file, or it is no image.
    """
    with _opened(file) as image:
        return _header(image)


def read_image(file: str | Path, stated: Size | None = None, orientation: str = "auto") -> Any:
    """An image as uint8 `tv_tensors.Image` [3, H, W].

    Args:
        file: in any format that Pillow reads.
        stated: the width and height that its annotation is for.
        orientation: see above.

    Raises:
        BrokenItem: there is no such file, it is damaged, or its size is not the stated one.
    """
    from torchvision import tv_tensors

    with _opened(file) as image:
        turn = turn_of(file, _header(image), stated, orientation)
        _decode(file, image)
        upright = image.transpose(_TURN[turn]) if turn in _TURN else image
        return tv_tensors.Image(_rgb(file, upright))


def read_numbers(file: str | Path) -> NDArray[Any]:
    """The numbers of a single-channel or palette image, [H, W]: a palette's indices, not its colours.

    Raises:
        BrokenItem: there is no such file, it is damaged, or it holds colours.
    """
    with _opened(file) as image:
        require_numbers(file, image.mode)
        _decode(file, image)
        return np.array(image)


def require_numbers(file: str | Path, mode: str) -> None:
    """Raises:
    BrokenItem: an image of this mode holds colours.
    """
    if mode not in ("1", "L", "P", "I") and not mode.startswith("I;16"):
        raise BrokenItem(
            str(file), f"a mask must have one channel of class numbers, or a palette; this is a {mode} image"
        )


def turn_of(file: str | Path, header: Header, stated: Size | None, orientation: str) -> int:
    """The EXIF orientation to undo; 1: none.

    Raises:
        BrokenItem: the image does not have the stated size.
    """
    swapped = header.size[::-1] if header.exif in _SIDES_SWAPPED else header.size
    upright = orientation == "exif" or (orientation == "auto" and stated == swapped != header.size)
    size = swapped if upright else header.size
    if stated is not None and size != stated:
        raise BrokenItem(str(file), f"is {_shown(size)} pixels, but its annotation is for {_shown(stated)}")
    return header.exif if upright else _UPRIGHT


def size_of(file: str | Path, header: Header, stated: Size | None, orientation: str) -> Size:
    """Width and height that `read_image` will give.

    Raises:
        BrokenItem: they are not the stated ones.
    """
    turn = turn_of(file, header, stated, orientation)
    return header.size[::-1] if turn in _SIDES_SWAPPED else header.size


def require_orientation(orientation: str) -> None:
    if orientation not in ORIENTATIONS:
        raise ValueError(f"orientation must be one of {', '.join(ORIENTATIONS)}, got {orientation!r}")


def _opened(file: str | Path) -> Image.Image:
    path = Path(file)
    if not path.is_file():
        raise BrokenItem(str(file), "is a folder" if path.is_dir() else "there is no such file")
    try:
        if path.stat().st_size == 0:
            raise BrokenItem(str(file), "is empty")
        return Image.open(path)
    except Image.UnidentifiedImageError as error:
        raise BrokenItem(str(file), "is no image that Pillow can read, or its header is damaged") from error
    except BrokenItem:
        raise
    except Exception as error:  # a damaged file makes Pillow's readers raise anything, from KeyError to struct.error
        raise BrokenItem(str(file), _reason(error)) from error


def _decode(file: str | Path, image: Image.Image) -> None:
    try:
        image.load()
    except Exception as error:  # as above
        raise BrokenItem(str(file), _reason(error)) from error


def _header(image: Image.Image) -> Header:
    return Header(image.size, _exif_orientation(image), image.mode)


def _exif_orientation(image: Image.Image) -> int:
    # Pillow turns TIFFs by itself. `image.getexif()` would decode a PNG that has no EXIF.
    data = image.info.get("exif")
    if not data or image.format == "TIFF":
        return _UPRIGHT
    try:
        exif = Image.Exif()
        exif.load(data)
        value = exif.get(_EXIF_ORIENTATION, _UPRIGHT)
    except Exception:  # a damaged note does not damage the picture
        return _UPRIGHT
    return value if value in _TURN else _UPRIGHT


def _rgb(file: str | Path, image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise BrokenItem(str(file), "has floating-point pixels, whose range nobody knows: convert it to 8 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise BrokenItem(str(file), "has pixels of 32 bits, whose range nobody knows: convert it to 8 bits")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"cannot be decoded: {text or type(error).__name__}"


def _shown(size: Size) -> str:
    return f"{size[0]}x{size[1]}"
