"""Decide which masks are drawn and kept: pure functions of a seed.

Training masks have 1 to 60 % hole, in the proportions in which their recipes draw them. Evaluation
masks are sorted into ratio bins until each bin has the same number. So all bins have the same
weight.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, pairwise
from typing import TYPE_CHECKING

from data_prep.core.digest import sha256_bytes
from data_prep.masks.recipes import RECIPES, draw, hole_ratio

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from data_prep.masks.settings import Border

EDGES = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
BINS = {f"{low:.2f}-{high:.2f}": (low, high) for low, high in pairwise(EDGES)}
BORDER_MARGIN = 50 / 512  # Liu et al. 2018: "masks without border holes" keep 50 px away, at 512


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mask that was drawn and measured; `draw` gives it again from the first three."""

    recipe: str
    seed: int
    index: int
    ratio: float  # share of hole pixels
    touches: bool  # whether it has a hole within the border margin

    def fits(self, border: Border) -> bool:
        """Return whether the mask is allowed by the option `eval_border`."""
        return border == "any" or self.touches == (border == "touching")


def ratio_bin(ratio: float) -> str | None:
    """Return the name of the bin (low, high] that holds a hole ratio, or None."""
    return next((name for name, (low, high) in BINS.items() if low < ratio <= high), None)


def touches_border(mask: NDArray[np.uint8]) -> bool:
    """Return whether a mask has a hole within the border margin (50 px at a side of 512)."""
    import cv2

    margin = round(BORDER_MARGIN * mask.shape[0])
    inner = mask[margin:-margin, margin:-margin]
    return bool(cv2.countNonZero(mask) > cv2.countNonZero(inner))


def split_seed(seed: int, split: str) -> int:
    """Return the seed of a split's own stream, below 2^52: any JSON reader keeps it exact."""
    return int(sha256_bytes(f"masks/{split}/{seed}".encode())[:13], 16)


def pick_recipe(weights: Mapping[str, float], seed: int, number: int) -> str:
    """Pick the recipe of mask `number` at random by weight; the order of `weights` is ignored."""
    names = sorted(weights)
    sums = list(accumulate(weights[name] for name in names))
    digits = sha256_bytes(f"recipe/{seed}/{number}".encode())[:13]
    point = int(digits, 16) / 16**13 * sums[-1]  # [0, 1) with 52 bits
    return next(name for name, end in zip(names, sums, strict=True) if point < end)


def measured(recipe: str, seed: int, index: int, size: int) -> Candidate:
    """Draw a mask and measure it.

    Args:
        recipe: a key of RECIPES.
        seed: of the stream.
        index: in the stream.
        size: side in pixels.
    """
    mask = draw(recipe, seed, index, size)
    return Candidate(recipe, seed, index, hole_ratio(mask), touches_border(mask))


def training_mask(
    weights: Mapping[str, float], seed: int, number: int, size: int
) -> tuple[Candidate, NDArray[np.uint8]]:
    """Return training mask `number` and its measures.

    Of its recipe's masks `number`, `number` + 2^32, … the first one in a bin is taken. The recipe
    does not change, so the weights also hold for the masks that are kept.

    Args:
        weights: of the recipes.
        seed: of the split.
        number: of the mask.
        size: side in pixels.

    Raises:
        KeyError: the picked recipe is `external`, which does not draw.
    """
    recipe = pick_recipe(weights, seed, number)
    for index in count(number, 1 << 32):
        mask = draw(recipe, seed, index, size)
        ratio = hole_ratio(mask)
        if ratio_bin(ratio):
            break
    return Candidate(recipe, seed, index, ratio, touches_border(mask)), mask


def fill_bins(
    candidates: Iterable[Candidate], per_bin: int, max_attempts: int, border: Border = "any"
) -> dict[str, list[Candidate]]:
    """Sort candidates into their bins, in order, until each bin is full or given up.

    Takes no more candidates than needed.

    Args:
        candidates: any number.
        per_bin: the number in a full bin.
        max_attempts: a bin is given up after this many candidates in a row outside of it.
        border: candidates that do not fit go to no bin.
    """
    filled: dict[str, list[Candidate]] = {name: [] for name in BINS}
    last = dict.fromkeys(BINS, -1)
    open_bins = set(BINS)
    for number, candidate in enumerate(candidates):
        name = ratio_bin(candidate.ratio) if candidate.fits(border) else None
        if name in open_bins:
            filled[name].append(candidate)
            last[name] = number
        open_bins = {
            b for b in open_bins if len(filled[b]) < per_bin and number - last[b] < max_attempts
        }
        if not open_bins:
            break
    return filled


def border_counts(bins: Mapping[str, Sequence[Candidate]]) -> dict[str, dict[str, int]]:
    """Count in each bin the masks that keep clear of the border, and those that touch it."""
    touching = {name: sum(mask.touches for mask in masks) for name, masks in bins.items()}
    return {
        name: {"inside": len(masks) - touching[name], "touching": touching[name]}
        for name, masks in bins.items()
    }


def recipes_by_bin(size: int, border: Border = "any", tries: int = 100) -> dict[str, list[str]]:
    """Return for each bin the recipes with at least one hit in 50 masks, the best first."""
    hits = {name: Counter[str]() for name in BINS}
    for recipe in RECIPES:
        for index in range(tries):
            candidate = measured(recipe, 0, index, size)
            name = ratio_bin(candidate.ratio) if candidate.fits(border) else None
            if name:
                hits[name][recipe] += 1
    return {
        name: [recipe for recipe, number in found.most_common() if number >= tries / 50]
        for name, found in hits.items()
    }
