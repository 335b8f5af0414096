"""The stage that turns raw photographs, wherever they lie, into image shards.

List the source, plan by the keys alone, read and prepare every picture once, sort out duplicates by
their hashes, commit. What an earlier version of the dataset holds already is not read again.
"""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from data_prep import pictures
from data_prep.digest import sha256_bytes
from data_prep.errors import PipelineError
from data_prep.image_build import build, forget_records
from data_prep.image_plan import (
    PICTURE,
    UNSURE,
    Hashes,
    Past,
    assign_splits,
    item_kinds,
    key_hashes,
    match_keys,
    plan_items,
)
from data_prep.image_shards import DUPLICATE, FAILED, SAMPLE, hash_items
from data_prep.listing import ROWS, SPLITS, Listing
from data_prep.pool import Map, cores, run_tasks
from data_prep.progress import Progress, say
from data_prep.raw import LAYOUTS, Source, open_source
from data_prep.raw.layouts import OUTSIDE
from data_prep.raw.tars import CUT, UNENDED
from data_prep.resolution import resolve
from data_prep.stage import Request, StageRef, run_stage
from data_prep.storage import Store
from data_prep.versions import OUTCOMES, Version, known_members, load_version, versions

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

POOL_ITEMS = 512  # below, starting worker processes costs more than it gains
HASHED_AT_ONCE = 256  # items in one task that only hashes
MAX_PIXELS = 64_000_000  # so that one worker stays under 700 MB
_FORMAT = 1  # raise it when the same items would give other bytes

Side = Annotated[int, Field(ge=16, le=8192)]


def _sides(value: Any) -> Any:
    return [value] if isinstance(value, int) else value


class ImagesConfig(BaseModel):
    """Which photographs, and how they are cut and stored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        description="Folder, zip, tar, Parquet file or list (csv, txt, jsonl) of photographs, or a"
        " prefix of s3:// with any of them.",
    )
    layout: Literal[tuple(LAYOUTS)] = Field(  # type: ignore[valid-type]
        default="auto",
        description="How the source is laid out: a published dataset, or auto: folders train, val"
        " and test are splits if they are there.",
    )
    name: str = Field(
        default="photographs",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=60,
        description="Name of the dataset; its versions lie under images/NAME.",
    )
    mode: Literal["center-crop", "short-side", "keep", "tiles"] = Field(
        default="center-crop",
        description="center-crop: one centred square of each photograph; short-side: all of it, its"
        " shorter side `size` pixels; keep: its file as it is; tiles: many squares.",
    )
    size: int = Field(
        default=256, ge=16, le=4096, description="Side of a stored sample, in pixels."
    )
    resample: Literal["area", "lanczos"] = Field(
        default="area", description="Filter that makes photographs smaller; both antialias."
    )
    tile: Annotated[tuple[Side, ...], BeforeValidator(_sides)] = Field(
        default=(256,),
        min_length=1,
        description="Sides of the tiles in the photograph, in pixels, before resizing to `size`.",
    )
    tile_stride: float = Field(
        default=1.0,
        gt=0.05,
        le=1,
        description="Distance of neighbouring tiles, as a share of their side.",
    )
    max_tiles: int = Field(
        default=64, ge=1, le=10_000, description="Most tiles of one photograph, drawn by hash."
    )
    format: pictures.Format = Field(default="jpeg", description="File format of the samples.")
    quality: int = Field(default=95, ge=1, le=100, description="Of jpeg and webp.")
    shard_samples: int = Field(
        default=1000, ge=1, le=100_000, description="Most samples in a shard."
    )
    val: float = Field(
        default=0.05,
        gt=0,
        le=0.4,
        description="Share of photographs for validation, where the source has no such split.",
    )
    test: float = Field(
        default=0.05,
        gt=0,
        le=0.4,
        description="Share of photographs for the final test, where the source has no such split.",
    )
    min_side: int = Field(
        default=0,
        ge=0,
        description="Least pixels of a photograph's shorter side; 0: nothing is enlarged, so"
        " `size` for center-crop and short-side. Tiles always need their own side.",
    )
    max_pixels: int = Field(
        default=MAX_PIXELS,
        ge=1,
        le=178_000_000,
        description="Most pixels of a photograph. More than the default may take a worker process"
        " above 700 MB.",
    )
    max_bytes: int = Field(
        default=128_000_000,
        ge=1,
        le=2_000_000_000,
        description="Most bytes of a photograph's file.",
    )
    max_failure_ratio: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Share of image files that may be unusable; a single one always may.",
    )
    dedupe: Literal["content", "off"] = Field(
        default="content",
        description="content: of identical files the one with the lowest key stays, and none is in"
        " two splits; off: all stay, and copies may lie in different splits.",
    )
    near_duplicates: Literal["report", "drop", "off"] = Field(
        default="report",
        description="Pictures of train that are nearly the same as one of val or test: report them,"
        " also drop them from train, or do not look.",
    )
    workers: int = Field(default=0, ge=0, le=256, description="Processes; 0: one per core.")

    @model_validator(mode="after")
    def _leave_enough_for_train(self) -> Self:
        if self.val + self.test > 0.5:
            raise ValueError("val and test together are at most 0.5")
        return self

    @property
    def needed_side(self) -> int:
        """Least pixels of a photograph's shorter side."""
        if self.mode == "tiles":
            return max(self.min_side, min(self.tile))
        return self.min_side or (1 if self.mode == "keep" else self.size)

    @property
    def cutting(self) -> pictures.Cutting:
        return pictures.Cutting(
            mode=self.mode,
            size=self.size,
            format=self.format,
            quality=self.quality,
            resample=self.resample,
            max_pixels=self.max_pixels,
            min_side=self.needed_side,
            tile=tuple(sorted(set(self.tile))),
            tile_stride=self.tile_stride,
            max_tiles=self.max_tiles,
        )

    @property
    def shard_items(self) -> int:
        """Most photographs in a shard."""
        return max(1, self.shard_samples // (self.max_tiles if self.mode == "tiles" else 1))

    def settings(self) -> dict[str, Any]:
        """The part that changes the output."""
        common = {"mode", "shard_samples", "val", "test", "max_pixels", "max_bytes", "layout"}
        settings = self.model_dump(mode="json", include=common | {"dedupe", "near_duplicates"})
        settings |= {"needed_side": self.needed_side, "format_version": _FORMAT}
        if self.mode == "tiles":
            settings |= {"tile": sorted(set(self.tile)), "tile_stride": self.tile_stride}
            settings["max_tiles"] = self.max_tiles
        if self.mode != "keep":
            settings |= {"size": self.size, "resample": self.resample, "format": self.format}
            if self.format != "png":
                settings["quality"] = self.quality
        if self.near_duplicates != "drop":
            del settings["near_duplicates"]  # looking changes no shard
        return settings


def prepare_images(
    config: ImagesConfig,
    store: Store,
    run: Map = run_tasks,
    *,
    retry_failed: bool = False,
    repack: bool = False,
) -> StageRef:
    """Shards of the photographs in `config.source`, made now unless they are there.

    Where a version of the dataset was made with the same settings, only what is new, changed or
    gone since is worked on; with `retry_failed` also what failed then, and with `repack` everything
    is, without regard to it. `run` says where the work is done; the bytes are the same.

    Raises PipelineError when too few photographs can be used, or too many files cannot.
    """
    import numpy as np

    source = open_source(config.source, config.layout)
    settings = config.settings()
    earlier = versions(store, config.name)
    same = [manifest for manifest in earlier if manifest["settings"] == settings]
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
    _refuse_left_out_pictures(config, listing, kind)
    split, notes = _splits(config, listing, hashes, kind, before)
    workers = run_workers(config, len(listing), run)
    past = None
    if parent is not None and row is not None:
        past = compare(
            config, listing, row, kind, split, parent, source, run, workers, retry_failed
        )
    plan = plan_items(
        listing,
        hashes,
        kind,
        split,
        notes,
        shard_items=config.shard_items,
        by_size=config.mode == "keep",
        past=past,
    )
    if parent is not None and plan.same_as_parent:
        if retry_failed:
            say(f"images: nothing to try again in {parent.folder}.")
        return parent.reference
    for note in plan.notes:
        say(f"images: {note}")
    sources = {"listing": listing_digest(listing)}
    if same:
        # A listing says nothing of what is in a file. So that no earlier version that was asked for
        # with the same one is taken for this, each is asked for as what comes after the newest.
        sources["after"] = str(same[-1]["request_digest"])
    if retry_failed and past is not None:
        sources["retried"] = sha256_bytes((past.row[plan.before < 0]).tobytes())
    request = Request(
        "images",
        config.name,
        f"images/{config.name}",
        settings,
        inputs={"parent": parent.reference} if parent is not None else {},
        sources=sources,
    )
    version = 1 + max((manifest["summary"]["version"] for manifest in earlier), default=0)
    ref = run_stage(
        store,
        request,
        lambda work: build(work, config, plan, source, parent, version, run, workers),
        say,
    )
    if not ref.skipped:
        forget_records(store, ref.folder)
    return ref


def run_workers(config: ImagesConfig, items: int, run: Map) -> int:
    """What to pass as the number of workers; 0 is all that a cluster has."""
    if run is not run_tasks:
        return config.workers
    return (config.workers or cores()) if items > POOL_ITEMS else 1


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


def compare(
    config: ImagesConfig,
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
        now = _hash(config, listing, found[touched], source, run, workers)
        known = [sha256[r].tobytes().hex() for r in at[touched]]
        same[touched] = [a == b for a, b in zip(now, known, strict=True)]
    holds = np.zeros(len(listing), np.bool_)
    holds[found] = same
    if retry_failed:
        holds[found] &= outcome[at] != OUTCOMES.index(FAILED)
    stored = pc.index_in(old["shard"], pa.array(names, pa.string()))
    past = Past(row, holds, stored.fill_null(-1).to_numpy().astype(np.int32), old_split, names)
    _take_back(config, past, parent, outcome, sha256)
    return past


def _take_back(
    config: ImagesConfig,
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
    still = resolve(sha256, phash, usable, past.split, config.dedupe, config.near_duplicates)
    back = usable & (outcome == OUTCOMES.index(DUPLICATE))
    back[still.rows] = False
    past.holds[past.holds] = ~back[rows]


def _hash(
    config: ImagesConfig,
    listing: Listing,
    rows: NDArray[np.int64],
    source: Source,
    run: Map,
    workers: int,
) -> list[str]:
    """The sha256 of the bytes of these items, empty where they cannot be read."""
    starts = range(0, len(rows), HASHED_AT_ONCE)
    tasks = (
        (source, list(listing.items(rows[start : start + HASHED_AT_ONCE])), config.max_bytes)
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
    config: ImagesConfig,
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
        known = ", ".join(sorted(pictures.EXTENSIONS))
        raise PipelineError(f"{config.source} holds no image file (of type {known}).")
    split, notes = assign_splits(given, wanted, hashes.draw, config.val, config.test, before)
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
    config: ImagesConfig, listing: Listing, kind: NDArray[np.int8]
) -> None:
    """Pictures beside the split folders are ignored, but not a large share of all."""
    endings = tuple(f".{extension}" for extension in pictures.EXTENSIONS)
    outside = [
        key
        for key, problem in listing.problems.items()
        if problem == OUTSIDE and key.lower().endswith(endings)
    ]
    if len(outside) > max(1.0, config.max_failure_ratio * int((kind >= UNSURE).sum())):
        raise PipelineError(
            f"{len(outside)} pictures of {config.source} lie outside its folders train, val and"
            f" test (first {min(outside)}): move them into these, or set images.layout=files to"
            " draw all splits by hash."
        )
