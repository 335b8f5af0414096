"""A folder of this machine that keeps shards of a far-away store, shared by its processes.

Files are named by the hash of their bytes, so a version of a dataset that shares shards with
another shares them here too, and a file is what it says or it is not taken. A file in use may be
evicted: who has it open reads on.
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

_NEW = ".new-"  # with a shard's hash: one that is being fetched, its whole size reserved
_SHARD = re.compile(r"[0-9a-f]{64}\.tar")  # nothing else in the folder is ever deleted


class ShardCache:
    """At most `limit` bytes of shards in `folder`; the ones not used for longest go first."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._telling, self._told = threading.Lock(), False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error(error, f"train.cache {folder}") from error

    def open(self, store: Store, key: str, sha256: str, size: int) -> int | None:
        """A descriptor of the shard's file, fetched unless it is here.

        None where it cannot be kept: it is larger than the cache, or than what others leave of it
        that fetch just now; its bytes are not those of the hash; or the disk refuses. Raises
        FileNotFoundError where the store has none.
        """
        path = self._path(sha256)
        try:
            if (file := _opened(path)) is not None or size > self.limit:
                return file
            # One process fetches, others wait for it; the lock ends with its holder.
            with _locked(self._lock(sha256)):
                file = _opened(path)
                if file is None and self._fetch(store, key, sha256, size):
                    file = _opened(path)
                return file
        except OSError as error:
            if isinstance(error, FileNotFoundError) and self.folder.is_dir():
                raise  # it is the store that has none
            self._tell(error)
            return None

    def drop(self, sha256: str) -> None:
        with suppress(OSError):
            self._path(sha256).unlink()

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.tar"

    def _lock(self, sha256: str) -> Path:
        """Who fetches a shard holds this, which others of the same first digits share."""
        return self.folder / f".lock-{sha256[:2]}"

    def _tell(self, error: OSError) -> None:
        with self._telling:
            told, self._told = self._told, True
        if not told:
            log.warning(
                "%s Until then shards are fetched each time.",
                storage_error(error, f"train.cache {self.folder}"),
            )

    def _fetch(self, store: Store, key: str, sha256: str, size: int) -> bool:
        new = self.folder / f"{_NEW}{sha256}"
        try:
            if not self._reserve(new, size):
                return False
            store.download(key, new)
            if sha256_file(new) != sha256:
                return False
            # Not while another looks through the folder, which would count neither name.
            with _locked(self.folder / ".lock"):
                os.replace(new, self._path(sha256))
            return True
        except StorageError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno is not None:
                raise error.__cause__ from None  # of this disk, not of the store
            raise
        finally:
            new.unlink(missing_ok=True)

    def _reserve(self, new: Path, size: int) -> bool:
        """Make the file `new` of `size` bytes, for which the shards not used for longest make room.

        False where there is no room for it: all else is being fetched.
        """
        with _locked(self.folder / ".lock"):
            taken, shards = size, []  # taken: what cannot be deleted
            for path in self.folder.iterdir():
                with suppress(FileNotFoundError):
                    status = path.stat()
                    if _SHARD.fullmatch(path.name):
                        shards.append((status.st_mtime_ns, status.st_size, path))
                    elif path.name.startswith(_NEW) and path != new:
                        if self._is_left(path):
                            path.unlink()
                        elif path.suffix == "":  # a part of it, which grows, lies beside
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

    def _is_left(self, new: Path) -> bool:
        """Whether the process that was fetching this was killed: nobody holds the lock."""
        try:
            with _locked(self._lock(new.name.removeprefix(_NEW)), fcntl.LOCK_NB):
                return True
        except BlockingIOError:
            return False


def _opened(path: Path) -> int | None:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    with suppress(OSError):
        os.utime(path)  # it was used just now
    return file


@contextmanager
def _locked(path: Path, how: int = 0) -> Iterator[None]:
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | how)
        yield
