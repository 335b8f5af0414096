"""The images stage: turn the photos of a source into image shards.

List the source. Plan by the keys only. Read and prepare every photo once. Find duplicates by their
hashes. Commit. Photos that an earlier version of the dataset already holds are not read again.
"""

from __future__ import annotations

import logging

from data_prep.core.manifest import StageRef
from data_prep.core.pool import Map, run_tasks
from data_prep.core.stage import run_stage
from data_prep.core.storage.store import Store
from data_prep.images.build import build, delete_shard_records
from data_prep.images.next_version import plan_next_version
from data_prep.images.settings import ImagesSettings

log = logging.getLogger(__name__)


def prepare_images(
    settings: ImagesSettings,
    store: Store,
    run: Map = run_tasks,
    *,
    retry_failed: bool = False,
    repack: bool = False,
) -> StageRef:
    """Make the shards of the photos in `settings.source`, unless they exist.

    If a version with the same settings exists, only new, changed and removed items cause work.

    Args:
        settings: of the dataset.
        store: the root.
        run: where tasks run; the bytes are the same everywhere.
        retry_failed: also prepare again the items that failed then.
        repack: prepare everything again, as if there were no earlier version.

    Raises:
        PipelineError: too few photos can be used, or too many files cannot.
    """
    following = plan_next_version(settings, store, run, retry_failed=retry_failed, repack=repack)
    plan, parent = following.plan, following.parent
    if parent is not None and plan.same_as_parent:
        if retry_failed:
            log.info("images: no failed item to try again in %s.", parent.folder)
        return parent.reference
    for note in plan.notes:
        log.info("images: %s", note)
    reference = run_stage(
        store, following.request, lambda work: build(work, settings, following, run)
    )
    if not reference.skipped:
        delete_shard_records(store, reference.folder)
    return reference
