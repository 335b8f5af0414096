"""Mask recipes: deterministic, scaled with the side, and with the published parameters."""

import math
from typing import Any

import cv2
import numpy as np
import pytest

from data_prep.masks.recipes import RECIPES, draw, generator, hole_ratio

FIXED = {"box"}  # draws the same mask for every seed and index


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", [16, 33, 256])
def test_a_mask_is_a_square_of_0_and_255(recipe: str, size: int) -> None:
    mask = draw(recipe, 1, 2, size)
    assert mask.dtype == np.uint8
    assert mask.shape == (size, size)
    assert set(np.unique(mask)) <= {0, 255}
    assert mask.flags.c_contiguous


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_arguments_give_the_same_mask(recipe: str) -> None:
    for index in range(20):
        assert (draw(recipe, 5, index, 64) == draw(recipe, 5, index, 64)).all()


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - FIXED))
def test_another_seed_or_index_gives_another_mask(recipe: str) -> None:
    first = [draw(recipe, 5, i, 64) for i in range(20)]
    assert any((a != draw(recipe, 6, i, 64)).any() for i, a in enumerate(first))
    assert any((a != first[0]).any() for a in first[1:])


def test_random_numbers_depend_only_on_the_stream_and_the_index() -> None:
    assert generator("mask/box/1", 7).integers(0, 10**6, 3).tolist() == [644852, 933242, 663604]
    assert generator("mask/box/1", 8).random() != generator("mask/box/1", 7).random()
    assert generator("mask/box/2", 7).random() != generator("mask/box/1", 7).random()
    assert generator("mask/box/1", 2**64 - 1).random() < 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_lengths_scale_with_the_side(recipe: str) -> None:
    small, large = (
        np.mean([hole_ratio(draw(recipe, 3, i, size)) for i in range(60)]) for size in (64, 256)
    )
    assert abs(small - large) < 0.05


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("free-form", 0.166),
        ("free-form-box", 0.228),
        ("strokes", 0.536),
        ("lama-thin", 0.266),
        ("lama-medium", 0.224),
        ("lama-thick", 0.286),
        ("box", 0.250),
        ("box-random", 0.191),
        ("half", 0.500),
        ("outpaint", 0.279),
    ],
)
def test_a_recipe_has_the_mean_hole_ratio_of_its_version(recipe: str, expected: float) -> None:
    mean = np.mean([hole_ratio(draw(recipe, 0, i, 128)) for i in range(200)])
    assert mean == pytest.approx(expected, abs=0.003)


@pytest.mark.parametrize("recipe", ["lama-thin", "lama-medium", "lama-thick"])
def test_lama_masks_are_never_more_than_half_hole(recipe: str) -> None:
    ratios = [hole_ratio(draw(recipe, 2, i, 64)) for i in range(300)]
    assert max(ratios) <= 0.5
    assert min(ratios) > 0


def test_the_box_is_the_centred_square_of_half_the_side() -> None:
    expected = np.zeros((256, 256), np.uint8)
    expected[64:192, 64:192] = 255
    assert (draw("box", 0, 0, 256) == expected).all()


def test_a_half_mask_is_one_of_the_four_halves() -> None:
    rows, columns = np.indices((32, 32)) < 16
    halves = {half.tobytes() for half in (rows, ~rows, columns, ~columns)}
    assert {(draw("half", 0, i, 32) > 0).tobytes() for i in range(60)} == halves


def test_a_random_box_is_one_full_rectangle() -> None:
    for index in range(50):
        hole = draw("box-random", 0, index, 64) > 0
        assert (hole == np.outer(hole.any(axis=1), hole.any(axis=0))).all()


def test_outpainting_keeps_one_rectangle_and_loses_at_most_a_quarter_from_a_side() -> None:
    for index in range(50):
        known = draw("outpaint", 0, index, 64) == 0
        assert (known == np.outer(known.any(axis=1), known.any(axis=0))).all()
        assert not known.all()
        assert known[16:48, 16:48].all()


def test_an_unknown_recipe_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        draw("squiggle", 0, 0, 64)


# The parameters of the recipes at 256, measured from the drawing calls

DIAGONAL = 256 * 2**0.5


class Strokes:
    """Recorder of OpenCV calls: the points and widths of each stroke, which is still drawn."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.strokes: list[tuple[list[tuple[int, int]], list[int]]] = []
        self.mask: Any = None
        line, polylines = cv2.line, cv2.polylines

        def one(mask: Any, start: Any, end: Any, color: int, width: int) -> Any:
            self.begin(mask)
            if not self.strokes or self.strokes[-1][0][-1] != start:
                self.strokes.append(([start], []))
            self.strokes[-1][0].append(end)
            self.strokes[-1][1].append(width)
            return line(mask, start, end, color, width)

        def many(mask: Any, lines: Any, closed: bool, color: int, width: int) -> Any:
            assert not closed
            self.begin(mask)
            self.strokes += [([tuple(p) for p in points.tolist()], [width]) for points in lines]
            return polylines(mask, lines, closed, color, width)

        monkeypatch.setattr(cv2, "line", one)
        monkeypatch.setattr(cv2, "polylines", many)

    def begin(self, mask: Any) -> None:
        """Forget the strokes of an earlier mask, which the recipe discarded."""
        if mask is not self.mask:
            self.mask, self.strokes = mask, []

    def drawn(self, recipe: str, index: int) -> tuple[np.ndarray, list]:
        self.mask, self.strokes = None, []
        mask = draw(recipe, 0, index, 256)
        only_boxes = recipe.startswith("lama") and mask is not self.mask
        return mask, [] if only_boxes else self.strokes


@pytest.fixture
def strokes(monkeypatch: pytest.MonkeyPatch) -> Strokes:
    return Strokes(monkeypatch)


def steps(points: list[tuple[int, int]]) -> list[tuple[float, float]]:
    """Return length and angle of each step between points that are not at the edges."""
    clear = [all(1 < v < 254 for v in point) for point in points]
    return [
        (math.hypot(x1 - x0, y1 - y0), math.atan2(y1 - y0, x1 - x0))
        for (x0, y0), (x1, y1), a, b in zip(points, points[1:], clear, clear[1:], strict=False)
        if a and b
    ]


def test_free_form_strokes_have_the_published_counts_lengths_widths_and_angles(
    strokes: Strokes,
) -> None:
    counts, vertices, widths, lengths, angles = set(), set(), set(), [], []
    for index in range(400):
        _, drawn = strokes.drawn("free-form", index)
        counts.add(len(drawn))
        for points, (width,) in drawn:
            vertices.add(len(points) - 1)
            widths.add(width)
            for number, (length, angle) in enumerate(steps(points)):
                lengths.append(length)
                if length > 20 and len(steps(points)) == len(points) - 1:
                    angles.append((number, angle))
    assert counts == {1, 2, 3}
    assert vertices == set(range(4, 12))
    assert (min(widths), max(widths)) == (12, 40)
    assert max(lengths) <= DIAGONAL / 4 + 2
    assert np.mean(lengths) == pytest.approx(DIAGONAL / 8, abs=4)
    assert np.std(lengths) == pytest.approx(DIAGONAL / 16, abs=4)
    near = 0.06  # points are whole pixels
    low, high = 2 * math.pi / 5 - 2 * math.pi / 15, 2 * math.pi / 5 + 2 * math.pi / 15
    assert len(angles) > 50
    for number, angle in angles:
        assert low - near < (-angle if number % 2 == 0 else angle) < high + near


def test_a_box_of_at_most_128_is_added_to_free_form_strokes() -> None:
    longest = 0
    for index in range(200):
        plain = RECIPES["free-form"](generator("any", index), 256)
        boxed = RECIPES["free-form-box"](generator("any", index), 256)
        assert (boxed[plain > 0] == 255).all()
        rows, columns = np.nonzero(boxed != plain)
        if len(rows):
            box = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert (boxed[box] == 255).all()
            longest = max(longest, *boxed[box].shape)
    assert 120 < longest <= 128


def test_strokes_have_the_published_counts_lengths_and_widths(strokes: Strokes) -> None:
    counts, segments, widths, lengths, angles = set(), set(), set(), [], []
    for index in range(300):
        _, drawn = strokes.drawn("strokes", index)
        counts.add(len(drawn))
        for points, used in drawn:
            segments.add(len(points) - 1)
            widths |= set(used)
            lengths += [length for length, _ in steps(points)]
            angles += [angle for length, angle in steps(points) if length > 10]
    assert max(counts) <= 14
    assert {1, 7, 12} <= counts
    assert max(segments) == 25
    assert widths == set(range(10, 25, 2))
    assert 95 < max(lengths) <= 102
    assert np.histogram(angles, 8, (-math.pi, math.pi))[0].min() > len(angles) / 16


@pytest.mark.parametrize(
    ("recipe", "fewest", "most", "width", "length", "boxes"),
    [
        ("lama-thin", 4, 50, 10, 40, None),
        ("lama-medium", 4, 5, 50, 100, (5, 10, 50)),
        ("lama-thick", 1, 5, 100, 200, (3, 30, 150)),
    ],
)
def test_lama_masks_have_the_published_parameters(
    strokes: Strokes,
    recipe: str,
    fewest: int,
    most: int,
    width: int,
    length: int,
    boxes: tuple[int, int, int] | None,
) -> None:
    counts, widths, lengths, boxed = set(), set(), [], []
    largest = 0.0
    for index in range(600):
        mask, drawn = strokes.drawn(recipe, index)
        largest = max(largest, hole_ratio(mask))
        if not drawn:
            boxed.append(mask)
            continue
        counts.add(len(drawn))
        for points, used in drawn:
            assert 1 <= len(points) - 1 <= 5
            widths |= set(used)
            lengths += [step for step, _ in steps(points)]
    assert largest <= 0.5
    assert fewest in counts
    assert max(counts) == most or recipe == "lama-thin"
    assert max(counts) <= most
    assert widths <= set(range(5, 5 + width))
    assert {5, 4 + width} <= widths
    assert min(lengths) >= 9
    assert 0.9 * (10 + length) < max(lengths) < 12 + length
    if boxes is None:
        assert not boxed
        return
    number, short, long = boxes
    # Weight 0.3 compared with 1. Thick masks rejected for too much hole are mostly strokes.
    assert 0.18 < len(boxed) / 600 < (0.38 if recipe == "lama-thick" else 0.28)
    for mask in boxed:
        rows, columns = (mask > 0).any(axis=1).sum(), (mask > 0).any(axis=0).sum()
        assert min(rows, columns) >= short
        assert max(rows, columns) <= number * long
        parts, *_ = cv2.connectedComponentsWithStats(mask)
        assert parts - 1 <= number
