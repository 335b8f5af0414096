"""The interface of object storage: a local folder (`local.py`) or an S3 prefix (`s3.py`).

Keys are POSIX paths relative to the store. Every write is atomic: a reader sees the old object or
the new one, never a part. `create` and `replace` are conditional (compare-and-swap). Leases and
manifests rely on them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from data_prep.core.errors import StorageError


@dataclass(frozen=True)
class Entry:
    """One object: its key, its size in bytes, and a mark that changes with each write.

    `modified` is the time of the last write in seconds since 1970, by the clock of the storage;
    None where it is not known.
    """

    key: str
    size: int
    fingerprint: str
    modified: float | None = field(default=None, compare=False)


class Store(Protocol):
    """The operations that every stage needs of storage.

    Reading an absent key raises FileNotFoundError. An S3 store raises StorageError for every other
    failure. A folder store raises StorageError if it cannot write; other OSErrors pass through.
    """

    uri: str

    @property
    def local_folder(self) -> Path | None:
        """Return the path of a folder store, or None for S3."""

    @property
    def label(self) -> str:
        """Return the store as people write it: a path or an S3 URI."""

    def read(self, key: str) -> bytes:
        """Return the whole object."""

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        """Return at most `size` bytes from `offset`, fewer at the end of the object."""

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        """Return the object's bytes and the tag that `replace` compares."""

    def open(self, key: str) -> BinaryIO:
        """Open the object as a seekable file, read in place, for use in one thread."""

    def download(self, key: str, path: Path) -> None:
        """Copy the object to a local file, whole or not at all."""

    def receive(self, key: str, into: BinaryIO) -> None:
        """Copy the object into an empty file."""

    def exists(self, key: str) -> bool:
        """Return whether there is such an object. A folder is not an object."""

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Yield every object in the folder `prefix` and below, sorted by key."""

    def folders(self, prefix: str = "") -> Iterator[str]:
        """Yield the keys of the folders directly under `prefix`, sorted.

        Their contents are not listed, so this takes time only for the number of folders.
        """

    def leftovers(self, before: float) -> Iterator[Entry]:
        """Yield temporary objects of killed writers, which `list` hides.

        These are all that are older than `before`, in seconds since 1970. A folder store also
        yields newer ones if their writer was a process of this machine that has ended. An S3 store
        also yields unfinished multipart uploads. They cost money, and `list` does not show them.
        """

    def delete_leftover(self, key: str) -> None:
        """Remove what `leftovers` yielded under this key, if it is still there."""

    def write(self, key: str, data: bytes) -> None:
        """Store `data` under `key`, in place of an older object."""

    def upload(self, key: str, path: Path) -> None:
        """Store a copy of a local file under `key`."""

    def create(self, key: str, data: bytes) -> str | None:
        """Write only if the key does not exist. Return the new tag, or None if it exists."""

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        """Write only if the tag is still `tag`. Return the new tag, or None if it differs."""

    def delete(self, key: str) -> None:
        """Remove the object, if it exists."""

    def delete_if(self, key: str, tag: str) -> bool:
        """Remove the object only if the tag is still `tag`. Return whether it was removed.

        An S3 store never removes it, because few servers compare tags when they delete.
        """

    def hurried(self, seconds: float) -> Store:
        """Return this store with requests that are sent once and fail after about `seconds`.

        A folder store cannot limit the time of a request.
        """


def checked_key(key: str) -> str:
    """Return `key`. Raises StorageError if it leads out of the store."""
    path = PurePosixPath(key)
    if not key or path.is_absolute() or ".." in path.parts or "\\" in key or "\0" in key:
        raise StorageError(
            f"{key!r} is not a key inside the store: use a relative path without '..'."
        )
    return key
