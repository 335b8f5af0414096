"""Members of archives and tables, and the names that archives give them."""

from __future__ import annotations

import re
from typing import NamedTuple

from data_prep.raw.files import escape, is_hidden


class Member(NamedTuple):
    """A member of a container. Its container defines the meaning of `offset` and `block`."""

    name: str
    size: int  # bytes, -1: unknown
    offset: int
    block: int = 0
    problem: str = ""


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
