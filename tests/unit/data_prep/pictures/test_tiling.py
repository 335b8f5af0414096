"""Tiles of a photo, and the keys of samples."""

from __future__ import annotations

import re

import pytest

from data_prep.pictures.tiling import choose_tiles, sample_key, square_tiles


def test_tiles_cover_the_photo_stay_inside_and_are_all_different() -> None:
    boxes = square_tiles(100, 70, [32, 64], 0.5)
    assert len(set(boxes)) == len(boxes)
    covered = {
        (x, y)
        for left, top, side in boxes
        if side == 32
        for x in range(left, left + side)
        for y in range(top, top + side)
    }
    assert covered == {(x, y) for x in range(100) for y in range(70)}
    assert {(left, top) for left, top, side in boxes if side == 64} == {
        (left, top) for left in (0, 32, 36) for top in (0, 6)
    }


def test_a_photo_of_the_tile_size_is_one_tile_and_a_smaller_one_gives_none() -> None:
    assert square_tiles(64, 64, [64], 0.25) == [(0, 0, 64)]
    assert square_tiles(64, 63, [64], 0.25) == []


def test_the_key_decides_which_tiles_are_chosen() -> None:
    boxes = square_tiles(640, 640, [64], 0.5)
    drawn = choose_tiles("a.jpg", boxes, 20)
    assert len(set(drawn)) == 20
    assert set(drawn) <= set(boxes)
    assert choose_tiles("a.jpg", boxes[::-1], 20) == drawn
    assert choose_tiles("b.jpg", boxes, 20) != drawn


@pytest.mark.parametrize("key", ["Ferien/Übung 1.jpeg", "a.b/c..d.png", "x" * 200 + ".png", "..a"])
def test_a_sample_key_has_plain_characters_and_is_short(key: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,80}", sample_key(key, (8191, 12345, 512)))


def test_similar_names_have_different_keys() -> None:
    keys = ["a b.jpg", "a_b.jpg", "a b.png", "ä b.jpg", "a/b.jpg"]
    assert len({sample_key(key) for key in keys}) == 5
