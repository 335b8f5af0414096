"""Files below a local folder or an S3 prefix: walking, looking up, reading whole or by parts.

A key is a file's POSIX path below the folder. A name whose bytes are not UTF-8 has them escaped in
its key (`\\xff`), reversibly.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

from data_prep.core.errors import ItemError, PipelineError, StorageError
from data_prep.core.storage.store import Entry, checked_key
from data_prep.core.storage.uri import S3Address, parse_uri
from data_prep.raw.listing import fingerprint

if TYPE_CHECKING:
    from data_prep.core.storage.s3 import S3Store

GONE = "it is gone since it was listed"
_LONGEST_TEXT = 64 << 20  # bytes
_S3_READS = 16  # at once: one connection gives a fraction of what a server can


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


def open_folder(uri: str) -> LocalFiles | S3Files:
    """The files below a path, a file:// URI or an s3:// URI. Asks nothing of the storage."""
    address = parse_uri(uri)
    if isinstance(address, S3Address):
        return s3_files(address.bucket, address.prefix)
    return LocalFiles(address)


def s3_files(bucket: str, prefix: str) -> S3Files:
    """The objects below a prefix. Asks nothing of the server."""
    from data_prep.core.storage.s3 import S3Store

    return S3Files(S3Store(bucket, prefix))


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


@dataclass(frozen=True)
class LocalFiles:
    """A local folder. Symbolic links are followed, each folder once."""

    folder: Path
    threads = 1

    @property
    def uri(self) -> str:
        return str(self.folder)

    def where(self, key: str) -> str:
        return str(self.folder / key)

    def walk(self) -> Iterator[Found]:
        """Raises PipelineError when a folder cannot be read."""
        seen: set[tuple[int, int]] = set()
        waiting = [("", str(self.folder))]
        while waiting:
            below, folder = waiting.pop()
            try:
                here = os.stat(folder)
                if (here.st_dev, here.st_ino) in seen:  # a link back to a folder already listed
                    continue
                seen.add((here.st_dev, here.st_ino))
                with os.scandir(folder) as entries:
                    for entry in entries:
                        if entry.name.startswith("."):
                            continue
                        if _is_folder(entry):
                            waiting.append((f"{below}{entry.name}/", entry.path))
                        elif (found := _found_entry(below + entry.name, entry)) is not None:
                            yield found
            except FileNotFoundError:
                if not below:
                    raise PipelineError(f"the folder {folder} does not exist.") from None
                # else: removed while it was listed
            except OSError as error:
                raise _unreadable(folder, error) from error

    def look(self, key: str) -> Found | None:
        try:
            status = os.stat(self._path(key))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _unreadable(self.where(key), error) from error
        return _found(key, status)

    def read(self, key: str, limit: int) -> bytes:
        try:
            with open(self._path(key), "rb") as file:
                if os.fstat(file.fileno()).st_size > limit:
                    raise too_large(limit)
                data = file.read(limit + 1)
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise ItemError(GONE) from None
        except OSError as error:
            raise _unreadable(self.where(key), error) from error
        if len(data) > limit:
            raise too_large(limit)
        return data

    def blob(self, key: str) -> LocalBlob:
        try:
            return LocalBlob(key, self._path(key))
        except (FileNotFoundError, NotADirectoryError):
            raise ItemError(GONE) from None
        except OSError as error:
            raise _unreadable(self.where(key), error) from error

    def text_beside(self, *paths: str) -> str | None:
        for path in paths:
            if (self.folder / path).is_file():
                return self.read(path, _LONGEST_TEXT).decode("utf-8", "replace")
        return None

    def _path(self, key: str) -> str:
        return os.path.join(self.folder, unescape(key))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into what may not be read
        return False


def _found_entry(name: str, entry: os.DirEntry[str]) -> Found | None:
    """What a directory entry is; None for what is no file (a socket, a pipe)."""
    try:
        return _found(escape(name), entry.stat())
    except FileNotFoundError:
        if entry.is_symlink():
            return Found(escape(name), 0, 0, "it is a link to a file that does not exist")
        return None  # removed while it was listed
    except OSError as error:
        if entry.is_symlink():  # a link to itself
            return Found(
                escape(name), 0, 0, f"it is a link that cannot be followed: {error.strerror}"
            )
        raise


def _found(key: str, status: os.stat_result) -> Found | None:
    if not stat.S_ISREG(status.st_mode):
        return None
    return Found(key, status.st_size, fingerprint(status.st_size, status.st_mtime_ns))


def _unreadable(where: str, error: OSError) -> PipelineError:
    return PipelineError(
        f"cannot read {where}: {error.strerror or error}: check its permissions and the disk, then"
        " run the same command again."
    )


class LocalBlob:
    """A local file. It closes when nobody holds it any more."""

    def __init__(self, key: str, path: str) -> None:
        self.key, self._path = key, path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self._descriptor)
        self.size, self.fingerprint = (
            status.st_size,
            fingerprint(status.st_size, status.st_mtime_ns),
        )

    def read_at(self, offset: int, size: int) -> bytes:
        try:
            return os.pread(self._descriptor, max(0, min(size, self.size - offset)), offset)
        except OSError as error:
            raise _unreadable(self._path, error) from error

    def open(self) -> BinaryIO:
        # Over the same descriptor: the file of that name may be another one by now.
        return io.BufferedReader(_PositionedReads(self))

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


class _PositionedReads(io.RawIOBase):
    """A blob as a seekable stream."""

    def __init__(self, blob: LocalBlob) -> None:
        self._blob, self._position = blob, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._blob.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        data = self._blob.read_at(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


@dataclass(frozen=True)
class S3Files:
    """A prefix of a bucket."""

    store: S3Store
    threads = _S3_READS

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
            head = self.store._head(key)
        except FileNotFoundError:
            return None
        return _found_object(Entry(key, head["ContentLength"], head["ETag"]))

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

    def blob(self, key: str) -> S3Blob:
        found = self.look(key)
        if found is None:
            raise ItemError(GONE)
        return S3Blob(self.store, found)

    def text_beside(self, *paths: str) -> str | None:
        bucket = s3_files(self.store.bucket, "")
        for path in paths:
            key = posixpath.normpath(posixpath.join(self.store.prefix, path))
            if bucket.look(key) is not None:
                return bucket.read(key, _LONGEST_TEXT).decode("utf-8", "replace")
        return None


_BAD_KEY = "its key starts with a slash or has '..', a backslash or a null, which is not read"


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
    """An object, read by ranges."""

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
