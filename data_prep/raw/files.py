"""Files below a local folder or an S3 prefix: walking, looking up, reading whole or by parts.

A key is a file's POSIX path below the folder. A name whose bytes are not UTF-8 has them escaped in
its key (`\\xff`), reversibly.
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
    """A file: size in bytes (-1: unknown), fingerprint (0: unknown) and why it cannot be read."""

    key: str
    size: int
    fingerprint: int
    problem: str = ""


class Blob(Protocol):
    """A file read by parts. `read_at` may be called from several threads."""

    key: str
    size: int  # bytes
    fingerprint: int

    def read_at(self, offset: int, size: int) -> bytes:
        """Those bytes, fewer where the file ends before."""

    def open(self) -> BinaryIO:
        """A seekable file of its own; the caller closes it."""


class Files(Protocol):
    """A folder or a prefix. Small and picklable."""

    threads: int  # reads at once that pay

    @property
    def uri(self) -> str: ...
    def where(self, key: str) -> str:
        """What to call a file in a message."""

    def walk(self) -> Iterator[Found]:
        """Every file below that is not hidden, in any order."""

    def look(self, key: str) -> Found | None:
        """One file, None where there is none."""

    def read(self, key: str, limit: int) -> bytes:
        """The whole file. Raises ItemError when it is gone or larger than `limit` bytes."""

    def blob(self, key: str) -> Blob:
        """The file, for reading by parts. Raises ItemError when it is gone."""

    def text_beside(self, *paths: str) -> str | None:
        """The text of the first of these that is there; a path may lead out of the folder."""


def is_hidden(key: str) -> bool:
    """Whether a part of the path starts with a dot (`..` is no name and does not count)."""
    return (key.startswith(".") or "/." in key) and any(
        part.startswith(".") and part not in (".", "..") for part in key.split("/")
    )


def too_large(limit: int) -> ItemError:
    return ItemError(f"it is larger than {limit} bytes")


_PLAIN_BACKSLASH = re.compile(r"\\(?=x(?:5c|[89a-f][0-9a-f]))")
_UNDECODED = re.compile("[\udc80-\udcff]")
_ESCAPED = re.compile(r"\\x(5c|[89a-f][0-9a-f])")


def escape(name: str) -> str:
    """A name decoded with `surrogateescape` as valid Unicode: `\\xff` for a byte that is not."""
    if name.isascii() and "\\" not in name:
        return name
    name = _PLAIN_BACKSLASH.sub(r"\\x5c", name)  # what only looks escaped
    return _UNDECODED.sub(lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", name)


def unescape(key: str) -> str:
    """The name that `escape` made the key of."""
    if "\\" not in key:
        return key
    return _ESCAPED.sub(
        lambda found: "\\" if found[1] == "5c" else chr(0xDC00 + int(found[1], 16)), key
    )
