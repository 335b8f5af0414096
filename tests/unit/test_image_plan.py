"""The plan: splits, tiles, keys and order."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from data_prep.errors import PipelineError
from data_prep.image_plan import (
    assign_splits,
    draw_boxes,
    has_split_folders,
    mixed_order,
    sample_key,
    tile_boxes,
)

MANY = [f"trip {n // 40}/photo {n}.jpg" for n in range(2000)]


def members(splits: dict[str, str], split: str) -> set[str]:
    return {key for key, own in splits.items() if own == split}


def test_the_shares_are_met_and_a_photograph_keeps_its_split_when_others_arrive() -> None:
    splits, notes = assign_splits(MANY, False, 0.1, 0.2)
    assert not notes
    assert 150 < len(members(splits, "val")) < 250
    assert 330 < len(members(splits, "test")) < 470
    before, _ = assign_splits(MANY[:700], False, 0.1, 0.2)
    assert all(splits[key] == split for key, split in before.items())


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_in_a_tiny_set_every_split_has_a_photograph(count: int) -> None:
    for start in range(0, 400, count):
        splits, _ = assign_splits(MANY[start : start + count], False, 0.05, 0.05)
        assert set(splits.values()) == {"train", "val", "test"}
        assert len(members(splits, "train")) >= count - 4


def test_two_photographs_are_too_few_for_three_splits() -> None:
    with pytest.raises(PipelineError, match=r"2 usable photographs in all, too few: at least 3"):
        assign_splits(MANY[:2], False, 0.1, 0.1)


def test_split_folders_count_where_they_are() -> None:
    keys = ["train/a.jpg", "train/b.jpg", "validation/c.jpg", "test/d.jpg"]
    assert has_split_folders(keys)
    splits, notes = assign_splits(keys, True, 0.4, 0.1)
    assert list(splits.values()) == ["train", "train", "val", "test"]
    assert not notes


@pytest.mark.parametrize(
    "keys", [["train/a.jpg", "cat/b.jpg"], ["val/a.jpg", "test/b.jpg"], ["train.jpg", "val.jpg"]]
)
def test_other_folders_are_no_splits(keys: list[str]) -> None:
    assert not has_split_folders(keys)


def test_a_split_that_the_folders_lack_is_taken_out_of_train_and_said() -> None:
    keys = [f"train/{n}.jpg" for n in range(200)] + ["test/a.jpg"]
    splits, notes = assign_splits(keys, True, 0.1, 0.1)
    assert members(splits, "test") == {"test/a.jpg"}
    assert 5 < len(members(splits, "val")) < 40
    assert notes == ["no photographs for val: some of train/ are taken instead"]


def test_split_folders_with_nothing_usable_in_train_are_an_error() -> None:
    with pytest.raises(PipelineError, match="0 usable photographs in train/"):
        assign_splits(["val/a.jpg", "test/b.jpg"], True, 0.1, 0.1)


def test_tiles_lie_inside_cover_the_photograph_and_differ() -> None:
    boxes = tile_boxes(100, 70, [32, 64], 0.5)
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


def test_a_photograph_of_the_tiles_size_is_one_tile_and_a_smaller_one_none() -> None:
    assert tile_boxes(64, 64, [64], 0.25) == [(0, 0, 64)]
    assert tile_boxes(64, 63, [64], 0.25) == []


def test_of_many_tiles_some_are_drawn_the_same_each_time() -> None:
    boxes = tile_boxes(640, 640, [64], 0.5)
    drawn = draw_boxes("a.jpg", boxes, 20)
    assert len(set(drawn)) == 20
    assert set(drawn) <= set(boxes)
    assert draw_boxes("a.jpg", boxes[::-1], 20) == drawn
    assert draw_boxes("b.jpg", boxes, 20) != drawn


@pytest.mark.parametrize("key", ["Ferien/Übung 1.jpeg", "a.b/c..d.png", "x" * 200 + ".png", "..a"])
def test_a_sample_key_is_plain_and_short(key: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,80}", sample_key(key, (8191, 12345, 512)))


def test_names_that_look_alike_have_different_keys() -> None:
    keys = ["a b.jpg", "a_b.jpg", "a b.png", "ä b.jpg", "a/b.jpg"]
    assert len({sample_key(key) for key in keys}) == 5


def test_the_order_holds_every_sample_once_and_mixes_the_photographs() -> None:
    photographs = {key: tile_boxes(256, 256, [64], 0.5) for key in MANY[:12]}
    order = mixed_order(photographs)
    assert sorted((key, box) for _, key, box in order) == sorted(
        (key, box) for key, boxes in photographs.items() for box in boxes
    )
    neighbours = sum(a[1] == b[1] for a, b in pairwise(order))
    assert neighbours / len(order) < 0.15
    assert mixed_order(dict(reversed(photographs.items()))) == order


def test_the_tiles_of_one_of_many_photographs_stay_near_each_other() -> None:
    order = mixed_order({key: tile_boxes(256, 256, [64], 0.5) for key in MANY[:160]})
    places = [place for place, sample in enumerate(order) if sample[1] == MANY[0]]
    assert places[-1] - places[0] < len(order) / 10
