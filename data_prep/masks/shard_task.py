"""Mask shards: which evaluation masks there are, and drawing, encoding and writing all masks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from data_prep.core.errors import ConfigError
from data_prep.core.manifest import FileRecord
from data_prep.core.pool import Map
from data_prep.masks.external import EXTERNAL, FilePool, FromFile
from data_prep.masks.plan import (
    Candidate,
    fill_bins,
    measured,
    pick_recipe,
    ratio_bin,
    recipes_by_bin,
    split_seed,
    training_mask,
)
from data_prep.masks.recipes import draw
from data_prep.shards.shards import Folder, ShardSample, finished_shard, shard_name, write_shard

if TYPE_CHECKING:
    from data_prep.masks.settings import MasksSettings
from data_prep.masks.codec import encode_png

CHUNK = 256  # candidates that a worker draws at a time


@dataclass(frozen=True)
class Shard:
    """One shard to make. A mask is the number of a training mask, an evaluation candidate that is
    drawn again, or a file's."""

    split: str
    number: int
    masks: Sequence[int | Candidate | FromFile]

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number)


def evaluation_masks(
    settings: MasksSettings, files: FilePool | None, run: Map, workers: int
) -> tuple[dict[str, list[Candidate]], list[str]]:
    """The masks of every bin that could be filled, and a sentence on each that could not."""
    weights = settings.weights["eval"]
    seed = split_seed(settings.seed, "eval")
    survey = partial(_survey, weights, seed, settings.size)
    with closing(run(survey, range(0, 2**62, CHUNK), workers)) as chunks:
        surveyed = (candidate for chunk in chunks for candidate in chunk)
        drawn = (_known_candidate(candidate, seed, files) for candidate in surveyed)
        filled = fill_bins(
            drawn, settings.eval_per_bin, settings.max_attempts, settings.eval_border
        )
    full = {name: masks for name, masks in filled.items() if len(masks) == settings.eval_per_bin}
    used = ", ".join(sorted(weights))
    kind = {"any": "", "inside": " clear of the border", "touching": " at the border"}
    where = kind[settings.eval_border]
    if not full:
        raise ConfigError(
            f"masks.eval_recipes: {used} cannot fill any ratio bin with {settings.eval_per_bin}"
            f" masks of {settings.size} pixels{where} (masks.max_attempts is"
            f" {settings.max_attempts}): add strokes or outpaint, raise masks.max_attempts or lower"
            " masks.eval_per_bin."
        )
    short = len(full) < len(filled)
    advice = recipes_by_bin(settings.size, settings.eval_border) if short else {}
    notes = [
        f"masks: no evaluation masks with {name} hole{where}, {used} drew {len(masks)} of the"
        f" {settings.eval_per_bin} wanted before {settings.max_attempts} in a row missed it: to"
        f" fill it {_advice(advice[name])}."
        for name, masks in filled.items()
        if name not in full
    ]
    return full, notes


def _advice(recipes: Sequence[str]) -> str:
    if recipes:
        return f"give weight to {' or '.join(recipes[:3])} in masks.eval_recipes"
    return "give files with such masks as masks.external, for no recipe draws them often enough"


def _survey(
    weights: Mapping[str, float], seed: int, size: int, start: int
) -> list[Candidate | int]:
    """Candidates `start` to `start` + CHUNK of the evaluation stream; of a file's the number."""
    picked = [(pick_recipe(weights, seed, n), n) for n in range(start, start + CHUNK)]
    return [n if recipe == EXTERNAL else measured(recipe, seed, n, size) for recipe, n in picked]


def _known_candidate(candidate: Candidate | int, seed: int, files: FilePool | None) -> Candidate:
    if isinstance(candidate, Candidate):
        return candidate
    assert files is not None
    return files.candidate(seed, candidate)


def shards(
    settings: MasksSettings, bins: Mapping[str, Sequence[Candidate]], pool: Mapping[str, FilePool]
) -> Iterator[Shard]:
    """Every shard, made up when its turn comes: masks of files go with it."""
    chosen: dict[str, Sequence[int | Candidate]] = {
        "train": range(settings.train),
        "eval": [candidate for masks in bins.values() for candidate in masks],
    }
    for split, masks in chosen.items():
        files, seed = pool.get(split), split_seed(settings.seed, split)
        weights = settings.weights[split]
        for number, start in enumerate(range(0, len(masks), settings.shard_samples)):
            own: Sequence[int | Candidate | FromFile] = masks[
                start : start + settings.shard_samples
            ]
            if files is not None:
                own = [_with_file(mask, weights, seed, files) for mask in own]
            yield Shard(split, number, own)


def _with_file(
    mask: int | Candidate | FromFile, weights: Mapping[str, float], seed: int, files: FilePool
) -> int | Candidate | FromFile:
    """The mask with its file's pixels, if it is one of a file."""
    if isinstance(mask, int) and pick_recipe(weights, seed, mask) == EXTERNAL:
        return files.mask(files.candidate(seed, mask))
    if isinstance(mask, Candidate) and mask.recipe == EXTERNAL:
        return files.mask(mask)
    return mask


def make_shard(
    settings: MasksSettings, place: Folder, shard: Shard
) -> tuple[int, list[FileRecord]]:
    """Draw and write one shard, unless it is there whole; its number of masks and its files."""
    written = finished_shard(place, shard.name)
    if written is None:
        written = write_shard(place, shard.name, _samples(settings, shard))
    return len(shard.masks), written


def _samples(settings: MasksSettings, shard: Shard) -> Iterator[ShardSample]:
    seed = split_seed(settings.seed, shard.split)
    for position, wanted in enumerate(shard.masks, start=shard.number * settings.shard_samples):
        file = ""
        if isinstance(wanted, int):
            candidate, mask = training_mask(settings.recipes, seed, wanted, settings.size)
        elif isinstance(wanted, FromFile):
            candidate, mask, file = wanted.candidate, wanted.mask(settings.size), wanted.key
        else:
            candidate = wanted
            mask = draw(candidate.recipe, candidate.seed, candidate.index, settings.size)
        key = f"{shard.split}-{position:08d}"
        columns = {
            "split": shard.split,
            "width": settings.size,
            "height": settings.size,
            "hole_ratio": candidate.ratio,
            "ratio_bin": ratio_bin(candidate.ratio),
            "recipe": candidate.recipe,
            "seed": candidate.seed,
            "index": candidate.index,
            "touches_border": candidate.touches,
        }
        if settings.file_splits:
            columns["file"] = file  # of the mask files, empty for a mask that was drawn
        sidecar = json.dumps({"key": key, **columns}).encode()
        yield key, {"png": encode_png(mask), "json": sidecar}, columns
