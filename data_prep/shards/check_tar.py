"""Check a shard: read its tar once from front to back and compare it with its index.

Neither a header's size nor a row of the index is trusted. Only the index is held in memory.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_prep.core.digest import canonical_json, sha256_bytes
from data_prep.core.manifest import FileRecord
from data_prep.core.storage.store import Store
from data_prep.core.tar_format import BLOCK, padded
from data_prep.shards.shards import index_key
from data_prep.shards.tar_members import MEMBER_NAME, Member, Report, TarReader, read_members

# Returns the width and height of the photo with a relative key, or None if it is unknown.
Originals = Callable[[str], tuple[int, int] | None]

MOST = 20  # reported problems of one shard; one damage may have many consequences
_MOST_ROWS = 1_000_000  # of an index; a forged one could hold billions in a few bytes
_INDEX_ONLY = ("offset", "size", "sha256")  # columns that are not in a sidecar
_MARKS = (b"tar_sha256", b"tar_size")  # in an index's metadata
_SIDECAR_ONLY = {"original_width", "original_height", "tile"}

Row = dict[str, Any]


@dataclass(frozen=True)
class Index:
    """The readable part of an index: sound rows by key, in order, and hash and size of the tar."""

    rows: dict[str, Row]
    sha256: str
    size: str

    def places(self) -> dict[int, str]:
        """Return the names of members by the byte of their header; a payload is its bare key."""
        found = {}
        for key, row in self.rows.items():
            found[row["offset"] - BLOCK] = key
            found[row["offset"] + padded(row["size"])] = f"{key}.json"
        return found


def check_shard(
    store: Store,
    tar_key: str,
    record: FileRecord | None = None,
    originals: Originals | None = None,
) -> list[str]:
    """Return the problems of a shard.

    Args:
        store: the store that contains the shard.
        tar_key: key of its tar. The index is next to it.
        record: size and hash of the tar in a manifest, if there is one.
        originals: sizes of the photos, if they are known; sidecars are compared with them.

    Raises:
        OSError: the shard cannot be read.
        StorageError: the storage failed.
    """
    found: list[str] = []
    index = read_marked_index(store, tar_key, found.append)
    return [*found, *check_tar(store, tar_key, index, record, originals)]


def check_tar(
    store: Store,
    tar_key: str,
    index: Index | None,
    record: FileRecord | None = None,
    originals: Originals | None = None,
) -> list[str]:
    """Return the problems of a tar, as `check_shard` does; `index` is None if it is unreadable."""
    found: list[str] = []
    try:
        with store.open(tar_key) as file:
            tar = TarReader(file)
            _Comparison(index, originals, found.append).run(tar)
            tar.drain()
    except FileNotFoundError:
        return ["is missing"]
    whole, sha256 = list[str](), tar.sha256.hexdigest()
    if record is not None and (record.size, record.sha256) != (tar.at, sha256):
        size = f"it has {tar.at} bytes, not {record.size}"
        whole.append(f"was altered: {size if tar.at != record.size else 'another sha256'}")
    if index is not None:
        whole += check_mark(index, tar.at, sha256)
    if whole and not found:
        found.append("no header, hash or sidecar shows where it was altered")
    more = len(found) - MOST
    return [*whole, *found[:MOST], *([f"and {more} more problems"] if more > 0 else [])]


def check_mark(index: Index, size: int, sha256: str) -> list[str]:
    """Return the problems of an index whose tar has `size` bytes and this hash."""
    found = []
    if index.size != str(size):
        found.append(f"has {size} bytes, its index says {index.size[:20]!r}")
    if index.sha256 != sha256:
        found.append("has another sha256 than its index says")
    return found


def read_marked_index(
    store: Store, tar_key: str, report: Report, record: FileRecord | None = None
) -> Index | None:
    """Read the index of a tar.

    Args:
        store: the store that contains the shard.
        tar_key: key of the tar.
        report: takes each problem of the index.
        record: size and hash of the index in a manifest, if there is one.

    Returns:
        The index, or None if it is unreadable.
    """
    import pyarrow.parquet as pq

    try:
        data = store.read(index_key(tar_key))
    except FileNotFoundError:
        report("its index is missing")
        return None
    if record is not None and (record.size, record.sha256) != (len(data), sha256_bytes(data)):
        report("its index was altered: another sha256")
    try:
        file = pq.ParquetFile(io.BytesIO(data), pre_buffer=False)
        if file.metadata.num_rows > _MOST_ROWS:
            report(f"its index has {file.metadata.num_rows} rows, more than a shard can have")
            return None
        mark = dict(file.schema_arrow.metadata or {})
        # Arrow's threads can abort a command that ends while they start.
        table = file.read(use_threads=False).to_pylist()
    except Exception as error:  # pyarrow raises many kinds of errors for a damaged file
        report(f"its index cannot be read ({type(error).__name__})")
        return None
    rows: dict[str, Row] = {}
    for number, row in enumerate(table):
        key = row.get("key")
        if not _is_sound(row):
            report(f"row {number} of its index, of sample {key!r}, is not whole")
        elif key in rows:
            report(f"sample {key} is in the index twice")
        else:
            rows[key] = row
    texts = (mark.get(name, b"nothing").decode("ascii", "replace") for name in _MARKS)
    return Index(rows, *texts)


def _is_sound(row: Row) -> bool:
    """Return whether a row has a key, a place, a size and a hash."""
    key, offset, size = (row.get(name) for name in ("key", "offset", "size"))
    return (
        isinstance(key, str)
        and MEMBER_NAME.fullmatch(f"{key}.x") is not None
        and all(isinstance(n, int) and 0 <= n < 1 << 62 for n in (offset, size))
        and isinstance(row.get("sha256"), str)
    )


@dataclass
class _Comparison:
    """A comparison of a tar's samples with its index, filled while the tar is read."""

    index: Index | None
    originals: Originals | None
    report: Report
    order: list[str] = field(default_factory=list)  # keys in the tar, each once
    lacking: dict[str, str] = field(default_factory=dict)  # the missing member, by key
    shift: int = 0  # bytes between the last payload and its place in the index

    def run(self, tar: TarReader) -> None:
        """Read the tar and report every difference."""
        places = self.index.places() if self.index else {}
        seen: set[str] = set()
        members = read_members(tar, places, self.report)
        for key, group in itertools.groupby(members, key=lambda member: member.key):
            if key in seen:
                self.report(f"sample {key}: its members are not together")
                self.lacking.pop(key, None)  # may be this one
                continue
            seen.add(key)
            self.order.append(key)
            self._sample(key, list(group))
        for key, what in self.lacking.items():
            self.report(f"sample {key}: {what} is missing")
        if self.index is not None:
            self._compare_order(self.index.rows, seen)

    def _compare_order(self, rows: Mapping[str, Row], seen: set[str]) -> None:
        missing = [key for key in rows if key not in seen]
        if len(self.order) != len(rows):
            self.report(f"it has {len(self.order)} samples, its index {len(rows)}")
        if missing:
            some = f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}"
            self.report(f"{len(missing)} samples of the index are missing: {some}")
        common = (key for key in self.order if key in rows)
        indexed = (key for key in rows if key in seen)
        for here, there in zip(common, indexed, strict=True):
            if here != there:
                self.report(f"another order than in the index: sample {here} in place of {there}")
                break

    def _sample(self, key: str, members: list[Member]) -> None:
        rows = self.index.rows if self.index else {}
        row = rows.get(key)
        if row is None and self.index is not None:
            self.report(f"sample {key} is not in the index")
        names = [member.name for member in members]
        sidecar = f"{key}.json"
        payloads = [m for m in members if m.name != sidecar]
        for name in sorted({name for name in names if names.count(name) > 1}):
            self.report(f"sample {key}: the tar has {name} twice")
        if len(payloads) > 1:
            place = row["offset"] if row else payloads[0].offset
            payloads.sort(key=lambda member: member.offset != place)  # stable: the right one first
            for extra in payloads[1:]:
                self.report(f"sample {key}: {extra.name} is not a member of a sample")
        if not payloads:
            self.lacking[key] = "its payload"
        elif sidecar not in names:
            self.lacking[key] = sidecar
        elif names.index(sidecar) < names.index(payloads[0].name):
            self.report(f"sample {key}: {sidecar} comes before {payloads[0].name}")
        for member in members:
            if member.name == sidecar and not member.damaged:
                self._sidecar(key, member, row)
        if row is not None and payloads and not payloads[0].damaged:
            self._payload(key, payloads[0], row)

    def _payload(self, key: str, member: Member, row: Row) -> None:
        where = f"sample {key}: {member.name}"
        shift = member.offset - row["offset"]
        if shift not in (0, self.shift):  # after a lost member, all others moved
            self.report(f"{where} is at byte {member.offset}, its index says {row['offset']}")
        self.shift = shift
        if member.size != row["size"]:
            self.report(f"{where} has {member.size} bytes, its index says {row['size']}")
        if member.sha256 != row["sha256"]:
            self.report(f"{where} has another sha256 than its index says")

    def _sidecar(self, key: str, member: Member, row: Row | None) -> None:
        where = f"sample {key}: {member.name}"
        try:
            record = json.loads(member.sidecar or b"")
            written = member.sidecar == canonical_json(record)
            written = written or member.sidecar == json.dumps(record).encode()
        except (ValueError, RecursionError):
            record, written = None, False
        if not isinstance(record, dict):
            self.report(f"{where} is not a JSON object")
            return
        if not written:
            self.report(f"{where} was altered: it is not in our form of JSON")
        if row is None:
            return
        said = {k: v for k, v in row.items() if k not in _INDEX_ONLY and v is not None}
        for name in sorted(said.keys() | (record.keys() - _SIDECAR_ONLY)):
            if said.get(name) != record.get(name):
                self.report(f"{where} has another {name!r} than its index")
        original = self.originals(str(row.get("relative_key"))) if self.originals else None
        if original and original != (record.get("original_width"), record.get("original_height")):
            self.report(f"{where} has another size of the original than sources.parquet")
