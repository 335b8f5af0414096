"""The mask stage: hole masks as verified shards, one split to train on and one to evaluate on.

A stored mask is a 1-bit PNG with 255 = hole. Everywhere else in the code a mask is `valid`, 1 =
known pixel and 0 = hole; `valid_from_png` is the one place where the meaning is turned round.

Training and evaluation masks come from different random streams.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from data_prep.errors import ConfigError, PipelineError
from data_prep.mask_plan import (
    BINS,
    Candidate,
    fill_bins,
    measured,
    pick_recipe,
    ratio_bin,
    recipes_by_bin,
    split_seed,
    training_mask,
)
from data_prep.mask_recipes import RECIPES, RECIPES_VERSION, draw, hole_ratio
from data_prep.pool import cores, run_tasks
from data_prep.progress import Progress, say
from data_prep.shards import (
    Folder,
    ShardSample,
    finished_shard,
    shard_name,
    write_shard,
    write_urls,
)
from data_prep.stage import FileRecord, Produced, Request, StageRef, Work, run_stage
from data_prep.storage import Store

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BORDER_MARGIN = 50 / 512  # Liu et al. 2018 keep "masks without border holes" 50 px away, at 512
CHUNK = 256  # candidates that a worker draws at a time
POOL_MASKS = 10_000  # fewer are drawn here sooner than worker processes start


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
        description=f"Weights of the recipes of training masks. Known: {', '.join(RECIPES)}.",
    )
    eval_recipes: dict[str, float] = Field(
        default_factory=dict,
        description="Weights of the recipes of evaluation masks; empty means the same.",
    )
    train: int = Field(20_000, ge=1, le=10_000_000, description="Number of training masks.")
    eval_per_bin: int = Field(
        2_000, ge=1, le=100_000, description="Number of evaluation masks in each ratio bin."
    )
    max_attempts: int = Field(
        2_000,
        ge=1,
        le=1_000_000,
        description="Evaluation masks drawn in a row without one for a ratio bin before that bin"
        " is given up.",
    )
    seed: int = Field(0, ge=0, le=2**53, description="Another seed draws other masks.")
    shard_samples: int = Field(2_000, ge=1, le=100_000, description="Masks in one shard.")
    workers: int = Field(0, ge=0, le=256, description="Processes; 0: one per core.")

    @field_validator("recipes", "eval_recipes")
    @classmethod
    def _known_recipes(cls, weights: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        for name, weight in weights.items():
            if name not in RECIPES:
                raise ConfigError(
                    f"masks.{info.field_name}: {name!r} is no mask recipe: choose from"
                    f" {', '.join(RECIPES)}."
                )
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(
                    f"masks.{info.field_name}.{name} is {weight}: a weight must be above 0; leave"
                    " the recipe out to do without it."
                )
        if not weights and info.field_name == "recipes":
            raise ConfigError(f"masks.recipes is empty: name at least one of {', '.join(RECIPES)}.")
        return weights


def prepare_masks(config: MasksConfig, store: Store) -> StageRef:
    """The committed mask set for `config`, made unless it is there.

    Raises ConfigError if no ratio bin of the evaluation split can be filled.
    """
    settings = config.model_dump(exclude={"name", "workers"})
    settings["eval_recipes"] = config.eval_recipes or config.recipes
    settings["recipes_version"] = RECIPES_VERSION
    request = Request("masks", config.name, f"masks/{config.name}", settings)
    return run_stage(store, request, partial(_build, config), say)


def valid_from_png(data: bytes) -> NDArray[np.uint8]:
    """A stored mask (255 = hole) as the code uses it: uint8 [H, W], 1 = known, 0 = hole.

    Grey values from 128 up are holes. Raises PipelineError if `data` is no picture.
    """
    import cv2
    import numpy as np

    hole = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE) if data else None
    if hole is None:
        raise PipelineError("a mask is not a readable PNG: give a PNG with white holes.")
    valid: NDArray[np.uint8] = (hole < 128).astype(np.uint8)
    return valid


def encode_png(mask: NDArray[np.uint8]) -> bytes:
    """A hole mask, uint8 [H, W] in {0, 255}, as a 1-bit PNG."""
    import cv2

    options = [cv2.IMWRITE_PNG_BILEVEL, 1, cv2.IMWRITE_PNG_COMPRESSION, 6]
    options += [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT]
    options += [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_FILTER_NONE]
    return bytes(cv2.imencode(".png", mask, options)[1])


def touches_border(mask: NDArray[np.uint8]) -> bool:
    """Whether a hole mask has a hole within the border margin (50 px at a side of 512)."""
    margin = round(BORDER_MARGIN * mask.shape[0])
    inner = mask[margin:-margin, margin:-margin]
    return bool(hole_ratio(mask) * mask.size > hole_ratio(inner) * inner.size)


def _build(config: MasksConfig, work: Work) -> Produced:
    wanted = config.train + len(BINS) * config.eval_per_bin
    workers = (config.workers or cores()) if wanted > POOL_MASKS else 1
    if wanted > POOL_MASKS:
        say(f"masks: drawing until each ratio bin has {config.eval_per_bin} evaluation masks")
    bins, notes = _evaluation_masks(config, workers)
    for note in notes:
        say(note)
    splits: dict[str, Sequence[Any]] = {
        "train": range(config.train),
        "eval": [candidate for masks in bins.values() for candidate in masks],
    }
    tasks = [
        (split, number, masks[start : start + config.shard_samples])
        for split, masks in splits.items()
        for number, start in enumerate(range(0, len(masks), config.shard_samples))
    ]
    make = partial(_make_shard, config, Folder(work.store, work.folder))
    files: list[FileRecord] = []
    done, total = 0, sum(len(masks) for masks in splits.values())
    with (
        Progress("masks", total, "masks") as progress,
        closing(run_tasks(make, tasks, workers)) as made,
    ):
        for (_, _, masks), records in zip(tasks, made, strict=True):
            files += records
            done += len(masks)
            progress.update(done)
    names = {s: [shard_name(s, n) for split, n, _ in tasks if split == s] for s in splits}
    files += [write_urls(work, split, names[split]) for split in splits]
    summary = {
        "splits": {s: {"samples": len(splits[s]), "shards": len(names[s])} for s in splits},
        "bins": {name: len(masks) for name, masks in bins.items()},
        "unreachable": [name for name in BINS if name not in bins],
        "notes": notes,
    }
    return Produced(files, summary)


def _evaluation_masks(
    config: MasksConfig, workers: int
) -> tuple[dict[str, list[Candidate]], list[str]]:
    """The masks of every bin that could be filled, and a sentence on each that could not."""
    weights = config.eval_recipes or config.recipes
    survey = partial(_survey, weights, split_seed(config.seed, "eval"), config.size)
    with closing(run_tasks(survey, range(0, 2**62, CHUNK), workers)) as chunks:
        drawn = (candidate for chunk in chunks for candidate in chunk)
        filled = fill_bins(drawn, config.eval_per_bin, config.max_attempts)
    full = {name: masks for name, masks in filled.items() if len(masks) == config.eval_per_bin}
    used = ", ".join(sorted(weights))
    if not full:
        raise ConfigError(
            f"masks.eval_recipes: {used} cannot fill any ratio bin with {config.eval_per_bin}"
            f" masks of {config.size} pixels (masks.max_attempts is {config.max_attempts}): add"
            " strokes or outpaint, raise masks.max_attempts or lower masks.eval_per_bin."
        )
    advice = recipes_by_bin(config.size) if len(full) < len(filled) else {}
    notes = [
        f"masks: no evaluation masks with {name} hole, {used} drew {len(masks)} of the"
        f" {config.eval_per_bin} wanted before {config.max_attempts} in a row missed it: to fill"
        f" it give weight to {' or '.join(advice[name][:3])} in masks.eval_recipes."
        for name, masks in filled.items()
        if name not in full
    ]
    return full, notes


def _survey(weights: Mapping[str, float], seed: int, size: int, start: int) -> list[Candidate]:
    """Candidates `start` to `start` + CHUNK of the evaluation stream."""
    return [
        measured(pick_recipe(weights, seed, n), seed, n, size) for n in range(start, start + CHUNK)
    ]


def _make_shard(
    config: MasksConfig, place: Folder, task: tuple[str, int, Sequence[Any]]
) -> list[FileRecord]:
    """Draw and write one shard, unless it is there whole. `task`: split, number of the shard, and
    its masks: numbers of training masks or evaluation candidates."""
    split, number, masks = task
    name = shard_name(split, number)
    finished = finished_shard(place, name)
    if finished is not None:
        return finished
    return write_shard(place, name, _samples(config, split, number * config.shard_samples, masks))


def _samples(
    config: MasksConfig, split: str, first: int, masks: Sequence[Any]
) -> Iterator[ShardSample]:
    for position, wanted in enumerate(masks, start=first):
        if split == "train":
            seed = split_seed(config.seed, split)
            candidate, mask = training_mask(config.recipes, seed, wanted, config.size)
        else:
            candidate = wanted
            mask = draw(candidate.recipe, candidate.seed, candidate.index, config.size)
        key = f"{split}-{position:08d}"
        columns = {
            "split": split,
            "width": config.size,
            "height": config.size,
            "hole_ratio": candidate.ratio,
            "ratio_bin": ratio_bin(candidate.ratio),
            "recipe": candidate.recipe,
            "seed": candidate.seed,
            "index": candidate.index,
            "touches_border": touches_border(mask),
        }
        sidecar = json.dumps({"key": key, **columns}).encode()
        yield key, {"png": encode_png(mask), "json": sidecar}, columns
