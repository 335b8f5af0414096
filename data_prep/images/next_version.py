"""Plan the next version of a dataset, and count how the source differs from the newest one.

Everything here only reads: the listing, the tables of earlier versions, and the bytes of items with
a new size or fingerprint.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from data_prep.core.digest import sha256_bytes, sha256_json
from data_prep.core.errors import PipelineError
from data_prep.core.manifest import ManifestHead
from data_prep.core.paths import images_folder
from data_prep.core.pool import Map, cores, run_tasks
from data_prep.core.stage import Request
from data_prep.core.storage.store import Store
from data_prep.core.text import count_of, printable
from data_prep.images.failures import what_to_do
from data_prep.images.keys import PHOTO, UNSURE, Hashes, item_kinds, key_hashes, match_keys
from data_prep.images.parent_state import POOL_ITEMS, Hashing, compare_with_parent
from data_prep.images.plan import ParentState, Plan, plan_items
from data_prep.images.splits import assign_splits
from data_prep.images.versions import Version, known_members, newest_version, versions
from data_prep.pictures.formats import EXTENSIONS
from data_prep.raw.layouts import IGNORED, OUTSIDE, lost_splits
from data_prep.raw.listing import ROWS, SPLITS, Listing
from data_prep.raw.lists import MISSING
from data_prep.raw.members import CUT
from data_prep.raw.overlap import check_apart, check_no_root
from data_prep.raw.source import Source, open_source
from data_prep.raw.tars import UNENDED

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from data_prep.images.settings import ImagesSettings


@dataclass(frozen=True)
class Changes:
    """A source compared with the newest version of its dataset that has the same settings.

    Attributes:
        digest: of the request for a new version. It changes whenever the source changes in a way
            that matters, and after a new version is made.
        version: number of the newest version; None if there is none, so that everything is new.
        items: number of listed photos, and of items that may be photos by their names.
        new: number of items that the version does not have.
        changed: number of items with other bytes, another split, or no longer readable.
        removed: number of items of the version, of any kind, that are not listed now.
        unchanged: number of items that need no work.
    """

    digest: str
    version: int | None
    items: int
    new: int
    changed: int
    removed: int
    unchanged: int

    def __bool__(self) -> bool:
        return bool(self.new or self.changed or self.removed)

    def to_json(self) -> dict[str, Any]:
        """Return the values as JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class NextVersion:
    """The plan of the next version, with everything that is needed to build it.

    Attributes:
        state: facts about `parent`; both are None if there is no parent.
        newest: head of the newest version of the dataset, also one with other settings; or None.
        number: of the version, from 1.
        workers: number of worker processes; 0 for all of a cluster.
    """

    source: Source
    plan: Plan
    parent: Version | None
    state: ParentState | None
    newest: ManifestHead | None
    request: Request
    number: int
    workers: int


def look(settings: ImagesSettings, store: Store, run: Map = run_tasks) -> Changes:
    """Compare `settings.source` with the newest version, and prepare nothing.

    A file with a new date and the same bytes is not a change: its bytes are read and compared.
    Raises PipelineError if the source cannot be listed, or a version could not be prepared from it.
    """
    return count_changes(plan_next_version(settings, store, run))


def count_changes(following: NextVersion) -> Changes:
    """Return the counts of a plan, and its digest."""
    import numpy as np

    plan, parent, state = following.plan, following.parent, following.state
    wanted = plan.kind >= UNSURE
    marks: list[Any] = []
    if state is not None:
        # The request does not distinguish two contents of a file with the same size.
        rows = np.flatnonzero(wanted & (plan.before < 0) & (state.row >= 0))
        marks = [item[:3] for item in plan.listing.items(rows)]
    return Changes(
        digest=sha256_json({"request": following.request.digest, "changed": marks}),
        version=None if parent is None else parent.number,
        items=int(wanted.sum()),
        new=plan.added,
        changed=plan.changed,
        removed=plan.removed,
        unchanged=int((wanted & (plan.before >= 0)).sum()),
    )


def plan_next_version(
    settings: ImagesSettings,
    store: Store,
    run: Map = run_tasks,
    *,
    retry_failed: bool = False,
    repack: bool = False,
) -> NextVersion:
    """List the source and plan its next version.

    Args:
        settings: of the dataset.
        store: the root.
        run: where tasks run.
        retry_failed: prepare items again that failed in the parent version.
        repack: plan a version without a parent.
    """
    check_apart(settings.source, store.uri)
    source = open_source(settings.source, settings.layout)
    requested = settings.request_settings()
    earlier = versions(store, settings.name)
    same = [manifest for manifest in earlier if manifest.settings == requested]
    parent = newest_version(store, same) if same and not repack else None
    if parent is not None:
        parent.check_shards()
    listing = source.list(known_members(parent))
    check_no_root(listing, source.uri)
    _check_archives(listing, source)
    workers = _workers(settings, len(listing), run)
    hashing = Hashing(source, run, workers)
    plan, state = _plan(settings, listing, parent, hashing, retry_failed=retry_failed)
    sources = _request_sources(listing, same, plan, state if retry_failed else None)
    request = Request(
        "images",
        settings.name,
        images_folder(settings.name),
        requested,
        inputs={"parent": parent.reference} if parent is not None else {},
        sources=sources,
    )
    number = 1 + max((manifest.summary["version"] for manifest in earlier), default=0)
    newest = earlier[-1] if earlier else None
    return NextVersion(source, plan, parent, state, newest, request, number, workers)


def _plan(
    settings: ImagesSettings,
    listing: Listing,
    parent: Version | None,
    hashing: Hashing,
    *,
    retry_failed: bool,
) -> tuple[Plan, ParentState | None]:
    """Plan the version, and compare the listing with the parent if there is one."""
    import numpy as np

    hashes = key_hashes(listing.table["key"])
    kind = item_kinds(listing, hashing.source.uri)
    row = before = None
    if parent is not None:
        row = match_keys(hashes, listing.table["key"], parent.hashes(), parent.table["key"])
        before = np.where(row >= 0, parent.splits()[row], -1).astype(np.int8)
    _check_photos_outside_splits(settings, listing, kind)
    _check_no_lost_splits(settings, listing, kind)
    split, notes = _splits(settings, listing, hashes, kind, before)
    state = None
    if parent is not None and row is not None:
        state = compare_with_parent(
            settings, listing, row, kind, split, parent, hashing, retry_failed=retry_failed
        )
    plan = plan_items(
        listing,
        hashes,
        kind,
        split,
        notes,
        shard_items=settings.shard_items,
        by_size=settings.mode == "keep",
        parent=state,
    )
    return plan, state


def _request_sources(
    listing: Listing, same: list[ManifestHead], plan: Plan, retried: ParentState | None
) -> dict[str, str]:
    """Return the digests that make the request of this version different from all others.

    Args:
        listing: the source's items.
        same: manifests of the versions with the same settings, oldest first.
        plan: of the version.
        retried: facts about the parent, if failed items are prepared again.
    """
    sources = {"listing": listing_digest(listing)}
    if same:
        # A listing does not show the content of files, so an earlier version may have the same
        # one. The newest version's request makes the difference.
        sources["after"] = same[-1].request_digest
    if retried is not None:
        sources["retried"] = sha256_bytes((retried.row[plan.before < 0]).tobytes())
    return sources


def _workers(settings: ImagesSettings, items: int, run: Map) -> int:
    """Return the number of workers to pass to `run`; 0 means all of a cluster."""
    if run is not run_tasks:
        return settings.workers
    return (settings.workers or cores()) if items > POOL_ITEMS else 1


def listing_digest(listing: Listing) -> str:
    """Return the digest of the items to prepare: keys, sizes, given splits and problems.

    Fingerprints are not included: a new date of a file or a moved folder requests nothing new.
    """
    import hashlib

    import numpy as np
    import pyarrow as pa

    sha256 = hashlib.sha256()
    split = "split" in listing.table.column_names
    for start in range(0, len(listing), ROWS):
        part = listing.table.slice(start, ROWS).combine_chunks()
        keys = part["key"].combine_chunks()
        if isinstance(keys, pa.ChunkedArray):
            keys = keys.chunk(0)
        text = "\0".join(keys.to_pylist()).encode()
        sha256.update(len(text).to_bytes(8, "little") + text)
        sha256.update(part["size"].to_numpy().astype("<i8").tobytes())
        if split:
            sha256.update(part["split"].to_numpy().astype(np.int8).tobytes())
    for key in sorted(listing.problems):
        sha256.update(f"{key}\0{listing.problems[key]}\0".encode())
    return sha256.hexdigest()


def _splits(
    settings: ImagesSettings,
    listing: Listing,
    hashes: Hashes,
    kind: NDArray[np.int8],
    before: NDArray[np.int8] | None,
) -> tuple[NDArray[np.int8], list[str]]:
    """Assign the splits, and return sentences that state their sizes and special cases."""
    import numpy as np

    given = np.full(len(listing), -1, np.int8)
    if "split" in listing.table.column_names:
        given = listing.table["split"].to_numpy().astype(np.int8)
    given[kind < UNSURE] = -1
    wanted = kind == PHOTO
    if wanted.sum() < len(SPLITS):  # most names may not show that they are photos
        wanted = kind >= UNSURE
    if not wanted.any():
        reasons = listing.problems.items()
        failed = sorted((k, why) for k, why in reasons if not why.startswith(IGNORED))
        explained = [f"{key}: {why}" for key, why in failed if why.startswith(f"{MISSING}. ")]
        if explained:  # a list whose paths all name no file
            raise PipelineError(
                f"none of the {count_of(len(failed), 'path')} in {settings.source} names a file;"
                f" {printable(explained[0])}."
            )
        if failed:
            first = "; ".join(printable(f"{key}: {why}") for key, why in failed[:2])
            raise PipelineError(
                f"none of the {len(failed)} image files of {settings.source} can be used ({first})."
                f" To use them, {what_to_do(settings, (why for _, why in failed))}."
            )
        known = ", ".join(sorted(EXTENSIONS))
        raise PipelineError(f"{settings.source} holds no image file: give photos of type {known}.")
    split, notes = assign_splits(given, wanted, hashes.draw, settings.val, settings.test, before)
    counts = np.bincount(split[kind >= UNSURE], minlength=len(SPLITS)).tolist()
    how = "given by the source" if (given >= 0).any() else "drawn by hash of the key"
    sizes = ", ".join(f"{name} {count}" for name, count in zip(SPLITS, counts, strict=True))
    return split, [f"splits {how}: {sizes}", *notes]


def _check_archives(listing: Listing, source: Source) -> None:
    """Refuse an archive or table that is cut off: nobody could report its missing members.

    Raises PipelineError.
    """
    for key, problem in sorted(listing.problems.items()):
        only_item = len(listing) == 1 and "cut off" in problem
        if problem in (CUT, UNENDED) or only_item:
            raise PipelineError(
                f"{source.uri}: {key}: {problem}, so its missing files are unknown. Give the"
                " complete archive, or remove it from the source."
            )


def _check_photos_outside_splits(
    settings: ImagesSettings, listing: Listing, kind: NDArray[np.int8]
) -> None:
    """Refuse a source with many photos next to its split folders, which would be ignored.

    Raises PipelineError.
    """
    endings = tuple(f".{extension}" for extension in EXTENSIONS)
    outside = [
        key
        for key, problem in listing.problems.items()
        if problem == OUTSIDE and key.lower().endswith(endings)
    ]
    if len(outside) > max(1.0, settings.max_failure_ratio * int((kind >= UNSURE).sum())):
        raise PipelineError(
            f"{len(outside)} photos of {settings.source} are outside its folders train, val and"
            f" test (first {min(outside)}). Move them into these folders, or set"
            " images.layout=files to draw all splits by hash."
        )


def _check_no_lost_splits(
    settings: ImagesSettings, listing: Listing, kind: NDArray[np.int8]
) -> None:
    """Refuse a source with folders that look like splits, if its splits would be drawn by hash.

    Its test photos would be trained on. Raises PipelineError.
    """
    if settings.layout == "files" or "split" in listing.table.column_names:
        return
    photos = kind == PHOTO if (kind == PHOTO).any() else kind == UNSURE
    found = lost_splits(listing.table["key"].filter(photos).to_pylist())
    if found:
        names = ", ".join([*found[:3], "…"] if len(found) > 3 else found)
        raise PipelineError(
            f"{settings.source} has folders that look like splits ({names}), but it is not clear"
            " which photos to hold out. Call the folders train, val and test, or give a list"
            " with a column split, or set images.layout=files to draw all splits by hash."
        )
