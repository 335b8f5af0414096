"""Find duplicates among the photos of a dataset: the same bytes, and nearly the same image.

All functions work on arrays in the order of the listing. It is sorted by key, so the lowest row has
the lowest key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = NDArray[np.int64]

NEAR = 4  # most differing bits of two 64-bit perceptual hashes of nearly the same image (ours)
_BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))  # first bit and length; NEAR + 1 bands
_PAIRS = 1 << 20  # candidates compared at a time


@dataclass(frozen=True)
class Near:
    """A photo and its nearest one in a split of higher rank; rows of the listing."""

    row: int
    other: int
    distance: int  # differing bits


def same_content(
    sha256: NDArray[np.uint8], usable: NDArray[np.bool_], split: NDArray[np.int8]
) -> tuple[Rows, Rows]:
    """Find the usable rows with the same bytes as another one.

    The row in the split of the highest rank stays: test over val over train, so that no photo of
    the evaluation is also trained on. Within a split the lowest key stays.

    Args:
        sha256: of the items' bytes, uint8 [n, 32].
        usable: which rows count.
        split: place in SPLITS.

    Returns:
        The rows that leave, sorted, and for each the row that stays.
    """
    import numpy as np

    rows = np.flatnonzero(usable)
    words = np.ascontiguousarray(sha256[rows]).view(">u8").reshape(-1, 4)
    # Sort by content; of equal rows the one that stays comes first.
    order = np.lexsort((rows, -split[rows], words[:, 3], words[:, 2], words[:, 1], words[:, 0]))
    words, rows = words[order], rows[order]
    first = np.ones(len(rows), np.bool_)
    first[1:] = (words[1:] != words[:-1]).any(axis=1)
    leaders = rows[np.maximum.accumulate(np.where(first, np.arange(len(rows)), 0))]
    dropped, kept = rows[~first], leaders[~first]
    order = np.argsort(dropped)
    return dropped[order], kept[order]


def near_pairs(
    phash: NDArray[np.uint64], usable: NDArray[np.bool_], split: NDArray[np.int8]
) -> list[Near]:
    """Find for each usable photo the nearest one in a split of higher rank, within `NEAR` bits.

    Compares train with val and test, and val with test.

    Two hashes that differ in at most four bits are equal in at least one of five bands of bits. So
    only photos with an equal band are compared: memory and time stay nearly linear.

    Args:
        phash: perceptual hashes.
        usable: which rows count.
        split: place in SPLITS.

    Returns:
        The pairs, sorted by row.
    """
    import numpy as np

    best: dict[int, tuple[int, int]] = {}
    for lower, higher in ((0, 1), (0, 2), (1, 2)):
        mine, theirs = (np.flatnonzero(usable & (split == code)) for code in (lower, higher))
        if not len(mine) or not len(theirs):
            continue
        # Each hash is compared once: thousands of blank pages would give millions of pairs.
        own, own_index = np.unique(phash[mine], return_inverse=True)
        others, first = np.unique(phash[theirs], return_index=True)
        distance, nearest = _nearest(own, others, theirs[first])
        for row, index in zip(mine.tolist(), own_index.tolist(), strict=True):
            found = (int(distance[index]), int(nearest[index]))
            if found[1] >= 0 and found < best.get(row, (NEAR + 1, 0)):
                best[row] = found
    return [Near(row, other, apart) for row, (apart, other) in sorted(best.items())]


def _nearest(
    own: NDArray[np.uint64], others: NDArray[np.uint64], other_rows: Rows
) -> tuple[Rows, Rows]:
    """Find the nearest other hash of each own hash; of equally near ones the lowest row.

    Returns:
        The distance in bits, `NEAR` + 1 if none is near, and the other's row, -1 if none is near.
    """
    import numpy as np

    nearest = np.full(len(own), -1, np.int64)
    distance = np.full(len(own), NEAR + 1, np.int64)
    for a, b in _candidates(own, others):
        apart = np.bitwise_count(own[a] ^ others[b]).astype(np.int64)
        near = apart <= NEAR
        a, b, apart = a[near], b[near], apart[near]
        order = np.lexsort((other_rows[b], apart, a))
        a, b, apart = a[order], b[order], apart[order]
        # The first of each own hash is now its nearest of these candidates.
        lead = np.ones(len(a), np.bool_)
        lead[1:] = a[1:] != a[:-1]
        a, b, apart = a[lead], b[lead], apart[lead]
        better = apart < distance[a]
        distance[a[better]], nearest[a[better]] = apart[better], other_rows[b[better]]
    return distance, nearest


def _candidates(own: NDArray[np.uint64], others: NDArray[np.uint64]) -> Iterator[tuple[Rows, Rows]]:
    """Yield pairs (index in own, index in others) with an equal band, some at a time."""
    import numpy as np

    for start, bits in _BANDS:
        mask = np.uint64((1 << bits) - 1)
        mine, theirs = ((h >> np.uint64(start)) & mask for h in (own, others))
        order = np.argsort(theirs, kind="stable")
        low = np.searchsorted(theirs[order], mine, "left")
        count = np.searchsorted(theirs[order], mine, "right") - low
        ends = np.cumsum(count)
        at = 0
        while at < len(own):
            begun = int(ends[at - 1]) if at else 0
            stop = max(int(np.searchsorted(ends, begun + _PAIRS, "right")), at + 1)
            part = count[at:stop]
            a = np.repeat(np.arange(at, stop), part)
            within = np.arange(int(part.sum())) - np.repeat(np.cumsum(part) - part, part)
            yield a, order[np.repeat(low[at:stop], part) + within]
            at = stop
