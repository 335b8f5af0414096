"""The mask stage: hole masks as verified shards, one split to train on and one to evaluate on.

A stored mask is a 1-bit PNG with 255 = hole. Everywhere else in the code a mask is `valid`, 1 =
known pixel and 0 = hole; `valid_from_png` is the one place where the meaning is turned round.

Training and evaluation masks come from different random streams.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.pool import Map, cores, run_tasks
from data_prep.core.progress import Progress, say
from data_prep.core.stage import (
    MANIFEST,
    FileRecord,
    Produced,
    Request,
    StageRef,
    Work,
    read_manifest,
    run_stage,
)
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
from data_prep.masks.plan import BINS, Border, border_counts
from data_prep.masks.recipes import RECIPES, RECIPES_VERSION
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
    import numpy as np
    from numpy.typing import NDArray

POOL_MASKS = 10_000  # fewer are drawn here sooner than worker processes start
FILES_TABLE = "sources.parquet"  # the mask files: what each became, and what spares reading it
FAILURES_SAID = 5  # broken mask files that are named; all are in the table
KNOWN = (*RECIPES, EXTERNAL)


class MasksConfig(BaseModel):
    """Which masks to draw, and how many."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        "mixed",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=60,
        description="Name of the mask set: its folder under masks/.",
    )
    size: int = Field(256, ge=16, le=4096, description="Side of a mask in pixels.")
    recipes: dict[str, float] = Field(
        default_factory=lambda: {"free-form": 1.0, "strokes": 1.0},
        description=f"Weights of the recipes of training masks. Known: {', '.join(KNOWN)}.",
    )
    eval_recipes: dict[str, float] = Field(
        default_factory=dict,
        description="Weights of the recipes of evaluation masks; empty means the same.",
    )
    train: int = Field(20_000, ge=1, le=10_000_000, description="Number of training masks.")
    eval_per_bin: int = Field(
        2_000, ge=1, le=100_000, description="Number of evaluation masks in each ratio bin."
    )
    eval_border: Border = Field(
        "any",
        description="Evaluation masks that keep clear of the picture's border (by 50 pixels at a"
        " side of 512), that touch it, or any.",
    )
    max_attempts: int = Field(
        2_000,
        ge=1,
        le=1_000_000,
        description="Evaluation masks drawn in a row without one for a ratio bin before that bin"
        " is given up.",
    )
    external: str | None = Field(
        None,
        min_length=1,
        description="Mask files for the recipe `external`: a folder, an archive or an s3:// address"
        " of black and white pictures; where both splits draw from them each has half.",
    )
    external_polarity: Literal["auto", "white-hole", "black-hole"] = Field(
        "auto", description="What is the hole in the mask files; auto finds out and says it."
    )
    external_dilate: int = Field(
        0, ge=0, le=256, description="Pixels by which the holes of mask files grow on every side."
    )
    external_flips: bool = Field(
        False, description="Mask files are flipped at random, left to right and upside down."
    )
    seed: int = Field(0, ge=0, le=2**53, description="Another seed draws other masks.")
    shard_samples: int = Field(2_000, ge=1, le=100_000, description="Masks in one shard.")
    workers: int = Field(0, ge=0, le=256, description="Processes; 0: one per core.")

    @field_validator("recipes", "eval_recipes")
    @classmethod
    def _known_recipes(cls, weights: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        for name, weight in weights.items():
            if name not in KNOWN:
                raise ConfigError(
                    f"masks.{info.field_name}: {name!r} is no mask recipe: choose from"
                    f" {', '.join(KNOWN)}."
                )
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(
                    f"masks.{info.field_name}.{name} is {weight}: a weight must be above 0; leave"
                    " the recipe out to do without it."
                )
        if not weights and info.field_name == "recipes":
            raise ConfigError(f"masks.recipes is empty: name at least one of {', '.join(KNOWN)}.")
        return weights

    @model_validator(mode="after")
    def _files_and_recipe_go_together(self) -> Self:
        if self.file_splits and self.external is None:
            raise ConfigError(
                "masks.external is missing: the recipe external needs a folder or archive of mask"
                " files."
            )
        if self.external is not None and not self.file_splits:
            raise ConfigError(
                "masks.external is given but no recipe draws from it: add external to masks.recipes"
                " or masks.eval_recipes, for example with --set masks.eval_recipes.external=1."
            )
        return self

    @property
    def weights(self) -> dict[str, dict[str, float]]:
        """The weights of the recipes of each split."""
        return {"train": self.recipes, "eval": self.eval_recipes or self.recipes}

    @property
    def file_splits(self) -> list[str]:
        """The splits that draw from mask files."""
        return [split for split, weights in self.weights.items() if EXTERNAL in weights]

    def settings(self, polarity: Polarity | None) -> dict[str, Any]:
        """The part that changes the output; `polarity` is that of the mask files."""
        common = {"size", "recipes", "train", "eval_per_bin", "max_attempts", "seed"}
        settings = self.model_dump(include={*common, "shard_samples"})
        settings["eval_recipes"] = self.weights["eval"]
        settings["recipes_version"] = RECIPES_VERSION
        if self.eval_border != "any":
            settings["eval_border"] = self.eval_border
        if polarity is not None:
            settings |= self.model_dump(include={"external_dilate", "external_flips"})
            settings["external_polarity"] = polarity
        return settings


def prepare_masks(config: MasksConfig, store: Store, run: Map = run_tasks) -> StageRef:
    """The committed mask set for `config`, made unless it is there; `run` does the work.

    Raises ConfigError if no ratio bin of the evaluation split can be filled.
    """
    top = f"masks/{config.name}"
    files = _mask_files(config, store, top, run) if config.file_splits else None
    request = Request(
        "masks",
        config.name,
        top,
        config.settings(files.polarity if files else None),
        sources={EXTERNAL: files_digest(files.found)} if files else {},
    )
    return run_stage(store, request, partial(_build, config, files, run), say)


def valid_from_png(data: bytes) -> NDArray[np.uint8]:
    """A stored mask (255 = hole) as the code uses it: uint8 [H, W], 1 = known, 0 = hole.

    Grey values from 128 up are holes. Raises PipelineError if `data` is no picture.
    """
    import cv2
    import numpy as np

    if (own := _unpacked(data)) is not None:
        return own
    hole = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None
    if hole is None:
        raise PipelineError("a mask is not a readable PNG: give a PNG with white holes.")
    valid: NDArray[np.uint8] = (hole < 128).astype(np.uint8)
    return valid


# What comes before the pixels of a PNG as `encode_png` writes it: 1 bit, grey, not interlaced.
_OWN_PNG = re.compile(
    rb"\x89PNG\r\n\x1a\n\0\0\0\rIHDR(....)(....)\x01\0\0\0\0(....)(....)IDAT", re.DOTALL
)


def _unpacked(data: bytes) -> NDArray[np.uint8] | None:
    """`valid` of a PNG of our own, at a third of the cost of a general reader; None for others."""
    import numpy as np

    if (match := _OWN_PNG.match(data)) is None:
        return None
    width, height, size = (int.from_bytes(match[n], "big") for n in (1, 2, 4))
    if zlib.crc32(data[12:29]) != int.from_bytes(match[3], "big"):
        return None
    stop = match.end() + size
    if data[stop + 4 : stop + 12] != b"\0\0\0\0IEND":
        return None  # its pixels go on in another chunk
    try:
        packed = np.frombuffer(zlib.decompress(data[match.end() : stop]), np.uint8)
        lines = packed.reshape(height, 1 + (width + 7) // 8)
    except (zlib.error, ValueError):
        return None
    if lines[:, 0].any():  # a filter
        return None
    return np.unpackbits(~lines[:, 1:], axis=1, count=width)


@dataclass(frozen=True)
class _Files:
    """The mask files, and what is the hole in them."""

    source: Source
    found: Sequence[MaskFile]
    polarity: Polarity
    sentence: str  # how that is known; empty where the config says it


def _mask_files(config: MasksConfig, store: Store, top: str, run: Map) -> _Files:
    from data_prep.raw.source import open_source

    assert config.external is not None
    source = open_source(config.external, "files")
    known = _known_files(store, top)
    found = read_files(source, _making(config), known, run, config.workers or cores())
    if config.external_polarity != "auto":
        return _Files(source, found, config.external_polarity, "")
    return _Files(source, found, *find_polarity(found, source.uri))


def _making(config: MasksConfig) -> Making:
    return Making(config.size, config.external_dilate)


def _known_files(store: Store, top: str) -> dict[str, dict[str, Any]]:
    """Rows of the newest committed set's table of mask files, by key; a cache, so none will do."""
    keys = {entry.key for entry in store.list(top)}
    made = []
    for key in keys:
        folder, _, file = key.rpartition("/")
        if file == MANIFEST and f"{folder}/{FILES_TABLE}" in keys:
            try:
                made.append((read_manifest(store, folder)["created"], folder))
            except PipelineError:
                continue
    if not made:
        return {}
    try:
        rows = decode_table(store.read(f"{max(made)[1]}/{FILES_TABLE}"))
    except (FileNotFoundError, ValueError):
        return {}
    return {row["key"]: row for row in rows}


def _build(config: MasksConfig, files: _Files | None, run: Map, work: Work) -> Produced:
    wanted = config.train + len(BINS) * config.eval_per_bin
    workers = (config.workers or cores()) if wanted > POOL_MASKS else 1
    records: list[FileRecord] = []
    summary: dict[str, Any] = {}
    pool: Mapping[str, FilePool] = {}
    if files is not None:
        pool, summary[EXTERNAL] = _file_pools(config, files, run)
        rows = [file.row() for file in files.found]
        records.append(write_file(work, FILES_TABLE, encode_table(rows, COLUMNS), content=False))
    if wanted > POOL_MASKS:
        say(f"masks: drawing until each ratio bin has {config.eval_per_bin} evaluation masks")
    bins, notes = evaluation_masks(config, pool.get("eval"), run, workers)
    for note in notes:
        say(note)
    totals = {"train": config.train, "eval": sum(len(masks) for masks in bins.values())}
    make = partial(make_shard, config, Folder(work.store, work.folder))
    done, total = 0, sum(totals.values())
    with (
        Progress("masks", total, "masks") as progress,
        closing(run(make, shards(config, bins, pool), workers)) as made,
    ):
        for masks, written in made:
            records += written
            progress.update(done := done + masks)
    names = {
        split: [shard_name(split, n) for n in range(math.ceil(count / config.shard_samples))]
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
    config: MasksConfig, files: _Files, run: Map
) -> tuple[dict[str, FilePool], dict[str, Any]]:
    """The files' masks for each split that draws from them, and how many files became what."""
    workers = config.workers or cores()
    made = made_masks(files.source, _making(config), files.found, files.polarity, run, workers)
    pool = pools(made, config.file_splits, config.external_flips, files.source.uri)
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
