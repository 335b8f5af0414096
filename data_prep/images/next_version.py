"""What a source holds beside what its newest version does: the plan of the next, and its counts.

Everything here reads: the listing, the earlier versions' tables, and the bytes of items whose size
or fingerprint is another one. Nothing is written.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from data_prep.core.digest import sha256_bytes, sha256_json
from data_prep.core.errors import PipelineError
from data_prep.core.paths import images_folder
from data_prep.core.pool import Map, cores, run_tasks
from data_prep.core.progress import Progress
from data_prep.core.stage import Request
from data_prep.core.storage.store import Store
from data_prep.images.plan import (
    PICTURE,
    UNSURE,
    Hashes,
    Past,
    Plan,
    assign_splits,
    item_kinds,
    key_hashes,
    match_keys,
    plan_items,
)
from data_prep.images.resolution import resolve
from data_prep.images.shard_task import DUPLICATE, FAILED, SAMPLE, hash_items
from data_prep.images.versions import OUTCOMES, Version, known_members, load_version, versions
from data_prep.pictures.formats import EXTENSIONS
from data_prep.raw.layouts import OUTSIDE
from data_prep.raw.listing import ROWS, SPLITS, Listing
from data_prep.raw.source import Source, open_source
from data_prep.raw.tars import CUT, UNENDED

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from data_prep.images.settings import ImagesSettings

POOL_ITEMS = 512  # below, starting worker processes costs more than it gains
HASHED_AT_ONCE = 256  # items in one task that only hashes


@dataclass(frozen=True)
class Changes:
    """A source beside the newest version of its dataset with the same settings.

    Attributes:
        digest: of what a new version would be asked for: another one whenever the source changes
            in a way that counts, and after a new version.
        version: the version compared with; None: there is none, so everything is new.
        items: listed pictures, and what may be one by its name.
        new, changed, removed, unchanged: counts of items; `removed` has all that was listed.
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
        return asdict(self)


@dataclass(frozen=True)
class Planned:
    """The plan of the next version: what it is made of and asked for as."""

    source: Source
    plan: Plan
    parent: Version | None
    past: Past | None
    request: Request
    number: int  # of the version
    workers: int


def look(settings: ImagesSettings, store: Store, run: Map = run_tasks) -> Changes:
    """What has changed in `settings.source` since the newest version. Prepares nothing.

    A file that was only touched is no change; its bytes are read to know it. Raises PipelineError
    where the source cannot be listed or could not be prepared.
    """
    return changes(planned(settings, store, run))


def changes(work: Planned) -> Changes:
    """The counts of a plan, and its digest."""
    import numpy as np

    plan, parent, past = work.plan, work.parent, work.past
    wanted = plan.kind >= UNSURE
    marks: list[Any] = []
    if past is not None:
        # The request does not tell two states of a file of the same size apart.
        rows = np.flatnonzero(wanted & (plan.before < 0) & (past.row >= 0))
        marks = [item[:3] for item in plan.listing.items(rows)]
    return Changes(
        digest=sha256_json({"request": work.request.digest, "changed": marks}),
        version=None if parent is None else parent.number,
        items=int(wanted.sum()),
        new=plan.added,
        changed=plan.changed,
        removed=plan.removed,
        unchanged=int((wanted & (plan.before >= 0)).sum()),
    )


def planned(
    settings: ImagesSettings,
    store: Store,
    run: Map = run_tasks,
    *,
    retry_failed: bool = False,
    repack: bool = False,
) -> Planned:
    """List the source and plan its next version; the options are those of `prepare_images`."""
    import numpy as np

    source = open_source(settings.source, settings.layout)
    requested = settings.request_settings()
    earlier = versions(store, settings.name)
    same = [manifest for manifest in earlier if manifest.settings == requested]
    parent = load_version(store, same[-1]) if same and not repack else None
    if parent is not None:
        parent.check_shards()
    listing = source.list(known_members(parent))
    _refuse_broken_archives(listing, source)
    hashes = key_hashes(listing.table["key"])
    kind = item_kinds(listing, source.uri)
    row = before = None
    if parent is not None:
        row = match_keys(hashes, listing.table["key"], parent.hashes(), parent.table["key"])
        before = np.where(row >= 0, parent.splits()[row], -1).astype(np.int8)
    _refuse_left_out_pictures(settings, listing, kind)
    split, notes = _splits(settings, listing, hashes, kind, before)
    workers = _workers(settings, len(listing), run)
    past = None
    if parent is not None and row is not None:
        past = _compare(
            settings, listing, row, kind, split, parent, source, run, workers, retry_failed
        )
    plan = plan_items(
        listing,
        hashes,
        kind,
        split,
        notes,
        shard_items=settings.shard_items,
        by_size=settings.mode == "keep",
        past=past,
    )
    sources = {"listing": listing_digest(listing)}
    if same:
        # A listing says nothing of what is in a file. So that no earlier version that was asked for
        # with the same one is taken for this, each is asked for as what comes after the newest.
        sources["after"] = same[-1].request_digest
    if retry_failed and past is not None:
        sources["retried"] = sha256_bytes((past.row[plan.before < 0]).tobytes())
    request = Request(
        "images",
        settings.name,
        images_folder(settings.name),
        requested,
        inputs={"parent": parent.reference} if parent is not None else {},
        sources=sources,
    )
    number = 1 + max((manifest.summary["version"] for manifest in earlier), default=0)
    return Planned(source, plan, parent, past, request, number, workers)


def _workers(settings: ImagesSettings, items: int, run: Map) -> int:
    """What to pass as the number of workers; 0 is all that a cluster has."""
    if run is not run_tasks:
        return settings.workers
    return (settings.workers or cores()) if items > POOL_ITEMS else 1


def listing_digest(listing: Listing) -> str:
    """Digest of what was asked to be prepared: keys, sizes, and what the source says of splits.

    Not of fingerprints: touching a file or moving the folder asks for nothing new.
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


def _compare(
    settings: ImagesSettings,
    listing: Listing,
    row: NDArray[np.int64],
    kind: NDArray[np.int8],
    split: NDArray[np.int8],
    parent: Version,
    source: Source,
    run: Map,
    workers: int,
    retry_failed: bool,
) -> Past:
    """What the parent version says of the listing's items, and what of it still holds.

    `row` is each item's in the parent. An item with another fingerprint is read and hashed: with
    the same bytes it is the same. One that goes into another split holds no longer.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    old, old_split = parent.table, parent.splits()
    names = parent.names()
    outcome = parent.outcomes()
    found = np.flatnonzero((row >= 0) & (kind >= UNSURE) & (old_split[row] == split))
    at = row[found]
    marks = [listing.table[c].to_numpy()[found] for c in ("fingerprint", "size")]
    before = [old[c].to_numpy()[at] for c in ("fingerprint", "size")]
    same = (marks[0] == before[0]) & (marks[1] == before[1]) & (marks[0] != 0)
    sha256, hashed = parent.sha256()
    touched = np.flatnonzero(~same & hashed[at])
    if len(touched):
        now = _hash(settings, listing, found[touched], source, run, workers)
        known = [sha256[r].tobytes().hex() for r in at[touched]]
        same[touched] = [a == b for a, b in zip(now, known, strict=True)]
    holds = np.zeros(len(listing), np.bool_)
    holds[found] = same
    if retry_failed:
        holds[found] &= outcome[at] != OUTCOMES.index(FAILED)
    stored = pc.index_in(old["shard"], pa.array(names, pa.string()))
    past = Past(row, holds, stored.fill_null(-1).to_numpy().astype(np.int32), old_split, names)
    _take_back(settings, past, parent, outcome, sha256)
    return past


def _take_back(
    settings: ImagesSettings,
    past: Past,
    parent: Version,
    outcome: NDArray[np.int8],
    sha256: NDArray[np.uint8],
) -> None:
    """A duplicate whose other copy is gone or has changed holds no longer: it is wanted now."""
    import numpy as np

    rows = past.row[past.holds]
    usable = np.zeros(len(outcome), np.bool_)
    usable[rows] = np.isin(outcome[rows], [OUTCOMES.index(o) for o in (SAMPLE, DUPLICATE)])
    phash = parent.table["phash"].to_numpy()
    still = resolve(sha256, phash, usable, past.split, settings.dedupe, settings.near_duplicates)
    back = usable & (outcome == OUTCOMES.index(DUPLICATE))
    back[still.rows] = False
    past.holds[past.holds] = ~back[rows]


def _hash(
    settings: ImagesSettings,
    listing: Listing,
    rows: NDArray[np.int64],
    source: Source,
    run: Map,
    workers: int,
) -> list[str]:
    """The sha256 of the bytes of these items, empty where they cannot be read."""
    starts = range(0, len(rows), HASHED_AT_ONCE)
    tasks = (
        (source, list(listing.items(rows[start : start + HASHED_AT_ONCE])), settings.max_bytes)
        for start in starts
    )
    hashes: list[str] = []
    with (
        Progress("compare items", len(rows), "items") as progress,
        closing(run(hash_items, tasks, workers if len(rows) > POOL_ITEMS else 1)) as results,
    ):
        for part in results:
            hashes += part
            progress.update(len(hashes))
    return hashes


def _splits(
    settings: ImagesSettings,
    listing: Listing,
    hashes: Hashes,
    kind: NDArray[np.int8],
    before: NDArray[np.int8] | None,
) -> tuple[NDArray[np.int8], list[str]]:
    import numpy as np

    given = np.full(len(listing), -1, np.int8)
    if "split" in listing.table.column_names:
        given = listing.table["split"].to_numpy().astype(np.int8)
    given[kind < UNSURE] = -1
    wanted = kind == PICTURE if (kind == PICTURE).any() else kind == UNSURE
    if not wanted.any():
        known = ", ".join(sorted(EXTENSIONS))
        raise PipelineError(f"{settings.source} holds no image file (of type {known}).")
    split, notes = assign_splits(given, wanted, hashes.draw, settings.val, settings.test, before)
    counts = np.bincount(split[kind >= UNSURE], minlength=len(SPLITS)).tolist()
    how = "as the source says" if (given >= 0).any() else "drawn by hash of the key"
    told = ", ".join(f"{name} {count}" for name, count in zip(SPLITS, counts, strict=True))
    return split, [f"splits {how}: {told}", *notes]


def _refuse_broken_archives(listing: Listing, source: Source) -> None:
    """What a tar held beyond its cut is in no listing, so it cannot be accounted for."""
    for key, problem in sorted(listing.problems.items()):
        alone = len(listing) == 1 and "cut off" in problem
        if problem in (CUT, UNENDED) or alone:
            raise PipelineError(
                f"{source.uri}: {key}: {problem}, and what it should hold beyond that is not known:"
                " give the whole archive, or take it out of the source."
            )


def _refuse_left_out_pictures(
    settings: ImagesSettings, listing: Listing, kind: NDArray[np.int8]
) -> None:
    """Pictures beside the split folders are ignored, but not a large share of all."""
    endings = tuple(f".{extension}" for extension in EXTENSIONS)
    outside = [
        key
        for key, problem in listing.problems.items()
        if problem == OUTSIDE and key.lower().endswith(endings)
    ]
    if len(outside) > max(1.0, settings.max_failure_ratio * int((kind >= UNSURE).sum())):
        raise PipelineError(
            f"{len(outside)} pictures of {settings.source} lie outside its folders train, val and"
            f" test (first {min(outside)}): move them into these, or set images.layout=files to"
            " draw all splits by hash."
        )
