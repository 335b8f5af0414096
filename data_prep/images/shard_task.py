"""One image shard: items read, prepared and written, in whichever process.

Beside a shard the worker leaves a record under `work/`, written last, which says what became of
each of its items. By it a broken-off build is taken up; it goes when the version is committed.
"""

from __future__ import annotations

import io
import json
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from data_prep.core.digest import canonical_json, sha256_bytes, sha256_json
from data_prep.core.errors import ItemError
from data_prep.core.manifest import FileRecord
from data_prep.pictures.cutting import Cutting
from data_prep.pictures.formats import looks_like_image
from data_prep.pictures.limits import PhotoError
from data_prep.pictures.prepare import Piece, prepare
from data_prep.pictures.tiling import sample_key
from data_prep.raw.listing import Item
from data_prep.shards.shards import (
    Folder,
    ShardSample,
    decode_table,
    encode_table,
    iterate_shard,
    read_index,
    sha256_of,
    write_shard,
)

if TYPE_CHECKING:
    from data_prep.raw.source import Reader, Source

_ITEM = ("key", "size", "fingerprint", "offset", "block")  # what a task's digest counts of one
SAMPLE, DUPLICATE, FAILED, IGNORED = "sample", "duplicate", "failed", "ignored"
_AHEAD_BYTES = 128 << 20  # of items that are read before they are prepared
_UNKNOWN_SIZE = 1 << 20  # bytes that an item of unknown size counts for
_FINDINGS = {
    "sha256": "string",
    "size": "int64",
    "width": "int32",
    "height": "int32",
    "format": "string",
    "phash": "uint64",
    "samples": "int32",
    "outcome": "string",
    "reason": "string",
    "dropped": "bool",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of an item. `sha256` is empty if it was not read, width and height are those of
    the upright picture, `samples` is how many it gave; `dropped`: they were taken out again."""

    sha256: str = ""
    size: int = -1
    width: int = 0
    height: int = 0
    format: str = ""
    phash: int = 0
    samples: int = 0
    outcome: str = SAMPLE
    reason: str = ""
    dropped: bool = False


@dataclass(frozen=True)
class ShardTask:
    """A shard to write.

    `unsure` are the places in `items` of those whose names do not tell whether they are pictures.
    Samples of the keys in `reuse` are copied from the tar `old`; `items` has none of them. `order`
    has the keys of both in the order in which they are stored.
    """

    place: Folder
    name: str
    split: str
    source: Source
    items: Sequence[Item]
    how: Cutting
    max_bytes: int
    unsure: frozenset[int] = frozenset()
    old: str = ""
    reuse: frozenset[str] = frozenset()
    order: Sequence[str] = ()

    @property
    def digest(self) -> str:
        """Of all that the shard depends on."""
        return sha256_json(
            {
                "items": [[getattr(item, name) for name in _ITEM] for item in self.items],
                "how": asdict(self.how),
                "max_bytes": self.max_bytes,
                "unsure": sorted(self.unsure),
                "old": self.old,
                "order": list(self.order),
            }
        )


@dataclass(frozen=True)
class DropTask:
    """A shard whose samples of some items are taken out.

    `tar` is the shard as it is, perhaps in an earlier version's folder. `keys` are those of the
    items that leave it; `places` are theirs in the task that wrote it, for its record.
    """

    place: Folder
    name: str
    tar: str
    keys: frozenset[str]
    places: frozenset[int] = frozenset()


@dataclass(frozen=True)
class ShardResult:
    """The files of a shard (none if no sample was left) and what became of each item."""

    files: list[FileRecord]
    findings: list[Finding] = field(default_factory=list)


def build_shard(task: ShardTask) -> ShardResult:
    """Write the shard, unless it is there whole."""
    done = _taken_up(task)
    if done is not None:
        return done
    import cv2

    cv2.setNumThreads(1)  # one worker for each core is enough
    findings: list[Finding] = []
    with task.source.reader() as reader:
        samples = _samples(task, reader, findings)
        files = _write(task.place, task.name, samples)
    _write_record(task.place, task.name, task.digest, files, findings)
    return ShardResult(files, findings)


def drop_samples(task: DropTask) -> list[FileRecord]:
    """Write the shard anew without the samples of some items."""
    store = task.place.store
    rows = {row["key"]: row for row in read_index(store, task.tar)}

    def kept() -> Iterator[ShardSample]:
        for key, files in iterate_shard(store, task.tar):
            if rows[key]["relative_key"] not in task.keys:
                yield key, files, _columns(rows[key])

    record = _read_record(task.place, task.name)
    files = _write(task.place, task.name, kept())
    if record is not None and record[0]:
        digest, _, findings = record
        for place in task.places:
            findings[place] = replace(findings[place], dropped=True)
        _write_record(task.place, task.name, digest, files, findings)
    return files


def record_path(name: str) -> str:
    return f"work/{name}.parquet"


def hash_items(task: tuple[Source, Sequence[Item], int]) -> list[str]:
    """The sha256 of each item's bytes, empty where it cannot be read."""
    source, items, max_bytes = task
    hashes = []
    with source.reader() as reader, closing(_fetched(reader, items, max_bytes)) as fetched:
        for _, read in fetched:
            try:
                hashes.append(sha256_bytes(read()))
            except ItemError:
                hashes.append("")
    return hashes


def _write(place: Folder, name: str, samples: Iterator[ShardSample]) -> list[FileRecord]:
    """The files of the shard; without a sample there are none, and none is left of before."""
    first = next(samples, None)
    if first is None:
        for extension in ("parquet", "tar"):
            place.store.delete(place.key(f"{name}.{extension}"))
        return []

    def all_of_them() -> Iterator[ShardSample]:
        yield first
        yield from samples

    return write_shard(place, name, all_of_them())


def _samples(task: ShardTask, reader: Reader, findings: list[Finding]) -> Iterator[ShardSample]:
    """The shard's samples in order; each item's finding is appended as it is met."""
    fresh = _fresh(task, reader, findings)
    if not task.reuse:
        for _, samples in fresh:
            yield from samples
        return
    store = task.place.store
    rows = {row["key"]: row for row in read_index(store, task.old)}
    old = deque[tuple[str, ShardSample]]()
    stored = iterate_shard(store, task.old)

    def next_old(key: str) -> Iterator[ShardSample]:
        """The old samples of an item, which stand together and in the new order."""
        while True:
            if not old:
                found = next(stored, None)
                if found is None:
                    return
                row = rows[found[0]]
                if row["relative_key"] not in task.reuse:
                    continue
                old.append((row["relative_key"], (*found, _columns(row))))
            if old[0][0] != key:
                return
            yield old.popleft()[1]

    for key in task.order:
        if key in task.reuse:
            yield from next_old(key)
        else:
            item, samples = next(fresh)
            assert item.key == key, f"{task.name}: {item.key} comes before {key}"
            yield from samples
    assert not old, f"{task.name}: samples of {old[0][0]} are out of order"


def _fresh(
    task: ShardTask, reader: Reader, findings: list[Finding]
) -> Iterator[tuple[Item, list[ShardSample]]]:
    """Every item with its samples, none where it gives none."""
    with closing(_fetched(reader, task.items, task.max_bytes)) as fetched:
        for place, (item, read) in enumerate(fetched):
            finding, samples = _prepared(task, item, read, place in task.unsure)
            findings.append(finding)
            yield item, samples


def _prepared(
    task: ShardTask, item: Item, read: Callable[[], bytes], unsure: bool
) -> tuple[Finding, list[ShardSample]]:
    try:
        data = read()
    except ItemError as error:
        return Finding(outcome=FAILED, reason=str(error)), []
    sha256 = sha256_bytes(data)
    if unsure and not looks_like_image(data[:32]):
        reason = "not an image: no extension, and not the content of one"
        return Finding(sha256, len(data), outcome=IGNORED, reason=reason), []
    try:
        picture = prepare(data, task.how, item.key)
    except PhotoError as error:
        return Finding(sha256, len(data), outcome=FAILED, reason=str(error)), []
    size = (picture.width, picture.height)
    samples = [_sample(task.split, item, sha256, size, piece) for piece in picture.pieces]
    finding = Finding(sha256, len(data), *size, picture.format, picture.phash, len(samples))
    return finding, samples


def _sample(
    split: str, item: Item, sha256: str, size: tuple[int, int], piece: Piece
) -> ShardSample:
    key = sample_key(item.key, piece.box)
    columns = {
        "width": piece.width,
        "height": piece.height,
        "split": split,
        "relative_key": item.key,
        "source_sha256": sha256,
    }
    sidecar: dict[str, Any] = {"key": key, **columns}
    sidecar |= {"original_width": size[0], "original_height": size[1]}
    if piece.box is not None:
        sidecar["tile"] = list(piece.box)  # left, top, side
    return key, {piece.extension: piece.data, "json": canonical_json(sidecar)}, columns


def _columns(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of an index row that `write_shard` does not make."""
    return {k: v for k, v in row.items() if k not in ("key", "offset", "size", "sha256")}


def _fetched(
    reader: Reader, items: Sequence[Item], max_bytes: int
) -> Generator[tuple[Item, Callable[[], bytes]], None, None]:
    """Every item in order with a call that gives its bytes or raises; read ahead by threads where
    the source is far away."""
    if reader.threads <= 1:
        for item in items:
            yield item, partial(reader.read, item, max_bytes)
        return
    pool = ThreadPoolExecutor(reader.threads)
    under_way: deque[tuple[Item, Future[bytes], int]] = deque()
    waiting, held = iter(items), 0
    following = next(waiting, None)
    try:
        while following is not None or under_way:
            while following is not None and len(under_way) < 2 * reader.threads:
                size = following.size if following.size >= 0 else _UNKNOWN_SIZE
                size = min(size, max_bytes)
                if under_way and held + size > _AHEAD_BYTES:
                    break
                future = pool.submit(reader.read, following, max_bytes)
                under_way.append((following, future, size))
                held += size
                following = next(waiting, None)
            item, future, size = under_way.popleft()
            yield item, future.result
            held -= size
    finally:
        pool.shutdown(cancel_futures=True)


def _taken_up(task: ShardTask) -> ShardResult | None:
    """The result of this very task if an earlier run has finished it, its files checked by hash."""
    record = _read_record(task.place, task.name)
    if record is None or record[0] != task.digest:
        return None
    _, files, findings = record
    for file in files:
        try:
            found = sha256_of(task.place.store, task.place.key(file.path))
        except FileNotFoundError:
            return None
        if found != (file.sha256, file.size):
            return None
    return ShardResult(files, findings)


def _write_record(
    place: Folder, name: str, digest: str, files: Sequence[FileRecord], findings: Sequence[Finding]
) -> None:
    metadata = {
        b"task": digest.encode(),
        b"files": json.dumps([file.to_json() for file in files]).encode(),
    }
    rows = [{name: getattr(finding, name) for name in _FINDINGS} for finding in findings]
    data = encode_table(rows, _FINDINGS, metadata)
    place.store.write(place.key(record_path(name)), data)


def _read_record(place: Folder, name: str) -> tuple[str, list[FileRecord], list[Finding]] | None:
    """The digest of the task, its files and findings; None if there is no whole record."""
    import pyarrow.parquet as pq

    try:
        data = place.store.read(place.key(record_path(name)))
        mark = pq.read_schema(io.BytesIO(data)).metadata or {}
        files = [FileRecord(**file) for file in json.loads(mark[b"files"])]
        return mark[b"task"].decode(), files, [Finding(**row) for row in decode_table(data)]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # ArrowInvalid is a ValueError
        return None
