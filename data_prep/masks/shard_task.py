"""Choose the evaluation masks; draw, encode and write the mask shards."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from data_prep.core.errors import ConfigError
from data_prep.core.lease import check_leases
from data_prep.core.manifest import FileRecord
from data_prep.core.pool import Map
from data_prep.masks.codec import encode_png
from data_prep.masks.external import FileMask, FilePool
from data_prep.masks.plan import (
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
from data_prep.masks.recipes import EXTERNAL, draw
from data_prep.shards.shards import Folder, ShardSample, finished_shard, shard_name, write_shard
from data_prep.shards.split_size import SplitSize, sample_bytes, tar_bytes

if TYPE_CHECKING:
    from data_prep.masks.settings import MasksSettings

CHUNK = 256  # candidates that a worker draws at a time

# A mask to make: the number of a training mask, an evaluation candidate to draw again, or the mask
# of a file.
Wanted = int | Candidate | FileMask


@dataclass(frozen=True)
class Shard:
    """One shard to make."""

    split: str
    number: int
    masks: Sequence[Wanted]

    @property
    def name(self) -> str:
        """Return the shard's name."""
        return shard_name(self.split, self.number)


def evaluation_masks(
    settings: MasksSettings, files: FilePool | None, run: Map, workers: int
) -> tuple[dict[str, list[Candidate]], list[str]]:
    """Choose the evaluation masks.

    Args:
        settings: of the mask set.
        files: the file masks of this split, if it draws from files.
        run: where tasks run.
        workers: number of processes.

    Returns:
        The masks of every full bin, and a sentence about each bin that could not be filled.

    Raises:
        ConfigError: no bin could be filled.
    """
    weights = settings.weights["eval"]
    seed = split_seed(settings.seed, "eval")
    survey = partial(_survey, weights, seed, settings.size)
    with closing(run(survey, range(0, 2**62, CHUNK), workers)) as chunks:
        surveyed = (candidate for chunk in chunks for candidate in chunk)
        drawn = (_with_measures(candidate, seed, files) for candidate in surveyed)
        filled = fill_bins(
            drawn, settings.eval_per_bin, settings.max_attempts, settings.eval_border
        )
    full = {name: masks for name, masks in filled.items() if len(masks) == settings.eval_per_bin}
    if not full:
        raise ConfigError(
            f"masks.eval_recipes: {_recipes(settings)} cannot fill any ratio bin with"
            f" {settings.eval_per_bin} masks of {settings.size} pixels{_where(settings)}"
            f" (masks.max_attempts is {settings.max_attempts}): add strokes or outpaint, raise"
            " masks.max_attempts or lower masks.eval_per_bin."
        )
    short = {name: len(masks) for name, masks in filled.items() if name not in full}
    return full, evaluation_notes(settings, short)


def _survey(
    weights: Mapping[str, float], seed: int, size: int, start: int
) -> list[Candidate | int]:
    """Draw candidates `start` to `start` + CHUNK of the evaluation stream.

    A candidate from a file is returned as its number, because workers do not have the files.
    """
    picked = [(pick_recipe(weights, seed, n), n) for n in range(start, start + CHUNK)]
    return [n if recipe == EXTERNAL else measured(recipe, seed, n, size) for recipe, n in picked]


def _with_measures(candidate: Candidate | int, seed: int, files: FilePool | None) -> Candidate:
    if isinstance(candidate, Candidate):
        return candidate
    assert files is not None
    return files.candidate(seed, candidate)


def evaluation_notes(settings: MasksSettings, short: Mapping[str, int]) -> list[str]:
    """Explain for each bin that is not full how many masks it got, and how to fill it."""
    advice = recipes_by_bin(settings.size, settings.eval_border) if short else {}
    return [
        f"masks: no evaluation masks with {name} hole{_where(settings)}: {_recipes(settings)} drew"
        f" {number} of {settings.eval_per_bin}, then {settings.max_attempts} others in a row. To"
        f" fill it, {_advice(advice[name])}{_fewer(number)}."
        for name, number in short.items()
    ]


def _advice(recipes: Sequence[str]) -> str:
    if recipes:
        return f"give weight to {' or '.join(recipes[:3])} in masks.eval_recipes"
    return "give files with such masks as masks.external: no recipe draws them often enough"


def _fewer(number: int) -> str:
    """Return what else fills a bin that has some masks."""
    if not number:
        return ""
    return f", raise masks.max_attempts, or lower masks.eval_per_bin to {number} for all bins"


def _recipes(settings: MasksSettings) -> str:
    return ", ".join(sorted(settings.weights["eval"]))


def _where(settings: MasksSettings) -> str:
    texts = {"any": "", "inside": " clear of the border", "touching": " at the border"}
    return texts[settings.eval_border]


def shards(
    settings: MasksSettings, bins: Mapping[str, Sequence[Candidate]], pool: Mapping[str, FilePool]
) -> Iterator[Shard]:
    """Yield every shard to make, one at a time, because the pixels of file masks are in it."""
    chosen: dict[str, Sequence[int | Candidate]] = {
        "train": range(settings.train),
        "eval": [candidate for masks in bins.values() for candidate in masks],
    }
    for split, masks in chosen.items():
        files, seed = pool.get(split), split_seed(settings.seed, split)
        weights = settings.weights[split]
        for number, start in enumerate(range(0, len(masks), settings.shard_samples)):
            own: Sequence[Wanted] = masks[start : start + settings.shard_samples]
            if files is not None:
                own = [_with_file(mask, weights, seed, files) for mask in own]
            yield Shard(split, number, own)


def _with_file(mask: Wanted, weights: Mapping[str, float], seed: int, files: FilePool) -> Wanted:
    """Replace a mask of the recipe `external` by its file mask; return other masks unchanged."""
    if isinstance(mask, int) and pick_recipe(weights, seed, mask) == EXTERNAL:
        return files.mask(files.candidate(seed, mask))
    if isinstance(mask, Candidate) and mask.recipe == EXTERNAL:
        return files.mask(mask)
    return mask


def make_shard(
    settings: MasksSettings, place: Folder, shard: Shard
) -> tuple[int, int, list[FileRecord]]:
    """Draw and write one shard, unless it is complete.

    Return its number of masks, how many of them an earlier run had written, and its files.
    """
    written = finished_shard(place, shard.name)
    if written is not None:
        return len(shard.masks), len(shard.masks), written
    return len(shard.masks), 0, write_shard(place, shard.name, _samples(settings, shard))


def _samples(settings: MasksSettings, shard: Shard) -> Iterator[ShardSample]:
    """Draw the masks of a shard, and yield its samples."""
    seed = split_seed(settings.seed, shard.split)
    for position, wanted in enumerate(shard.masks, start=shard.number * settings.shard_samples):
        check_leases()  # of this process, if the task runs in the stage's own
        file = ""
        if isinstance(wanted, int):
            candidate, mask = training_mask(settings.recipes, seed, wanted, settings.size)
        elif isinstance(wanted, FileMask):
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
            columns["file"] = file  # key of the mask file; empty for a drawn mask
        sidecar = json.dumps({"key": key, **columns}).encode()
        yield key, {"png": encode_png(mask), "json": sidecar}, columns


def planned_sizes(settings: MasksSettings, most: int) -> dict[str, SplitSize]:
    """Return the size of each split before it is made, from a few masks that are drawn for it.

    The training masks are the first of the set itself, so a set of `most` masks or fewer has the
    true size. Evaluation masks are taken to be as large, and every ratio bin to be full.

    Args:
        settings: of the mask set.
        most: most masks to draw, 1 or more.
    """
    counts = {"train": settings.train, "eval": len(BINS) * settings.eval_per_bin}
    number = min(most, settings.train)
    drawn = _samples(_without_files(settings), Shard("train", 0, range(number)))
    each = sum(sample_bytes(files) for _, files, _ in drawn) / number
    shards = {split: math.ceil(count / settings.shard_samples) for split, count in counts.items()}
    return {
        split: SplitSize(count, shards[split], tar_bytes(each * count, shards[split]))
        for split, count in counts.items()
    }


def _without_files(settings: MasksSettings) -> MasksSettings:
    """Return settings that draw every training mask, for a size that is near that of files."""
    drawn = {name: weight for name, weight in settings.recipes.items() if name != EXTERNAL}
    return settings.model_copy(update={"recipes": drawn or {"free-form": 1.0}})
