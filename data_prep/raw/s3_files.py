"""Objects below an S3 prefix."""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

from data_prep.core.errors import ItemError, StorageError
from data_prep.core.storage.store import Entry, checked_key
from data_prep.raw.files import GONE, LONGEST_TEXT, Found, is_hidden, too_large
from data_prep.raw.listing import fingerprint

if TYPE_CHECKING:
    from data_prep.core.storage.s3 import S3Store

_READS = 16  # at the same time, because one connection does not use a server's full speed


def s3_files(bucket: str, prefix: str) -> S3Files:
    """Return the objects below a prefix, without any request to the server."""
    from data_prep.core.storage.s3 import S3Store

    return S3Files(S3Store(bucket, prefix))


@dataclass(frozen=True)
class S3Files:
    """A prefix of a bucket."""

    store: S3Store
    threads = _READS

    @property
    def uri(self) -> str:
        return self.store.uri

    def where(self, key: str) -> str:
        return f"{self.store.uri}/{key}"

    def walk(self) -> Iterator[Found]:
        for entry in self.store.list():
            if not is_hidden(entry.key):
                yield _found_object(entry)

    def look(self, key: str) -> Found | None:
        if _bad_key(key):
            return None
        try:
            entry = self.store.entry(key)
        except FileNotFoundError:
            return None
        return _found_object(entry)

    def read(self, key: str, limit: int) -> bytes:
        if _bad_key(key):
            raise ItemError(_BAD_KEY)
        try:
            data = self.store.read_range(key, 0, limit + 1)
        except FileNotFoundError:
            raise ItemError(GONE) from None
        if len(data) > limit:
            raise too_large(limit)
        return data

    def head(self, key: str, count: int) -> bytes:
        if _bad_key(key):
            raise ItemError(_BAD_KEY)
        try:
            return self.store.read_range(key, 0, count)
        except FileNotFoundError:
            raise ItemError(GONE) from None

    def blob(self, key: str) -> S3Blob:
        found = self.look(key)
        if found is None:
            raise ItemError(GONE)
        return S3Blob(self.store, found)

    def first_text(self, *paths: str) -> str | None:
        bucket = s3_files(self.store.bucket, "")
        for path in paths:
            key = posixpath.normpath(posixpath.join(self.store.prefix, path))
            if bucket.look(key) is not None:
                return bucket.read(key, LONGEST_TEXT).decode("utf-8", "replace")
        return None


_BAD_KEY = "such a key cannot be read: it starts with a slash or has '..', a backslash or a null"


def _bad_key(key: str) -> bool:
    try:
        checked_key(key)
    except StorageError:
        return True
    return False


def _found_object(entry: Entry) -> Found:
    mark = fingerprint(entry.fingerprint.strip('"'), entry.size)
    return Found(entry.key, entry.size, mark, _BAD_KEY if _bad_key(entry.key) else "")


class S3Blob:
    """An object that is read in ranges."""

    def __init__(self, store: S3Store, found: Found) -> None:
        self._store = store
        self.key, self.size, self.fingerprint = found.key, found.size, found.fingerprint

    def read_at(self, offset: int, size: int) -> bytes:
        size = max(0, min(size, self.size - offset))
        if not size:
            return b""
        try:
            return self._store.read_range(self.key, offset, size)
        except FileNotFoundError:
            raise ItemError(GONE) from None

    def open(self) -> BinaryIO:
        try:
            return self._store.open(self.key)
        except FileNotFoundError:
            raise ItemError(GONE) from None
