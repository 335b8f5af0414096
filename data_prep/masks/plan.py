"""Which masks are drawn and kept: pure functions of a seed.

Training masks are as their recipes draw them, between 1 and 60 % hole. Evaluation masks are dealt
to ratio bins until each bin has the same number, so that no bin weighs more than another.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, pairwise
from typing import TYPE_CHECKING, Literal

from data_prep.core.digest import sha256_bytes
from data_prep.masks.recipes import RECIPES, draw, hole_ratio

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EDGES = (0.01, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
BINS = {f"{low:.2f}-{high:.2f}": (low, high) for low, high in pairwise(EDGES)}
BORDER_MARGIN = 50 / 512  # Liu et al. 2018 keep "masks without border holes" 50 px away, at 512

Border = Literal["any", "inside", "touching"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mask that was drawn and measured; `draw` gives it again from the first three."""

    recipe: str
    seed: int
    index: int
    ratio: float  # share of hole pixels
    touches: bool  # whether it has a hole within the border margin

    def fits(self, border: Border) -> bool:
        return border == "any" or self.touches == (border == "touching")


def ratio_bin(ratio: float) -> str | None:
    """The name of the bin (low, high] that a hole ratio falls in, None outside them all."""
    return next((name for name, (low, high) in BINS.items() if low < ratio <= high), None)


def touches_border(mask: NDArray[np.uint8]) -> bool:
    """Whether a hole mask has a hole within the border margin (50 px at a side of 512)."""
    import cv2

    margin = round(BORDER_MARGIN * mask.shape[0])
    inner = mask[margin:-margin, margin:-margin]
    return bool(cv2.countNonZero(mask) > cv2.countNonZero(inner))


def split_seed(seed: int, split: str) -> int:
    """The seed of a split's own stream: below 2^52, so that any JSON reader keeps it exact."""
    return int(sha256_bytes(f"masks/{split}/{seed}".encode())[:13], 16)


def pick_recipe(weights: Mapping[str, float], seed: int, number: int) -> str:
    """The recipe of mask `number`, at random by weight, whatever the order of `weights`."""
    names = sorted(weights)
    sums = list(accumulate(weights[name] for name in names))
    digits = sha256_bytes(f"recipe/{seed}/{number}".encode())[:13]
    point = int(digits, 16) / 16**13 * sums[-1]  # [0, 1) with 52 bits
    return next(name for name, end in zip(names, sums, strict=True) if point < end)


def measured(recipe: str, seed: int, index: int, size: int) -> Candidate:
    mask = draw(recipe, seed, index, size)
    return Candidate(recipe, seed, index, hole_ratio(mask), touches_border(mask))


def training_mask(
    weights: Mapping[str, float], seed: int, number: int, size: int
) -> tuple[Candidate, NDArray[np.uint8]]:
    """Training mask `number`: the first of its recipe's masks `number`, `number` + 2^32, … that
    lies in a bin. The recipe stays, so that the weights hold for the masks kept.

    The recipe is one that is drawn: KeyError where `pick_recipe` gives another."""
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
    """Deal candidates to their bins, in order, until each has `per_bin` or is given up.

    Candidates that do not fit `border` go to no bin. A bin is given up when `max_attempts`
    candidates in a row brought it none. Takes no more candidates than that needs.
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
    """How many masks of each bin keep clear of the border, and how many touch it."""
    touching = {name: sum(mask.touches for mask in masks) for name, masks in bins.items()}
    return {
        name: {"inside": len(masks) - touching[name], "touching": touching[name]}
        for name, masks in bins.items()
    }


def recipes_by_bin(size: int, border: Border = "any", tries: int = 100) -> dict[str, list[str]]:
    """For each bin the recipes that hit it at least once in 50 masks, likeliest first."""
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
