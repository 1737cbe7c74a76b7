"""How a tensor is cut into tiles for the GPU: which one a program works on, and how many programs there are.

A tensor is N images of S places, each with C values. Channels last, all places of all images follow each other, so
there it is one image of N·S places. A tile is ``block_s`` places of ``block_c`` channels; its channels' tiles are dealt
out in ``splits`` equal shares of neighbours, one for each program.

The tile's shape is one of a few for each layout, whatever the tensor's shape: kernels are compiled for tiles, not for
tensors.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

TILE = 2048  # values: 16 for each thread of 4 warps, so that several 16-byte loads are under way
WIDTHS = {  # of the tile along memory: places where these are contiguous, channels where they are last
    False: (2048, 1024, 256, 64, 16),
    True: (128, 64, 32, 16),
}
RUN = 64  # tiles that one program may sum in float32: each of its accumulators adds up as many values
_TOLERABLE_WASTE = 4 / 3  # idle lanes cost less than short reads
VECTORS = (8, 4, 2, 1)  # by how many values the start of every row in memory can be divided; 8 of 2 bytes are 16


class Tiling(NamedTuple):
    """A tensor's tiles. All of them numbers of the host."""

    images: int  # N; 1 for channels last
    channels: int  # C
    places: int  # S, in each image
    channels_last: bool
    block_s: int
    block_c: int
    tiles_per_image: int
    vector: int

    @property
    def tiles(self) -> int:
        """How many tiles each block of channels has."""
        return self.images * self.tiles_per_image

    @property
    def channel_blocks(self) -> int:
        return -(-self.channels // self.block_c)

    def shares(self, programs: int, most: int | None = None) -> tuple[int, int]:
        """How many splits there are, and of how many tiles each: at least one, and ``most`` at most.

        As many splits as make about ``programs`` programs in all, and more only where their share would be too large.
        """
        splits = max(1, min(programs // self.channel_blocks, self.tiles))
        share = max(1, -(-self.tiles // splits))
        share = share if most is None else min(share, most)
        return max(1, -(-self.tiles // share)), share


@lru_cache(maxsize=4096)
def tiling(images: int, channels: int, places: int, channels_last: bool, aligned: bool) -> Tiling:
    """The tiles of a tensor of N images, C channels and S places each.

    Args:
        images: N.
        channels: C, at least 1.
        places: S.
        channels_last: whether channels are contiguous in memory, rather than places.
        aligned: whether the tensors start at multiples of 16 bytes.
    """
    if channels_last:
        images, places = 1, images * places
    along = channels if channels_last else places
    width = _width(along, WIDTHS[channels_last])
    block_s, block_c = (TILE // width, width) if channels_last else (width, TILE // width)
    vector = next(each for each in VECTORS if along % each == 0) if aligned else 1
    return Tiling(images, channels, places, channels_last, block_s, block_c, max(1, -(-places // block_s)), vector)


def _width(length: int, widths: tuple[int, ...]) -> int:
    """The widest that leaves few lanes idle at the end of a row, or else that which leaves the fewest."""
    waste = {width: -(-length // width) * width / max(length, 1) for width in widths}
    return next((width for width in widths if waste[width] <= _TOLERABLE_WASTE), min(waste, key=lambda w: waste[w]))
