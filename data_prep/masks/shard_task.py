"""Mask shards: which evaluation masks there are, and drawing, encoding and writing all masks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from data_prep.core.errors import ConfigError
from data_prep.core.pool import Map
from data_prep.core.stage import FileRecord
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
    from data_prep.masks.settings import MasksConfig
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
    config: MasksConfig, files: FilePool | None, run: Map, workers: int
) -> tuple[dict[str, list[Candidate]], list[str]]:
    """The masks of every bin that could be filled, and a sentence on each that could not."""
    weights = config.weights["eval"]
    seed = split_seed(config.seed, "eval")
    survey = partial(_survey, weights, seed, config.size)
    with closing(run(survey, range(0, 2**62, CHUNK), workers)) as chunks:
        surveyed = (candidate for chunk in chunks for candidate in chunk)
        drawn = (_known_candidate(candidate, seed, files) for candidate in surveyed)
        filled = fill_bins(drawn, config.eval_per_bin, config.max_attempts, config.eval_border)
    full = {name: masks for name, masks in filled.items() if len(masks) == config.eval_per_bin}
    used = ", ".join(sorted(weights))
    kind = {"any": "", "inside": " clear of the border", "touching": " at the border"}
    where = kind[config.eval_border]
    if not full:
        raise ConfigError(
            f"masks.eval_recipes: {used} cannot fill any ratio bin with {config.eval_per_bin}"
            f" masks of {config.size} pixels{where} (masks.max_attempts is {config.max_attempts}):"
            " add strokes or outpaint, raise masks.max_attempts or lower masks.eval_per_bin."
        )
    short = len(full) < len(filled)
    advice = recipes_by_bin(config.size, config.eval_border) if short else {}
    notes = [
        f"masks: no evaluation masks with {name} hole{where}, {used} drew {len(masks)} of the"
        f" {config.eval_per_bin} wanted before {config.max_attempts} in a row missed it: to fill"
        f" it {_advice(advice[name])}."
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
    config: MasksConfig, bins: Mapping[str, Sequence[Candidate]], pool: Mapping[str, FilePool]
) -> Iterator[Shard]:
    """Every shard, made up when its turn comes: masks of files go with it."""
    chosen: dict[str, Sequence[int | Candidate]] = {
        "train": range(config.train),
        "eval": [candidate for masks in bins.values() for candidate in masks],
    }
    for split, masks in chosen.items():
        files, seed = pool.get(split), split_seed(config.seed, split)
        weights = config.weights[split]
        for number, start in enumerate(range(0, len(masks), config.shard_samples)):
            own: Sequence[int | Candidate | FromFile] = masks[start : start + config.shard_samples]
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


def make_shard(config: MasksConfig, place: Folder, shard: Shard) -> tuple[int, list[FileRecord]]:
    """Draw and write one shard, unless it is there whole; its number of masks and its files."""
    written = finished_shard(place, shard.name)
    if written is None:
        written = write_shard(place, shard.name, _samples(config, shard))
    return len(shard.masks), written


def _samples(config: MasksConfig, shard: Shard) -> Iterator[ShardSample]:
    seed = split_seed(config.seed, shard.split)
    for position, wanted in enumerate(shard.masks, start=shard.number * config.shard_samples):
        file = ""
        if isinstance(wanted, int):
            candidate, mask = training_mask(config.recipes, seed, wanted, config.size)
        elif isinstance(wanted, FromFile):
            candidate, mask, file = wanted.candidate, wanted.mask(config.size), wanted.key
        else:
            candidate = wanted
            mask = draw(candidate.recipe, candidate.seed, candidate.index, config.size)
        key = f"{shard.split}-{position:08d}"
        columns = {
            "split": shard.split,
            "width": config.size,
            "height": config.size,
            "hole_ratio": candidate.ratio,
            "ratio_bin": ratio_bin(candidate.ratio),
            "recipe": candidate.recipe,
            "seed": candidate.seed,
            "index": candidate.index,
            "touches_border": candidate.touches,
        }
        if config.file_splits:
            columns["file"] = file  # of the mask files, empty for a mask that was drawn
        sidecar = json.dumps({"key": key, **columns}).encode()
        yield key, {"png": encode_png(mask), "json": sidecar}, columns
