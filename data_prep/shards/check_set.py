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
from data_prep.shards import ledger as accounts
from data_prep.shards.check_tar import Index, check_mark, check_tar, read_marked_index
from data_prep.shards.ledger import Ledger, OldTableError, TableError

STAGES = ("images", "masks")  # those that make shards
THREADS = 4  # hashing frees the interpreter lock, and S3 answers several reads at once

Say = Callable[[str, str], None]  # where (a key under the root), and what is wrong there


@dataclass(frozen=True)
class Depth:
    """How much is read: of every set of shards a `share` of the tars, chosen by the hash of their
    keys and at least one, with their indexes; or with `index_only` every index and no tar."""

    share: float = 1.0
    index_only: bool = False

    @property
    def everything(self) -> bool:
        return self.share >= 1 and not self.index_only


@dataclass(frozen=True)
class Shard:
    """A shard of a set: the key and record of its tar and of its index."""

    name: str  # "train-000000", unlike that of any other shard of the set
    tar: str
    tar_record: FileRecord
    index_record: FileRecord | None

    @property
    def index(self) -> str:
        return f"{self.tar.removesuffix('.tar')}.parquet"

    @property
    def split(self) -> str:
        return self.name.rpartition("-")[0]


@dataclass
class Coverage:
    """Which tars and indexes there are in all the sets, by their keys, and which were read."""

    sizes: dict[str, int] = field(default_factory=dict)
    read: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def count(self, extension: str, only_read: bool = False) -> int:
        return sum(k.endswith(extension) for k in (self.read if only_read else self.sizes))

    @property
    def bytes_read(self) -> int:
        return sum(self.sizes[key] for key in self.read)


def shards_of(records: Mapping[str, FileRecord]) -> list[Shard]:
    """The shards among the files of a set, by their keys under the root."""
    found = []
    for key in sorted(key for key in records if key.endswith(".tar")):
        stem = key.removesuffix(".tar")
        name = posixpath.basename(stem)
        found.append(Shard(name, key, records[key], records.get(f"{stem}.parquet")))
    return found


def chosen(shards: Sequence[Shard], share: float) -> list[Shard]:
    """The share of the shards that is read, the same every time."""
    count = math.ceil(share * len(shards))
    return sorted(shards, key=lambda shard: sha256_bytes(shard.tar.encode()))[:count]


def check_set(
    store: Store,
    manifest: Manifest,
    records: Mapping[str, FileRecord],
    depth: Depth,
    coverage: Coverage,
    say: Say,
    step: Callable[[int], None] = lambda count: None,
) -> None:
    """Check the shards, lists and accounts of one committed set.

    `records` are its files by their keys under the root. A tar that `coverage` has as read is not
    read again; what is read now is added to it. `step` is told how many shards are done. Raises
    StorageError where storage fails.
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
            say(manifest_key(folder), f"names {times} shards {name}")
    _check_lists(store, folder, manifest, shards, say)
    ledger = _open_ledger(store, manifest, say, coverage)
    task = partial(_check_shard, store, ledger, depth, frozenset(coverage.read))
    samples, bins = Counter[str](), Counter[str]()
    with ThreadPoolExecutor(THREADS) as pool:
        for count, (shard, seen) in enumerate(zip(read, pool.map(task, read), strict=True), 1):
            for where, problem in seen.problems:
                say(where, problem)
            samples[shard.split] += seen.samples
            bins += seen.bins
            if shard.index_record is not None:
                coverage.read.add(shard.index)
            if not depth.index_only:
                coverage.read.add(shard.tar)
            step(count)
    counted = None if unread else (samples, bins)
    _check_numbers(manifest, shards, counted, say)
    if ledger is not None:
        _settle(ledger, manifest, unread, say)


@dataclass
class _Seen:
    """What came of one shard."""

    problems: list[tuple[str, str]]
    samples: int = 0
    bins: Counter[str] = field(default_factory=Counter)


def _check_shard(
    store: Store, ledger: Ledger | None, depth: Depth, done: frozenset[str], shard: Shard
) -> _Seen:
    seen = _Seen([])

    def say(where: str, problem: str) -> None:
        seen.problems.append((where, problem))

    try:
        if shard.index_record is None:
            say(shard.tar, "its index is not in the manifest")
        index = read_marked_index(store, shard.tar, partial(say, shard.index), shard.index_record)
        if depth.index_only:
            found = _check_index(index, shard.tar_record) if index else []
        elif shard.tar in done:
            found = []
        else:
            originals = ledger.original if ledger else None
            found = check_tar(store, shard.tar, index, shard.tar_record, originals)
    except OSError as error:
        say(shard.tar, f"cannot be read: {error.strerror or error}")
        return seen
    for problem in found:
        say(shard.tar, problem)
    if index is not None:
        rows = list(index.rows.values())
        seen.samples = len(rows)
        if shard.split == "eval":
            seen.bins = Counter(str(row.get("ratio_bin")) for row in rows)
        strangers = [row["key"] for row in rows if row.get("split") != shard.split]
        if strangers:
            say(shard.index, f"sample {strangers[0]} is of another split than its shard")
        if ledger is not None:
            where = f"{ledger.folder}/{accounts.SOURCES}"
            ledger.meet_shard(shard.name, rows, partial(say, where))
    return seen


def _check_index(index: Index, tar: FileRecord) -> list[str]:
    """Whether an index can be that of the tar, without reading the tar."""
    found = check_mark(index, tar.size, tar.sha256)
    end = 0
    for key, row in index.rows.items():
        if row["offset"] % BLOCK or row["offset"] < end + BLOCK:
            found.append(f"sample {key}: its index has an offset that no sample can have")
            break
        end = row["offset"] + row["size"]
    if end > tar.size:
        found.append("its index leads past its end")
    return found


def _check_lists(
    store: Store, folder: str, manifest: Manifest, shards: Sequence[Shard], say: Say
) -> None:
    """Each split's `.urls` list names its shards, in order, and no others."""
    splits = {shard.split for shard in shards} | set(_splits(manifest))
    for split in sorted(splits):
        key = f"{folder}/{split}.urls"
        wanted = sorted((s for s in shards if s.split == split), key=lambda shard: shard.name)
        try:
            lines = store.read(key).decode().splitlines()
        except (FileNotFoundError, NotADirectoryError):
            say(key, "is missing")
            continue
        except ValueError:
            say(key, "is no list of shards")
            continue
        named = [posixpath.normpath(posixpath.join(folder, line)) for line in lines]
        tars = [shard.tar for shard in wanted]
        for line, tar in zip(lines, named, strict=True):
            if tar not in tars:
                say(key, f"names {line!r}, which is no shard of this split in the manifest")
        for tar in tars:
            if tar not in named:
                say(key, f"does not name {tar}")
        if sorted(named) == sorted(tars) and named != tars:
            say(key, "names the shards in another order")
        if len(set(named)) < len(named):
            say(key, "names a shard twice")


def _open_ledger(store: Store, manifest: Manifest, say: Say, coverage: Coverage) -> Ledger | None:
    if manifest.stage != "images":
        return None
    folder = manifest.folder
    where = f"{folder}/{accounts.SOURCES}"
    try:
        ledger = Ledger(store, folder)
    except OldTableError:
        coverage.notes.append(
            f"{where} is of an earlier version of dpnet and does not say where each item went:"
            " that was not checked"
        )
        return None
    except TableError as error:
        say(where, str(error))
        return None
    for problem in ledger.problems:
        say(where, problem)
    return ledger


def _settle(ledger: Ledger, manifest: Manifest, unread: frozenset[str], say: Say) -> None:
    """Hold the tables against each other and against the manifest's summary."""
    folder, summary = manifest.folder, manifest.summary
    where = manifest_key(folder)
    counts = {outcome: ledger.count(outcome) for outcome in accounts.OUTCOMES}
    for table, kinds in {
        accounts.FAILURES: ("failed", "ignored"),
        accounts.DUPLICATES: ("duplicate",),
    }.items():
        key = f"{folder}/{table}"
        try:
            found = ledger.meet_table(table, partial(say, key))
        except TableError as error:
            say(key, str(error))
            continue
        for kind in kinds:
            if found[kind] != counts[kind]:
                said = f"{accounts.SOURCES} says {counts[kind]}"
                say(key, f"has {found[kind]} items that are {kind}, {said}")
    ledger.settle(unread, partial(say, f"{folder}/{accounts.SOURCES}"))
    wanted = {
        "listed": len(ledger),
        "photographs": counts["sample"],
        "failed": counts["failed"],
        "ignored": counts["ignored"],
        "duplicates": counts["duplicate"],
    }
    for name, number in wanted.items():
        if summary.get(name) != number:
            say(where, f"its summary has {name} {summary.get(name)}, its tables {number}")


def _splits(manifest: Manifest) -> dict[str, Any]:
    """The numbers of each split in the summary."""
    splits = manifest.summary.get("splits")
    return splits if isinstance(splits, dict) else {}


def _check_numbers(
    manifest: Manifest,
    shards: Sequence[Shard],
    counted: tuple[Mapping[str, int], Mapping[str, int]] | None,
    say: Say,
) -> None:
    """The summary's numbers against the manifest's shards and, if all were read, the indexes'."""
    where = manifest_key(manifest.folder)
    splits = _splits(manifest)
    if not splits:
        say(where, "its summary does not say which splits there are")
    for split in sorted(splits.keys() | {shard.split for shard in shards}):
        said = splits.get(split)
        wanted = {"shards": sum(shard.split == split for shard in shards)}
        if counted is not None:
            wanted["samples"] = counted[0].get(split, 0)
        for name, number in wanted.items():
            told = said.get(name) if isinstance(said, dict) else None
            if told != number:
                say(where, f"its summary has {told} {name} of {split}, it is {number}")
    if manifest.stage == "masks" and counted is not None:
        _check_bins(manifest.summary.get("bins"), counted[1], partial(say, where))


def _check_bins(bins: Any, counted: Mapping[str, int], say: Callable[[str], None]) -> None:
    """The summary's numbers of evaluation masks against those of the indexes."""
    said = bins if isinstance(bins, dict) else {}
    for name in sorted(said.keys() | counted.keys()):
        if said.get(name) != counted.get(name, 0):
            there = f"there are {counted.get(name, 0)}"
            say(f"its summary has {said.get(name)} evaluation masks with {name} hole, {there}")
