"""Estimate the size of the next version of a dataset from its listing and a few of its photos.

Nothing is written. Splits and shards are planned exactly as `prepare_images` plans them. The number
and size of samples come from photos that are really prepared, spread evenly over each split. If
they are all photos of a split, the result is what the stage makes, unless photos are duplicates.
"""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from data_prep.core.apart import DECODE_S, guarded
from data_prep.core.manifest import StageRef
from data_prep.core.storage.store import Store
from data_prep.images.keys import UNSURE
from data_prep.images.next_version import NextVersion, plan_next_version
from data_prep.images.plan import PlannedShard, shard_split
from data_prep.images.shard_task import Preparer, ShardTask, prepare_items
from data_prep.pictures.prepare import prepare
from data_prep.raw.listing import SPLITS
from data_prep.shards.shards import Folder
from data_prep.shards.split_size import SplitSize, sample_bytes, tar_bytes

if TYPE_CHECKING:
    from data_prep.images.settings import ImagesSettings

LOOKED_AT = 48  # most photos of a split that are prepared; a second or two in all


@dataclass(frozen=True)
class Survey:
    """The size of a version that is not built yet.

    Attributes:
        splits: size of each split.
        photos: number of photos to read, without those that an earlier version holds.
        photo_bytes: their bytes; 0 if the listing does not have them.
        looked_at: number of photos that were prepared for the estimate.
        failed: how many of these cannot be used.
        seconds: time in which one photo is read and prepared here, in seconds; 0 if unknown.
        committed: the version, if it is built: nothing is new.
    """

    splits: dict[str, SplitSize]
    photos: int
    photo_bytes: int
    looked_at: int
    failed: int
    seconds: float
    committed: StageRef | None


@dataclass
class _Looked:
    """The findings about the photos of one split."""

    photos: int = 0
    failed: int = 0
    samples: int = 0
    bytes: int = 0
    seconds: list[float] = field(default_factory=list)  # of each photo but the first


def survey(settings: ImagesSettings, store: Store, most: int = LOOKED_AT) -> Survey:
    """Estimate the size of the next version.

    Args:
        settings: of the dataset.
        store: the root; it is only read.
        most: most photos of each split to prepare, 1 or more.

    Raises:
        PipelineError: the source cannot be listed, or no version could be made from it.
    """
    following = plan_next_version(settings, store)
    plan, parent = following.plan, following.parent
    # In a process of its own, because a damaged photo can end it.
    with guarded(prepare, DECODE_S, apart=True) as preparing:
        looked = {
            split: _look(_task(settings, store, following, split, most), preparing)
            for split in SPLITS
        }
    sizes = {split: _size(following, split, looked[split]) for split in SPLITS}
    fresh = [row for shard in plan.shards for row in shard.rows[plan.before[shard.rows] < 0]]
    listed = plan.listing.table["size"].to_numpy()[fresh] if fresh else ()
    photos = sum(each.photos for each in looked.values())
    times = [seconds for each in looked.values() for seconds in each.seconds]
    return Survey(
        sizes,
        len(fresh),
        int(sum(max(0, int(size)) for size in listed)),
        photos,
        sum(each.failed for each in looked.values()),
        sum(times) / len(times) if times else 0.0,
        parent.reference if parent is not None and plan.same_as_parent else None,
    )


def _planned(following: NextVersion, split: str) -> list[PlannedShard]:
    return [shard for shard in following.plan.shards if shard.split == split]


def _task(
    settings: ImagesSettings, store: Store, following: NextVersion, split: str, most: int
) -> ShardTask:
    """Return a task with photos of a split, spread evenly over its planned shards."""
    import numpy as np

    plan = following.plan
    rows = np.concatenate(
        [np.zeros(0, np.int64), *(shard.rows for shard in _planned(following, split))]
    )
    if len(rows) > most:
        rows = rows[np.linspace(0, len(rows) - 1, most).astype(np.int64)]
    unsure = frozenset(np.flatnonzero(plan.kind[rows] == UNSURE).tolist())
    return ShardTask(
        Folder(store, ""),
        "",
        split,
        following.source,
        list(plan.listing.items(rows)),
        settings.cutting,
        settings.max_bytes,
        unsure,
    )


def _look(task: ShardTask, preparing: Preparer) -> _Looked:
    """Prepare the photos of a task, and count samples, bytes and times."""
    found, before = _Looked(), 0.0
    if not task.items:
        return found
    with (
        task.source.reader() as reader,
        closing(prepare_items(task, reader, preparing, [])) as made,
    ):
        for _, samples in made:
            now = time.perf_counter()
            if found.photos:  # the first one waits for the start of the process
                found.seconds.append(now - before)
            before = now
            found.photos += 1
            found.failed += not samples
            found.samples += len(samples)
            found.bytes += sum(sample_bytes(files) for _, files, _ in samples)
    return found


def _size(following: NextVersion, split: str, looked: _Looked) -> SplitSize:
    """Return the size of a split: its planned shards, and those that stay from the parent."""
    planned = _planned(following, split)
    photos = sum(len(shard.rows) for shard in planned)
    each = photos / looked.photos if looked.photos else 0.0
    samples, size = round(each * looked.samples), tar_bytes(each * looked.bytes, len(planned))
    shards = len(planned)
    if following.parent is not None:
        kept = set(following.plan.inherited)
        for name, files in following.parent.shards().items():
            if name in kept and shard_split(name) == split:
                (tar,) = (file for file in files if file.path.endswith(".tar"))
                shards += 1
                size += tar.size
                samples += tar.samples or 0
    return SplitSize(samples, shards, size)
