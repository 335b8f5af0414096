"""Object storage: a local folder or an S3 prefix (`s3.py`) behind one small interface.

Keys are POSIX paths relative to the store. Every write is atomic: a reader sees the old object or
the new one, never a part. `create` and `replace` are conditional (compare-and-swap); leases and
commit markers are built on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from data_prep.core.errors import StorageError


@dataclass(frozen=True)
class Entry:
    """One object: its key, its size in bytes, and a mark that changes when it is rewritten."""

    key: str
    size: int
    fingerprint: str


class Store(Protocol):
    """What every stage needs of storage.

    Reading raises FileNotFoundError for a key that is absent. An S3 store raises StorageError for
    whatever else goes wrong; of a folder, what the operating system says on reading passes through.
    """

    uri: str

    @property
    def local_folder(self) -> Path | None:
        """Return the folder of this machine that the store is, or None for S3."""

    @property
    def label(self) -> str:
        """Return the store as people write it: a path or an S3 URI."""

    def read(self, key: str) -> bytes: ...
    def read_range(self, key: str, offset: int, size: int) -> bytes:
        """At most `size` bytes from `offset`: what there is, nothing beyond the end."""

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        """The object's bytes and the tag that `replace` compares."""

    def open(self, key: str) -> BinaryIO:
        """A seekable file for one thread, read in place: for zip, tar and Parquet readers."""

    def download(self, key: str, path: Path) -> None: ...
    def exists(self, key: str) -> bool: ...
    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Every object under the folder `prefix`, sorted by key, listed while it is asked for."""

    def folders(self, prefix: str = "") -> Iterator[str]:
        """The keys of the folders right under the folder `prefix`, sorted, whatever is in them: as
        quick as there are few of them."""

    def write(self, key: str, data: bytes) -> None: ...
    def upload(self, key: str, path: Path) -> None:
        """Store a local file's bytes under `key`; the file itself stays."""

    def create(self, key: str, data: bytes) -> str | None:
        """Write only if absent: the new tag, or None if the key exists."""

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        """Write only if the tag is still `tag`: the new tag, or None if it is not."""

    def delete(self, key: str) -> None:
        """Remove the object; absent is fine."""


def checked_key(key: str) -> str:
    """`key` itself, if it stays inside the store."""
    path = PurePosixPath(key)
    if not key or path.is_absolute() or ".." in path.parts or "\\" in key or "\0" in key:
        raise StorageError(f"{key!r} is not a key inside the store.")
    return key
