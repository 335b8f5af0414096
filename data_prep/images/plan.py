"""The plan of an image dataset: the shard of each item.

Pure functions of a listing and, for a later version, of its parent's contents. Items are columns of
arrays, so that one process can plan tens of millions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from data_prep.core.hashing import splitmix64
from data_prep.images.keys import UNSURE, Hashes
from data_prep.raw.listing import SPLITS, Listing
from data_prep.shards.shards import shard_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = NDArray[np.int64]


def shard_number(name: str) -> int:
    """Return the number in a shard's name."""
    return int(name.rpartition("-")[2])


def shard_split(name: str) -> str:
    """Return the split in a shard's name."""
    return name.rpartition("-")[0]


@dataclass(frozen=True)
class PlannedShard:
    """The rows of the listing that one shard holds, in stored order.

    `old` is the name of the parent's shard that this one replaces; empty for a new shard.
    """

    name: str
    split: str
    rows: Rows
    old: str = ""


@dataclass(frozen=True)
class Plan:
    """The plan for every item of a listing.

    Attributes:
        kind: of each item, int8: see `keys.py`.
        split: of each item, int8: its place in SPLITS.
        before: the item's row in the parent, if its outcome there still holds; else -1. Photos
            (and items that may be photos) with -1 are in one of the planned `shards`.
        inherited: names of the parent's shards that stay unchanged.
        notes: sentences about the splits, for people.
        same_as_parent: nothing is new, changed or removed.
    """

    listing: Listing
    kind: NDArray[np.int8]
    split: NDArray[np.int8]
    before: Rows
    shards: list[PlannedShard]
    inherited: list[str]
    notes: list[str]
    added: int = 0
    removed: int = 0
    changed: int = 0
    same_as_parent: bool = False


@dataclass(frozen=True)
class ParentState:
    """The parent version's facts about the items of a new listing.

    Attributes:
        row: each item's row in the parent; -1 for new items.
        holds: whether the item's outcome in the parent still holds.
        stored: by row of the parent, the place in `shards` of the item's samples; -1 for none.
        split: by row of the parent, the item's split.
        shards: names of the parent's shards.
    """

    row: Rows
    holds: NDArray[np.bool_]
    stored: NDArray[np.int32]
    split: NDArray[np.int8]
    shards: list[str]


@dataclass(frozen=True)
class _Start:
    """The part of a plan that follows from the parent: all but the new shards."""

    before: Rows
    fresh: NDArray[np.bool_]  # items that go into new shards
    planned: list[PlannedShard]
    inherited: list[str]
    first: dict[int, int]  # number of the first new shard of each split
    added: int
    removed: int
    changed: int


def plan_items(
    listing: Listing,
    hashes: Hashes,
    kind: NDArray[np.int8],
    split: NDArray[np.int8],
    notes: list[str],
    *,
    shard_items: int,
    by_size: bool = False,
    parent: ParentState | None = None,
) -> Plan:
    """Plan a dataset version.

    Without a parent every photo goes into a new shard. With one, the parent's shards that lost
    nothing stay. A shard that lost an item is written again, without it or with its new content.
    New items go into new shards, with numbers that continue the parent's.

    Args:
        listing: the source's items, sorted by key.
        hashes: of their keys.
        kind: of each item, int8.
        split: of each item, int8.
        notes: sentences about the splits.
        shard_items: most items of a shard.
        by_size: also keep new shards near one gibibyte.
        parent: facts about the parent version, if there is one.
    """
    import numpy as np

    wanted = kind >= UNSURE
    if parent is None:
        start = _from_nothing(wanted)
    else:
        start = _from_parent(listing, hashes, wanted, split, parent)
    planned = start.planned
    sizes = listing.table["size"].to_numpy() if by_size else None
    for code, name in enumerate(SPLITS):
        rows = storage_order(listing, hashes.order, np.flatnonzero(start.fresh & (split == code)))
        planned += cut_into_shards(rows, name, start.first[code], shard_items, sizes)
    same_as_parent = parent is not None and not (
        planned or start.removed or start.changed or (parent.row < 0).any()
    )
    return Plan(
        listing,
        kind,
        split,
        start.before,
        planned,
        start.inherited,
        notes,
        start.added,
        start.removed,
        start.changed,
        same_as_parent,
    )


def _from_nothing(wanted: NDArray[np.bool_]) -> _Start:
    import numpy as np

    first = dict.fromkeys(range(len(SPLITS)), 0)
    before = np.full(len(wanted), -1, np.int64)
    return _Start(before, wanted, [], [], first, int(wanted.sum()), 0, 0)


def _from_parent(
    listing: Listing,
    hashes: Hashes,
    wanted: NDArray[np.bool_],
    split: NDArray[np.int8],
    parent: ParentState,
) -> _Start:
    """Decide which shards of the parent stay, and which are written again."""
    import numpy as np

    before = np.where(parent.holds & wanted, parent.row, -1)
    there = np.flatnonzero((parent.row >= 0) & wanted)
    old = parent.row[there]
    same = (before[there] >= 0) & (parent.split[old] == split[there])
    before[there[~same]] = -1
    # The parent's samples that are lost: those of all items that are not the same any more.
    lost = parent.stored >= 0
    lost[old[same]] = False
    changed_in_place = ~same & lost[old] & (parent.split[old] == split[there])
    home = np.full(len(listing), -1, np.int64)  # the parent's shard that holds an item, or will
    keeps = same | changed_in_place
    home[there[keeps]] = parent.stored[old[keeps]]
    rewritten = np.zeros(len(parent.shards), np.bool_)
    rewritten[np.unique(parent.stored[lost])] = True
    first = dict.fromkeys(range(len(SPLITS)), 0)
    for name in parent.shards:
        code = SPLITS.index(shard_split(name))
        first[code] = max(first[code], shard_number(name) + 1)
    # Photos of the parent that can no longer be read, such as a file that is missing from a list.
    gone = (parent.row >= 0) & ~wanted & (parent.split[parent.row] >= 0)
    found = np.zeros(len(parent.stored), np.bool_)
    found[parent.row[parent.row >= 0]] = True
    return _Start(
        before=before,
        fresh=wanted & (before < 0) & (home < 0),
        planned=_rewritten_shards(listing, hashes, home, rewritten, parent.shards),
        inherited=[n for n, again in zip(parent.shards, rewritten, strict=True) if not again],
        first=first,
        added=int((wanted & (parent.row < 0)).sum()),
        removed=int((~found).sum()),
        changed=int((~same).sum() + gone.sum()),
    )


def _rewritten_shards(
    listing: Listing,
    hashes: Hashes,
    home: Rows,
    rewritten: NDArray[np.bool_],
    shards: Sequence[str],
) -> list[PlannedShard]:
    """Plan the parent's shards that are written again, with the rows that they hold now."""
    import numpy as np

    rows = np.flatnonzero((home >= 0) & rewritten[home])
    rows = storage_order(listing, hashes.order, rows)
    rows = rows[np.argsort(home[rows], kind="stable")]
    planned = []
    for part in np.split(rows, np.flatnonzero(np.diff(home[rows])) + 1):
        if len(part):
            name = shards[int(home[part[0]])]
            planned.append(PlannedShard(name, shard_split(name), part, name))
    return planned


def storage_order(listing: Listing, order: NDArray[np.uint64], rows: Rows) -> Rows:
    """Return `rows` in the order in which their samples are stored.

    The hash of the key gives the order, so neighbours in a shard are unrelated. Items of one block
    of an archive stay together, in the archive's order: only then is the block read once. Blocks
    are ordered by hash.
    """
    import numpy as np

    first = order[rows]
    if "block" not in listing.table.column_names:
        return rows[np.argsort(first, kind="stable")]
    block = listing.table["block"].to_numpy()[rows]
    container = listing.table["container"].to_numpy()[rows]
    offset = listing.table["offset"].to_numpy()[rows]
    blocked = block >= 0
    names = np.array([_name_hash(name) for name in listing.containers], np.uint64)
    number = names[container] + block.astype(np.uint64)
    first = np.where(blocked, splitmix64(number), first)
    return rows[np.lexsort((np.where(blocked, offset, 0), first))]


def cut_into_shards(
    ordered: Rows,
    split: str,
    first_number: int,
    most: int,
    sizes: NDArray[np.int64] | None = None,
    most_bytes: int = 1 << 30,
) -> Iterator[PlannedShard]:
    """Cut rows into shards of nearly equal length.

    Args:
        ordered: rows of the listing, in stored order.
        split: of all these rows.
        first_number: number of the first shard.
        most: most rows of a shard.
        sizes: bytes of every item of the listing. If given, the shards' mean size is at most
            `most_bytes`, unless items are larger.
        most_bytes: see `sizes`.
    """
    import numpy as np

    count = -(-len(ordered) // most)
    if sizes is not None and len(ordered):
        total = int(np.maximum(sizes[ordered], 0).sum())
        count = min(max(count, -(-total // most_bytes)), len(ordered))
    bounds = [len(ordered) * n // count for n in range(count + 1)] if count else []
    for number, (start, stop) in enumerate(pairwise(bounds), first_number):
        yield PlannedShard(shard_name(split, number), split, ordered[start:stop])


def _name_hash(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest()[:16], 16)
