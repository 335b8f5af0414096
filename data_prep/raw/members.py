"""Members of archives and tables, and the names that archives give them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from data_prep.core.errors import ItemError
from data_prep.raw.files import escape, is_hidden

# A photo and its entry need more bytes than this. A file with more members was made to fill memory.
_MEMBERS, _BYTES_PER_MEMBER = 4096, 8
LONGEST_NAME = 4096  # characters
LONGEST_NAMES = 16 << 20  # characters of all names of a small container


class Member(NamedTuple):
    """A member of a container. Its container defines the meaning of `offset` and `block`."""

    name: str
    size: int  # bytes, -1: unknown
    offset: int
    block: int = 0
    problem: str = ""


def most_members(size: int) -> int:
    """Return how many members a container of `size` bytes can have."""
    return _MEMBERS + size // _BYTES_PER_MEMBER


def too_many(count: int, size: int) -> ItemError:
    """Return the error for a container of `size` bytes with `count` members or more."""
    return ItemError(
        f"it has {count} members or more in {size} bytes, and {most_members(size)} are allowed, so"
        " they cannot be photos"
    )


class Bounds:
    """A count of what a container of `size` bytes holds, which stops before it fills the memory."""

    def __init__(self, size: int) -> None:
        self._size, self._count = size, 0
        self._left = LONGEST_NAMES + 4 * size  # an escaped byte has 4 characters

    def add(self, *names: str) -> None:
        """Count a member with its names.

        Raises:
            ItemError: There are more members, or longer names, than photos in such a file have.
        """
        self._count += 1
        self._left -= sum(map(len, names))
        if self._count > most_members(self._size):
            raise too_many(self._count, self._size)
        if self._left < 0:
            raise ItemError(
                f"the names of its members are too long for its size of {self._size} bytes"
            )


def bounded(members: Iterator[Member], size: int) -> Iterator[Member]:
    """Yield the members of a container of `size` bytes. Raises ItemError, see `Bounds.add`."""
    bounds = Bounds(size)
    for member in members:
        bounds.add(member.name)
        yield member


def checked_name(name: str) -> str:
    """Return a name, or a target of a link. Raises ItemError if no system has such a long one."""
    if len(name) > LONGEST_NAME:
        raise ItemError(f"the name of a member has more than {LONGEST_NAME} characters")
    return name


CUT = "the archive is cut off within it"  # so its other members are unknown
LEADS_OUT = "its name leads out of the archive"


def leads_out(name: str) -> bool:
    """Return whether a member's name, as a path, leads out of the archive."""
    parts = re.split(r"[/\\]", name)
    return not parts[0] or ".." in parts or re.match(r"[A-Za-z]:[/\\]", name) is not None


def member_of(name: str, size: int, offset: int, problem: str = "") -> Member | None:
    """Return the member with this stored name; None for a hidden one."""
    while name.startswith("./"):
        name = name[2:]
    name = escape(name) or "nameless"
    if leads_out(name):
        return Member(name, size, offset, 0, LEADS_OUT)
    return None if is_hidden(name) else Member(name, size, offset, 0, problem)
