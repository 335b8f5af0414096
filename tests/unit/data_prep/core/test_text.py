"""Text for people: durations, counts and tables."""

from __future__ import annotations

import pytest

from data_prep.core.text import aligned_table, count_of, duration, markdown_table


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (4.24, "4.2 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (125.4, "2 min 5 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (19800, "5 h 30 min"),
        (360000, "100 h 0 min"),
    ],
)
def test_a_duration_has_at_most_two_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_a_count_has_its_noun_in_the_right_number() -> None:
    assert [count_of(n, "shard") for n in (0, 1, 2, 1234)] == [
        "0 shards",
        "1 shard",
        "2 shards",
        "1,234 shards",
    ]


def test_a_table_has_numbers_to_the_right_and_words_to_the_left() -> None:
    rows = [["name", "size", "note"], ["a", "7", "x"], ["long name", "1,234", ""]]
    assert aligned_table(rows) == [
        "name        size  note",
        "a              7  x",
        "long name  1,234",
    ]


def test_the_sides_of_a_table_can_be_given() -> None:
    assert aligned_table([["a", "b"], ["1", "22"]], "<>") == ["a   b", "1  22"]


def test_a_markdown_table_has_a_line_under_its_heading() -> None:
    assert markdown_table(["a", "b"], [["1", "2"]]) == ["| a | b |", "| --- | --- |", "| 1 | 2 |"]
