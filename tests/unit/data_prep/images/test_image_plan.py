"""The plan of a version: splits, shards and order, with and without a parent."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from data_prep.core.errors import PipelineError
from data_prep.images.keys import (
    OTHER,
    PHOTO,
    PROBLEM,
    UNSURE,
    item_kinds,
    key_hashes,
    match_keys,
)
from data_prep.images.plan import (
    ParentState,
    Plan,
    cut_into_shards,
    plan_items,
    storage_order,
)
from data_prep.images.splits import assign_splits
from data_prep.raw.listing import SPLITS, Item, Listing, collect

MANY = [f"trip {n // 40}/photo {n}.jpg" for n in range(2000)]


def listing(keys: list[str], **columns: Any) -> Listing:
    """Make a listing of items of 10 bytes; other columns have one value for each key."""
    own = [{name: values[n] for name, values in columns.items()} for n in range(len(keys))]
    return collect(Item(key, 10, 1, **rest) for key, rest in zip(keys, own, strict=True))


def drawn(keys: list[str], **options: Any) -> tuple[dict[str, str], list[str]]:
    """Return the split of every key, drawn if the source gives none, and the notes."""
    table = listing(keys).table["key"]
    given = options.pop("given", np.full(len(keys), -1, np.int8))
    shares = {"val": 0.05, "test": 0.05, **options}
    everything = np.ones(len(keys), bool)
    splits, notes = assign_splits(given, everything, key_hashes(table).draw, **shares)
    return {k: SPLITS[c] for k, c in zip(table.to_pylist(), splits, strict=True)}, notes


def members(splits: dict[str, str], split: str) -> set[str]:
    return {key for key, own in splits.items() if own == split}


def test_the_shares_are_met_and_a_photo_keeps_its_split_when_others_arrive() -> None:
    splits, notes = drawn(MANY, val=0.1, test=0.2)
    assert not notes
    assert 150 < len(members(splits, "val")) < 250
    assert 330 < len(members(splits, "test")) < 470
    before, _ = drawn(MANY[:700], val=0.1, test=0.2)
    assert all(splits[key] == split for key, split in before.items())


def test_a_larger_share_only_adds_photos_to_its_split() -> None:
    less, _ = drawn(MANY, val=0.1, test=0.1)
    more, _ = drawn(MANY, val=0.1, test=0.3)
    assert members(less, "val") == members(more, "val")
    assert members(less, "test") < members(more, "test")


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_in_a_tiny_set_every_split_has_a_photo(count: int) -> None:
    for start in range(0, 400, count):
        splits, _ = drawn(MANY[start : start + count])
        assert set(splits.values()) == {"train", "val", "test"}
        assert len(members(splits, "train")) >= count - 4


def test_an_empty_split_is_filled_only_with_usable_photos() -> None:
    given, usable = np.full(20, -1, np.int8), np.arange(20) >= 16
    splits, _ = assign_splits(given, usable, key_hashes(listing(MANY[:20]).table["key"]).draw, 0, 0)
    assert set(splits[usable]) == {0, 1, 2}
    assert set(splits[~usable]) == {0}


def test_a_split_of_the_parent_version_is_kept() -> None:
    before = np.array([n % 3 for n in range(30)], np.int8)
    before[7] = -1
    splits, _ = drawn(MANY[:30], before=before)
    keys = sorted(MANY[:30])
    assert all(splits[key] == SPLITS[before[n]] for n, key in enumerate(keys) if n != 7)


def test_two_photos_are_too_few_for_three_splits() -> None:
    with pytest.raises(PipelineError, match=r"too few photos: 2, but at least 3 are needed"):
        drawn(MANY[:2])


def test_a_split_given_by_the_source_wins_over_the_parents() -> None:
    given = np.array([0, 0, 1, 2, 2], np.int8)
    splits, notes = drawn(list("abcde"), given=given, before=given[::-1].copy())
    assert list(splits.values()) == ["train", "train", "val", "test", "test"]
    assert not notes


def test_a_missing_split_is_drawn_from_train_with_a_note() -> None:
    keys = [f"{n:03d}" for n in range(201)]
    given = np.zeros(201, np.int8)
    given[200] = 2
    splits, notes = drawn(keys, given=given, val=0.1, test=0.1)
    assert members(splits, "test") == {"200"}
    assert 5 < len(members(splits, "val")) < 40
    assert notes == ["the source has no split val: a part of train is used instead"]


def test_a_source_without_usable_photos_in_train_is_an_error() -> None:
    with pytest.raises(PipelineError, match="too few photos: 0 in train"):
        drawn(["a", "b"], given=np.array([1, 2], np.int8))


def test_names_give_the_kinds_of_items() -> None:
    odd = ["a.jpg?w=640", "b.jpg_large", "c.mpo", "2021-07-14 12.30.45", "d.png.part"]
    keys = ["a.JPG", "b.tar.jpeg", "c", "d/e", "f.txt", "g.jpg.txt", "d.x/h", "i.j/k.webp", "p.png"]
    keys += odd
    found = listing(keys)
    found = Listing(found.table, (), {"p.png": "missing"})
    kinds = dict(zip(found.table["key"].to_pylist(), item_kinds(found, "photos"), strict=True))
    photo = {"a.JPG", "b.tar.jpeg", "i.j/k.webp"}
    unsure, other = {"c", "d/e", "d.x/h", *odd}, {"f.txt", "g.jpg.txt"}
    expected = dict.fromkeys(photo, PHOTO) | dict.fromkeys(unsure, UNSURE)
    expected |= dict.fromkeys(other, OTHER) | {"p.png": PROBLEM}
    assert kinds == expected


def test_rows_of_a_table_are_photos_under_any_name() -> None:
    rows = [Item("t.parquet/1", 5, 1, "", 0, 0, 0), Item("z.zip/1.txt", 5, 1, "", 1, 0, 0)]
    found = collect(rows, ["t.parquet", "z.zip"])
    assert item_kinds(found, "photos").tolist() == [PHOTO, OTHER]
    alone = collect([Item("1", 5, 1, "", 0, 0, 0)], [""])
    assert item_kinds(alone, "x/t.parquet").tolist() == [PHOTO]


def test_keys_are_matched_with_the_old_keys() -> None:
    old, new = [*MANY[::2], "gone"], [*MANY[:100], "new"]
    tables = [listing(keys).table["key"] for keys in (new, old)]
    rows = match_keys(key_hashes(tables[0]), tables[0], key_hashes(tables[1]), tables[1])
    olds = tables[1].to_pylist()
    for key, row in zip(tables[0].to_pylist(), rows, strict=True):
        assert (olds[row] == key) if key in old else row == -1


def test_shards_have_even_sizes_and_hold_every_row_once() -> None:
    rows = np.arange(2003)[::-1]
    shards = list(cut_into_shards(rows, "val", 7, 100))
    assert [shard.name for shard in shards] == [f"val-{n:06d}" for n in range(7, 28)]
    assert {len(shard.rows) for shard in shards} == {95, 96}
    assert np.concatenate([shard.rows for shard in shards]).tolist() == rows.tolist()
    assert list(cut_into_shards(rows[:0], "val", 0, 100)) == []


def test_shards_of_large_files_hold_fewer_rows() -> None:
    sizes = np.full(100, 1 << 28)  # 25 GiB in all
    assert len(list(cut_into_shards(np.arange(100), "train", 0, 1000, sizes))) == 25
    assert len(list(cut_into_shards(np.arange(3), "train", 0, 1000, sizes << 4))) == 3


def test_hashes_give_the_order_and_blocks_of_archives_stay_together() -> None:
    plain = listing(MANY[:50])
    order = key_hashes(plain.table["key"]).order
    rows = storage_order(plain, order, np.arange(50))
    assert (np.diff(order[rows].astype(object)) > 0).all()
    places = {
        "container": [0] * 50,
        "offset": [*range(50)][::-1],
        "block": [n // 5 for n in range(50)],
    }
    packed = listing(MANY[:50], **places)
    packed = Listing(packed.table, ("a.tar",))
    rows = storage_order(packed, key_hashes(packed.table["key"]).order, np.arange(50))
    blocks = packed.table["block"].to_numpy()[rows]
    assert [blocks[n] for n in range(0, 50, 5)] != sorted(set(blocks))
    for start in range(0, 50, 5):
        own = rows[start : start + 5]
        assert len(set(blocks[start : start + 5])) == 1
        assert (np.diff(packed.table["offset"].to_numpy()[own]) > 0).all()


def planned(found: Listing, split: Any = None, parent: ParentState | None = None) -> Plan:
    hashes = key_hashes(found.table["key"])
    kind = item_kinds(found, "photos")
    splits = np.zeros(len(found), np.int8) if split is None else np.asarray(split, np.int8)
    return plan_items(found, hashes, kind, splits, [], shard_items=4, parent=parent)


def state_of(first: Plan, found: Listing, holds: Any = None) -> ParentState:
    """Return the parent state for the items of `found`, if `first` was built without failures."""
    keys = [x.table["key"] for x in (found, first.listing)]
    row = match_keys(key_hashes(keys[0]), keys[0], key_hashes(keys[1]), keys[1])
    names = sorted(shard.name for shard in first.shards)
    stored = np.full(len(first.listing), -1, np.int32)
    for shard in first.shards:
        stored[shard.rows] = names.index(shard.name)
    holds = row >= 0 if holds is None else holds & (row >= 0)
    split = np.where(first.kind >= UNSURE, first.split, -1).astype(np.int8)
    return ParentState(row, holds, stored, split, names)


KEYS = [f"{n:02d}.jpg" for n in range(16)]


def test_a_first_plan_holds_every_photo_once_and_nothing_else() -> None:
    plan = planned(listing([*KEYS, "a.txt"]), [n % 3 for n in range(17)])
    held = np.concatenate([shard.rows for shard in plan.shards])
    assert sorted(held) == list(range(16))
    assert all((plan.split[s.rows] == SPLITS.index(s.split)).all() for s in plan.shards)
    assert (plan.added, plan.removed, plan.changed) == (16, 0, 0)
    assert not plan.same_as_parent


def test_a_plan_of_the_same_items_is_the_same_as_the_parent() -> None:
    found = listing([*KEYS, "a.txt"])
    again = planned(found, parent=state_of(planned(found), found))
    assert again.same_as_parent
    assert again.shards == []


def test_new_items_go_into_shards_with_the_next_numbers() -> None:
    first = planned(listing(KEYS))
    more = listing([*KEYS, *(f"new {n}.jpg" for n in range(5))])
    plan = planned(more, parent=state_of(first, more))
    assert plan.inherited == [f"train-{n:06d}" for n in range(4)]
    assert [(s.name, len(s.rows), s.old) for s in plan.shards] == [
        ("train-000004", 2, ""),
        ("train-000005", 3, ""),
    ]
    assert (plan.added, plan.removed, plan.changed) == (5, 0, 0)
    assert (plan.before[:16] == np.arange(16)).all()


def test_a_removed_and_a_changed_item_rewrite_only_their_shards() -> None:
    first = planned(listing(KEYS))
    gone, changed = first.shards[1].rows[0], first.shards[2].rows[1]
    rest = listing([key for n, key in enumerate(KEYS) if n != gone])
    place = rest.table["key"].to_pylist().index(KEYS[changed])
    plan = planned(rest, parent=state_of(first, rest, np.arange(15) != place))
    assert plan.inherited == ["train-000000", "train-000003"]
    assert [(s.name, s.old, len(s.rows)) for s in plan.shards] == [
        ("train-000001", "train-000001", 3),
        ("train-000002", "train-000002", 4),
    ]
    assert np.flatnonzero(plan.before < 0).tolist() == [place]
    assert (plan.added, plan.removed, plan.changed) == (0, 1, 1)
    second = plan.shards[1].rows
    order = key_hashes(rest.table["key"]).order
    assert (np.diff(order[second].astype(object)) > 0).all()


def test_an_item_that_moves_to_another_split_leaves_its_shard() -> None:
    found = listing(KEYS)
    first = planned(found)
    moved = first.shards[1].rows[0]
    plan = planned(found, np.where(np.arange(16) == moved, 2, 0), state_of(first, found))
    assert [(s.name, s.old, len(s.rows)) for s in plan.shards] == [
        ("train-000001", "train-000001", 3),
        ("test-000000", "", 1),
    ]
    assert np.flatnonzero(plan.before < 0).tolist() == [moved]


def test_a_shard_that_lost_all_items_is_neither_inherited_nor_written() -> None:
    first = planned(listing(KEYS))
    left = listing([key for n, key in enumerate(KEYS) if n not in first.shards[3].rows])
    plan = planned(left, parent=state_of(first, left))
    assert plan.shards == []
    assert plan.inherited == [f"train-{n:06d}" for n in range(3)]
    assert plan.removed == 4
    assert not plan.same_as_parent


def test_photos_that_cannot_be_read_any_more_are_a_change() -> None:
    found = listing(KEYS)
    first = planned(found)
    keys = [KEYS[n] for n in first.shards[3].rows]
    missing = Listing(found.table, (), dict.fromkeys(keys, "missing"))
    plan = planned(missing, parent=state_of(first, missing))
    assert plan.inherited == [f"train-{n:06d}" for n in range(3)]
    assert plan.changed == 4
    assert not plan.same_as_parent
