"""Decide which photos leave a dataset because others are the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data_prep.images.duplicates import Near, near_pairs, same_content

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Rows = NDArray[np.int64]

SAME, OTHER_SPLIT, NEARLY = "the same bytes", "the same bytes in another split", "nearly the same"
# Which one of some copies stays.
KEPT = (
    "of identical files in several splits the one in test stays, else the one in val; in one split"
    " the one that comes first by name"
)


@dataclass(frozen=True)
class Resolution:
    """The duplicates of a dataset.

    Attributes:
        rows: of the listing, that leave.
        kept: for each of them the row that stays.
        reasons: for each of them why it leaves.
        near: all pairs of nearly the same photos, also those that both stay.
    """

    rows: Rows
    kept: Rows
    reasons: Sequence[str]
    near: list[Near] = field(default_factory=list)


def resolve(
    sha256: NDArray[np.uint8],
    phash: NDArray[np.uint64],
    usable: NDArray[np.bool_],
    split: NDArray[np.int8],
    dedupe: str,
    near_duplicates: str,
) -> Resolution:
    """Decide which usable rows leave; all arrays are by row of the listing.

    Args:
        sha256: of the items' bytes, uint8 [n, 32].
        phash: perceptual hashes, uint64.
        usable: which rows count.
        split: place in SPLITS, int8.
        dedupe: "content" removes identical files, "off" keeps them.
        near_duplicates: "drop" removes near duplicates from train, "report" only finds them, "off"
            does not look for them.
    """
    import numpy as np

    none = np.zeros(0, np.int64)
    rows, kept = same_content(sha256, usable, split) if dedupe == "content" else (none, none)
    reasons = np.where(split[rows] == split[kept], SAME, OTHER_SPLIT).tolist()
    if near_duplicates == "off":
        return Resolution(rows, kept, reasons)
    left = usable.copy()
    left[rows] = False
    near = near_pairs(phash, left, split)
    if near_duplicates == "drop":
        leave = [pair for pair in near if split[pair.row] == 0]
        rows = np.concatenate([rows, np.array([p.row for p in leave], np.int64)])
        kept = np.concatenate([kept, np.array([p.other for p in leave], np.int64)])
        reasons += [NEARLY] * len(leave)
        order = np.argsort(rows)
        rows, kept, reasons = rows[order], kept[order], [reasons[i] for i in order]
    return Resolution(rows, kept, reasons, near)
