"""Check a committed set of shards: its shards, its lists, and the numbers in its manifest."""

from __future__ import annotations

import math
import posixpath
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from data_prep.core.digest import sha256_bytes
from data_prep.core.manifest import FileRecord, Manifest
from data_prep.core.paths import manifest_key
from data_prep.core.storage.store import Store
from data_prep.core.tar_format import BLOCK
from data_prep.shards.check_tar import Index, check_mark, check_tar, read_marked_index
from data_prep.shards.ledger import (
    DUPLICATES,
    FAILURES,
    OUTCOMES,
    SOURCES,
    Ledger,
    OldTableError,
    TableError,
)
from data_prep.shards.shards import index_key

STAGES = ("images", "masks")  # the stages that make shards
THREADS = 4  # hashing frees the interpreter lock, and S3 answers several reads at once

Report = Callable[[str, str], None]  # takes a key under the root, and its problem


@dataclass(frozen=True)
class Depth:
    """The part of the shards that is read.

    Attributes:
        share: of every set, the share of tars that are read with their indexes, in (0, 1]. The
            hash of their keys chooses them; at least one is read.
        index_only: read every index and no tar.
    """

    share: float = 1.0
    index_only: bool = False

    @property
    def everything(self) -> bool:
        """Return whether all tars and indexes are read."""
        return self.share >= 1 and not self.index_only


@dataclass(frozen=True)
class Shard:
    """A shard of a set: the keys and records of its tar and its index."""

    name: str  # such as "train-000000", unique in the set
    tar: str
    tar_record: FileRecord
    index_record: FileRecord | None

    @property
    def index(self) -> str:
        """Return the key of the index."""
        return index_key(self.tar)

    @property
    def split(self) -> str:
        """Return the split, such as "train"."""
        return self.name.rpartition("-")[0]


@dataclass
class Coverage:
    """The tars and indexes of all checked sets by their keys, and those that were read."""

    sizes: dict[str, int] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def count(self, extension: str, only_read: bool = False) -> int:
        """Return the number of files with this extension."""
        return sum(k.endswith(extension) for k in (self.read if only_read else self.sizes))

    @property
    def bytes_read(self) -> int:
        """Return the total size of the read files."""
        return sum(self.sizes[key] for key in self.read)


def shards_of(records: Mapping[str, FileRecord]) -> list[Shard]:
    """Return the shards among the files of a set; `records` has the keys under the root."""
    found = []
    for key in sorted(key for key in records if key.endswith(".tar")):
        stem = key.removesuffix(".tar")
        name = posixpath.basename(stem)
        found.append(Shard(name, key, records[key], records.get(f"{stem}.parquet")))
    return found


def chosen(shards: Sequence[Shard], share: float) -> list[Shard]:
    """Return the shards to read, the same ones every time."""
    count = math.ceil(share * len(shards))
    return sorted(shards, key=lambda shard: sha256_bytes(shard.tar.encode()))[:count]


def check_set(
    store: Store,
    manifest: Manifest,
    records: Mapping[str, FileRecord],
    depth: Depth,
    coverage: Coverage,
    report: Report,
    step: Callable[[int], None] = lambda count: None,
) -> None:
    """Check the shards, lists and tables of one committed set.

    Args:
        store: the root.
        manifest: the manifest of the set.
        records: its files by their keys under the root.
        depth: how much is read.
        coverage: the files that were read before. They are not read again; new ones are added.
        report: takes each problem.
        step: takes the number of checked shards.

    Raises:
        StorageError: the storage failed.
    """
    folder = manifest.folder
    shards = shards_of(records)
    read = shards if depth.index_only else chosen(shards, depth.share)
    unread = frozenset(shard.name for shard in shards) - {shard.name for shard in read}
    for shard in shards:
        coverage.sizes[shard.tar] = shard.tar_record.size
        if shard.index_record is not None:
            coverage.sizes[shard.index] = shard.index_record.size
    for name, times in Counter(shard.name for shard in shards).items():
        if times > 1:
            report(manifest_key(folder), f"names {times} shards {name}")
    _check_lists(store, manifest, shards, report)
    ledger = _open_ledger(store, manifest, report, coverage)
    task = partial(_check_shard, store, ledger, depth, frozenset(coverage.read))
    samples, bins = Counter[str](), Counter[str]()
    with ThreadPoolExecutor(THREADS) as pool:
        for count, (shard, seen) in enumerate(zip(read, pool.map(task, read), strict=True), 1):
            for where, problem in seen.problems:
                report(where, problem)
            samples[shard.split] += seen.samples
            bins += seen.bins
            if shard.index_record is not None:
                coverage.read.add(shard.index)
            if not depth.index_only:
                coverage.read.add(shard.tar)
            step(count)
    counted = None if unread else (samples, bins)
    _check_numbers(manifest, shards, counted, report)
    if ledger is not None:
        _check_tables(ledger, manifest, unread, report)


@dataclass
class _Seen:
    """The result of checking one shard."""

    problems: list[tuple[str, str]]
    samples: int = 0
    bins: Counter[str] = field(default_factory=Counter)


def _check_shard(
    store: Store, ledger: Ledger | None, depth: Depth, done: frozenset[str], shard: Shard
) -> _Seen:
    """Check one shard. The tars in `done` were read before."""
    seen = _Seen([])

    def report(where: str, problem: str) -> None:
        seen.problems.append((where, problem))

    try:
        if shard.index_record is None:
            report(shard.tar, "its index is not in the manifest")
        index = read_marked_index(
            store, shard.tar, partial(report, shard.index), shard.index_record
        )
        if depth.index_only:
            found = _check_index(index, shard.tar_record) if index else []
        elif shard.tar in done:
            found = []
        else:
            originals = ledger.original if ledger else None
            found = check_tar(store, shard.tar, index, shard.tar_record, originals)
    except OSError as error:
        report(shard.tar, f"cannot be read: {error.strerror or error}")
        return seen
    for problem in found:
        report(shard.tar, problem)
    if index is not None:
        rows = list(index.rows.values())
        seen.samples = len(rows)
        if shard.split == "eval":
            seen.bins = Counter(str(row.get("ratio_bin")) for row in rows)
        strangers = [row["key"] for row in rows if row.get("split") != shard.split]
        if strangers:
            report(shard.index, f"sample {strangers[0]} is of another split than its shard")
        if ledger is not None:
            where = f"{ledger.folder}/{SOURCES}"
            ledger.check_shard_rows(shard.name, rows, partial(report, where))
    return seen


def _check_index(index: Index, tar: FileRecord) -> list[str]:
    """Return the problems of an index, without reading its tar."""
    found = check_mark(index, tar.size, tar.sha256)
    end = 0
    for key, row in index.rows.items():
        if row["offset"] % BLOCK or row["offset"] < end + BLOCK:
            found.append(f"sample {key}: its index has an offset that no sample can have")
            break
        end = row["offset"] + row["size"]
    if end > tar.size:
        found.append("its index has a sample after its end")
    return found


def _check_lists(store: Store, manifest: Manifest, shards: Sequence[Shard], report: Report) -> None:
    """Check that each split's `.urls` list has exactly its shards, in order."""
    folder = manifest.folder
    splits = {shard.split for shard in shards} | set(_splits(manifest))
    for split in sorted(splits):
        key = f"{folder}/{split}.urls"
        wanted = sorted((s for s in shards if s.split == split), key=lambda shard: shard.name)
        try:
            lines = store.read(key).decode().splitlines()
        except (FileNotFoundError, NotADirectoryError):
            report(key, "is missing")
            continue
        except ValueError:
            report(key, "is not a list of shards")
            continue
        named = [posixpath.normpath(posixpath.join(folder, line)) for line in lines]
        tars = [shard.tar for shard in wanted]
        for line, tar in zip(lines, named, strict=True):
            if tar not in tars:
                report(key, f"names {line!r}, which is not a shard of this split in the manifest")
        for tar in tars:
            if tar not in named:
                report(key, f"does not name {tar}")
        if sorted(named) == sorted(tars) and named != tars:
            report(key, "names the shards in another order")
        if len(set(named)) < len(named):
            report(key, "names a shard twice")


def _open_ledger(
    store: Store, manifest: Manifest, report: Report, coverage: Coverage
) -> Ledger | None:
    """Return the ledger of a set of images; None for masks, and if it is damaged or too old."""
    if manifest.stage != "images":
        return None
    folder = manifest.folder
    where = f"{folder}/{SOURCES}"
    try:
        ledger = Ledger(store, folder)
    except OldTableError:
        coverage.notes.append(
            f"{where} was written by an earlier version of dpnet, without the place of each item:"
            " the places were not checked"
        )
        return None
    except TableError as error:
        report(where, str(error))
        return None
    for problem in ledger.problems:
        report(where, problem)
    return ledger


def _check_tables(
    ledger: Ledger, manifest: Manifest, unread: frozenset[str], report: Report
) -> None:
    """Compare the tables with each other and with the manifest's summary."""
    folder, summary = manifest.folder, manifest.summary
    where = manifest_key(folder)
    counts = {outcome: ledger.count(outcome) for outcome in OUTCOMES}
    for table, kinds in {
        FAILURES: ("failed", "ignored"),
        DUPLICATES: ("duplicate",),
    }.items():
        key = f"{folder}/{table}"
        try:
            found = ledger.check_table(table, partial(report, key))
        except TableError as error:
            report(key, str(error))
            continue
        for kind in kinds:
            if found[kind] != counts[kind]:
                report(key, f"has {found[kind]} {kind} items, {SOURCES} has {counts[kind]}")
    ledger.report_missing(unread, partial(report, f"{folder}/{SOURCES}"))
    wanted = {
        "listed": len(ledger),
        "photographs": counts["sample"],
        "failed": counts["failed"],
        "ignored": counts["ignored"],
        "duplicates": counts["duplicate"],
    }
    for name, number in wanted.items():
        if summary.get(name) != number:
            report(where, f"its summary has {name} {summary.get(name)}, its tables {number}")


def _splits(manifest: Manifest) -> dict[str, Any]:
    """Return the numbers of each split in the summary."""
    splits = manifest.summary.get("splits")
    return splits if isinstance(splits, dict) else {}


def _check_numbers(
    manifest: Manifest,
    shards: Sequence[Shard],
    counted: tuple[Mapping[str, int], Mapping[str, int]] | None,
    report: Report,
) -> None:
    """Compare the summary's numbers with the manifest's shards and the indexes.

    `counted` has samples by split and masks by bin; None if not every index was read.
    """
    where = manifest_key(manifest.folder)
    splits = _splits(manifest)
    if not splits:
        report(where, "its summary does not name the splits")
    for split in sorted(splits.keys() | {shard.split for shard in shards}):
        stated = splits.get(split)
        wanted = {"shards": sum(shard.split == split for shard in shards)}
        if counted is not None:
            wanted["samples"] = counted[0].get(split, 0)
        for name, number in wanted.items():
            number_stated = stated.get(name) if isinstance(stated, dict) else None
            if number_stated != number:
                report(where, f"its summary has {number_stated} {name} of {split}, not {number}")
    if manifest.stage == "masks" and counted is not None:
        _check_bins(manifest.summary.get("bins"), counted[1], partial(report, where))


def _check_bins(bins: Any, counted: Mapping[str, int], report: Callable[[str], None]) -> None:
    """Compare the summary's numbers of evaluation masks with those of the indexes."""
    stated = bins if isinstance(bins, dict) else {}
    for name in sorted(stated.keys() | counted.keys()):
        if stated.get(name) != counted.get(name, 0):
            numbers = f"{stated.get(name)} evaluation masks with {name} hole"
            report(f"its summary has {numbers}, not {counted.get(name, 0)}")
