"""A folder on this machine that keeps shards of a remote store, shared by all processes.

A file's name is the hash of its bytes. So dataset versions that share shards share files here, and
a file with other bytes is not used. A file can be deleted while it is in use: a process that has
it open can still read it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from data_prep.core.digest import sha256_file
from data_prep.core.errors import StorageError, storage_error
from data_prep.core.storage.store import Store

log = logging.getLogger(__name__)

_NEW = ".new-"  # then a shard's hash: a file that is being fetched, with its whole size reserved
_SHARD = re.compile(r"[0-9a-f]{64}\.tar")  # nothing else in the folder is deleted


class ShardCache:
    """At most `limit` bytes of shards in a folder. The least recently used are deleted first."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._warning, self._warned = threading.Lock(), False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, f"train.cache {folder}") from error

    def open(self, store: Store, key: str, sha256: str, size: int) -> int | None:
        """Return a descriptor of a shard's file, which is fetched if it is not here.

        Args:
            store: the store to fetch from.
            key: key of the tar.
            sha256: hash of the tar, in hexadecimal digits.
            size: bytes of the tar.

        Returns:
            None if the shard cannot be kept: it does not fit next to the shards that are being
            fetched now, its bytes do not have this hash, or the disk refuses it.

        Raises:
            FileNotFoundError: the store does not have the shard.
        """
        path = self._path(sha256)
        try:
            if (file := _open_used(path)) is not None or size > self.limit:
                return file
            # One process fetches and the others wait. The lock ends with its process.
            with _locked(self._lock(sha256)):
                file = _open_used(path)
                if file is None and self._fetch(store, key, sha256, size):
                    file = _open_used(path)
                return file
        except OSError as error:
            if isinstance(error, FileNotFoundError) and self.folder.is_dir():
                raise  # the file is missing in the store, not here
            self._warn(error)
            return None

    def drop(self, sha256: str) -> None:
        """Delete a shard."""
        with suppress(OSError):
            self._path(sha256).unlink()

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.tar"

    def _lock(self, sha256: str) -> Path:
        """Return the lock file for fetching a shard. Some shards share one."""
        return self.folder / f".lock-{sha256[:2]}"

    def _warn(self, error: OSError) -> None:
        with self._warning:
            warned, self._warned = self._warned, True
        if not warned:
            log.warning(
                "%s Until then shards are fetched each time.",
                storage_error(error, f"train.cache {self.folder}"),
            )

    def _fetch(self, store: Store, key: str, sha256: str, size: int) -> bool:
        """Fetch a shard. Return whether it is here now."""
        new = self.folder / f"{_NEW}{sha256}"
        try:
            if not self._reserve(new, size):
                return False
            store.download(key, new)
            if sha256_file(new) != sha256:
                return False
            # Under the lock: during the rename another process could count neither name.
            with _locked(self.folder / ".lock"):
                os.replace(new, self._path(sha256))
            return True
        except StorageError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno is not None:
                raise error.__cause__ from None  # an error of this disk, not of the store
            raise
        finally:
            new.unlink(missing_ok=True)

    def _reserve(self, new: Path, size: int) -> bool:
        """Create the file `new` of `size` bytes, and delete least recently used shards for it.

        Return False if there is no room, because other shards are being fetched.
        """
        with _locked(self.folder / ".lock"):
            taken, shards = size, []  # taken: bytes that cannot be deleted
            for path in self.folder.iterdir():
                with suppress(FileNotFoundError):
                    status = path.stat()
                    if _SHARD.fullmatch(path.name):
                        shards.append((status.st_mtime_ns, status.st_size, path))
                    elif path.name.startswith(_NEW) and path != new:
                        if self._is_abandoned(path):
                            path.unlink()
                        elif path.suffix == "":  # not the growing `.part` file next to it
                            taken += status.st_size
            if taken > self.limit:
                return False
            held = taken + sum(its for _, its, _ in shards)
            for _, its, path in sorted(shards):
                if held <= self.limit:
                    break
                path.unlink(missing_ok=True)
                held -= its
            with new.open("wb") as file:
                file.truncate(size)
            return True

    def _is_abandoned(self, new: Path) -> bool:
        """Return whether the process that fetched this file was killed: its lock is free."""
        try:
            with _locked(self._lock(new.name.removeprefix(_NEW)), fcntl.LOCK_NB):
                return True
        except BlockingIOError:
            return False


def _open_used(path: Path) -> int | None:
    """Open a file and mark it as used now. Return None if it does not exist."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with suppress(OSError):
        os.utime(path)
    return file


@contextmanager
def _locked(path: Path, how: int = 0) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | how)
        yield
