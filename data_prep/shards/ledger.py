"""The ledger of an image version: every listed item is in exactly one place.

A place is a sample of the shard that sources.parquet names, a row of failures.parquet or a row of
duplicates.parquet. Items are held as numbers, about 80 bytes each, so that tens of millions fit.
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

Report = Callable[[str], None]  # takes a problem

SOURCES, FAILURES, DUPLICATES = "sources.parquet", "failures.parquet", "duplicates.parquet"
OUTCOMES = ("sample", "duplicate", "failed", "ignored")
_COLUMNS = ("key", "sha256", "width", "height", "samples", "split", "shard", "outcome")
_NUMBERS = ("width", "height", "samples")
_KINDS = {"shard": "int32", "outcome": "int8"}  # of the arrays; others are int64
_BATCH = 1 << 16
_MOST = 20  # items of one kind that are reported by name

Columns = dict[str, list[Any]]


class TableError(Exception):
    """A table that cannot be read; the message is the problem."""


class OldTableError(TableError):
    """A sources.parquet of an old version, without the shard and outcome of each item."""


def read_batches(store: Store, key: str, wanted: Sequence[str]) -> Iterator[Columns]:
    """Yield the `wanted` columns of a parquet file in batches of rows. Raise TableError."""
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
    except Exception as error:  # pyarrow raises many kinds of errors for a damaged file
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
    """The items of sources.parquet, and in how many places each one was found."""

    def __init__(self, store: Store, folder: str) -> None:
        """Read sources.parquet of the version in `folder`. Raise TableError if it is damaged."""
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
                    self._add(f"item {key!r} is a {outcome} and names the shard {shard}")
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
        # One by one, so that only one column at a time is in memory twice.
        self._key, self._sha256, self._width, self._height, self._samples = (
            np.concatenate(parts.pop(name)) for name in _COLUMNS[:5]
        )
        self._split, self._shard, self._outcome = (
            np.concatenate(parts.pop(name)) for name in _COLUMNS[5:]
        )
        self._by_key = np.argsort(self._key, kind="stable")
        self._sorted_keys = self._key[self._by_key]
        self._found = np.zeros(row, np.uint8)
        self._lock = threading.Lock()
        self.shards = {name: code for name, code in shards.items() if name is not None}

    def __len__(self) -> int:
        return len(self._key)

    def count(self, outcome: str) -> int:
        """Return the number of items with this outcome."""
        return int((self._outcome == OUTCOMES.index(outcome)).sum())

    def original(self, key: str) -> tuple[int, int] | None:
        """Return the width and height of an item's photo, or None if the item is not listed."""
        (row,) = self._rows([key])
        return None if row < 0 else (int(self._width[row]), int(self._height[row]))

    def check_shard_rows(
        self, name: str, rows: Sequence[Mapping[str, Any]], report: Report
    ) -> None:
        """Check that sources.parquet names this shard for its items, with the same figures.

        Args:
            name: the shard, such as "train-000000".
            rows: the rows of its index.
            report: takes each problem.
        """
        import numpy as np

        items = {str(row.get("relative_key")): row for row in rows}
        samples = Counter(str(row.get("relative_key")) for row in rows)
        problems, keys, at = Limited(report), list(items), self._rows(list(items))
        for place in np.flatnonzero(at < 0):
            problems(f"has no item {keys[place]!r}, which is in shard {name}")
        there = np.flatnonzero(at >= 0)
        found = at[there]
        with self._lock:
            self._found[found] = np.minimum(self._found[found] + 1, 2)
        columns = {
            "shard": (self._shard, np.full(len(keys), self.shards.get(name, -2))),
            "number of samples": (self._samples, np.array([samples[key] for key in keys])),
            "sha256": (self._sha256, _hashes(row.get("source_sha256") for row in items.values())),
            "split": (self._split, _hashes(row.get("split") for row in items.values())),
        }
        for what, (listed, indexed) in columns.items():
            for place in there[listed[found] != indexed[there]]:
                problems(f"has another {what} of item {keys[place]!r} than the index of {name}")
        problems.finish()

    def check_table(self, table: str, report: Report) -> dict[str, int]:
        """Check the rows of failures.parquet or duplicates.parquet.

        Returns:
            The number of rows of each kind.

        Raises:
            TableError: the table is damaged.
        """
        problems, counts = Limited(report), dict.fromkeys(OUTCOMES, 0)
        own = ("key", "sha256", "kind" if table == FAILURES else "kept")
        for batch in read_batches(self.store, f"{self.folder}/{table}", own):
            rows = self._rows(batch["key"]).tolist()
            found = zip(batch["key"], rows, batch["sha256"], strict=True)
            for (key, row, sha256), more in zip(found, batch[own[2]], strict=True):
                kind = more if table == FAILURES else "duplicate"
                if row < 0:
                    problems(f"item {key!r} is not in {SOURCES}")
                    continue
                if kind != (outcome := OUTCOMES[self._outcome[row]]):
                    problems(f"item {key!r} is {kind}, {SOURCES} has {outcome}")
                if hash(str(sha256 or "")) != self._sha256[row]:
                    problems(f"item {key!r} has another sha256 than in {SOURCES}")
                self._found[row] = min(self._found[row] + 1, 2)
                counts[kind] = counts.get(kind, 0) + 1
            if table == DUPLICATES:
                for key, row in zip(batch["kept"], self._rows(batch["kept"]).tolist(), strict=True):
                    if row < 0:
                        problems(f"the kept item {key!r} is not in {SOURCES}")
        problems.finish()
        return counts

    def report_missing(self, unread: frozenset[str], report: Report) -> None:
        """Report every item that was found in no place or in two. Call it after all checks.

        Args:
            unread: shards that were not read. Their items may be missing.
            report: takes each problem.
        """
        import numpy as np

        problems = Limited(report)
        codes = [self.shards[name] for name in unread if name in self.shards]
        wrong = (self._found != 1) & ~(np.isin(self._shard, codes) & (self._found == 0))
        rows = np.flatnonzero(wrong)
        for row, key, shard in self._named(rows):
            outcome = OUTCOMES[self._outcome[row]]
            where = f"in shard {shard}" if shard is not None else f"{outcome}"
            if self._found[row]:
                problems(f"item {key!r} is in more than one place")
            else:
                problems(f"item {key!r} is not in its place ({where})")
        problems.finish(len(rows))

    def _add(self, problem: str) -> None:
        if len(self.problems) < _MOST:
            self.problems.append(problem)

    def _rows(self, keys: Sequence[Any]) -> NDArray[np.int64]:
        """Return the rows of items, -1 for an item that is not listed."""
        import numpy as np

        hashes = _hashes(keys)
        if not len(self._key):
            return np.full(len(keys), -1)
        at = np.minimum(np.searchsorted(self._sorted_keys, hashes), len(self._key) - 1)
        return np.where(self._sorted_keys[at] == hashes, self._by_key[at], -1)

    def _named(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, str, str | None]]:
        """Yield the first few of `rows` with their keys and shards, read from the table again."""
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
    """Return a hash of each text, the same within a process; None counts as an empty text."""
    import numpy as np

    return np.array([hash(str(text or "")) for text in texts], np.int64)


class Limited:
    """A reporter that passes on the first problems of a kind and counts the others."""

    def __init__(self, report: Report) -> None:
        self._report, self._count = report, 0

    def __call__(self, problem: str) -> None:
        self._count += 1
        if self._count <= _MOST:
            self._report(problem)

    def finish(self, count: int = 0) -> None:
        """Report the number of further items; `count` is the number of all, if it is known."""
        count = max(self._count, count)
        if count > _MOST:
            self._report(f"and {count - _MOST} more items")
