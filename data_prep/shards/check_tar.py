"""Check a shard: read its tar once from front to back and hold it against its index.

Nothing is trusted, neither a header's size nor an index's row, and nothing is held in memory but
the index. After a bad header the next good one is looked for, so one damage does not hide another.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

from data_prep.core.digest import canonical_json, sha256_bytes
from data_prep.core.manifest import FileRecord
from data_prep.core.storage.store import Store
from data_prep.core.tar_format import (
    BLOCK,
    MAGIC,
    MAGIC_AT,
    NAME,
    PLAIN_HEADER,
    SIZE,
    checksum_fits,
    padded,
    padding,
)
from data_prep.shards.shards import index_key

Originals = Callable[[str], tuple[int, int] | None]  # a relative key's width and height, if known

MOST = 20  # problems that are told of one shard; one damage may have many consequences
_CHUNK = 1 << 20  # bytes read at once
_MOST_SIDECAR = 1 << 20  # bytes of a sidecar; ours have some hundred
_MOST_ROWS = 1_000_000  # of an index; a forged one could hold billions in a few bytes
_ZEROS = bytes(BLOCK)
_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}\.[A-Za-z0-9.]{1,18}")
_INDEX_ONLY = ("offset", "size", "sha256")  # columns that are not in a sidecar
_MARKS = (b"tar_sha256", b"tar_size")  # in an index's metadata
_SIDECAR_ONLY = {"original_width", "original_height", "tile"}

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Index:
    """What could be read of an index: sound rows by key, in order, and the tar that it is of."""

    rows: dict[str, Row]
    sha256: str
    size: str

    def places(self) -> dict[int, str]:
        """The member whose header is at a byte of the tar; "KEY" alone for a payload's."""
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
    """What is wrong with the shard whose tar is `tar_key`; empty if nothing is.

    It is held against the index beside it, its `record` in a manifest where there is one, and the
    sizes of the `originals` where they are known. Raises StorageError or OSError if it cannot be
    read.
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
    """The same for the tar alone, its index read before (None: it could not be)."""
    found: list[str] = []
    try:
        with store.open(tar_key) as file:
            tar = _Tar(file)
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
        found.append("no header, hash or sidecar tells where it was altered")
    more = len(found) - MOST
    return [*whole, *found[:MOST], *([f"and {more} more problems"] if more > 0 else [])]


def check_mark(index: Index, size: int, sha256: str) -> list[str]:
    """Whether an index is that of a tar of `size` bytes with this hash."""
    found = []
    if index.size != str(size):
        found.append(f"has {size} bytes, its index says {index.size[:20]!r}")
    if index.sha256 != sha256:
        found.append("has another sha256 than its index says")
    return found


def read_marked_index(
    store: Store, tar_key: str, say: Say, record: FileRecord | None = None
) -> Index | None:
    """The index beside a tar; what is wrong with it is told to `say`, None if it is unreadable."""
    import pyarrow.parquet as pq

    try:
        data = store.read(index_key(tar_key))
    except FileNotFoundError:
        say("its index is missing")
        return None
    if record is not None and (record.size, record.sha256) != (len(data), sha256_bytes(data)):
        say("its index was altered: another sha256")
    try:
        file = pq.ParquetFile(io.BytesIO(data))
        if file.metadata.num_rows > _MOST_ROWS:
            say(f"its index has {file.metadata.num_rows} rows, which no shard has")
            return None
        mark = dict(file.schema_arrow.metadata or {})
        table = file.read().to_pylist()
    except Exception as error:  # a damaged parquet raises whatever its bytes lead pyarrow to
        say(f"its index cannot be read ({type(error).__name__})")
        return None
    rows: dict[str, Row] = {}
    for number, row in enumerate(table):
        key = row.get("key")
        if not _sound(row):
            say(f"row {number} of its index, of sample {key!r}, is not whole")
        elif key in rows:
            say(f"sample {key} is in the index twice")
        else:
            rows[key] = row
    texts = (mark.get(name, b"nothing").decode("ascii", "replace") for name in _MARKS)
    return Index(rows, *texts)


def _sound(row: Row) -> bool:
    key, offset, size = (row.get(name) for name in ("key", "offset", "size"))
    return (
        isinstance(key, str)
        and _NAME.fullmatch(f"{key}.x") is not None
        and all(isinstance(n, int) and 0 <= n < 1 << 62 for n in (offset, size))
        and isinstance(row.get("sha256"), str)
    )


@dataclass
class _Member:
    """A file in the tar. A damaged one was recognised by its place alone."""

    key: str
    name: str
    offset: int = -1  # of its data in the tar
    size: int = -1
    sha256: str = ""
    sidecar: bytes | None = None
    damaged: bool = False


class _Tar:
    """A file read once; `at` is the place, `sha256` that of all that was read."""

    def __init__(self, file: BinaryIO) -> None:
        self.at = 0
        self.sha256 = hashlib.sha256()
        self._file, self._buffer, self._next = file, b"", 0

    def _fill(self, size: int) -> int:
        """Have `size` bytes ready, fewer at the end; how many there are."""
        while (ready := len(self._buffer) - self._next) < size:
            data = self._file.read(_CHUNK)
            if not data:
                return ready
            self.sha256.update(data)
            self._buffer, self._next = self._buffer[self._next :] + data, 0
        return ready

    def peek(self, size: int) -> bytes:
        self._fill(size)
        return self._buffer[self._next : self._next + size]

    def take(self, size: int) -> bytes:
        """The next `size` bytes (≤ 1 MiB), fewer at the end."""
        data = self.peek(size)
        self._next += len(data)
        self.at += len(data)
        return data

    def pour(self, size: int) -> tuple[int, str]:
        """Pass over `size` bytes; how many there were, and their sha256."""
        sha256, left = hashlib.sha256(), size
        while left and (data := self.take(min(left, _CHUNK))):
            sha256.update(data)
            left -= len(data)
        return size - left, sha256.hexdigest()

    def find_header(self) -> bool:
        """Pass to the next whole header, wherever it begins; to the end if there is none."""
        while self._fill(BLOCK) >= BLOCK:
            start = self._next
            mark = self._buffer.find(MAGIC, start + MAGIC_AT)
            header = len(self._buffer) - BLOCK + 1 if mark < 0 else mark - MAGIC_AT
            self.take(header - start)
            if mark >= 0 and self._fill(BLOCK) >= BLOCK:
                if checksum_fits(self._buffer[self._next : self._next + BLOCK]):
                    return True
                self.take(1)
        self.drain()
        return False

    def drain(self) -> None:
        while self.take(_CHUNK):
            pass


def _as_written(block: bytes) -> bool:
    """Whether a header has no owner, no time and the mode and type that ours have."""
    parts = slice(100, 124), slice(136, 148), slice(156, BLOCK)
    return all(block[part] == PLAIN_HEADER[part] for part in parts)


def _members(tar: _Tar, places: Mapping[int, str], say: Say) -> Iterator[_Member]:
    """The members of `tar` in order; what is wrong with its make is told to `say`."""
    while True:
        at = tar.at
        block = tar.take(BLOCK)
        if len(block) < BLOCK:
            say(f"is truncated: it ends at byte {tar.at}, without the mark of its end")
            return
        if block == _ZEROS and (at not in places or not any(tar.peek(BLOCK))):
            if _at_end(tar, at, say):
                return
            continue
        if not checksum_fits(block):
            place = places.get(at, "")
            if place:
                key = place.removesuffix(".json")
                what = "payload" if key == place else place
                say(f"sample {key}: bad header of its {what}, at byte {at}")
                yield _Member(key, place, damaged=True)
            if not tar.find_header():
                if not place:
                    say(f"the mark of its end, at byte {at}, was altered")
                return
            if not place:
                say(f"what stands at byte {at} is no header; the next one is at byte {tar.at}")
            continue
        name = block[NAME].rstrip(b"\0").decode("ascii", "backslashreplace")
        key = name.partition(".")[0]
        try:
            size = int(block[SIZE], 8)
        except ValueError:
            size = -1
        if size < 0 or not _NAME.fullmatch(name) or not _as_written(block):
            say(f"member {name!r}, at byte {at}: no shard has such a header")
            if size < 0 or not _NAME.fullmatch(name):
                tar.pour(max(0, padded(size)))
                continue
        yield _member(tar, key, name, size, say)


def _member(tar: _Tar, key: str, name: str, size: int, say: Say) -> _Member:
    """The data of one member."""
    member = _Member(key, name, tar.at, size)
    if name.endswith(".json") and size <= _MOST_SIDECAR:
        member.sidecar = tar.take(size)
        there = len(member.sidecar)
    else:
        there, member.sha256 = tar.pour(size)
    if there < size:
        say(f"is truncated: it ends at byte {tar.at}, inside {name} of sample {key}")
        member.damaged = True
    elif any(tar.take(padding(size))):
        say(f"sample {key}: what fills up the block after {name} is not empty")
    return member


def _at_end(tar: _Tar, at: int, say: Say) -> bool:
    """After one block of zeros, at byte `at`: whether it is the end."""
    second = tar.take(BLOCK)
    if len(second) < BLOCK:
        say("is truncated: the mark of its end is cut short")
        return True
    after = tar.at
    if second != _ZEROS:
        say(f"the mark of its end, at byte {at}, was altered")
    if tar.find_header():
        say(f"the mark of its end stands at byte {at}, before a member at byte {tar.at}")
        return False
    if tar.at > after:
        say(f"{tar.at - after} bytes follow the mark of its end")
    return True


@dataclass
class _Comparison:
    """A tar's samples held against its index."""

    index: Index | None
    originals: Originals | None
    say: Say
    order: list[str] = field(default_factory=list)  # keys in the tar, each once
    lacking: dict[str, str] = field(default_factory=dict)  # what is missing, by key
    shift: int = 0  # how far the last payload lies from where the index says

    def run(self, tar: _Tar) -> None:
        places = self.index.places() if self.index else {}
        seen: set[str] = set()
        members = _members(tar, places, self.say)
        for key, group in itertools.groupby(members, key=lambda member: member.key):
            if key in seen:
                self.say(f"sample {key}: its members are not together")
                self.lacking.pop(key, None)  # may be what stands here
                continue
            seen.add(key)
            self.order.append(key)
            self._sample(key, list(group))
        for key, what in self.lacking.items():
            self.say(f"sample {key}: {what} is missing")
        if self.index is not None:
            self._compare_order(self.index.rows, seen)

    def _compare_order(self, rows: Mapping[str, Row], seen: set[str]) -> None:
        missing = [key for key in rows if key not in seen]
        if len(self.order) != len(rows):
            self.say(f"it has {len(self.order)} samples, its index {len(rows)}")
        if missing:
            some = f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}"
            self.say(f"{len(missing)} samples of the index are missing: {some}")
        common = (key for key in self.order if key in rows)
        indexed = (key for key in rows if key in seen)
        for here, there in zip(common, indexed, strict=True):
            if here != there:
                self.say(f"another order than in the index: sample {here} stands for {there}")
                break

    def _sample(self, key: str, members: list[_Member]) -> None:
        rows = self.index.rows if self.index else {}
        row = rows.get(key)
        if row is None and self.index is not None:
            self.say(f"sample {key} is not in the index")
        names = [member.name for member in members]
        sidecar = f"{key}.json"
        payloads = [m for m in members if m.name != sidecar]
        for name in sorted({name for name in names if names.count(name) > 1}):
            self.say(f"sample {key}: {name} is there twice")
        if len(payloads) > 1:
            place = row["offset"] if row else payloads[0].offset
            payloads.sort(key=lambda member: member.offset != place)  # stable: the right one first
            for extra in payloads[1:]:
                self.say(f"sample {key}: {extra.name} is one member too many")
        if not payloads:
            self.lacking[key] = "its payload"
        elif sidecar not in names:
            self.lacking[key] = sidecar
        elif names.index(sidecar) < names.index(payloads[0].name):
            self.say(f"sample {key}: {sidecar} stands before {payloads[0].name}")
        for member in members:
            if member.name == sidecar and not member.damaged:
                self._sidecar(key, member, row)
        if row is not None and payloads and not payloads[0].damaged:
            self._payload(key, payloads[0], row)

    def _payload(self, key: str, member: _Member, row: Row) -> None:
        where = f"sample {key}: {member.name}"
        shift = member.offset - row["offset"]
        if shift not in (0, self.shift):  # all that follows something lost is moved with it
            self.say(f"{where} is at byte {member.offset}, its index says {row['offset']}")
        self.shift = shift
        if member.size != row["size"]:
            self.say(f"{where} has {member.size} bytes, its index says {row['size']}")
        if member.sha256 != row["sha256"]:
            self.say(f"{where} has another sha256 than its index says")

    def _sidecar(self, key: str, member: _Member, row: Row | None) -> None:
        where = f"sample {key}: {member.name}"
        try:
            record = json.loads(member.sidecar or b"")
            written = member.sidecar == canonical_json(record)
            written = written or member.sidecar == json.dumps(record).encode()
        except (ValueError, RecursionError):
            record, written = None, False
        if not isinstance(record, dict):
            self.say(f"{where} is no JSON object")
            return
        if not written:
            self.say(f"{where} is not as it was written")
        if row is None:
            return
        said = {k: v for k, v in row.items() if k not in _INDEX_ONLY and v is not None}
        for name in sorted(said.keys() | (record.keys() - _SIDECAR_ONLY)):
            if said.get(name) != record.get(name):
                self.say(f"{where} has another {name!r} than its index")
        original = self.originals(str(row.get("relative_key"))) if self.originals else None
        if original and original != (record.get("original_width"), record.get("original_height")):
            self.say(f"{where} has another size of the original than sources.parquet")
