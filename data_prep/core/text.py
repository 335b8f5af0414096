"""Text for people: durations, counts and tables, and names that are safe to show.

Names of files, of members of archives and of things in a root come from strangers. A name can hold
characters that clear a terminal, forge a line of a log or turn the order of letters around. So such
text goes through `printable` before it leaves the process.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# Controls, separators of lines, controls of the direction of letters, halves of surrogate pairs,
# and invisible marks.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
_MARKDOWN = re.compile(r"[\\`*\[\]<|]")


def printable(text: str, *, newlines: bool = False) -> str:
    """Return a text in which each character that cannot be shown is escaped, such as `\\x1b`.

    Args:
        text: any text.
        newlines: keep line breaks. Use it for a text of several lines that we made, with names that
            are already escaped.
    """
    if text.isascii() and text.isprintable():
        return text
    if newlines:
        return "\n".join(map(printable, text.replace("\r\n", "\n").split("\n")))
    return _UNPRINTABLE.sub(lambda found: _escape(ord(found[0])), text)


def _escape(code: int) -> str:
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def joined(lines: Iterable[str]) -> str:
    """Return lines as one text; what cannot be shown in a line is escaped."""
    return "\n".join(map(printable, lines))


def html_text(text: str) -> str:
    """Return a text to put into an HTML page."""
    import html  # most processes need none

    return html.escape(printable(text, newlines=True))


def markdown_text(text: str) -> str:
    """Return a text to put into Markdown, without effect on the text around it."""
    return _MARKDOWN.sub(r"\\\g<0>", printable(text))


def markdown_code(text: str) -> str:
    """Return a text as code in Markdown; a backtick becomes an apostrophe."""
    return f"`{printable(text).replace('`', chr(39))}`"


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
    """Return the lines of a table whose columns are two blanks apart, with printable cells.

    Args:
        rows: the cells, row by row; the first row is the heading.
        sides: "<" (left) or ">" (right) for each column. Without it, a column is aligned to the
            right if its last cell begins with a digit.
    """
    rows = [[printable(cell) for cell in row] for row in rows]
    sides = sides or "".join(">" if cell[:1].isdigit() else "<" for cell in rows[-1])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True)
        ).rstrip()
        for row in rows
    ]


def markdown_table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table. The cells are Markdown, see `markdown_text`."""
    lines = [heading, ["---"] * len(heading), *rows]
    return [f"| {' | '.join(map(printable, line))} |" for line in lines]
