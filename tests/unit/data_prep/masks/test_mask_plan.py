"""The plan of a mask set: the masks that are drawn and kept."""

from collections import Counter

import numpy as np
import pytest

from data_prep.masks.plan import (
    BINS,
    Candidate,
    border_counts,
    fill_bins,
    pick_recipe,
    ratio_bin,
    recipes_by_bin,
    split_seed,
    touches_border,
    training_mask,
)
from data_prep.masks.recipes import hole_ratio


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.0, None),
        (0.01, None),
        (0.0101, "0.01-0.10"),
        (0.1, "0.01-0.10"),
        (0.1001, "0.10-0.20"),
        (0.25, "0.20-0.30"),
        (0.5, "0.40-0.50"),
        (0.6, "0.50-0.60"),
        (0.6001, None),
        (1.0, None),
    ],
)
def test_a_bin_holds_its_upper_end_and_not_its_lower(ratio: float, expected: str | None) -> None:
    assert ratio_bin(ratio) == expected


@pytest.mark.parametrize(
    ("size", "y", "x", "expected"),
    [
        (512, 50, 50, False),
        (512, 49, 256, True),
        (512, 256, 462, True),
        (512, 461, 461, False),
        (256, 25, 25, False),
        (256, 24, 128, True),
        (256, 128, 231, True),
    ],
)
def test_the_border_is_50_pixels_wide_at_512(size: int, y: int, x: int, expected: bool) -> None:
    mask = np.zeros((size, size), np.uint8)
    mask[y, x] = 255
    assert touches_border(mask) is expected


# Plans


def candidates(ratios: list[float]) -> list[Candidate]:
    return [Candidate("box", 0, index, ratio, False) for index, ratio in enumerate(ratios)]


@pytest.mark.parametrize(
    ("ratios", "per_bin", "max_attempts", "kept", "used"),
    [
        ([0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.05], 1, 9, [[0], [1], [2], [3], [4], [5]], 6),
        ([0.25, 0.25, 0.25, 0.25, 0.25], 2, 3, [[], [], [0, 1], [], [], []], 3),
        ([0.0, 0.7, 0.0], 1, 2, [[], [], [], [], [], []], 2),
        ([0.05, 0.25, 0.05, 0.25, 0.05, 0.05], 2, 3, [[0, 2], [], [1, 3], [], [], []], 4),
        ([0.05, 0.25, 0.25, 0.25, 0.05], 2, 3, [[0], [], [1, 2], [], [], []], 4),
    ],
)
def test_bins_are_filled_in_order_until_full_or_given_up(
    ratios: list[float], per_bin: int, max_attempts: int, kept: list[list[int]], used: int
) -> None:
    stream = iter(candidates(ratios))
    filled = fill_bins(stream, per_bin, max_attempts)
    assert [[c.index for c in found] for found in filled.values()] == kept
    assert len(list(stream)) == len(ratios) - used


@pytest.mark.parametrize(
    ("border", "kept"), [("any", [0, 1]), ("inside", [0, 2]), ("touching", [1, 3])]
)
def test_bins_can_hold_only_masks_inside_the_border_or_only_masks_that_touch_it(
    border: str, kept: list[int]
) -> None:
    drawn = [Candidate("box", 0, index, 0.25, index % 2 == 1) for index in range(6)]
    filled = fill_bins(drawn, 2, 9, border)  # type: ignore[arg-type]
    assert [candidate.index for candidate in filled["0.20-0.30"]] == kept
    counts = {"inside": sum(i % 2 == 0 for i in kept), "touching": sum(i % 2 for i in kept)}
    assert border_counts(filled)["0.20-0.30"] == counts


def test_the_recipes_advised_for_a_bin_fit_the_border_option() -> None:
    inside = recipes_by_bin(64, "inside")
    assert "box" in inside["0.20-0.30"]
    assert not {"half", "outpaint"} & {recipe for found in inside.values() for recipe in found}
    assert "half" in recipes_by_bin(64, "touching")["0.40-0.50"]


def test_recipes_are_picked_by_weight_in_any_order() -> None:
    weights = {"strokes": 3.0, "box": 1.0}
    picks = [pick_recipe(weights, 1, n) for n in range(2000)]
    assert 0.72 < Counter(picks)["strokes"] / 2000 < 0.78
    assert picks == [pick_recipe({"box": 1.0, "strokes": 3.0}, 1, n) for n in range(2000)]
    assert picks != [pick_recipe(weights, 2, n) for n in range(2000)]


def test_a_training_mask_is_drawn_again_with_the_same_recipe_until_it_is_in_a_bin() -> None:
    weights = {"strokes": 1.0, "box": 1.0}
    redrawn = 0
    for number in range(60):
        candidate, mask = training_mask(weights, 3, number, 32)
        assert candidate.recipe == pick_recipe(weights, 3, number)
        assert ratio_bin(hole_ratio(mask)) == ratio_bin(candidate.ratio) is not None
        assert candidate.index % 2**32 == number
        redrawn += candidate.index != number
    assert redrawn > 5


def test_train_and_eval_draw_from_different_streams() -> None:
    assert split_seed(0, "train") != split_seed(0, "eval")
    assert split_seed(0, "train") != split_seed(1, "train")
    assert max(split_seed(s, "eval") for s in range(100)) < 2**52


@pytest.mark.parametrize("size", [16, 64, 256])
def test_every_bin_has_a_recipe_that_fills_it(size: int) -> None:
    advice = recipes_by_bin(size)
    assert list(advice) == list(BINS)
    assert all(advice.values())
    assert "box" in advice["0.20-0.30"]
    assert "half" in advice["0.40-0.50"]
    assert not {"box", "half", "lama-thin", "lama-medium"} & set(advice["0.50-0.60"])
