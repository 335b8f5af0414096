"""The work of the images stage: build the shards, remove duplicates, write tables and lists.

Every listed item gets exactly one outcome: stored in a shard, duplicate, failed or ignored.
"""

from __future__ import annotations

import json
import logging
import posixpath
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from data_prep.core.apart import DECODE_S
from data_prep.core.errors import PipelineError
from data_prep.core.manifest import FileRecord
from data_prep.core.pool import Map, run_apart, run_tasks
from data_prep.core.progress import Progress
from data_prep.core.stage import Produced, Work
from data_prep.core.storage.store import Store
from data_prep.core.text import count_of
from data_prep.images.failures import (
    accepted_failures,
    check_failures,
    log_unused,
    too_many_failures,
)
from data_prep.images.findings import DUPLICATE, FAILED, IGNORED, OUTCOMES, SAMPLE, record_path
from data_prep.images.keys import UNSURE
from data_prep.images.next_version import NextVersion
from data_prep.images.outcomes import Outcomes, check_every_item_counted, check_splits
from data_prep.images.plan import Plan, PlannedShard
from data_prep.images.resolution import KEPT, Resolution, resolve
from data_prep.images.shard_task import (
    DropTask,
    ShardResult,
    ShardTask,
    build_shard,
    drop_samples,
)
from data_prep.images.tables import write_lists, write_tables
from data_prep.images.versions import Version
from data_prep.shards.shards import Folder, write_file

if TYPE_CHECKING:
    from data_prep.images.settings import ImagesSettings

log = logging.getLogger(__name__)

CONFIG = "config.json"  # the settings of a version, with its source
Files = dict[str, list[FileRecord]]  # of shards, by name


def build(work: Work, settings: ImagesSettings, following: NextVersion, run: Map) -> Produced:
    """Build the planned version.

    Args:
        work: the stage's folder.
        settings: of the dataset.
        following: the planned version.
        run: where tasks run.

    Raises:
        PipelineError: too many items failed, or a split has no usable photo.
    """
    plan, parent = following.plan, following.parent
    outcomes = Outcomes(plan)
    if parent is not None:
        outcomes.copy_from_parent(parent)
    outcomes.ignore_others()
    builder = _Builder(work, settings, following, run, outcomes)
    files = builder.build_shards()
    check_failures(work, settings, outcomes)
    resolution = resolve(
        outcomes.sha256,
        outcomes.phash,
        outcomes.are(SAMPLE, DUPLICATE),
        plan.split,
        settings.dedupe,
        settings.near_duplicates,
    )
    builder.drop_duplicates(resolution, files)
    check_splits(outcomes, settings.source)
    check_every_item_counted(outcomes)
    log_unused(settings, outcomes)
    if count := outcomes.count(DUPLICATE):
        log.info("images: %s left out: %s", count_of(count, "duplicate"), KEPT)
    shards = _with_inherited(files, plan, parent)
    records = [record for shard in shards.values() for record in shard]
    records += write_tables(work, outcomes, resolution)
    options = json.dumps(settings.model_dump(mode="json"), indent=1).encode()
    records.append(write_file(work, CONFIG, options, content=False))
    lists, figures = write_lists(work, outcomes, shards)
    summary = _summary(following, outcomes, resolution, figures)
    return Produced(records + lists, summary)


def delete_shard_records(store: Store, folder: str) -> None:
    """Delete the workers' records, which a committed version does not need."""
    keys = [entry.key for entry in store.list(f"{folder}/work")]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(store.delete, keys))
    if store.local_folder and keys:
        (store.local_folder / folder / "work").rmdir()


def _summary(
    following: NextVersion,
    outcomes: Outcomes,
    resolution: Resolution,
    figures: Mapping[str, Mapping[str, int]],
) -> dict[str, Any]:
    """Return the figures of the version for its manifest."""
    plan = following.plan
    return {
        "version": following.number,
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


def _with_inherited(files: Files, plan: Plan, parent: Version | None) -> Files:
    """Return the files of all shards; those that stay in the parent's folder have a path to it."""
    shards = {name: [record for record in own if record] for name, own in files.items()}
    if parent is not None:
        records = parent.shards()
        for name in plan.inherited:
            if name not in shards:
                shards[name] = [_inherited(parent, record) for record in records[name]]
    return shards


def _inherited(parent: Version, record: FileRecord) -> FileRecord:
    path = record.path
    if not path.startswith("../"):
        path = f"../{posixpath.basename(parent.folder)}/{path}"
    return replace(record, path=path)


@dataclass(frozen=True)
class _Builder:
    """Builds the planned shards and removes duplicates from them, and updates the outcomes."""

    work: Work
    settings: ImagesSettings
    following: NextVersion
    run: Map
    outcomes: Outcomes

    @property
    def _run_decoding(self) -> Map:
        """Return where tasks run that decode photos: not in this process, which must not crash."""
        return run_apart if self.run is run_tasks else self.run

    @cached_property
    def _place(self) -> Folder:
        return Folder(self.work.store, self.work.folder)

    @cached_property
    def _old_tars(self) -> dict[str, str]:
        parent = self.following.parent
        return {} if parent is None else parent.tars()

    @cached_property
    def _planned(self) -> dict[str, PlannedShard]:
        return {shard.name: shard for shard in self.following.plan.shards}

    def build_shards(self) -> Files:
        """Build every planned shard, and return their files."""
        plan, workers = self.following.plan, self.following.workers
        files: Files = {}
        total = sum(int((plan.before[shard.rows] < 0).sum()) for shard in plan.shards)
        accepted = accepted_failures(self.settings, int((plan.kind >= UNSURE).sum()))
        done = failed = 0
        with (
            Progress("prepare images", total, "images") as progress,
            # map() makes one task at a time: a task holds its items as objects.
            closing(
                self._run_decoding(build_shard, map(self._task, plan.shards), workers)
            ) as results,
        ):
            for shard, result in zip(plan.shards, results, strict=True):
                files[shard.name] = self._add_result(shard, result)
                done += len(result.findings)
                failed += sum(finding.outcome == FAILED for finding in result.findings)
                if failed > accepted:
                    raise too_many_failures(self.work, self.settings, self.outcomes, so_far=True)
                progress.update(done, resumed=len(result.findings) if result.resumed else 0)
        return files

    def drop_duplicates(self, resolution: Resolution, files: Files) -> None:
        """Remove the duplicates from the shards that hold them, and update `files`."""
        outcomes = self.outcomes
        leaving_rows = set(resolution.rows.tolist())
        self._restore_dropped(leaving_rows, files)
        names = list(outcomes.numbers)
        leaving: dict[str, list[int]] = {}
        for row in sorted(leaving_rows - outcomes.dropped):
            if outcomes.shard[row] >= 0:
                leaving.setdefault(names[outcomes.shard[row]], []).append(row)
        if leaving:
            tasks = (self._drop_task(name, rows, name in files) for name, rows in leaving.items())
            with (
                Progress("drop duplicates", len(leaving), "shards") as progress,
                closing(self.run(drop_samples, tasks, self.following.workers)) as results,
            ):
                for count, (name, records) in enumerate(zip(leaving, results, strict=True), 1):
                    files[name] = records
                    progress.update(count)
        outcomes.code[resolution.rows] = OUTCOMES.index(DUPLICATE)
        outcomes.shard[resolution.rows] = -1
        self._check_no_stale_duplicate(resolution)

    def _restore_dropped(self, leaving: set[int], files: Files) -> None:
        """Build shards again that an interrupted build removed too many samples from.

        That happens if the build resumes with other photos, so that duplicates are not duplicates
        any more.
        """
        outcomes = self.outcomes
        names = list(outcomes.numbers)
        for row in sorted(outcomes.dropped - leaving):
            shard = self._planned[names[outcomes.shard[row]]]
            if outcomes.dropped.intersection(self._fresh_rows(shard)):
                self._place.store.delete(self._place.key(record_path(shard.name)))
                with closing(self._run_decoding(build_shard, [self._task(shard)], 1)) as results:
                    files[shard.name] = self._add_result(shard, next(results))
                outcomes.dropped.difference_update(self._fresh_rows(shard))

    def _check_no_stale_duplicate(self, resolution: Resolution) -> None:
        """Check that every item marked as a duplicate still is one. Raises PipelineError."""
        stale = self.outcomes.are(DUPLICATE)
        stale[resolution.rows] = False
        if stale.any():
            key = self.outcomes.key(int(stale.argmax()))
            raise PipelineError(
                f"{key} is not a duplicate any more, but no shard holds it. This is a fault of the"
                " program: run `dpnet images build` with --repack."
            )

    def _add_result(self, shard: PlannedShard, result: ShardResult) -> list[FileRecord]:
        """Add a shard's findings to the outcomes, and return its files."""
        rows = self._fresh_rows(shard)
        if len(rows) != len(result.findings):
            raise PipelineError(
                f"{shard.name} has {len(rows)} items, but its record names"
                f" {len(result.findings)}. Delete {self._place.folder} and run the same command"
                " again."
            )
        self.outcomes.add_findings(shard, rows, result.findings)
        for row, finding in zip(rows, result.findings, strict=True):
            if finding.dropped:
                self.outcomes.dropped.add(row)
        return result.files

    def _fresh_rows(self, shard: PlannedShard) -> list[int]:
        """Return the rows of the items that are prepared now, in stored order."""
        return [int(row) for row in shard.rows[self.following.plan.before[shard.rows] < 0]]

    def _task(self, shard: PlannedShard) -> ShardTask:
        """Make the task that builds a shard."""
        import numpy as np

        plan, rows = self.following.plan, self._fresh_rows(shard)
        items = list(plan.listing.items(np.array(rows, np.int64)))
        unsure = frozenset(i for i, row in enumerate(rows) if plan.kind[row] == UNSURE)
        order: list[str] = []
        reuse = frozenset[str]()
        if shard.old:
            order = plan.listing.table["key"].take(shard.rows).to_pylist()
            reuse = frozenset(order) - {item.key for item in items}
        return ShardTask(
            place=self._place,
            name=shard.name,
            split=shard.split,
            source=self.following.source,
            items=items,
            how=self.settings.cutting,
            max_bytes=self.settings.max_bytes,
            unsure=unsure,
            old=self._old_tars[shard.old] if shard.old else "",
            reuse=reuse,
            order=order,
            limit_s=DECODE_S,
        )

    def _drop_task(self, name: str, rows: list[int], built_now: bool) -> DropTask:
        """Make the task that removes the items in `rows` from a shard."""
        keys = frozenset(self.outcomes.key(row) for row in rows)
        if not built_now:
            return DropTask(self._place, name, self._old_tars[name], keys)
        places = {row: place for place, row in enumerate(self._fresh_rows(self._planned[name]))}
        own = frozenset(places[row] for row in rows if row in places)
        return DropTask(self._place, name, self._place.key(f"{name}.tar"), keys, own)
