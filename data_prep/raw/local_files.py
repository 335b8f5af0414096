"""Files below a local folder."""

from __future__ import annotations

import io
import os
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data_prep.core.errors import ConfigError, ItemError, PipelineError
from data_prep.raw.files import GONE, LONGEST_TEXT, Found, escape, too_large, unescape
from data_prep.raw.listing import fingerprint


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
        """Yield the files. Raises PipelineError if a folder cannot be read.

        A folder with several names is listed under the one with the fewest parts; a link comes
        after a folder. So the keys do not depend on the order in which the system lists folders.
        """
        seen: set[tuple[int, int]] = set()
        waiting = deque([("", str(self.folder))])
        while waiting:
            below, folder = waiting.popleft()
            inner: list[tuple[bool, str, str]] = []
            try:
                here = os.stat(folder)
                if (here.st_dev, here.st_ino) in seen:  # a link to a folder that is already listed
                    continue
                seen.add((here.st_dev, here.st_ino))
                with os.scandir(folder) as entries:
                    for entry in entries:
                        name = local_name(entry.name)
                        if name.startswith("."):
                            continue
                        if _is_folder(entry):
                            inner.append((entry.is_symlink(), name, entry.path))
                        elif (found := _found_entry(below + name, entry)) is not None:
                            yield found
            except FileNotFoundError:
                if not below:
                    raise ConfigError(
                        f"the folder {self.uri} does not exist. Correct the path."
                    ) from None
                # else: a folder was removed during the listing
            except OSError as error:
                raise _unreadable(folder, error) from error
            waiting.extend((f"{below}{name}/", path) for _, name, path in sorted(inner))

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

    def head(self, key: str, count: int) -> bytes:
        return self.blob(key).read_at(0, count)

    def blob(self, key: str) -> LocalBlob:
        try:
            return LocalBlob(key, self._path(key))
        except (FileNotFoundError, NotADirectoryError):
            raise ItemError(GONE) from None
        except OSError as error:
            raise _unreadable(self.where(key), error) from error

    def first_text(self, *paths: str) -> str | None:
        for path in paths:
            if (self.folder / path).is_file():
                return self.read(path, LONGEST_TEXT).decode("utf-8", "replace")
        return None

    def _path(self, key: str) -> str:
        name = unescape(key).encode("utf-8", "surrogateescape")
        return os.path.join(self.folder, os.fsdecode(name))


def local_name(path: str | Path) -> str:
    """Return a path as UTF-8 reads its bytes.

    Keys may not depend on the locale, and Python decodes names with the encoding of the locale.
    """
    return os.fsencode(path).decode("utf-8", "surrogateescape")


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself or into a private folder
        return False


def _found_entry(name: str, entry: os.DirEntry[str]) -> Found | None:
    """Return the file of a directory entry; None if it is a socket, a pipe or similar."""
    try:
        return _found(escape(name), entry.stat())
    except FileNotFoundError:
        if entry.is_symlink():
            return Found(escape(name), 0, 0, "it is a link to a file that does not exist")
        return None  # removed during the listing
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
        f"cannot read {where}: {error.strerror or error}. Check its permissions and the disk, then"
        " run the same command again."
    )


class LocalBlob:
    """A local file, which is closed when nothing refers to it."""

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
        # On the same descriptor, because the file may have been replaced by another one.
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
