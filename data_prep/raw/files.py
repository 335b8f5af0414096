"""The common part of local files and S3 objects: their interface and their keys.

A key is a file's POSIX path below the folder. Bytes of a name that are not UTF-8 are escaped in its
key (`\\xff`), and `unescape` restores them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, NamedTuple, Protocol

from data_prep.core.errors import ItemError

if TYPE_CHECKING:
    pass

GONE = "it is gone since it was listed"
LONGEST_TEXT = 64 << 20  # bytes


class Found(NamedTuple):
    """A file: size in bytes (-1: unknown), fingerprint (0: unknown), and a problem, if any."""

    key: str
    size: int
    fingerprint: int
    problem: str = ""


class Blob(Protocol):
    """A file that is read in parts. Several threads may call `read_at`."""

    key: str
    size: int  # bytes
    fingerprint: int

    def read_at(self, offset: int, size: int) -> bytes:
        """Return these bytes, fewer at the end of the file."""

    def open(self) -> BinaryIO:
        """Open a new seekable file, which the caller closes."""


class Files(Protocol):
    """A folder or an S3 prefix. Small and picklable."""

    threads: int  # useful number of reads at the same time

    @property
    def uri(self) -> str:
        """Return the address of the folder or prefix."""

    def where(self, key: str) -> str:
        """Return the name of a file for messages."""

    def walk(self) -> Iterator[Found]:
        """Yield every file below that is not hidden, in any order."""

    def look(self, key: str) -> Found | None:
        """Return one file; None if it does not exist."""

    def read(self, key: str, limit: int) -> bytes:
        """Return the whole file. Raises ItemError if it is gone or larger than `limit` bytes."""

    def head(self, key: str, count: int) -> bytes:
        """Return the first bytes of a file. Raises ItemError if it is gone."""

    def blob(self, key: str) -> Blob:
        """Return the file for reading in parts. Raises ItemError if it is gone."""

    def first_text(self, *paths: str) -> str | None:
        """Return the text of the first file that exists; a path may lead out of the folder."""


def is_hidden(key: str) -> bool:
    """Return whether a part of the path starts with a dot. The part `..` does not count."""
    return (key.startswith(".") or "/." in key) and any(
        part.startswith(".") and part not in (".", "..") for part in key.split("/")
    )


def too_large(limit: int) -> ItemError:
    """Return the error for an item of more than `limit` bytes."""
    return ItemError(f"it is larger than {limit} bytes")


_PLAIN_BACKSLASH = re.compile(r"\\(?=x(?:5c|[89a-f][0-9a-f]))")
_UNDECODED = re.compile("[\udc80-\udcff]")
_ESCAPED = re.compile(r"\\x(5c|[89a-f][0-9a-f])")


def escape(name: str) -> str:
    """Return a name decoded with `surrogateescape` as valid Unicode, with `\\xff` for a byte."""
    if name.isascii() and "\\" not in name:
        return name
    name = _PLAIN_BACKSLASH.sub(r"\\x5c", name)  # a real backslash that looks like an escape
    return _UNDECODED.sub(lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", name)


def unescape(key: str) -> str:
    """Return the name from which `escape` made the key."""
    if "\\" not in key:
        return key
    return _ESCAPED.sub(
        lambda found: "\\" if found[1] == "5c" else chr(0xDC00 + int(found[1], 16)), key
    )
