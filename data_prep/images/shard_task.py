"""Make one image shard in a worker process: read its items, prepare them, write the samples."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from data_prep.core.apart import DECODE_S, DeathError, guarded
from data_prep.core.digest import canonical_json, sha256_bytes, sha256_json
from data_prep.core.errors import ItemError
from data_prep.core.lease import check_leases
from data_prep.core.manifest import FileRecord
from data_prep.images.findings import (
    FAILED,
    IGNORED,
    Finding,
    ShardRecord,
    read_record,
    write_record,
)
from data_prep.images.read_ahead import NotAPhotoError, read_items
from data_prep.pictures.cutting import Cutting
from data_prep.pictures.limits import PhotoError
from data_prep.pictures.prepare import Piece, Prepared, prepare
from data_prep.pictures.tiling import sample_key
from data_prep.raw.listing import Item
from data_prep.shards.shards import (
    Folder,
    ShardSample,
    iterate_shard,
    read_index,
    sha256_of,
    write_shard,
)

if TYPE_CHECKING:
    from data_prep.raw.source import Reader, Source

Preparer = Callable[[bytes, Cutting, str], Prepared]

_ITEM = ("key", "size", "fingerprint", "offset", "block")  # the fields that a task's digest covers


@dataclass(frozen=True)
class ShardTask:
    """A shard to write.

    Attributes:
        place: the version's folder.
        items: to prepare, in stored order.
        unsure: places in `items` of those with names that may or may not be photos.
        old: key of the parent's tar that this shard replaces; empty for a new shard.
        reuse: keys of the items to copy from `old`; none of them is in `items`.
        order: keys of all items, copied and new, in stored order; empty for a new shard.
        limit_s: the most seconds of preparing one photo.
        careful: prepare the photos in a process of their own, because one of them, or something
            else, ended a worker process. The result does not depend on it.
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
    limit_s: float = DECODE_S
    careful: bool = False

    def after_death(self) -> ShardTask | None:
        """Return the task to run after this one ended its worker process."""
        return None if self.careful else replace(self, careful=True)

    @property
    def digest(self) -> str:
        """Return the digest of everything that the shard depends on."""
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
    """A shard from which the samples of some items are removed.

    Attributes:
        place: the version's folder.
        tar: key of the shard as it is, perhaps in an earlier version's folder.
        keys: of the items to remove.
        places: of these items in the task that wrote the shard, to update its record.
    """

    place: Folder
    name: str
    tar: str
    keys: frozenset[str]
    places: frozenset[int] = frozenset()


@dataclass(frozen=True)
class ShardResult:
    """The files of a shard (none if it has no sample) and a finding for each of its items.

    `resumed` says that an earlier run had written it.
    """

    files: list[FileRecord]
    findings: list[Finding] = field(default_factory=list)
    resumed: bool = False


def build_shard(task: ShardTask) -> ShardResult:
    """Write a shard, or return the result of an earlier run if its files are complete."""
    finished = _finished(task)
    if finished is not None:
        return finished
    import cv2

    cv2.setNumThreads(1)  # each core has its own worker process
    findings: list[Finding] = []
    with (
        task.source.reader() as reader,
        guarded(prepare, task.limit_s, apart=task.careful) as preparing,
    ):
        files = _write(task.place, task.name, _samples(task, reader, preparing, findings))
    write_record(task.place, task.name, ShardRecord(task.digest, files, findings))
    return ShardResult(files, findings)


def drop_samples(task: DropTask) -> list[FileRecord]:
    """Write a shard again without the samples of some items."""
    store = task.place.store
    rows = {row["key"]: row for row in read_index(store, task.tar)}

    def kept() -> Iterator[ShardSample]:
        for key, files in iterate_shard(store, task.tar):
            if rows[key]["relative_key"] not in task.keys:
                yield key, files, _columns(rows[key])

    record = read_record(task.place, task.name)
    files = _write(task.place, task.name, kept())
    if record is not None and record.task_digest:
        for place in task.places:
            record.findings[place] = replace(record.findings[place], dropped=True)
        write_record(task.place, task.name, replace(record, files=files))
    return files


def _finished(task: ShardTask) -> ShardResult | None:
    """Return this task's result from an earlier run, after its files are checked by hash."""
    record = read_record(task.place, task.name)
    if record is None or record.task_digest != task.digest:
        return None
    for file in record.files:
        try:
            found = sha256_of(task.place.store, task.place.key(file.path))
        except FileNotFoundError:
            return None
        if found != (file.sha256, file.size):
            return None
    return ShardResult(record.files, record.findings, resumed=True)


def _write(place: Folder, name: str, samples: Iterator[ShardSample]) -> list[FileRecord]:
    """Write the files of a shard. Without samples write none, and delete those of earlier runs."""
    first = next(samples, None)
    if first is None:
        for extension in ("parquet", "tar"):
            place.store.delete(place.key(f"{name}.{extension}"))
        return []

    def all_samples() -> Iterator[ShardSample]:
        yield first
        yield from samples

    return write_shard(place, name, all_samples())


def _samples(
    task: ShardTask, reader: Reader, preparing: Preparer, findings: list[Finding]
) -> Iterator[ShardSample]:
    """Yield the shard's samples in order, and append a finding for each prepared item."""
    prepared = prepare_items(task, reader, preparing, findings)
    if not task.reuse:
        for _, samples in prepared:
            yield from samples
        return
    old = _OldSamples(task)
    for key in task.order:
        if key in task.reuse:
            yield from old.of_item(key)
        else:
            item, samples = next(prepared)
            assert item.key == key, f"{task.name}: {item.key} comes before {key}"
            yield from samples
    old.check_all_used()


class _OldSamples:
    """The samples of the parent's shard that are copied, read one at a time in stored order.

    The samples of one item are neighbours, and the items are in the order of the new shard.
    """

    def __init__(self, task: ShardTask) -> None:
        store = task.place.store
        self._name, self._reuse = task.name, task.reuse
        self._rows = {row["key"]: row for row in read_index(store, task.old)}
        self._stored = iterate_shard(store, task.old)
        self._next = deque[tuple[str, ShardSample]]()  # at most one sample, with its item's key

    def of_item(self, key: str) -> Iterator[ShardSample]:
        """Yield the next samples as long as they are those of the item `key`."""
        while True:
            if not self._next:
                found = next(self._stored, None)
                if found is None:
                    return
                row = self._rows[found[0]]
                if row["relative_key"] not in self._reuse:
                    continue
                self._next.append((row["relative_key"], (*found, _columns(row))))
            if self._next[0][0] != key:
                return
            yield self._next.popleft()[1]

    def check_all_used(self) -> None:
        assert not self._next, f"{self._name}: samples of {self._next[0][0]} are out of order"


def prepare_items(
    task: ShardTask, reader: Reader, preparing: Preparer, findings: list[Finding]
) -> Generator[tuple[Item, list[ShardSample]], None, None]:
    """Yield every item with its samples; a failed or ignored item has none."""
    with closing(read_items(reader, task.items, task.max_bytes, task.unsure)) as read:
        for item, get_bytes in read:
            check_leases()  # of this process, if the task runs in the stage's own
            finding, samples = _prepare_item(task, item, get_bytes, preparing)
            findings.append(finding)
            yield item, samples


def _prepare_item(
    task: ShardTask, item: Item, get_bytes: Callable[[], bytes], preparing: Preparer
) -> tuple[Finding, list[ShardSample]]:
    """Read one item and cut its samples; a failure becomes its finding.

    Args:
        task: of the shard.
        item: to prepare.
        get_bytes: returns its bytes.
        preparing: `prepare`, perhaps in another process.
    """
    try:
        data = get_bytes()
    except NotAPhotoError as error:
        sha256 = "" if error.data is None else sha256_bytes(error.data)
        return Finding(sha256, item.size, outcome=IGNORED, reason=str(error)), []
    except ItemError as error:
        return Finding(outcome=FAILED, reason=str(error)), []
    sha256 = sha256_bytes(data)
    try:
        photo = preparing(data, task.how, item.key)
    except (PhotoError, DeathError) as error:
        return Finding(sha256, len(data), outcome=FAILED, reason=str(error)), []
    size = (photo.width, photo.height)
    samples = [_sample(task.split, item, sha256, size, piece) for piece in photo.pieces]
    finding = Finding(sha256, len(data), *size, photo.format, photo.phash, len(samples))
    return finding, samples


def _sample(
    split: str, item: Item, sha256: str, size: tuple[int, int], piece: Piece
) -> ShardSample:
    """Return the sample of a piece: its key, its files, and its columns in the index."""
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
    """Return the columns of an index row that `write_shard` does not add itself."""
    return {k: v for k, v in row.items() if k not in ("key", "offset", "size", "sha256")}
