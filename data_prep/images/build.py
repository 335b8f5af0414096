"""The work of the images stage: shards, then duplicates, then tables and lists.

Every listed item ends in exactly one place: a shard, the failures or the duplicates.
"""

from __future__ import annotations

import json
import posixpath
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import FileRecord
from data_prep.core.pool import Map
from data_prep.core.progress import Progress, say
from data_prep.core.stage import Produced, Work
from data_prep.core.storage.store import Store
from data_prep.images.plan import OTHER, PROBLEM, UNSURE, Plan, PlannedShard
from data_prep.images.resolution import Resolution, resolve
from data_prep.images.shard_task import (
    DUPLICATE,
    FAILED,
    IGNORED,
    SAMPLE,
    DropTask,
    Finding,
    ShardResult,
    ShardTask,
    build_shard,
    drop_samples,
    record_path,
)
from data_prep.images.versions import OUTCOMES, SOURCES, Version
from data_prep.raw.listing import ROWS, SPLITS, Listing
from data_prep.raw.source import Source
from data_prep.shards.shards import Folder, sha256_of, write_file, write_urls

if TYPE_CHECKING:
    import pyarrow as pa

    from data_prep.images.settings import ImagesSettings

_PENDING = -1
_IGNORED_PROBLEM = "ignored: "  # how a problem starts that is no fault of the item


class Outcomes:
    """What became of every listed item, as columns in the order of the listing."""

    def __init__(self, plan: Plan) -> None:
        import numpy as np

        number = len(plan.listing)
        self.plan = plan
        self.sha256 = np.zeros((number, 32), np.uint8)
        self.hashed = np.zeros(number, np.bool_)
        self.width = np.zeros(number, np.int32)
        self.height = np.zeros(number, np.int32)
        self.phash = np.zeros(number, np.uint64)
        self.samples = np.zeros(number, np.int32)
        self.code = np.full(number, _PENDING, np.int8)
        self.shard = np.full(number, -1, np.int32)  # number in `numbers`
        self.format = np.full(number, -1, np.int8)  # place in `formats`
        self.numbers: dict[str, int] = {}  # of shards, by name
        self.formats: list[str] = []
        self.reasons: dict[int, str] = {}
        self.dropped: set[int] = set()  # rows whose samples an earlier attempt took out again

    def ignore_others(self) -> None:
        """Items whose names or listing already tell that they are not to be prepared."""
        import numpy as np
        import pyarrow as pa

        plan, keys = self.plan, self.plan.listing.table["key"]
        self.code[plan.kind == OTHER] = OUTCOMES.index(IGNORED)
        rows = np.flatnonzero(plan.kind == PROBLEM)
        for row, key in zip(rows.tolist(), keys.take(pa.array(rows)).to_pylist(), strict=True):
            problem = plan.listing.problems[key]
            ignored = problem.startswith(_IGNORED_PROBLEM)
            self.code[row] = OUTCOMES.index(IGNORED if ignored else FAILED)
            self.reasons[row] = problem.removeprefix(_IGNORED_PROBLEM)

    def carry(self, parent: Version) -> None:
        """Take over from the parent what still holds."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        rows = np.flatnonzero(self.plan.before >= 0)
        at = self.plan.before[rows]
        table = parent.table
        sha256, hashed = parent.sha256()
        self.sha256[rows], self.hashed[rows] = sha256[at], hashed[at]
        for name in ("width", "height", "phash", "samples"):
            getattr(self, name)[rows] = table[name].to_numpy()[at]
        self.code[rows] = parent.outcomes()[at]
        names = parent.names()
        self.numbers = {name: number for number, name in enumerate(names)}
        shard = pc.index_in(table["shard"], pa.array(names, pa.string()))
        self.shard[rows] = shard.fill_null(-1).to_numpy()[at]
        self.formats = [f for f in pc.unique(table["format"]).to_pylist() if f]
        kind = pc.index_in(table["format"], pa.array(self.formats, pa.string()))
        self.format[rows] = kind.fill_null(-1).to_numpy()[at]
        lasting = (OUTCOMES.index(FAILED), OUTCOMES.index(IGNORED))
        told = rows[np.isin(self.code[rows], lasting)]
        texts = table["reason"].take(pa.array(self.plan.before[told])).to_pylist()
        self.reasons.update(zip(told.tolist(), texts, strict=True))

    def found(self, shard: PlannedShard, rows: Sequence[int], findings: Sequence[Finding]) -> None:
        """What a shard's task found of the items in `rows`; all of the shard is in it now."""
        import numpy as np

        number = self.numbers.setdefault(shard.name, len(self.numbers))
        for row, finding in zip(rows, findings, strict=True):
            if finding.sha256:
                self.sha256[row] = np.frombuffer(bytes.fromhex(finding.sha256), np.uint8)
                self.hashed[row] = True
            self.width[row], self.height[row] = finding.width, finding.height
            self.phash[row], self.samples[row] = finding.phash, finding.samples
            self.code[row] = OUTCOMES.index(finding.outcome)
            if finding.outcome == SAMPLE:
                self.shard[row] = number
            if finding.format:
                if finding.format not in self.formats:
                    self.formats.append(finding.format)
                self.format[row] = self.formats.index(finding.format)
            if finding.reason:
                self.reasons[row] = finding.reason

    def count(self, outcome: str) -> int:
        return int((self.code == OUTCOMES.index(outcome)).sum())

    def key(self, row: int) -> str:
        return str(self.plan.listing.table["key"][int(row)].as_py())


def build(
    work: Work,
    settings: ImagesSettings,
    plan: Plan,
    source: Source,
    parent: Version | None,
    version: int,
    run: Map,
    workers: int,
) -> Produced:
    """Carry out a plan. Raises PipelineError when too many items fail or a split is left empty."""
    outcomes = Outcomes(plan)
    if parent is not None:
        outcomes.carry(parent)
    outcomes.ignore_others()
    tasks = _Tasks(work, settings, plan, source, parent)
    files = _build_shards(settings, plan, outcomes, tasks, run, workers)
    _check_failures(work, settings, outcomes)
    usable = _is(outcomes, SAMPLE, DUPLICATE)
    resolution = resolve(
        outcomes.sha256,
        outcomes.phash,
        usable,
        plan.split,
        settings.dedupe,
        settings.near_duplicates,
    )
    _drop(outcomes, resolution, tasks, files, parent, run, workers)
    _check_splits(settings, outcomes)
    _check_accounts(outcomes)
    for kind in (FAILED, IGNORED):
        _tell(outcomes, kind)
    own = {name: [file for file in records if file] for name, records in files.items()}
    inherited = {} if parent is None else parent.shards()
    for name in plan.inherited:
        if name not in own:
            own[name] = [_inherited(parent, record) for record in inherited[name]]
    records = [record for shard in own.values() for record in shard]
    records += _write_tables(work, outcomes, resolution)
    options = json.dumps(settings.model_dump(mode="json"), indent=1).encode()
    records.append(write_file(work, "config.json", options, content=False))
    lists, figures = _write_lists(work, outcomes, own)
    summary = {
        "version": version,
        "splits": figures,
        "listed": len(plan.listing),
        "photographs": outcomes.count(SAMPLE),
        "failed": outcomes.count(FAILED),
        "ignored": outcomes.count(IGNORED),
        "duplicates": outcomes.count(DUPLICATE),
        "near_duplicates": len(resolution.near),
        "added": plan.added,
        "removed": plan.removed,
        "changed": plan.changed,
    }
    return Produced(records + lists, summary)


def forget_records(store: Store, folder: str) -> None:
    """Remove what a committed build needs no longer."""
    keys = [entry.key for entry in store.list(f"{folder}/work")]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(store.delete, keys))
    if store.local_folder and keys:
        (store.local_folder / folder / "work").rmdir()


class _Tasks:
    """Makes the tasks of planned shards, one at a time: a task holds its items as objects."""

    def __init__(
        self,
        work: Work,
        settings: ImagesSettings,
        plan: Plan,
        source: Source,
        parent: Version | None,
    ) -> None:
        self.work = work
        self.place = Folder(work.store, work.folder)
        self.settings, self.plan, self.source = settings, plan, source
        self.old = parent.tars() if parent is not None else {}
        self.planned = {shard.name: shard for shard in plan.shards}

    def fresh(self, shard: PlannedShard) -> list[int]:
        """Rows of the items that are prepared now, in stored order."""
        return [int(row) for row in shard.rows[self.plan.before[shard.rows] < 0]]

    def build(self, shard: PlannedShard) -> ShardTask:
        import numpy as np

        listing, rows = self.plan.listing, self.fresh(shard)
        items = list(listing.items(np.array(rows, np.int64)))
        unsure = frozenset(i for i, row in enumerate(rows) if self.plan.kind[row] == UNSURE)
        order: list[str] = []
        reuse = frozenset[str]()
        if shard.old:
            order = listing.table["key"].take(shard.rows).to_pylist()
            reuse = frozenset(order) - {item.key for item in items}
        return ShardTask(
            place=self.place,
            name=shard.name,
            split=shard.split,
            source=self.source,
            items=items,
            how=self.settings.cutting,
            max_bytes=self.settings.max_bytes,
            unsure=unsure,
            old=self.old[shard.old] if shard.old else "",
            reuse=reuse,
            order=order,
        )


def _build_shards(
    settings: ImagesSettings,
    plan: Plan,
    outcomes: Outcomes,
    tasks: _Tasks,
    run: Map,
    workers: int,
) -> dict[str, list[FileRecord]]:
    """Build every planned shard; the files of each by name."""
    files: dict[str, list[FileRecord]] = {}
    total = sum(int((plan.before[shard.rows] < 0).sum()) for shard in plan.shards)
    most = _most_failures(settings, int((plan.kind >= UNSURE).sum()))
    done = failed = 0
    with (
        Progress("prepare images", total, "images") as progress,
        closing(run(build_shard, map(tasks.build, plan.shards), workers)) as results,
    ):
        for shard, result in zip(plan.shards, results, strict=True):
            files[shard.name] = _taken(shard, result, outcomes, tasks)
            done += len(result.findings)
            failed += sum(finding.outcome == FAILED for finding in result.findings)
            if failed > most:
                _check_failures(tasks.work, settings, outcomes, certain=True)
            progress.update(done)
    return files


def _taken(
    shard: PlannedShard, result: ShardResult, outcomes: Outcomes, tasks: _Tasks
) -> list[FileRecord]:
    rows = tasks.fresh(shard)
    if len(rows) != len(result.findings):
        raise PipelineError(
            f"{shard.name} was to hold {len(rows)} items and tells of {len(result.findings)}:"
            f" delete {tasks.place.folder} and run the same command again."
        )
    outcomes.found(shard, rows, result.findings)
    for row, finding in zip(rows, result.findings, strict=True):
        if finding.dropped:
            outcomes.dropped.add(row)
    return result.files


def _drop(
    outcomes: Outcomes,
    resolution: Resolution,
    tasks: _Tasks,
    files: dict[str, list[FileRecord]],
    parent: Version | None,
    run: Map,
    workers: int,
) -> None:
    """Take the duplicates out of the shards that hold them."""
    wanted = set(resolution.rows.tolist())
    names = list(outcomes.numbers)
    # A build that was broken off here, and goes on with other pictures, may have dropped too much.
    for row in sorted(outcomes.dropped - wanted):
        shard = tasks.planned[names[outcomes.shard[row]]]
        if outcomes.dropped.intersection(tasks.fresh(shard)):
            tasks.place.store.delete(tasks.place.key(record_path(shard.name)))
            files[shard.name] = _taken(shard, build_shard(tasks.build(shard)), outcomes, tasks)
            outcomes.dropped.difference_update(tasks.fresh(shard))
    leaving: dict[str, list[int]] = {}
    for row in sorted(wanted - outcomes.dropped):
        if outcomes.shard[row] >= 0:
            leaving.setdefault(names[outcomes.shard[row]], []).append(row)

    def task(name: str) -> DropTask:
        keys = frozenset(outcomes.key(row) for row in leaving[name])
        if name in files:
            planned = tasks.planned[name]
            places = {row: place for place, row in enumerate(tasks.fresh(planned))}
            own = frozenset(places[row] for row in leaving[name] if row in places)
            return DropTask(tasks.place, name, tasks.place.key(f"{name}.tar"), keys, own)
        return DropTask(tasks.place, name, tasks.old[name], keys)

    if leaving:
        count = 0
        with (
            Progress("drop duplicates", len(leaving), "shards") as progress,
            closing(run(drop_samples, map(task, leaving), workers)) as results,
        ):
            for name, records in zip(leaving, results, strict=True):
                files[name] = records
                progress.update(count := count + 1)
    outcomes.code[resolution.rows] = OUTCOMES.index(DUPLICATE)
    outcomes.shard[resolution.rows] = -1
    back = _is(outcomes, DUPLICATE)
    back[resolution.rows] = False
    if back.any():
        raise PipelineError(
            f"{outcomes.key(back.argmax())} was a duplicate and is none now, but is in no shard:"
            " this is a fault of the program; run `dpnet images build` with --repack."
        )


def _is(outcomes: Outcomes, *names: str) -> Any:
    import numpy as np

    return np.isin(outcomes.code, [OUTCOMES.index(name) for name in names])


def _most_failures(settings: ImagesSettings, items: int) -> float:
    """Failures that are borne; a single one always is."""
    return max(1.0, settings.max_failure_ratio * items)


def _check_failures(
    work: Work, settings: ImagesSettings, outcomes: Outcomes, certain: bool = False
) -> None:
    import numpy as np

    failed = outcomes.count(FAILED)
    usable = int(_is(outcomes, SAMPLE, DUPLICATE).sum())
    rows = np.flatnonzero(_is(outcomes, FAILED))[:2]
    first = "; ".join(f"{outcomes.key(row)}: {outcomes.reasons.get(int(row), '')}" for row in rows)
    number = usable + failed
    if not certain and not usable:
        raise PipelineError(
            f"none of the {number} image files in {settings.source} is usable: {first};"
            " give whole photographs that are large enough."
        )
    if certain or failed > _most_failures(settings, number):
        share = f"{failed} of the {number} image files in {settings.source}"
        tried = " that were tried" if certain else ""
        listed = _list_failures(work, outcomes)
        raise PipelineError(
            f"{share}{tried} cannot be used ({first}; all in {listed}):"
            " mend or remove them, or raise images.max_failure_ratio, which is"
            f" {settings.max_failure_ratio:g}; what is done is kept."
        )


def _list_failures(work: Work, outcomes: Outcomes) -> str:
    """Write out the items that failed so far, for a build that commits nothing; where they are."""
    rows = _is(outcomes, FAILED).nonzero()[0].tolist()
    lines = [json.dumps({"key": outcomes.key(r), "reason": _reason(outcomes, r)}) for r in rows]
    work.store.write(work.key("work/failures.jsonl"), "".join(f"{x}\n" for x in lines).encode())
    return f"{work.store.uri}/{work.key('work/failures.jsonl')}"


def _check_splits(settings: ImagesSettings, outcomes: Outcomes) -> None:
    for code, split in enumerate(SPLITS):
        if not (_is(outcomes, SAMPLE) & (outcomes.plan.split == code)).any():
            raise PipelineError(
                f"no usable photograph of {settings.source} is left for {split}: give more of them,"
                " or raise images.val and images.test."
            )


def _check_accounts(outcomes: Outcomes) -> None:
    """Every listed item is in exactly one place, or nothing is committed."""
    listed = len(outcomes.plan.listing)
    lost = listed - sum(outcomes.count(kind) for kind in OUTCOMES)
    unstored = int((_is(outcomes, SAMPLE) != (outcomes.shard >= 0)).sum())
    if lost or unstored:
        raise PipelineError(
            f"the accounts do not add up: of {listed} listed items {lost} are nowhere"
            f" and {unstored} are in no shard or in one too many; nothing is committed."
        )


def _tell(outcomes: Outcomes, kind: str) -> None:
    count = outcomes.count(kind)
    if count:
        row = int(_is(outcomes, kind).argmax())
        number = "1 file" if count == 1 else f"{count} files"
        say(f"{number} {kind}, first {outcomes.key(row)}: {_reason(outcomes, row)}")


def _reason(outcomes: Outcomes, row: int) -> str:
    if row in outcomes.reasons:
        return outcomes.reasons[row]
    if outcomes.plan.kind[row] == OTHER:
        extension = outcomes.key(row).rpartition(".")[2].lower()
        return f"not an image: extension .{extension}"
    return ""


def _inherited(parent: Version | None, record: FileRecord) -> FileRecord:
    """A file of the parent as one that the child refers to."""
    assert parent is not None
    path = record.path
    if not path.startswith("../"):
        path = f"../{posixpath.basename(parent.folder)}/{path}"
    return replace(record, path=path)


def _write_lists(
    work: Work, outcomes: Outcomes, shards: Mapping[str, Sequence[FileRecord]]
) -> tuple[list[FileRecord], dict[str, dict[str, int]]]:
    """The `.urls` of every split, and how much is in it."""
    import numpy as np

    records, figures = [], {}
    stored = _is(outcomes, SAMPLE)
    for code, split in enumerate(SPLITS):
        paths = [
            record.path.removesuffix(".tar")
            for name in sorted(shards)
            if name.rpartition("-")[0] == split
            for record in shards[name]
            if record.path.endswith(".tar")
        ]
        # The order of the lines follows from the names, so this says nothing about the content.
        record = write_urls(work, split, paths)
        records.append(replace(record, content=False))
        own = stored & (outcomes.plan.split == code)
        figures[split] = {
            "samples": int(outcomes.samples[own].sum(dtype=np.int64)),
            "shards": len(paths),
        }
    return records, figures


def _write_tables(work: Work, outcomes: Outcomes, resolution: Resolution) -> list[FileRecord]:
    """The tables of what became of every item. None of them is a picture: a new text file or copy
    among the photographs retrains nothing."""
    import pyarrow as pa

    listing = outcomes.plan.listing

    def keys(rows: Any) -> pa.Array:
        return listing.table["key"].take(pa.array(rows, pa.int64())).combine_chunks()

    def sha256(rows: Iterable[int]) -> list[str | None]:
        return [outcomes.sha256[r].tobytes().hex() if outcomes.hashed[r] else None for r in rows]

    failures = _is(outcomes, FAILED, IGNORED).nonzero()[0]
    failure_table = pa.table(
        {
            "key": keys(failures),
            "kind": pa.array([OUTCOMES[outcomes.code[r]] for r in failures], pa.string()),
            "sha256": pa.array(sha256(failures), pa.string()),
            "reason": pa.array([_reason(outcomes, int(r)) for r in failures], pa.string()),
        }
    )
    duplicate_table = pa.table(
        {
            "key": keys(resolution.rows),
            "sha256": pa.array(sha256(resolution.rows), pa.string()),
            "kept": keys(resolution.kept),
            "reason": pa.array(list(resolution.reasons), pa.string()),
        }
    )
    rows, others = ([getattr(p, n) for p in resolution.near] for n in ("row", "other"))
    gone = set(resolution.rows.tolist())
    splits = outcomes.plan.split
    near_table = pa.table(
        {
            "key": keys(rows),
            "split": pa.array([SPLITS[splits[r]] for r in rows], pa.string()),
            "other": keys(others),
            "other_split": pa.array([SPLITS[splits[r]] for r in others], pa.string()),
            "distance": pa.array([p.distance for p in resolution.near], pa.int32()),
            "dropped": pa.array([r in gone for r in rows], pa.bool_()),
        }
    )
    tables = {
        "failures.parquet": [failure_table],
        "duplicates.parquet": [duplicate_table],
        "near_duplicates.parquet": [near_table],
        SOURCES: _source_tables(listing, outcomes),
    }
    return [_write_table(work, path, parts) for path, parts in tables.items()]


def _source_tables(listing: Listing, outcomes: Outcomes) -> Iterator[pa.Table]:
    """sources.parquet, some rows at a time."""
    import numpy as np
    import pyarrow as pa

    names = list(outcomes.numbers)
    splits = pa.array([*SPLITS])
    kinds = pa.array([*OUTCOMES])
    placed = np.asarray(outcomes.plan.kind >= UNSURE)
    for start in range(0, len(listing), ROWS):
        stop = min(start + ROWS, len(listing))
        part = slice(start, stop)
        columns = listing.table.slice(start, stop - start)
        rows = range(start, stop)
        hashes = outcomes.sha256[part].tobytes().hex()
        there = outcomes.hashed[part]
        split = pa.array(outcomes.plan.split[part], mask=~placed[part])
        places: dict[str, Any] = {}
        if "container" in columns.column_names:
            containers = pa.array([*listing.containers], pa.string())
            number = pa.array(
                columns["container"].to_numpy(), mask=columns["container"].to_numpy() < 0
            )
            places["container"] = containers.take(number)
            places |= {name: columns[name] for name in ("offset", "block")}
        yield pa.table(
            {
                **places,
                "key": columns["key"],
                "size": columns["size"],
                "fingerprint": columns["fingerprint"],
                "sha256": pa.array(
                    [hashes[64 * i : 64 * i + 64] if ok else None for i, ok in enumerate(there)],
                    pa.string(),
                ),
                "width": pa.array(outcomes.width[part]),
                "height": pa.array(outcomes.height[part]),
                "format": pa.array(
                    [outcomes.formats[c] if c >= 0 else None for c in outcomes.format[part]],
                    pa.string(),
                ),
                "phash": pa.array(outcomes.phash[part]),
                "samples": pa.array(outcomes.samples[part]),
                "split": splits.take(split.cast(pa.int32())),
                "shard": pa.array(
                    [names[c] if c >= 0 else None for c in outcomes.shard[part]], pa.string()
                ),
                "outcome": kinds.take(pa.array(outcomes.code[part].astype(np.int32))),
                "reason": pa.array([_reason(outcomes, r) or None for r in rows], pa.string()),
            }
        )


def _write_table(work: Work, path: str, parts: Iterable[pa.Table]) -> FileRecord:
    """Write a Parquet file part by part; it is not content (see `_write_tables`)."""
    import pyarrow.parquet as pq

    with tempfile.NamedTemporaryFile(prefix="dpnet-table-") as file:
        writer = None
        for part in parts:
            if writer is None:
                writer = pq.ParquetWriter(file.name, part.schema, compression="zstd")
            writer.write_table(part)
        assert writer is not None
        writer.close()
        work.store.upload(work.key(path), Path(file.name))
    sha256, size = sha256_of(work.store, work.key(path))
    return FileRecord(path, size, sha256, content=False)
