"""Listings hold items in columns, sorted by key."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.raw import listing
from data_prep.raw.listing import Item, collect, fingerprint


def test_items_are_sorted_by_key_in_character_order() -> None:
    keys = ["b", "a/b", "a", "ä", "Z", "a.b", "é漢😀", "a b", "\n", ""]
    found = collect(Item(key, n, n + 1) for n, key in enumerate(keys))
    assert [item.key for item in found.items()] == sorted(keys)
    assert {item.key: (item.size, item.fingerprint) for item in found.items()} == {
        key: (n, n + 1) for n, key in enumerate(keys)
    }
    assert len(found) == 10


def test_items_in_several_batches_make_one_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "ROWS", 7)
    items = [Item(f"{n:03d}", n, 2**64 - 1 - n) for n in range(50)]
    for given in (items, items[::-1], items[25:] + items[:25]):
        assert list(collect(given).items()) == items


def test_splits_and_containers_have_columns_only_if_needed() -> None:
    plain = collect([Item("a", 1, 1), Item("b", 1, 1)])
    assert plain.table.column_names == ["key", "size", "fingerprint"]
    items = [Item("a", 1, 1, "test"), Item("b", 1, 1), Item("c", -1, 0, "", 0, 512, 3)]
    full = collect(items, ["x.tar"], {"c": "broken"})
    assert list(full.items()) == items
    assert (full.containers, full.problems) == (("x.tar",), {"c": "broken"})


def test_selected_rows_can_be_read() -> None:
    items = [Item(f"{n}", n, 1, ("train", "val", "test", "")[n % 4]) for n in range(8)]
    found = collect(items)
    assert list(found.items(slice(2, 5))) == items[2:5]
    assert list(found.items(np.array([7, 0, 3]))) == [items[n] for n in (7, 0, 3)]
    assert list(found.items(np.array([], np.int64))) == []


@pytest.mark.parametrize("keys", ["aab", "aba", "baa"])
def test_a_repeated_key_is_refused_and_named(keys: str) -> None:
    with pytest.raises(ValueError, match=r"^a$"):
        collect(Item(key, 1, 1) for key in keys)


def test_a_listing_can_be_empty() -> None:
    found = collect([])
    assert len(found) == 0
    assert list(found.items()) == []


def test_a_fingerprint_differs_with_each_mark_and_is_never_zero() -> None:
    marks = [(1, 23), (12, 3), ("a", "b"), ("a\x00", "b"), ("ab",), ("ab", ""), ("\udcff",)]
    found = [fingerprint(*mark) for mark in marks]
    assert len(set(found)) == len(marks)
    assert all(0 < mark < 2**64 for mark in found)
    assert fingerprint(1, 23) == found[0]
