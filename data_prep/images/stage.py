"""The images stage: turn the photos of a source into image shards.

List the source. Plan by the keys only. Read and prepare every photo once. Find duplicates by their
hashes. Commit. Photos that an earlier version of the dataset already holds are not read again.
"""

from __future__ import annotations

import logging

from data_prep.core.errors import ConfigError
from data_prep.core.lease import Lease
from data_prep.core.manifest import StageRef
from data_prep.core.paths import images_folder, lease_key, manifest_key
from data_prep.core.pool import Map, run_tasks
from data_prep.core.record import parse_json
from data_prep.core.stage import Produced, Work, run_stage
from data_prep.core.storage.store import Store
from data_prep.core.storage.uri import normal_uri
from data_prep.core.text import count_of
from data_prep.images.build import CONFIG, build, delete_shard_records
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
        _log_difference(settings, store, following)
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


def _log_difference(settings: ImagesSettings, store: Store, following: NextVersion) -> None:
    """Log how the source differs from the last version, and warn if it is another source."""
    plan, parent, newest = following.plan, following.parent, following.newest
    if parent is not None:
        log.info(
            "images: compared with version %d: %s added, %d removed and %d changed",
            parent.number,
            count_of(plan.added, "item"),
            plan.removed,
            plan.changed,
        )
    before = None if newest is None else _source_of(store, newest.folder)
    if newest is None or before is None or _same_place(before, settings.source):
        return
    log.warning(
        "images: version %d of %s was made from %s, and this one will be made from %s: if these are"
        " other photos, stop, and give them a name of their own with --name (images.name).",
        newest.summary["version"],
        settings.name,
        before,
        settings.source,
    )


def _source_of(store: Store, folder: str) -> str | None:
    """Return the address that a version was made from, or None if it is not known."""
    try:
        source = parse_json(store.read(f"{folder}/{CONFIG}"))["source"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return source if isinstance(source, str) else None


def _same_place(one: str, other: str) -> bool:
    """Return whether two addresses of sources are written for the same place."""
    try:
        return one == other or normal_uri(one) == normal_uri(other)
    except ConfigError:  # an earlier version accepted it
        return False


def _never(work: Work) -> Produced:
    raise AssertionError(f"{work.folder} is committed")


def _log_unchanged(reference: StageRef, following: NextVersion, retry_failed: bool) -> StageRef:
    if retry_failed and following.plan.same_as_parent:
        log.info("images: no failed item to try again in %s.", reference.folder)
    return reference
