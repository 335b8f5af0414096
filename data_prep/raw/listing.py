"""Listings: the items of a source in columns, compact enough for tens of millions.

An item is one photo of a source: a file, a member of an archive or a row of a table. Its key
identifies it. Size and fingerprint only show whether it may have changed.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

SPLITS = ("train", "val", "test")
ROWS = 1 << 16  # rows per batch
RULES = 2  # raise it when archives are listed otherwise: then earlier listings are not reused
_HELD = 1 << 14  # items that are Python objects at the same time


class Item(NamedTuple):
    """One item.

    `key` is its POSIX path below the source: unique, in valid Unicode. `size` is in stored bytes,
    -1 if unknown. `fingerprint` changes if the item may have changed, 0 if unknown. For a member of
    a container, `container` is an index in `Listing.containers`. The kind of container defines the
    meaning of `offset` and `block`.
    """

    key: str
    size: int
    fingerprint: int
    split: str = ""  # one of SPLITS, if the source gives one
    container: int = -1
    offset: int = -1
    block: int = -1  # items of one block are read fastest one after the other


@dataclass(frozen=True)
class Listing:
    """The items of a source, sorted by key.

    Attributes:
        table: The columns of `Item`: key large_string, size int64, fingerprint uint64. If any item
            has a split, also split int8 (-1: none, otherwise the index in SPLITS). If any item is
            in a container, also container int32, offset int64 and block int32.
        containers: The keys of the archives and tables; "" for one that is the source.
        problems: Why an item cannot be read, by key. "ignored: " starts the problem of an item that
            is not part of the set, which is not a failure.
    """

    table: pa.Table
    containers: tuple[str, ...] = ()
    problems: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def items(self, rows: slice | NDArray[np.int64] | None = None) -> Iterator[Item]:
        """Yield the items in order, or those of the given rows."""
        table = self.table
        if isinstance(rows, slice):
            table = table.slice(rows.start, rows.stop - rows.start)
        elif rows is not None:
            table = table.take(rows)
        for batch in table.to_batches(max_chunksize=ROWS):
            for row in batch.to_pylist():
                code = row.pop("split", -1)
                yield Item(**row, split=SPLITS[code] if code >= 0 else "")


def collect(
    items: Iterable[Item],
    containers: Iterable[str] = (),
    problems: Mapping[str, str] | None = None,
) -> Listing:
    """Return the listing of `items` in any order. Raises ValueError for a repeated key."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    types = {
        "key": pa.large_string(),
        "size": pa.int64(),
        "fingerprint": pa.uint64(),
        "split": pa.int8(),
        "container": pa.int32(),
        "offset": pa.int64(),
        "block": pa.int32(),
    }
    columns = _columns(items, types)
    keys = columns["key"]
    if not _ascending(keys):
        order = pc.sort_indices(keys)
        del keys
        for name in list(columns):  # one by one, so that only one column is in memory twice
            columns[name] = columns[name].take(order)
            _give_back()
        keys = columns["key"]
        if not _ascending(keys):
            same = pc.equal(keys.slice(1), keys.slice(0, len(keys) - 1))
            raise ValueError(keys[int(np.flatnonzero(same.to_numpy())[0])].as_py())
    return Listing(pa.table(columns), tuple(containers), dict(problems or {}))


def _columns(items: Iterable[Item], types: Mapping[str, pa.DataType]) -> dict[str, pa.ChunkedArray]:
    """Return the columns that contain information."""
    import pyarrow as pa
    import pyarrow.compute as pc

    codes = {"": -1, **{split: code for code, split in enumerate(SPLITS)}}
    chunks: dict[str, list[pa.Array]] = {name: [] for name in types}
    waiting = iter(items)
    collecting = gc.isenabled()
    gc.disable()  # it would take a third of the time, to search millions of tuples for cycles
    try:
        while batch := list(islice(waiting, _HELD)):
            for name, values in zip(Item._fields, zip(*batch, strict=True), strict=True):
                coded = [codes[split] for split in values] if name == "split" else values
                chunks[name].append(pa.array(coded, types[name]))
    finally:
        if collecting:
            gc.enable()
    columns: dict[str, pa.ChunkedArray] = {}
    for name, kind in types.items():
        column = pa.chunked_array(chunks.pop(name), kind)
        if name in ("split", "container") and pc.max(column).as_py() in (None, -1):
            if name == "container":
                break  # without containers, the columns offset and block mean nothing
            continue
        columns[name] = pa.chunked_array([column.combine_chunks()], kind)
        del column
        _give_back()
    return columns


def _give_back() -> None:
    """Return unused memory of Arrow to the system."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


def _ascending(keys: pa.ChunkedArray) -> bool:
    import pyarrow.compute as pc

    if len(keys) < 2:
        return True
    return bool(pc.all(pc.greater(keys.slice(1), keys.slice(0, len(keys) - 1))).as_py())


def fingerprint(*marks: object) -> int:
    """Return a number from 1 to 2^64 - 1 that stands for one state of an item."""
    text = "\0".join(map(str, marks)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") or 1
