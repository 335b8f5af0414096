"""Compare a new listing with the parent version: which outcomes still hold."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_prep.core.pool import Map
from data_prep.core.progress import Progress
from data_prep.images.findings import DUPLICATE, FAILED, OUTCOMES, SAMPLE
from data_prep.images.keys import UNSURE
from data_prep.images.plan import ParentState
from data_prep.images.read_ahead import hash_items
from data_prep.images.resolution import resolve
from data_prep.images.versions import Version
from data_prep.raw.listing import Listing
from data_prep.raw.source import Source

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from data_prep.images.settings import ImagesSettings

POOL_ITEMS = 512  # with fewer items, starting worker processes costs more time than it saves
HASHED_AT_ONCE = 256  # items in one task that only hashes


@dataclass(frozen=True)
class Hashing:
    """The way to read and hash items: from which source, and with how many workers."""

    source: Source
    run: Map
    workers: int


def compare_with_parent(
    settings: ImagesSettings,
    listing: Listing,
    row: NDArray[np.int64],
    kind: NDArray[np.int8],
    split: NDArray[np.int8],
    parent: Version,
    hashing: Hashing,
    *,
    retry_failed: bool,
) -> ParentState:
    """Find the parent's outcomes that still hold for the listing's items.

    An outcome holds if the item has the same fingerprint and size. Otherwise the item is read and
    hashed, and the outcome holds if the bytes are the same. An item that moves to another split is
    prepared again.

    Args:
        settings: of the dataset.
        listing: the source's items.
        row: each item's row in the parent, -1 for new items.
        kind: of each item, int8.
        split: of each item, int8.
        parent: the version to compare with.
        hashing: how to read items.
        retry_failed: outcomes of failed items do not hold.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    old, old_split = parent.table, parent.splits()
    names = parent.names()
    outcome = parent.outcomes()
    found = np.flatnonzero((row >= 0) & (kind >= UNSURE) & (old_split[row] == split))
    at = row[found]
    marks = [listing.table[c].to_numpy()[found] for c in ("fingerprint", "size")]
    before = [old[c].to_numpy()[at] for c in ("fingerprint", "size")]
    same = (marks[0] == before[0]) & (marks[1] == before[1]) & (marks[0] != 0)
    sha256, hashed = parent.sha256()
    touched = np.flatnonzero(~same & hashed[at])
    if len(touched):
        now = _hash_rows(settings, listing, found[touched], hashing)
        known = [sha256[r].tobytes().hex() for r in at[touched]]
        same[touched] = [a == b for a, b in zip(now, known, strict=True)]
    holds = np.zeros(len(listing), np.bool_)
    holds[found] = same
    if retry_failed:
        holds[found] &= outcome[at] != OUTCOMES.index(FAILED)
    stored = pc.index_in(old["shard"], pa.array(names, pa.string()))
    stored = stored.fill_null(-1).to_numpy().astype(np.int32)
    state = ParentState(row, holds, stored, old_split, names)
    _release_duplicates(settings, state, parent, outcome, sha256)
    return state


def _release_duplicates(
    settings: ImagesSettings,
    state: ParentState,
    parent: Version,
    outcome: NDArray[np.int8],
    sha256: NDArray[np.uint8],
) -> None:
    """Clear `holds` for each duplicate if its kept copy was removed or changed: it is needed now.

    Args:
        settings: of the dataset.
        state: changed in place.
        parent: the version to compare with.
        outcome: of the parent's items, int8.
        sha256: of the parent's items, uint8 [n, 32].
    """
    import numpy as np

    rows = state.row[state.holds]
    usable = np.zeros(len(outcome), np.bool_)
    usable[rows] = np.isin(outcome[rows], [OUTCOMES.index(o) for o in (SAMPLE, DUPLICATE)])
    phash = parent.table["phash"].to_numpy()
    still = resolve(sha256, phash, usable, state.split, settings.dedupe, settings.near_duplicates)
    released = usable & (outcome == OUTCOMES.index(DUPLICATE))
    released[still.rows] = False
    state.holds[state.holds] = ~released[rows]


def _hash_rows(
    settings: ImagesSettings, listing: Listing, rows: NDArray[np.int64], hashing: Hashing
) -> list[str]:
    """Return the SHA-256 of these items' bytes, empty for an item that cannot be read."""
    parts = (rows[start : start + HASHED_AT_ONCE] for start in range(0, len(rows), HASHED_AT_ONCE))
    tasks = ((hashing.source, list(listing.items(part)), settings.max_bytes) for part in parts)
    workers = hashing.workers if len(rows) > POOL_ITEMS else 1
    hashes: list[str] = []
    with (
        Progress("compare items", len(rows), "items") as progress,
        closing(hashing.run(hash_items, tasks, workers)) as results,
    ):
        for part in results:
            hashes += part
            progress.update(len(hashes))
    return hashes
