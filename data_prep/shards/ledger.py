"""The accounts of an image version: every listed item is in exactly one place.

A place is a sample of the shard that sources.parquet names, a row of failures.parquet or one of
duplicates.parquet. Items are held as numbers, some 80 bytes each, so that tens of millions fit.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_prep.core.errors import PipelineError
from data_prep.core.storage.store import Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Say = Callable[[str], None]

SOURCES, FAILURES, DUPLICATES = "sources.parquet", "failures.parquet", "duplicates.parquet"
OUTCOMES = ("sample", "duplicate", "failed", "ignored")
_COLUMNS = ("key", "sha256", "width", "height", "samples", "split", "shard", "outcome")
_NUMBERS = ("width", "height", "samples")
_KINDS = {"shard": "int32", "outcome": "int8"}  # of the arrays; others are int64
_BATCH = 1 << 16
_MOST = 20  # items of one kind that are named

Columns = dict[str, list[Any]]


class TableError(Exception):
    """A table that cannot be read; the message is what is wrong with it."""


class OldTableError(TableError):
    """sources.parquet of a version that did not say where each item went."""


def read_batches(store: Store, key: str, wanted: Sequence[str]) -> Iterator[Columns]:
    """The `wanted` columns of a parquet file, some rows at a time. Raises TableError."""
    import pyarrow.parquet as pq

    try:
        with store.open(key) as source:
            file = pq.ParquetFile(source)
            _check_columns(file.schema_arrow, wanted)
            for batch in file.iter_batches(_BATCH, columns=list(wanted), use_threads=False):
                yield batch.to_pydict()
    except FileNotFoundError:
        raise TableError("is missing") from None
    except (TableError, PipelineError):
        raise
    except Exception as error:  # a damaged parquet raises whatever its bytes lead pyarrow to
        raise TableError(f"cannot be read ({type(error).__name__})") from None


def _check_columns(schema: Any, wanted: Sequence[str]) -> None:
    import pyarrow as pa

    for name in wanted:
        if name not in schema.names:
            old = name in ("samples", "split", "shard", "outcome")
            raise (OldTableError if old else TableError)(f"has no column {name!r}")
        kind = schema.field(name).type
        number, text = pa.types.is_integer(kind), kind in (pa.string(), pa.large_string())
        if not (number if name in _NUMBERS else text):
            raise TableError(f"has a column {name!r} of the type {kind}")


class Ledger:
    """sources.parquet, and how often each of its items was met in its place."""

    def __init__(self, store: Store, folder: str) -> None:
        """Raises TableError if sources.parquet cannot be read as what it is."""
        import numpy as np

        self.store, self.folder = store, folder
        self.problems: list[str] = []  # of sources.parquet
        shards: dict[str | None, int] = {None: -1}
        parts: dict[str, list[NDArray[Any]]] = {
            name: [np.zeros(0, _KINDS.get(name, "int64"))] for name in _COLUMNS
        }
        last, row = "", 0
        for batch in read_batches(store, f"{folder}/{SOURCES}", _COLUMNS):
            for key, shard, outcome in zip(
                batch["key"], batch["shard"], batch["outcome"], strict=True
            ):
                if not isinstance(key, str) or (row and key <= last):
                    raise TableError(f"row {row} is out of order: {key!r} after {last!r}")
                if outcome not in OUTCOMES:
                    raise TableError(f"item {key!r} has the outcome {outcome!r}")
                if (outcome == "sample") != (shard is not None):
                    self._say(f"item {key!r} is a {outcome} and names the shard {shard}")
                shards.setdefault(shard, len(shards) - 1)
                last, row = key, row + 1
            columns: dict[str, NDArray[Any]] = {
                "key": _hashes(batch["key"]),
                "sha256": _hashes(batch["sha256"]),
                "width": np.array([n or 0 for n in batch["width"]], np.int64),
                "height": np.array([n or 0 for n in batch["height"]], np.int64),
                "samples": np.array([n or 0 for n in batch["samples"]], np.int64),
                "shard": np.array([shards[shard] for shard in batch["shard"]], np.int32),
                "outcome": np.array([OUTCOMES.index(o) for o in batch["outcome"]], np.int8),
                "split": _hashes(batch["split"]),
            }
            for name, column in columns.items():
                parts[name].append(column)
        # One by one, so that there are never two of everything.
        self._key, self._sha256, self._width, self._height, self._samples = (
            np.concatenate(parts.pop(name)) for name in _COLUMNS[:5]
        )
        self._split, self._shard, self._outcome = (
            np.concatenate(parts.pop(name)) for name in _COLUMNS[5:]
        )
        self._by_key = np.argsort(self._key, kind="stable")
        self._sorted_keys = self._key[self._by_key]
        self._met = np.zeros(row, np.uint8)
        self._lock = threading.Lock()
        self.shards = {name: code for name, code in shards.items() if name is not None}

    def __len__(self) -> int:
        return len(self._key)

    def count(self, outcome: str) -> int:
        return int((self._outcome == OUTCOMES.index(outcome)).sum())

    def original(self, key: str) -> tuple[int, int] | None:
        """Width and height of an item's picture, None if there is no such item."""
        (row,) = self._rows([key])
        return None if row < 0 else (int(self._width[row]), int(self._height[row]))

    def meet_shard(self, name: str, rows: Sequence[Mapping[str, Any]], say: Say) -> None:
        """The index of shard `name`: its items must be said to lie there, with the same bytes."""
        import numpy as np

        items = {str(row.get("relative_key")): row for row in rows}
        samples = Counter(str(row.get("relative_key")) for row in rows)
        told, keys, at = Told(say), list(items), self._rows(list(items))
        for place in np.flatnonzero(at < 0):
            told(f"has no item {keys[place]!r}, which shard {name} holds")
        there = np.flatnonzero(at >= 0)
        found = at[there]
        with self._lock:
            self._met[found] = np.minimum(self._met[found] + 1, 2)
        columns = {
            "shard": (self._shard, np.full(len(keys), self.shards.get(name, -2))),
            "number of samples": (self._samples, np.array([samples[key] for key in keys])),
            "sha256": (self._sha256, _hashes(row.get("source_sha256") for row in items.values())),
            "split": (self._split, _hashes(row.get("split") for row in items.values())),
        }
        for what, (said, indexed) in columns.items():
            for place in there[said[found] != indexed[there]]:
                told(f"has another {what} of item {keys[place]!r} than the index of {name}")
        told.rest()

    def meet_table(self, table: str, say: Say) -> dict[str, int]:
        """The rows of failures.parquet or duplicates.parquet; how many there are of each kind.

        Raises TableError.
        """
        told, counts = Told(say), dict.fromkeys(OUTCOMES, 0)
        own = ("key", "sha256", "kind" if table == FAILURES else "kept")
        for batch in read_batches(self.store, f"{self.folder}/{table}", own):
            rows = self._rows(batch["key"]).tolist()
            found = zip(batch["key"], rows, batch["sha256"], strict=True)
            for (key, row, sha256), more in zip(found, batch[own[2]], strict=True):
                kind = more if table == FAILURES else "duplicate"
                if row < 0:
                    told(f"item {key!r} is not in {SOURCES}")
                    continue
                if kind not in OUTCOMES or OUTCOMES[self._outcome[row]] != kind:
                    told(f"item {key!r} is {kind}, {SOURCES} has {OUTCOMES[self._outcome[row]]}")
                if hash(str(sha256 or "")) != self._sha256[row]:
                    told(f"item {key!r} has another sha256 than in {SOURCES}")
                self._met[row] = min(self._met[row] + 1, 2)
                counts[kind] = counts.get(kind, 0) + 1
            if table == DUPLICATES:
                for key, row in zip(batch["kept"], self._rows(batch["kept"]).tolist(), strict=True):
                    if row < 0:
                        told(f"what is kept, {key!r}, is not in {SOURCES}")
        told.rest()
        return counts

    def settle(self, unread: frozenset[str], say: Say) -> None:
        """Tell of every item that was met in no place or in two, once all were looked through but
        the shards `unread`."""
        import numpy as np

        told = Told(say)
        codes = [self.shards[name] for name in unread if name in self.shards]
        wrong = (self._met != 1) & ~(np.isin(self._shard, codes) & (self._met == 0))
        rows = np.flatnonzero(wrong)
        for row, key, shard in self._named(rows):
            outcome = OUTCOMES[self._outcome[row]]
            where = f"in shard {shard}" if shard is not None else f"{outcome}"
            if self._met[row]:
                told(f"item {key!r} is in more than one place")
            else:
                told(f"item {key!r} is not where it should be: {where}")
        told.more(len(rows))

    def _say(self, problem: str) -> None:
        if len(self.problems) < _MOST:
            self.problems.append(problem)

    def _rows(self, keys: Sequence[Any]) -> NDArray[np.int64]:
        """The rows of items, -1 where there is no such one."""
        import numpy as np

        hashes = _hashes(keys)
        if not len(self._key):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self._sorted_keys, hashes), len(self._key) - 1)
        return np.where(self._sorted_keys[at] == hashes, self._by_key[at], -1)

    def _named(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, str, str | None]]:
        """The first few of `rows` with their keys and shards: the table is read once more."""
        wanted = [int(row) for row in rows[:_MOST]]
        start = 0
        if not wanted:
            return
        for batch in read_batches(self.store, f"{self.folder}/{SOURCES}", ("key", "shard")):
            stop = start + len(batch["key"])
            for row in wanted:
                if start <= row < stop:
                    yield row, batch["key"][row - start], batch["shard"][row - start]
            start = stop


def _hashes(texts: Iterable[Any]) -> NDArray[np.int64]:
    """A number for each text that this process always gives it; none and an empty one are alike."""
    import numpy as np

    return np.array([hash(str(text or "")) for text in texts], np.int64)


class Told:
    """Passes on the first problems of a kind and counts the rest."""

    def __init__(self, say: Say) -> None:
        self._say, self._count = say, 0

    def __call__(self, problem: str) -> None:
        self._count += 1
        if self._count <= _MOST:
            self._say(problem)

    def more(self, count: int) -> None:
        """There were `count` in all."""
        self._count = max(self._count, count)
        self.rest()

    def rest(self) -> None:
        if self._count > _MOST:
            self._say(f"and {self._count - _MOST} more items")
