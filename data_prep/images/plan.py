"""The plan of an image dataset: which item goes into which split and shard.

Pure functions of a listing and, for a later version, of what its parent holds. Items are columns of
arrays throughout, so that tens of millions are planned in one process.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from data_prep.core.errors import PipelineError
from data_prep.core.hashing import splitmix64
from data_prep.raw.listing import ROWS, SPLITS, Listing
from data_prep.shards.shards import shard_name

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    Rows = NDArray[np.int64]

# Pictures that Pillow does not read; to ignore them would be to lose them without a word.
UNREADABLE = frozenset(
    ("heic", "heif", "jxl", "psd", "dng", "cr2", "cr3", "nef", "arw", "orf", "raf", "rw2", "exr")
)
PICTURE, UNSURE, OTHER, PROBLEM = 1, 0, -1, -2  # kinds of items, by their names


@dataclass(frozen=True)
class Hashes:
    """Two numbers of every key, from its sha256: uint64 arrays in the order of the listing."""

    order: NDArray[np.uint64]  # where its samples are stored
    draw: NDArray[np.uint64]  # which split it is in, where the source does not say


def shard_number(name: str) -> int:
    return int(name.rpartition("-")[2])


def key_hashes(keys: pa.ChunkedArray) -> Hashes:
    """The hashes of the keys. Two different keys of one listing never share `order` unnoticed:
    raises PipelineError if they do, which 2^64 makes unheard of."""
    import numpy as np
    import pyarrow as pa

    parts = []
    sha256 = hashlib.sha256
    for start in range(0, len(keys), ROWS):
        text = keys.slice(start, ROWS).cast(pa.large_binary()).to_pylist()
        joined = b"".join([sha256(key).digest() for key in text])
        parts.append(np.frombuffer(joined, ">u8").reshape(-1, 4)[:, :2].astype(np.uint64))
    both = np.concatenate(parts) if parts else np.zeros((0, 2), np.uint64)
    return Hashes(np.ascontiguousarray(both[:, 0]), np.ascontiguousarray(both[:, 1]))


@dataclass(frozen=True)
class PlannedShard:
    """Rows of the listing that one shard holds, in stored order. `old` is the name of the parent's
    shard that it takes the place of, where there is one."""

    name: str
    split: str
    rows: Rows
    old: str = ""


@dataclass(frozen=True)
class Plan:
    """What is to be done with every item of a listing.

    `kind` and `split` (place in SPLITS) are int8 arrays. `before` is the row of the parent version
    that tells what became of an item and still holds, -1 for all others: those that are pictures,
    or may be, are in one of the planned `shards`. `inherited` names the parent's shards that stay.
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
    same_as_parent: bool = False  # nothing is new, changed or gone


@dataclass(frozen=True)
class Past:
    """What the parent version says of the items of a new listing.

    `row` is each item's row in the parent (-1: none), `holds` whether its outcome there still
    holds. The others are columns of the parent, by its rows: `stored`, in which of `shards` the
    item's samples are (-1: none), and its `split`.
    """

    row: Rows
    holds: NDArray[np.bool_]
    stored: NDArray[np.int32]
    split: NDArray[np.int8]
    shards: list[str]


def plan_items(
    listing: Listing,
    hashes: Hashes,
    kind: NDArray[np.int8],
    split: NDArray[np.int8],
    notes: list[str],
    *,
    shard_items: int,
    by_size: bool = False,
    past: Past | None = None,
) -> Plan:
    """The plan of a dataset version.

    Without a past every picture is in a new shard. With one, shards of the parent that lost nothing
    stay, those that lost an item are written again without it, or with what it has become, and what
    is new goes into shards of its own, whose numbers go on from the parent's. At most `shard_items`
    items are in a shard, and `by_size` keeps new ones near a gibibyte.
    """
    import numpy as np

    wanted = kind >= UNSURE
    number = len(listing)
    if past is None:
        before = np.full(number, -1, np.int64)
        fresh, planned, inherited = wanted, list[PlannedShard](), list[str]()
        first = dict.fromkeys(range(len(SPLITS)), 0)
        added, removed, changed = int(wanted.sum()), 0, 0
    else:
        before = np.where(past.holds & wanted, past.row, -1)
        there = np.flatnonzero((past.row >= 0) & wanted)
        old = past.row[there]
        same = (before[there] >= 0) & (past.split[old] == split[there])
        before[there[~same]] = -1
        # Which samples of the parent are lost: all those that no item of the new listing is.
        lost = past.stored >= 0
        lost[old[same]] = False
        again = ~same & lost[old] & (past.split[old] == split[there])  # changed, in its place
        home = np.full(number, -1, np.int64)  # the parent's shard that an item is in, or goes into
        keeps = same | again
        home[there[keeps]] = past.stored[old[keeps]]
        rewritten = np.zeros(len(past.shards), np.bool_)
        rewritten[np.unique(past.stored[lost])] = True
        planned = _rewritten(listing, hashes, home, rewritten, past.shards)
        inherited = [name for name, gone in zip(past.shards, rewritten, strict=True) if not gone]
        fresh = wanted & (before < 0) & (home < 0)
        first = dict.fromkeys(range(len(SPLITS)), 0)
        for name in past.shards:
            code = SPLITS.index(name.rpartition("-")[0])
            first[code] = max(first[code], shard_number(name) + 1)
        added = int((wanted & (past.row < 0)).sum())
        # What was a picture and cannot even be tried now, as a file that a list names in vain.
        gone = (past.row >= 0) & ~wanted & (past.split[past.row] >= 0)
        changed = int((~same).sum() + gone.sum())
        found = np.zeros(len(past.stored), np.bool_)
        found[past.row[past.row >= 0]] = True
        removed = int((~found).sum())
    sizes = listing.table["size"].to_numpy() if by_size else None
    for code, name in enumerate(SPLITS):
        rows = storage_order(listing, hashes.order, np.flatnonzero(fresh & (split == code)))
        planned += cut_into_shards(rows, name, first[code], shard_items, sizes)
    nothing_new = past is not None and not (planned or removed or changed or (past.row < 0).any())
    counts = (added, removed, changed)
    return Plan(listing, kind, split, before, planned, inherited, notes, *counts, nothing_new)


def assign_splits(
    given: NDArray[np.int8],
    pictures: NDArray[np.bool_],
    draw: NDArray[np.uint64],
    val: float,
    test: float,
    before: NDArray[np.int8] | None = None,
) -> tuple[NDArray[np.int8], list[str]]:
    """The split of every item as its place in SPLITS, and sentences on what was decided.

    `given` is what the source says (-1: nothing). Where it says splits, one that it lacks is taken
    out of train. That, and all three where it says nothing, is drawn by hash of the key (`val` and
    `test` are shares of [0, 1)), so that an item keeps its split when others arrive. `before` is
    the split in the parent version (-1: not in it), which a drawn split never leaves.

    `pictures` marks items that look usable. If one of the splits has none of them, as may happen in
    a small set, it gets the one with the lowest hash from the largest split (our choice). Raises
    PipelineError when there are fewer pictures than splits to fill.
    """
    import numpy as np

    fixed = bool((given >= 0).any())
    splits = np.where(given >= 0, given, 0).astype(np.int8)
    lacking = [code for code in (1, 2) if not (given == code).any()]
    free = splits == 0
    candidates = np.flatnonzero(free & pictures)
    if len(candidates) < 1 + len(lacking):
        where = "in train" if fixed else "in all"
        names = ", ".join(["train", *(SPLITS[code] for code in lacking)])
        raise PipelineError(
            f"there are {len(candidates)} pictures {where}, too few: at least {1 + len(lacking)}"
            f" are needed, one each for {names}."
        )
    bounds = [_bound(val), _bound(val + test)]
    drawn = np.where(draw < bounds[0], 1, np.where(draw < bounds[1], 2, 0)).astype(np.int8)
    drawn[~np.isin(drawn, lacking)] = 0
    if before is not None:
        drawn = np.where(before >= 0, before, drawn)
        drawn[~np.isin(drawn, lacking)] = 0
    splits = np.where(free, drawn, splits)
    notes = []
    if fixed and lacking:
        names = " and ".join(SPLITS[code] for code in lacking)
        notes.append(f"the source has no split {names}: some of train is taken instead")
    for code in (0, *lacking):
        counts = np.bincount(splits[candidates], minlength=3)
        if not counts[code]:
            donors = candidates[splits[candidates] == counts.argmax()]
            splits[donors[draw[donors].argmin()]] = code
            notes.append(f"the set is so small that {SPLITS[code]} was left empty: it gets one")
    return splits, notes


def storage_order(listing: Listing, order: NDArray[np.uint64], rows: Rows) -> Rows:
    """`rows` in the order in which they are stored.

    That of the hash of the keys, so that neighbours in a shard have nothing to do with one another.
    Items of a container's block stay together in the container's order, since only so can they be
    read once; blocks are mixed by hash.
    """
    import numpy as np

    first = order[rows]
    if "block" not in listing.table.column_names:
        return rows[np.argsort(first, kind="stable")]
    block = listing.table["block"].to_numpy()[rows]
    container = listing.table["container"].to_numpy()[rows]
    offset = listing.table["offset"].to_numpy()[rows]
    blocked = block >= 0
    names = np.array([int(_sha256(name)[:16], 16) for name in listing.containers], np.uint64)
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
    """Shards of at most `most` rows, as equal as can be; with `sizes` (bytes of every listed item)
    also of at most `most_bytes`, unless one item alone is larger."""
    import numpy as np

    count = -(-len(ordered) // most)
    if sizes is not None and len(ordered):
        total = int(np.maximum(sizes[ordered], 0).sum())
        count = min(max(count, -(-total // most_bytes)), len(ordered))
    bounds = [len(ordered) * n // count for n in range(count + 1)] if count else []
    for number, (start, stop) in enumerate(pairwise(bounds), first_number):
        yield PlannedShard(shard_name(split, number), split, ordered[start:stop])


def item_kinds(listing: Listing, uri: str) -> NDArray[np.int8]:
    """What each item's name tells: PICTURE, UNSURE, OTHER, or that the listing has a PROBLEM."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from data_prep.pictures.formats import EXTENSIONS

    kinds = []
    pattern = rf"\.({'|'.join(sorted(EXTENSIONS | UNREADABLE))})$"
    for chunk in listing.table["key"].chunks:
        picture = pc.match_substring_regex(chunk, pattern, ignore_case=True)
        bare = pc.match_substring_regex(chunk, r"(^|/)[^./]+$")
        flags = [np.asarray(f.to_numpy(zero_copy_only=False), np.bool_) for f in (picture, bare)]
        kinds.append(np.where(flags[0], PICTURE, np.where(flags[1], UNSURE, OTHER)))
    kind = np.concatenate([*kinds, np.zeros(0)]).astype(np.int8)
    tables = [name.endswith(".parquet") for name in listing.containers]
    if any(tables) or (listing.containers == ("",) and uri.endswith(".parquet")):
        container = listing.table["container"].to_numpy()
        is_table = np.array([n.endswith(".parquet") or not n for n in listing.containers])
        kind[(container >= 0) & is_table[container]] = PICTURE
    if listing.problems:
        named = pa.array(list(listing.problems), pa.large_string())
        kind[pc.is_in(listing.table["key"], named).to_numpy()] = PROBLEM
    return kind


def match_keys(
    hashes: Hashes, keys: pa.ChunkedArray, old: Hashes, old_keys: pa.ChunkedArray
) -> Rows:
    """For every key its row among the old keys, -1 where it is not one of them."""
    import numpy as np
    import pyarrow.compute as pc

    if not len(old.order):
        return np.full(len(keys), -1, np.int64)
    order = np.argsort(old.order)
    at = np.searchsorted(old.order[order], hashes.order)
    row = order[np.minimum(at, len(order) - 1)]
    row = np.where(old.order[row] == hashes.order, row, -1)
    found = np.flatnonzero(row >= 0)
    equal = pc.equal(keys.take(found), old_keys.take(row[found]))
    row[found[~np.asarray(equal.to_numpy(), np.bool_)]] = -1
    return row


def _rewritten(
    listing: Listing,
    hashes: Hashes,
    home: Rows,
    rewritten: NDArray[np.bool_],
    shards: Sequence[str],
) -> list[PlannedShard]:
    """The shards of the parent that are written again, with the rows that they hold now."""
    import numpy as np

    rows = np.flatnonzero((home >= 0) & rewritten[home])
    rows = storage_order(listing, hashes.order, rows)
    rows = rows[np.argsort(home[rows], kind="stable")]
    planned = []
    for part in np.split(rows, np.flatnonzero(np.diff(home[rows])) + 1):
        if len(part):
            name = shards[int(home[part[0]])]
            planned.append(PlannedShard(name, name.rpartition("-")[0], part, name))
    return planned


def _bound(share: float) -> int:
    """`share` of the 64-bit numbers."""
    return min(int(share * 2**64), 2**64 - 1)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
