"""The mask stage: hole masks as verified shards, one split to train on and one to evaluate on.

A stored mask is a 1-bit PNG with 255 = hole. Everywhere else in the code a mask is `valid`, 1 =
known pixel and 0 = hole; `valid_from_png` is the one place where the meaning is turned round.

Training and evaluation masks come from different random streams.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import FileRecord, StageRef, read_manifest
from data_prep.core.paths import MANIFEST, masks_folder
from data_prep.core.pool import Map, cores, run_tasks
from data_prep.core.progress import Progress, say
from data_prep.core.stage import Produced, Request, Work, run_stage
from data_prep.core.storage.store import Store
from data_prep.masks.external import (
    COLUMNS,
    EXTERNAL,
    FilePool,
    MaskFile,
    Source,
    files_digest,
    find_polarity,
    made_masks,
    pools,
    read_files,
)
from data_prep.masks.mask_file import Making, Polarity
from data_prep.masks.plan import BINS, border_counts
from data_prep.masks.shard_task import evaluation_masks, make_shard, shards
from data_prep.shards.shards import (
    Folder,
    decode_table,
    encode_table,
    shard_name,
    write_file,
    write_urls,
)

if TYPE_CHECKING:
    pass
from data_prep.masks.settings import MasksSettings

POOL_MASKS = 10_000  # fewer are drawn here sooner than worker processes start
FILES_TABLE = "sources.parquet"  # the mask files: what each became, and what spares reading it
FAILURES_SAID = 5  # broken mask files that are named; all are in the table


def prepare_masks(settings: MasksSettings, store: Store, run: Map = run_tasks) -> StageRef:
    """The committed mask set for `settings`, made unless it is there; `run` does the work.

    Raises ConfigError if no ratio bin of the evaluation split can be filled.
    """
    top = masks_folder(settings.name)
    files = _mask_files(settings, store, top, run) if settings.file_splits else None
    request = Request(
        "masks",
        settings.name,
        top,
        settings.request_settings(files.polarity if files else None),
        sources={EXTERNAL: files_digest(files.found)} if files else {},
    )
    return run_stage(store, request, partial(_build, settings, files, run))


@dataclass(frozen=True)
class _Files:
    """The mask files, and what is the hole in them."""

    source: Source
    found: Sequence[MaskFile]
    polarity: Polarity
    sentence: str  # how that is known; empty where the settings say it


def _mask_files(settings: MasksSettings, store: Store, top: str, run: Map) -> _Files:
    from data_prep.raw.source import open_source

    assert settings.external is not None
    source = open_source(settings.external, "files")
    known = _known_files(store, top)
    found = read_files(source, _making(settings), known, run, settings.workers or cores())
    if settings.external_polarity != "auto":
        return _Files(source, found, settings.external_polarity, "")
    return _Files(source, found, *find_polarity(found, source.uri))


def _making(settings: MasksSettings) -> Making:
    return Making(settings.size, settings.external_dilate)


def _known_files(store: Store, top: str) -> dict[str, dict[str, Any]]:
    """Rows of the newest committed set's table of mask files, by key; a cache, so none will do."""
    keys = {entry.key for entry in store.list(top)}
    made = []
    for key in keys:
        folder, _, file = key.rpartition("/")
        if file == MANIFEST and f"{folder}/{FILES_TABLE}" in keys:
            try:
                made.append((read_manifest(store, folder).created, folder))
            except PipelineError:
                continue
    if not made:
        return {}
    try:
        rows = decode_table(store.read(f"{max(made)[1]}/{FILES_TABLE}"))
    except (FileNotFoundError, ValueError):
        return {}
    return {row["key"]: row for row in rows}


def _build(settings: MasksSettings, files: _Files | None, run: Map, work: Work) -> Produced:
    wanted = settings.train + len(BINS) * settings.eval_per_bin
    workers = (settings.workers or cores()) if wanted > POOL_MASKS else 1
    records: list[FileRecord] = []
    summary: dict[str, Any] = {}
    pool: Mapping[str, FilePool] = {}
    if files is not None:
        pool, summary[EXTERNAL] = _file_pools(settings, files, run)
        rows = [file.row() for file in files.found]
        records.append(write_file(work, FILES_TABLE, encode_table(rows, COLUMNS), content=False))
    if wanted > POOL_MASKS:
        say(f"masks: drawing until each ratio bin has {settings.eval_per_bin} evaluation masks")
    bins, notes = evaluation_masks(settings, pool.get("eval"), run, workers)
    for note in notes:
        say(note)
    totals = {"train": settings.train, "eval": sum(len(masks) for masks in bins.values())}
    make = partial(make_shard, settings, Folder(work.store, work.folder))
    done, total = 0, sum(totals.values())
    with (
        Progress("masks", total, "masks") as progress,
        closing(run(make, shards(settings, bins, pool), workers)) as made,
    ):
        for masks, written in made:
            records += written
            progress.update(done := done + masks)
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


def _file_pools(
    settings: MasksSettings, files: _Files, run: Map
) -> tuple[dict[str, FilePool], dict[str, Any]]:
    """The files' masks for each split that draws from them, and how many files became what."""
    workers = settings.workers or cores()
    made = made_masks(files.source, _making(settings), files.found, files.polarity, run, workers)
    pool = pools(made, settings.file_splits, settings.external_flips, files.source.uri)
    kinds = Counter(file.kind for file in files.found)
    used = {split: len(own) for split, own in pool.items()}
    outside = len(made) - sum(used.values())
    if files.sentence:
        say(files.sentence)
    skipped = {
        "outside 1 to 60 % hole": outside,
        "all hole or all known": kinds["blank"],
        "broken": kinds["failed"],
        "no picture": kinds["ignored"],
    }
    if any(skipped.values()):
        words = ", ".join(f"{number} {why}" for why, number in skipped.items() if number)
        used_files = f"{sum(used.values())} of {len(files.found)} mask files are used"
        say(f"masks: {used_files}; skipped: {words}")
    for file in [file for file in files.found if file.kind == "failed"][:FAILURES_SAID]:
        say(f"masks: {file.key} cannot be used: {file.reason}")
    return pool, {
        "polarity": files.polarity,
        "files": len(files.found),
        "used": used,
        "outside": outside,
        "blank": kinds["blank"],
        "failed": kinds["failed"],
        "ignored": kinds["ignored"],
    }
