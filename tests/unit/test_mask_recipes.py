import numpy as np
import pytest

from data_prep.mask_recipes import RECIPES, draw, generator, hole_ratio

FIXED = {"box"}  # draws the same mask whatever the seed and index


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


def test_random_numbers_depend_on_the_stream_and_the_index_alone() -> None:
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
def test_a_recipe_draws_what_it_drew_when_its_version_was_set(recipe: str, expected: float) -> None:
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
