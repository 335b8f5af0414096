"""A folder as a store."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from stat import S_ISDIR
from typing import BinaryIO

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import storage_error
from data_prep.core.process_identity import boot, process_start
from data_prep.core.storage.store import Entry, checked_key


class LocalStore:
    """A folder. `replace` holds a file lock while it compares and writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        self.uri = self.folder.as_uri()
        self._swept: set[Path] = set()

    @property
    def local_folder(self) -> Path:
        return self.folder

    @property
    def label(self) -> str:
        return str(self.folder)

    def path(self, key: str) -> Path:
        return self.folder / checked_key(key)

    def open(self, key: str) -> BinaryIO:
        try:
            return self.path(key).open("rb")
        except (IsADirectoryError, NotADirectoryError) as error:  # S3 too has no such object
            raise FileNotFoundError(error.errno, error.strerror, error.filename) from None

    def read(self, key: str) -> bytes:
        with self.open(key) as file:
            return file.read()

    def read_range(self, key: str, offset: int, size: int) -> bytes:
        with self.open(key) as file:
            file.seek(offset)
            return file.read(size)

    def read_tagged(self, key: str) -> tuple[bytes, str]:
        data = self.read(key)
        return data, sha256_bytes(data)

    def download(self, key: str, path: Path) -> None:
        shutil.copyfile(self.path(key), path)

    def receive(self, key: str, into: BinaryIO) -> None:
        with self.open(key) as file:
            shutil.copyfileobj(file, into)

    def exists(self, key: str) -> bool:
        return self.path(key).is_file()

    def list(self, prefix: str = "") -> Iterator[Entry]:
        yield from self._walk(self.path(prefix) if prefix else self.folder)

    def _walk(self, folder: Path) -> Iterator[Entry]:
        """Yield the files below `folder` in key order, except those removed meanwhile."""
        for name in _names(folder):
            path = folder / name
            if name.endswith("/"):
                yield from self._walk(path)
            elif not name.startswith((_TEMPORARY, _PROBE)) and name != _LOCK:
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue
                if not S_ISDIR(stat.st_mode):  # links to folders are not followed
                    key = path.relative_to(self.folder).as_posix()
                    mark = f"{stat.st_size}-{stat.st_mtime_ns}"
                    yield Entry(key, stat.st_size, mark, stat.st_mtime)

    def folders(self, prefix: str = "") -> Iterator[str]:
        for name in _names(self.path(prefix) if prefix else self.folder):
            if name.endswith("/"):
                yield f"{prefix}/{name}".strip("/")

    def leftovers(self, before: float) -> Iterator[Entry]:
        for folder, _, names in os.walk(self.folder):
            for name in sorted(names):
                if name.startswith((_TEMPORARY, _PROBE)):
                    path = Path(folder) / name
                    with suppress(FileNotFoundError):
                        stat = path.lstat()
                        if stat.st_mtime < before or _is_abandoned(name):
                            key = path.relative_to(self.folder).as_posix()
                            yield Entry(key, stat.st_size, "", stat.st_mtime)

    def delete_leftover(self, key: str) -> None:
        self.delete(key)

    def write(self, key: str, data: bytes) -> None:
        with self._staged(key) as (file, path):
            file.write(data)
            _publish(file, path, self.path(key))

    def upload(self, key: str, path: Path) -> None:
        with path.open("rb") as source, self._staged(key) as (file, staged):
            shutil.copyfileobj(source, file, 1 << 20)
            _publish(file, staged, self.path(key))

    def create(self, key: str, data: bytes) -> str | None:
        with self._staged(key) as (file, path):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            # After a power cut, whoever finds this file finds the files before it too.
            _sync_folder(path.parent)
            try:
                os.link(path, self.path(key))  # atomic; fails if the key exists
            except FileExistsError:
                return None
            _sync_folder(path.parent)
        return sha256_bytes(data)

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        try:
            with self._locked(key):
                if self.read_tagged(key)[1] != tag:
                    return None
                self.write(key, data)
        except FileNotFoundError:
            return None
        return sha256_bytes(data)

    def delete(self, key: str) -> None:
        self.path(key).unlink(missing_ok=True)

    def delete_if(self, key: str, tag: str) -> bool:
        try:
            with self._locked(key):
                if self.read_tagged(key)[1] != tag:
                    return False
                self.path(key).unlink()
        except FileNotFoundError:
            return False
        return True

    def hurried(self, seconds: float) -> LocalStore:
        return self

    @contextmanager
    def _staged(self, key: str) -> Iterator[tuple[BinaryIO, Path]]:
        """Open a new temporary file next to `key`; remove it at the end if it is still there."""
        target = self.path(key)
        staged = target.with_name(_temporary_name())
        try:
            _make_folder(target.parent)
            if target.parent not in self._swept:
                self._swept.add(target.parent)
                _sweep(target.parent)
            with staged.open("xb") as file:
                yield file, staged
        except OSError as error:
            raise storage_error(error, str(target)) from error
        finally:
            with suppress(OSError):  # if the parent is a file, the error above reports it
                staged.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        with _lock(self.path(key).parent):
            yield


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the file lock of a folder. Raises FileNotFoundError if the folder does not exist."""
    while True:
        with (folder / _LOCK).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            # `remove_empty_folders` may have removed the file while this process waited for it.
            if os.fstat(file.fileno()).st_nlink:
                yield
                return


def remove_empty_folders(top: Path) -> None:
    """Remove `top` and the folders below it, except those with files."""
    for folder, _, _ in os.walk(top, topdown=False):
        with suppress(OSError):
            if os.listdir(folder) == [_LOCK]:
                with _lock(Path(folder)):
                    if os.listdir(folder) == [_LOCK]:
                        (Path(folder) / _LOCK).unlink()
            os.rmdir(folder)


_TEMPORARY = ".staged-"
_PROBE = ".probe-"  # an empty file, by which a command tests whether the root can be written
_LOCK = ".lock"


def _names(folder: Path) -> list[str]:
    """Return the names directly in `folder` in key order; those of folders end with a slash."""
    try:
        with os.scandir(folder) as found:
            # With the slash, a folder sorts among the files in the order of its keys.
            return sorted(
                f"{entry.name}/" if entry.is_dir(follow_symlinks=False) else entry.name
                for entry in found
            )
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise storage_error(error, str(folder)) from error


def _temporary_name() -> str:
    """Return a name that identifies this process, so that `_sweep` knows when it has ended."""
    pid = os.getpid()
    writer = f"{_boot_mark()}-{pid}-{process_start(pid)}"
    return f"{_TEMPORARY}{writer}-{secrets.token_hex(4)}"


def _boot_mark() -> str:
    return sha256_bytes(boot().encode())[:8] if boot() else ""


def _sweep(folder: Path) -> None:
    """Remove temporary files of processes of this machine that were killed while writing."""
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(_TEMPORARY)]
    for name in names:
        if _is_abandoned(name):
            with suppress(OSError):
                (folder / name).unlink()


def _is_abandoned(name: str) -> bool:
    """Return whether the writer of a temporary file was a process of this machine that ended."""
    mark = _boot_mark()
    written_on, pid, started = [*name.removeprefix(_TEMPORARY).split("-"), "", "", ""][:3]
    return bool(
        mark and written_on == mark and pid.isdecimal() and process_start(int(pid)) != started
    )


def _publish(file: BinaryIO, staged: Path, target: Path) -> None:
    file.flush()
    os.fsync(file.fileno())
    os.replace(staged, target)
    _sync_folder(target.parent)


def _make_folder(folder: Path) -> None:
    """Make a folder and its parents, so that they survive a power cut."""
    if folder.is_dir():
        return
    _make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _sync_folder(folder.parent)


def _sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut, where its file system can do that."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
