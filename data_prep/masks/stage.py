"""The masks stage: hole masks as verified shards, with a train and an eval split.

Training and evaluation masks come from different random streams. See `codec.py` for the meaning of
a stored mask.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Any

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import FileRecord, StageRef, read_head, reference
from data_prep.core.paths import MANIFEST, manifest_key, masks_folder
from data_prep.core.pool import Map, cores, run_tasks
from data_prep.core.progress import Progress
from data_prep.core.stage import Produced, Request, Work, run_stage
from data_prep.core.storage.store import Store
from data_prep.core.text import printable
from data_prep.masks.external import FilePool, find_polarity, make_pools
from data_prep.masks.mask_file import Conversion
from data_prep.masks.plan import BINS, Candidate, border_counts
from data_prep.masks.read_files import (
    COLUMNS,
    Kind,
    MaskFile,
    Reading,
    files_digest,
    load_masks,
    read_files,
)
from data_prep.masks.recipes import EXTERNAL
from data_prep.masks.settings import MasksSettings, Polarity
from data_prep.masks.shard_task import evaluation_masks, make_shard, shards
from data_prep.shards.shards import (
    Folder,
    encode_table,
    read_table,
    shard_name,
    write_file,
    write_urls,
)

log = logging.getLogger(__name__)

POOL_MASKS = 10_000  # with fewer masks, starting worker processes costs more time than it saves
FILES_TABLE = "sources.parquet"  # the facts about each mask file
NAMED_FAILURES = 5  # broken mask files that messages name; the table holds all


def prepare_masks(settings: MasksSettings, store: Store, run: Map = run_tasks) -> StageRef:
    """Make the mask set for `settings`, unless it exists; `run` says where tasks run.

    Raises ConfigError if no ratio bin of the eval split can be filled.
    """
    top = masks_folder(settings.name)
    files = _read_mask_files(settings, store, top, run) if settings.file_splits else None
    return run_stage(store, _request(settings, files), partial(_build, settings, files, run))


def committed_masks(settings: MasksSettings, store: Store) -> StageRef | None:
    """Return the mask set for `settings` if it exists. Sets of mask files are not looked for.

    Raises PipelineError if its manifest was altered.
    """
    if settings.file_splits:  # the files would have to be read
        return None
    folder = _request(settings, None).folder
    if not store.exists(manifest_key(folder)):
        return None
    return reference(read_head(store, folder), 0.0, skipped=True)


def _request(settings: MasksSettings, files: _Files | None) -> Request:
    return Request(
        "masks",
        settings.name,
        masks_folder(settings.name),
        settings.request_settings(files.polarity if files else None),
        sources={EXTERNAL: files_digest(files.found)} if files else {},
    )


@dataclass(frozen=True)
class _Files:
    """The mask files and the colour of their holes."""

    reading: Reading
    found: Sequence[MaskFile]
    polarity: Polarity
    explanation: str  # how the polarity was found; empty if the settings give it


def _read_mask_files(settings: MasksSettings, store: Store, top: str, run: Map) -> _Files:
    """Read the mask files, and find the colour of their holes."""
    from data_prep.raw.overlap import check_apart
    from data_prep.raw.source import open_source

    assert settings.external is not None
    check_apart(settings.external, store.uri, "masks.external")
    source = open_source(settings.external, "files", "masks.external")
    conversion = Conversion(settings.size, settings.external_dilate)
    reading = Reading(source, conversion, run, settings.workers or cores())
    found = read_files(reading, _known_files(store, top))
    if settings.external_polarity != "auto":
        return _Files(reading, found, settings.external_polarity, "")
    return _Files(reading, found, *find_polarity(found, source.uri))


def _known_files(store: Store, top: str) -> dict[str, dict[str, Any]]:
    """Return the rows of the newest set's table of mask files, by key.

    They only save time, so without a readable table the result is empty.
    """
    keys = {entry.key for entry in store.list(top)}
    made = []
    for key in keys:
        folder, _, file = key.rpartition("/")
        if file == MANIFEST and f"{folder}/{FILES_TABLE}" in keys:
            try:
                made.append((read_head(store, folder).created, folder))
            except PipelineError:
                continue
    if not made:
        return {}
    try:
        table = read_table(store.read(f"{max(made)[1]}/{FILES_TABLE}"), list(COLUMNS))
    except (FileNotFoundError, ValueError):
        return {}
    return {row["key"]: row for row in table.to_pylist()}


def _build(settings: MasksSettings, files: _Files | None, run: Map, work: Work) -> Produced:
    """Choose the masks, make the shards, and return the files and figures of the set."""
    wanted = settings.train + len(BINS) * settings.eval_per_bin
    workers = (settings.workers or cores()) if wanted > POOL_MASKS else 1
    records: list[FileRecord] = []
    summary: dict[str, Any] = {}
    pool: Mapping[str, FilePool] = {}
    if files is not None:
        pool, summary[EXTERNAL] = _file_pools(settings, files)
        rows = [file.row() for file in files.found]
        records.append(write_file(work, FILES_TABLE, encode_table(rows, COLUMNS), content=False))
    if wanted > POOL_MASKS:
        log.info(
            "masks: drawing until each ratio bin has %d evaluation masks", settings.eval_per_bin
        )
    bins, notes = evaluation_masks(settings, pool.get("eval"), run, workers)
    for note in notes:
        log.warning("%s", note)
    totals = {"train": settings.train, "eval": sum(len(masks) for masks in bins.values())}
    records += _make_shards(settings, work, bins, pool, run, workers)
    names = {
        split: [shard_name(split, n) for n in range(math.ceil(count / settings.shard_samples))]
        for split, count in totals.items()
    }
    records += [write_urls(work, split, names[split]) for split in totals]
    summary |= {
        "splits": {s: {"samples": totals[s], "shards": len(names[s])} for s in totals},
        "bins": {name: len(masks) for name, masks in bins.items()},
        "borders": border_counts(bins),
        "unreachable": [name for name in BINS if name not in bins],
        "notes": notes,
    }
    return Produced(records, summary)


def _make_shards(
    settings: MasksSettings,
    work: Work,
    bins: Mapping[str, Sequence[Candidate]],
    pool: Mapping[str, FilePool],
    run: Map,
    workers: int,
) -> list[FileRecord]:
    """Make all shards and return their files.

    Args:
        settings: of the mask set.
        work: the stage's folder.
        bins: the evaluation masks.
        pool: the file masks of each split that draws from files.
        run: where tasks run.
        workers: number of processes.
    """
    make = partial(make_shard, settings, Folder(work.store, work.folder))
    total = settings.train + sum(len(masks) for masks in bins.values())
    records: list[FileRecord] = []
    done = 0
    with (
        Progress("masks", total, "masks") as progress,
        closing(run(make, shards(settings, bins, pool), workers)) as made,
    ):
        for masks, resumed, written in made:
            records += written
            progress.update(done := done + masks, resumed=resumed)
    return records


def _file_pools(
    settings: MasksSettings, files: _Files
) -> tuple[dict[str, FilePool], dict[str, Any]]:
    """Return the file masks of each split that draws from them, and the counts of the files."""
    source = files.reading.source
    masks = load_masks(files.reading, files.found, files.polarity)
    pool = make_pools(masks, settings.file_splits, settings.external_flips, source.uri)
    kinds = Counter(file.kind for file in files.found)
    used = {split: len(own) for split, own in pool.items()}
    outside = len(masks) - sum(used.values())
    _log_files(files, sum(used.values()), outside, kinds)
    return pool, {
        "polarity": files.polarity,
        "files": len(files.found),
        "used": used,
        "outside": outside,
        "blank": kinds["blank"],
        "failed": kinds["failed"],
        "ignored": kinds["ignored"],
    }


def _log_files(files: _Files, used: int, outside: int, kinds: Counter[Kind]) -> None:
    """Log how the polarity was found, and which files are not used.

    Args:
        files: all files.
        used: number of files that are used.
        outside: number of masks outside all ratio bins.
        kinds: number of files of each kind.
    """
    if files.explanation:
        log.info("%s", files.explanation)
    skipped = {
        "outside 1 to 60 % hole": outside,
        "all hole or all known": kinds["blank"],
        "broken": kinds["failed"],
        "not images": kinds["ignored"],
    }
    if any(skipped.values()):
        words = ", ".join(f"{number} {why}" for why, number in skipped.items() if number)
        log.info("masks: %d of %d mask files are used; skipped: %s", used, len(files.found), words)
    for file in [file for file in files.found if file.kind == "failed"][:NAMED_FAILURES]:
        log.warning("masks: %s cannot be used: %s", printable(file.key), printable(file.reason))
