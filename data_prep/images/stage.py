"""The stage that turns raw photographs, wherever they lie, into image shards.

List the source, plan by the keys alone, read and prepare every picture once, sort out duplicates by
their hashes, commit. What an earlier version of the dataset holds already is not read again.
"""

from __future__ import annotations

from data_prep.core.manifest import StageRef
from data_prep.core.pool import Map, run_tasks
from data_prep.core.progress import say
from data_prep.core.stage import run_stage
from data_prep.core.storage.store import Store
from data_prep.images.build import build, forget_records
from data_prep.images.next_version import planned
from data_prep.images.settings import ImagesSettings


def prepare_images(
    settings: ImagesSettings,
    store: Store,
    run: Map = run_tasks,
    *,
    retry_failed: bool = False,
    repack: bool = False,
) -> StageRef:
    """Shards of the photographs in `settings.source`, made now unless they are there.

    Where a version of the dataset was made with the same settings, only what is new, changed or
    gone since is worked on; with `retry_failed` also what failed then, and with `repack` everything
    is, without regard to it. `run` says where the work is done; the bytes are the same.

    Raises PipelineError when too few photographs can be used, or too many files cannot.
    """
    work = planned(settings, store, run, retry_failed=retry_failed, repack=repack)
    plan, parent = work.plan, work.parent
    if parent is not None and plan.same_as_parent:
        if retry_failed:
            say(f"images: nothing to try again in {parent.folder}.")
        return parent.reference
    for note in plan.notes:
        say(f"images: {note}")
    ref = run_stage(
        store,
        work.request,
        lambda begun: build(
            begun, settings, plan, work.source, parent, work.number, run, work.workers
        ),
    )
    if not ref.skipped:
        forget_records(store, ref.folder)
    return ref
