"""Text for people: durations, counts and tables."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def duration(seconds: float) -> str:
    """Return a duration in at most two units: "4.2 s", "40 s", "2 min 5 s" or "5 h 30 min"."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min"


def count_of(number: int, noun: str) -> str:
    """Return a number with its noun: "1 shard", "0 shards", "1,234 shards"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def aligned_table(rows: Sequence[Sequence[str]], sides: str = "") -> list[str]:
    """Return the lines of a table whose columns are two blanks apart.

    Args:
        rows: the cells, row by row; the first row is the heading.
        sides: "<" (left) or ">" (right) for each column. Without it, a column is aligned to the
            right if its last cell begins with a digit.
    """
    sides = sides or "".join(">" if cell[:1].isdigit() else "<" for cell in rows[-1])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def markdown_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [heading, ["---"] * len(heading), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]
