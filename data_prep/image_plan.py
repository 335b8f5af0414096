"""The plan of an image dataset: splits, tiles, sample keys and their order. Pure functions."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping, Sequence

from data_prep.errors import PipelineError

SPLITS = ("train", "val", "test")
_SPLIT_FOLDERS = {"train": "train", "val": "val", "validation": "val", "test": "test"}
_MIXED_PHOTOGRAPHS = 16

Box = tuple[int, int, int]  # left, top, side of a square tile, in pixels of the upright photograph


def has_split_folders(keys: Sequence[str]) -> bool:
    """Whether some keys lie in the top folder train/ and some in val/, validation/ or test/."""
    found = {split for key in keys if (split := split_folder(key))}
    return "train" in found and len(found) > 1


def split_folder(key: str) -> str | None:
    """The split whose folder `key` lies in, None for any other place."""
    top, slash, _ = key.partition("/")
    return _SPLIT_FOLDERS.get(top) if slash else None


def assign_splits(
    keys: Sequence[str], fixed: bool, val: float, test: float
) -> tuple[dict[str, str], list[str]]:
    """The split of every photograph by its relative key, and sentences on what was decided.

    With `fixed` the top folders are the splits, and a split that they lack is taken out of train.
    It and, without `fixed`, all three are drawn by hash of the key: `val` and `test` are shares of
    [0, 1). So a photograph keeps its split when others arrive. In a set so small that a split is
    left empty, it gets the photograph of the lowest hash from the largest one (our choice: a
    photograph may leave that split when the set grows). Raises PipelineError when there are fewer
    photographs than splits to fill.
    """
    splits = {key: (split_folder(key) or "train") if fixed else "train" for key in keys}
    lacking = [split for split in SPLITS[1:] if split not in splits.values()]
    free = [key for key, split in splits.items() if split == "train"]
    if len(free) < 1 + len(lacking):
        where = "in train/" if fixed else "in all"
        raise PipelineError(
            f"there are {len(free)} usable photographs {where}, too few: at least"
            f" {1 + len(lacking)} are needed, one each for {', '.join(['train', *lacking])}."
        )
    for key in free:
        drawn = _draw(_position(key), val, test)
        splits[key] = drawn if drawn in lacking else "train"
    notes = []
    if fixed and lacking:
        notes.append(
            f"no photographs for {' and '.join(lacking)}: some of train/ are taken instead"
        )
    for split in ("train", *lacking):
        members = {name: [key for key in free if splits[key] == name] for name in SPLITS}
        if not members[split]:
            donor = max(members.values(), key=len)
            moved = min(donor, key=_position)
            splits[moved] = split
            notes.append(f"the set is so small that {split} was left empty: it gets {moved}")
    return splits, notes


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


def sample_key(key: str, box: Box | None = None) -> str:
    """Key of a sample in the tar: the relative key made plain, 8 digits of its hash, the tile."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "_", os.path.splitext(key)[0])[-40:]
    tile = "" if box is None else "_{}_{}_{}".format(*box)
    return f"{plain}_{_sha256(key)[:8]}{tile}"


def mixed_order(
    photographs: Mapping[str, Sequence[Box | None]],
) -> list[tuple[str, str, Box | None]]:
    """All samples of a split in the order in which they are stored: (sample key, key, box).

    `photographs` has the boxes of each photograph's tiles, or [None] for one sample of it whole.
    The order is that of the hash of the sample keys, so that neighbours in a tar come from
    different photographs. Many photographs are mixed 16 at a time, so that the tiles of one lie in
    few shards and it is not decoded for each of them.
    """
    order: list[tuple[str, str, Box | None]] = []
    keys = sorted(photographs, key=lambda key: _sha256(sample_key(key)))
    for start in range(0, len(keys), _MIXED_PHOTOGRAPHS):
        mixed = [
            (sample_key(key, box), key, box)
            for key in keys[start : start + _MIXED_PHOTOGRAPHS]
            for box in photographs[key]
        ]
        order += sorted(mixed, key=lambda sample: _sha256(sample[0]))
    assert len({name for name, _, _ in order}) == len(order), "two samples have the same key"
    return order


def _starts(length: int, side: int, stride: float) -> list[int]:
    if length < side:
        return []
    starts = list(range(0, length - side + 1, max(1, round(side * stride))))
    return starts if starts[-1] == length - side else [*starts, length - side]


def _position(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int(_sha256(f"split:{key}")[:13], 16) / 16**13


def _draw(position: float, val: float, test: float) -> str:
    if position < val:
        return "val"
    return "test" if position < val + test else "train"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
