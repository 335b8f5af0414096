"""The stage that turns a folder of photographs into image shards.

List, hash and inspect every file: the request depends on that alone. Then sort out what cannot be
used, give every photograph a split, cut, encode and write, shard after shard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from data_prep import pictures
from data_prep.digest import sha256_json
from data_prep.errors import PipelineError
from data_prep.image_plan import (
    SPLITS,
    Box,
    assign_splits,
    draw_boxes,
    has_split_folders,
    mixed_order,
    split_folder,
    tile_boxes,
)
from data_prep.image_shards import Cutting, Sample, Shard, build_shard, forget_decoded
from data_prep.pool import cores, run_tasks
from data_prep.progress import Progress, say
from data_prep.shards import Folder, encode_table, shard_name, write_file, write_urls
from data_prep.sources import COLUMNS, Source, examine, known_sources, list_items
from data_prep.stage import FileRecord, Produced, Request, StageRef, Work, run_stage
from data_prep.storage import Store

_FAILURES = {"key": "string", "kind": "string", "sha256": "string", "reason": "string"}
_DUPLICATES = {"key": "string", "sha256": "string", "kept": "string"}
_POOL_SAMPLES = 512  # below, starting worker processes costs more than it gains

Side = Annotated[int, Field(ge=16, le=8192)]


def _sides(value: Any) -> Any:
    return [value] if isinstance(value, int) else value


class ImagesConfig(BaseModel):
    """Which photographs, and how they are cut and stored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: Path = Field(description="Folder of photographs, searched with its sub-folders.")
    name: str = Field(
        default="photographs",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        description="Name of the dataset; its versions lie under images/NAME.",
    )
    mode: Literal["center-crop", "tiles"] = Field(
        default="center-crop", description="One centred square of each photograph, or many tiles."
    )
    size: int = Field(
        default=256, ge=16, le=4096, description="Side of a stored sample, in pixels."
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
        default=0, ge=0, description="Most tiles of one photograph, drawn by hash; 0: all."
    )
    format: pictures.Format = Field(default="jpeg", description="File format of the samples.")
    quality: int = Field(default=95, ge=1, le=100, description="Of jpeg and webp.")
    shard_samples: int = Field(default=1000, ge=1, le=100_000, description="Samples in a shard.")
    val: float = Field(
        default=0.05, gt=0, le=0.4, description="Share of photographs for validation."
    )
    test: float = Field(
        default=0.05, gt=0, le=0.4, description="Share of photographs for the final test."
    )
    min_side: int = Field(
        default=0,
        ge=0,
        description="Least pixels of a photograph's shorter side; 0: nothing is enlarged, so"
        " `size` for center-crop. Tiles always need their own side.",
    )
    max_pixels: int = Field(
        default=pictures.MAX_PIXELS,
        ge=1,
        le=178_000_000,
        description="Most pixels of a photograph.",
    )
    max_failure_ratio: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="Share of image files that may be unusable; a single one always may.",
    )
    dedupe: Literal["content", "off"] = Field(
        default="content",
        description="content: of identical files the one with the lowest key stays; off: all stay,"
        " and copies may lie in different splits.",
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
        return self.min_side or self.size

    def settings(self) -> dict[str, Any]:
        """The part that changes the output."""
        common = {"mode", "size", "format", "shard_samples", "val", "test", "max_pixels", "dedupe"}
        settings = self.model_dump(mode="json", include=common)
        settings["needed_side"] = self.needed_side
        if self.mode == "tiles":
            settings |= {"tile": sorted(set(self.tile)), "tile_stride": self.tile_stride}
            settings["max_tiles"] = self.max_tiles
        if self.format != "png":
            settings["quality"] = self.quality
        return settings


def prepare_images(config: ImagesConfig, store: Store) -> StageRef:
    """Shards of the photographs in `config.source`, made now unless they are there.

    Raises PipelineError when too few photographs can be used, or too many files cannot.
    """
    top = f"images/{config.name}"
    items = list_items(config.source.expanduser())
    known = known_sources(store, top)
    sources = examine(items, known, config.max_pixels, config.workers or cores())
    raw = sha256_json([(source.key, source.sha256) for source in sources])
    request = Request("images", config.name, top, config.settings(), sources={"raw": raw})
    return run_stage(store, request, lambda work: _build(work, config, sources), say)


@dataclass(frozen=True)
class SortedOut:
    """Where every listed file went: each is in exactly one of the three."""

    usable: list[Source]
    unusable: list[dict[str, str]]  # rows of failures.parquet
    duplicates: list[dict[str, str]]  # rows of duplicates.parquet

    def count(self, kind: str) -> int:
        return sum(row["kind"] == kind for row in self.unusable)


def sort_out(config: ImagesConfig, sources: Sequence[Source], fixed: bool) -> SortedOut:
    """Part the usable photographs from the rest.

    `sources` are sorted by key; `fixed`: they have split folders, what lies outside is ignored.
    """
    done = SortedOut([], [], [])
    kept: dict[str, str] = {}  # by sha256
    for source in sources:
        sha256 = source.sha256
        kind, reason = _why_not(config, source, fixed)
        if kind:
            row = {"key": source.key, "kind": kind, "sha256": sha256, "reason": reason}
            done.unusable.append(row)
        elif config.dedupe == "content" and sha256 in kept:
            row = {"key": source.key, "sha256": sha256, "kept": kept[sha256]}
            done.duplicates.append(row)
        else:
            kept[sha256] = source.key
            done.usable.append(source)
    assert len(done.usable) + len(done.unusable) + len(done.duplicates) == len(sources)
    return done


def _why_not(config: ImagesConfig, source: Source, fixed: bool) -> tuple[str, str]:
    """("ignored" or "failed", the reason) of a file that cannot be used; empty if it can."""
    if not source.item.is_image:
        kind = f"extension .{source.item.extension}" if source.item.extension else "no extension"
        return "ignored", f"not an image: {kind}"
    if fixed and split_folder(source.key) is None:
        return "ignored", "outside the folders train, val, validation and test"
    if source.error:
        return "failed", source.error
    size = f"it has {source.width}x{source.height} pixels"
    if source.width * source.height > config.max_pixels:
        return "failed", f"{size}, images.max_pixels is {config.max_pixels}"
    if min(source.width, source.height) < config.needed_side:
        return "failed", f"{size}, its shorter side needs {config.needed_side}"
    return "", ""


def _check_failures(config: ImagesConfig, done: SortedOut) -> None:
    failed = [row for row in done.unusable if row["kind"] == "failed"]
    images = len(done.usable) + len(done.duplicates) + len(failed)
    first = "; ".join(f"{row['key']}: {row['reason']}" for row in failed[:2])
    if not images:
        known = ", ".join(sorted(pictures.EXTENSIONS))
        raise PipelineError(f"{config.source} holds no image file (of type {known}).")
    if not done.usable:
        raise PipelineError(
            f"none of the {images} image files in {config.source} is usable: {first};"
            " give whole photographs that are large enough."
        )
    if len(failed) > max(1, config.max_failure_ratio * images):
        raise PipelineError(
            f"{len(failed)} of the {images} image files in {config.source} cannot be used"
            f" ({first}): remove them, or raise images.max_failure_ratio, which is"
            f" {config.max_failure_ratio:g}."
        )


def _build(work: Work, config: ImagesConfig, sources: Sequence[Source]) -> Produced:
    fixed = has_split_folders([source.key for source in sources if source.item.is_image])
    done = sort_out(config, sources, fixed)
    _check_failures(config, done)
    for kind in ("failed", "ignored"):
        rows = [row for row in done.unusable if row["kind"] == kind]
        if rows:
            number = "1 file" if len(rows) == 1 else f"{len(rows)} files"
            say(f"{number} {kind}, first {rows[0]['key']}: {rows[0]['reason']}")
    keys = [source.key for source in done.usable]
    splits, notes = assign_splits(keys, fixed, config.val, config.test)
    for note in notes:
        say(note)
    tables = {
        "sources.parquet": encode_table([source.row() for source in sources], COLUMNS),
        "failures.parquet": encode_table(done.unusable, _FAILURES),
        "duplicates.parquet": encode_table(done.duplicates, _DUPLICATES),
        "config.json": json.dumps(config.model_dump(mode="json"), indent=1).encode(),
    }
    # None of these is a picture: a new text file or copy among the photographs retrains nothing.
    files = [write_file(work, path, data, content=False) for path, data in tables.items()]
    shards = _plan_shards(work, config, done.usable, splits)
    files += _build_shards(shards, config)
    figures = {}
    for split in SPLITS:
        own = [shard for shard in shards if shard.split == split]
        files.append(write_urls(work, split, [shard.name for shard in own]))
        figures[split] = {"samples": sum(len(s.samples) for s in own), "shards": len(own)}
    summary = {
        "splits": figures,
        "photographs": len(done.usable),
        "failed": done.count("failed"),
        "ignored": done.count("ignored"),
        "duplicates": len(done.duplicates),
    }
    return Produced(files, summary)


def _plan_shards(
    work: Work, config: ImagesConfig, usable: Sequence[Source], splits: Mapping[str, str]
) -> list[Shard]:
    by_key, shards = {source.key: source for source in usable}, []
    place = Folder(work.store, work.folder)
    how = Cutting(config.size, config.format, config.quality, config.max_pixels)
    for split in SPLITS:
        boxes = {key: _boxes(config, by_key[key]) for key in by_key if splits[key] == split}
        order = [Sample(name, by_key[key], box) for name, key, box in mixed_order(boxes)]
        for number, start in enumerate(range(0, len(order), config.shard_samples)):
            own = order[start : start + config.shard_samples]
            shards.append(Shard(place, shard_name(split, number), split, own, how))
    return shards


def _boxes(config: ImagesConfig, source: Source) -> list[Box] | list[None]:
    if config.mode == "center-crop":
        return [None]
    boxes = tile_boxes(source.width, source.height, sorted(set(config.tile)), config.tile_stride)
    return draw_boxes(source.key, boxes, config.max_tiles) if config.max_tiles else boxes


def _build_shards(shards: Sequence[Shard], config: ImagesConfig) -> list[FileRecord]:
    total = sum(len(shard.samples) for shard in shards)
    workers = (config.workers or cores()) if total > _POOL_SAMPLES else 1
    files, count = list[FileRecord](), 0
    try:
        with (
            Progress("prepare images", total, "images") as progress,
            closing(run_tasks(build_shard, shards, workers)) as results,
        ):
            for shard, records in zip(shards, results, strict=True):
                files += records
                progress.update(count := count + len(shard.samples))
    finally:
        forget_decoded()
    return files
