"""Square tiles of a picture: where they are, and which are drawn."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence

Box = tuple[int, int, int]  # left, top, side of a square tile, in pixels of the upright photograph


def tile_boxes(width: int, height: int, sides: Sequence[int], stride: float) -> list[Box]:
    """Square tiles of each side that fits, covering the photograph.

    Tiles of one side are `stride` x side apart; the last of a row or column lies at the edge.
    """
    return [
        (left, top, side)
        for side in sides
        for top in _starts(height, side, stride)
        for left in _starts(width, side, stride)
    ]


def draw_boxes(key: str, boxes: Sequence[Box], most: int) -> list[Box]:
    """At most `most` of a photograph's tiles, those whose sample keys have the lowest hashes."""
    return sorted(boxes, key=lambda box: _sha256(sample_key(key, box)))[:most]


def _starts(length: int, side: int, stride: float) -> list[int]:
    if length < side:
        return []
    starts = list(range(0, length - side + 1, max(1, round(side * stride))))
    return starts if starts[-1] == length - side else [*starts, length - side]


def sample_key(key: str, box: Box | None = None) -> str:
    """Key of a sample in the tar: the item's key made plain, 16 digits of its hash, the tile."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(key)[0])[-40:]
    tile = "" if box is None else "_{}_{}_{}".format(*box)
    return f"{plain}_{_sha256(key)[:16]}{tile}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
