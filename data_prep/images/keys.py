"""The keys of a listing: their hashes, their kinds, and their rows in an earlier listing."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_prep.raw.listing import ROWS, Listing

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

    Rows = NDArray[np.int64]

# Kinds of items: a photo by its name; a name that does not show the kind, so the first bytes must;
# another file; an item that the listing reports a problem for.
PHOTO, UNSURE, OTHER, PROBLEM = 1, 0, -1, -2


@dataclass(frozen=True)
class Hashes:
    """Two numbers from the SHA-256 of every key: uint64 arrays in the order of the listing."""

    order: NDArray[np.uint64]  # decides where an item's samples are stored
    draw: NDArray[np.uint64]  # decides an item's split, if the source does not give it


def key_hashes(keys: pa.ChunkedArray) -> Hashes:
    """Compute the hashes of the keys."""
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


def item_kinds(listing: Listing, uri: str) -> NDArray[np.int8]:
    """Return each item's kind: PHOTO, UNSURE, OTHER or PROBLEM. Rows of tables are photos."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from data_prep.pictures.formats import EXTENSIONS, OTHER_EXTENSIONS, UNREADABLE

    kinds = []
    patterns = [
        rf"\.({'|'.join(sorted(each))})$" for each in (EXTENSIONS | UNREADABLE, OTHER_EXTENSIONS)
    ]
    for chunk in listing.table["key"].chunks:
        photo, other = (
            np.asarray(
                pc.match_substring_regex(chunk, pattern, ignore_case=True).to_numpy(
                    zero_copy_only=False
                ),
                np.bool_,
            )
            for pattern in patterns
        )
        kinds.append(np.where(photo, PHOTO, np.where(other, OTHER, UNSURE)))
    kind = np.concatenate([*kinds, np.zeros(0)]).astype(np.int8)
    is_table = np.array([(n or uri).lower().endswith(".parquet") for n in listing.containers])
    if is_table.any() and "container" in listing.table.column_names:
        container = listing.table["container"].to_numpy()
        kind[(container >= 0) & is_table[container]] = PHOTO
    if listing.problems:
        named = pa.array(list(listing.problems), pa.large_string())
        kind[pc.is_in(listing.table["key"], named).to_numpy()] = PROBLEM
    return kind


def match_keys(
    hashes: Hashes, keys: pa.ChunkedArray, old: Hashes, old_keys: pa.ChunkedArray
) -> Rows:
    """Return for every key its row among the old keys, or -1 if it is new.

    Args:
        hashes: of the keys.
        keys: of the new listing, all different.
        old: hashes of the old keys.
        old_keys: of the earlier listing, all different.
    """
    import numpy as np
    import pyarrow.compute as pc

    if not len(old.order):
        return np.full(len(keys), -1, np.int64)
    order = np.argsort(old.order)
    at = np.searchsorted(old.order[order], hashes.order)
    row = order[np.minimum(at, len(order) - 1)]
    row = np.where(old.order[row] == hashes.order, row, -1)
    # Two keys with equal hashes may still differ: compare the keys themselves.
    found = np.flatnonzero(row >= 0)
    equal = pc.equal(keys.take(found), old_keys.take(row[found]))
    row[found[~np.asarray(equal.to_numpy(), np.bool_)]] = -1
    return row
