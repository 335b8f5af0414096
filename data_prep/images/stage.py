"""The images stage: turn the photos of a source into image shards.

List the source. Plan by the keys only. Read and prepare every photo once. Find duplicates by their
hashes. Commit. Photos that an earlier version of the dataset already holds are not read again.
"""

from __future__ import annotations

import logging

from data_prep.core.lease import Lease
from data_prep.core.manifest import StageRef
from data_prep.core.paths import images_folder, lease_key, manifest_key
from data_prep.core.pool import Map, run_tasks
from data_prep.core.stage import Produced, Work, run_stage
from data_prep.core.storage.store import Store
from data_prep.images.build import build, delete_shard_records
from data_prep.images.next_version import NextVersion, plan_next_version
from data_prep.images.settings import ImagesSettings
from data_prep.images.versions import committed_folders

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

    def plan() -> NextVersion:
        return plan_next_version(settings, store, run, retry_failed=retry_failed, repack=repack)

    before = committed_folders(store, settings.name)
    following = plan()
    if (done := _finished(store, following)) is not None:  # needs no right to write
        return _log_unchanged(done, following, retry_failed)
    # One build of a dataset at a time: the number and the parent of a version depend on the others.
    with Lease(store, lease_key(images_folder(settings.name))) as lease:
        if lease.waited or committed_folders(store, settings.name) != before:
            following = plan()
            if (done := _finished(store, following)) is not None:
                return _log_unchanged(done, following, retry_failed)
        for note in following.plan.notes:
            log.info("images: %s", note)
        reference = run_stage(
            store, following.request, lambda work: build(work, settings, following, run)
        )
        if not reference.skipped:
            delete_shard_records(store, reference.folder)
    return reference


def _finished(store: Store, following: NextVersion) -> StageRef | None:
    """Return the version that is already what `following` plans, or None."""
    if following.parent is not None and following.plan.same_as_parent:
        return following.parent.reference
    if store.exists(manifest_key(following.request.folder)):
        return run_stage(store, following.request, _never)
    return None


def _never(work: Work) -> Produced:
    raise AssertionError(f"{work.folder} is committed")


def _log_unchanged(reference: StageRef, following: NextVersion, retry_failed: bool) -> StageRef:
    if retry_failed and following.plan.same_as_parent:
        log.info("images: no failed item to try again in %s.", reference.folder)
    return reference
