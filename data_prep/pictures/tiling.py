"""Square tiles of a photo: all positions, the chosen ones, and the keys of their samples."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence

Box = tuple[int, int, int]  # left, top, side of a square tile, in pixels of the upright photo


def square_tiles(width: int, height: int, sides: Sequence[int], stride: float) -> list[Box]:
    """Return the square tiles that cover a photo, for each side that fits.

    Tiles of one side are `stride` x side apart. The last tile of a row or column ends at the edge.
    It may overlap its neighbour more than the others do.

    Args:
        width: of the photo, in pixels.
        height: of the photo, in pixels.
        sides: of the tiles, in pixels.
        stride: in (0, 1].
    """
    return [
        (left, top, side)
        for side in sides
        for top in _starts(height, side, stride)
        for left in _starts(width, side, stride)
    ]


def choose_tiles(key: str, boxes: Sequence[Box], most: int) -> list[Box]:
    """Choose at most `most` tiles of a photo: those with the lowest hashes of the sample keys."""
    return sorted(boxes, key=lambda box: _sha256(sample_key(key, box)))[:most]


def _starts(length: int, side: int, stride: float) -> list[int]:
    if length < side:
        return []
    starts = list(range(0, length - side + 1, max(1, round(side * stride))))
    return starts if starts[-1] == length - side else [*starts, length - side]


def sample_key(key: str, box: Box | None = None) -> str:
    """Return a sample's key in the tar.

    It has the end of the item's key in plain characters, 16 digits of the key's hash, and the tile.
    """
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(key)[0])[-40:]
    tile = "" if box is None else "_{}_{}_{}".format(*box)
    return f"{plain}_{_sha256(key)[:16]}{tile}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
