"""Listings: the items of a source as columns, small enough for tens of millions.

An item is one picture of a source: a file, a member of an archive, a row of a table. It is known by
its key; size and fingerprint only tell whether it may have changed.
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
ROWS = 1 << 16  # rows that are worked on at a time
_HELD = 1 << 14  # items that are held as Python objects at a time


class Item(NamedTuple):
    """One item. `key` is its POSIX path below the source, unique in it, in valid Unicode.

    `size` is in stored bytes, -1 if it is not known. `fingerprint` changes when the item may have
    changed; 0 if it is not known. A member of a container names the container by its place in
    `Listing.containers`, and where it lies in it: `offset` and `block` mean what the source says.
    """

    key: str
    size: int
    fingerprint: int
    split: str = ""  # one of SPLITS where the source itself says it
    container: int = -1
    offset: int = -1
    block: int = -1  # items of one block of a container are best read one after the other


@dataclass(frozen=True)
class Listing:
    """What a source holds, sorted by key.

    `table` has the columns of `Item`: key large_string, size int64, fingerprint uint64; split int8
    (-1: none, else the place in SPLITS) where any item has one; container int32, offset int64 and
    block int32 where any item lies in a container. `problems` says why an item that was listed
    cannot be read; "ignored: " starts those of what is no part of the set, which is no failure.
    `containers` are the keys of archives and tables in the source ("" for one that
    is the source).
    """

    table: pa.Table
    containers: tuple[str, ...] = ()
    problems: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def items(self, rows: slice | NDArray[np.int64] | None = None) -> Iterator[Item]:
        """The items in order, or those of the given rows."""
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
    """The listing of `items`, which may come in any order. Raises ValueError on a repeated key."""
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
        for name in list(columns):  # one after the other, so that only one is there twice
            columns[name] = columns[name].take(order)
            _give_back()
        keys = columns["key"]
        if not _ascending(keys):
            same = pc.equal(keys.slice(1), keys.slice(0, len(keys) - 1))
            raise ValueError(keys[int(np.flatnonzero(same.to_numpy())[0])].as_py())
    return Listing(pa.table(columns), tuple(containers), dict(problems or {}))


def _columns(items: Iterable[Item], types: Mapping[str, pa.DataType]) -> dict[str, pa.ChunkedArray]:
    """The columns that say anything."""
    import pyarrow as pa
    import pyarrow.compute as pc

    codes = {"": -1, **{split: code for code, split in enumerate(SPLITS)}}
    chunks: dict[str, list[pa.Array]] = {name: [] for name in types}
    waiting = iter(items)
    collecting = gc.isenabled()
    gc.disable()  # it would look through millions of tuples, none in a cycle: a third of the time
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
                break  # offset and block, which follow, say nothing then
            continue
        columns[name] = pa.chunked_array([column.combine_chunks()], kind)
        del column
        _give_back()
    return columns


def _give_back() -> None:
    """Return memory that Arrow has freed and keeps."""
    import pyarrow as pa

    pa.default_memory_pool().release_unused()


def _ascending(keys: pa.ChunkedArray) -> bool:
    import pyarrow.compute as pc

    if len(keys) < 2:
        return True
    return bool(pc.all(pc.greater(keys.slice(1), keys.slice(0, len(keys) - 1))).as_py())


def fingerprint(*marks: object) -> int:
    """A number below 2^64, above 0, that stands for the marks of one state of an item."""
    text = "\0".join(map(str, marks)).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") or 1
