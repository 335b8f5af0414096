"""Shards as files that can be read: where their bytes are, and whether they are the right ones.

A shard in a folder is read in place. A shard on S3 is read in one of two ways:

* Training reads all of it. It downloads the shard into the cache, or into a file without a name
  that exists while it is open. So memory holds only the system's page cache, and no other process
  can delete an open shard.
* Validation and evaluation read single samples by range requests.

Each sample is checked: the manifest holds the hash of each index, the index that of each sample.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import posixpath
import re
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import PipelineError, storage_error
from data_prep.core.manifest import FileRecord, StageRef, read_manifest
from data_prep.core.storage.store import Store, checked_key
from data_prep.core.temporary import nameless_file, naming_temporary_folder
from data_prep.shards.shards import index_key, read_table
from dpnet.loading.shard_cache import ShardCache

if TYPE_CHECKING:
    import pyarrow as pa

_COLUMNS = ["key", "offset", "size", "sha256"]  # of the index, needed to read a sample
_PIECE = 256 << 10  # bytes hashed at a time: they stay in the processor's cache
_ADVICE = "run `dpnet verify` on the root, and put the file back from a copy"


@dataclass(frozen=True)
class Shard:
    """A shard as it is in its stage's manifest."""

    key: str  # of the tar, under the root
    size: int  # bytes of the tar
    sha256: str
    index_sha256: str
    samples: int


@dataclass(frozen=True)
class ShardSet:
    """The shards of one split of a committed images or masks stage."""

    where: str  # path or URI of the stage's folder, for messages
    digest: str  # the stage's content digest
    shards: Sequence[Shard]

    @property
    def samples(self) -> int:
        """Return the number of samples in all shards."""
        return sum(shard.samples for shard in self.shards)


def find_shards(store: Store, ref: StageRef, split: str) -> ShardSet:
    """Return the shards of a split, sorted by name, from one read of the manifest.

    Raises:
        PipelineError: the stage is not committed, is not the one in `ref` any more, or has no such
            split.
    """
    where = f"{store.label}/{ref.folder}"
    manifest = read_manifest(store, ref.folder)
    if manifest.content_digest != ref.content_digest:
        raise PipelineError(
            f"{where} is another dataset than the one at the start of this run (content"
            f" {manifest.content_digest[:12]}, not {ref.content_digest[:12]}): put the old one"
            " back, or run the same command again to use this one."
        )
    pattern = re.compile(rf"(?:\.\./[^/]+/)?({re.escape(split)}-\d+)\.(tar|parquet)")
    files: dict[tuple[str, str], FileRecord] = {}
    for file in manifest.files:
        if match := pattern.fullmatch(file.path):
            files[match[1], match[2]] = file
    shards = []
    for name in sorted(name for name, kind in files if kind == "tar"):
        tar, index = files[name, "tar"], files[name, "parquet"]
        key = posixpath.normpath(posixpath.join(ref.folder, tar.path))
        samples = tar.samples or _count(store, key, index.sha256)
        shards.append(Shard(key, tar.size, tar.sha256, index.sha256, samples))
    if not shards:
        raise PipelineError(f"the split {split!r} of {where} is empty: build it from more data.")
    return ShardSet(where, ref.content_digest, shards)


def check_enough(shards: ShardSet, batch: int) -> None:
    """Raise PipelineError if there are fewer samples than in one batch."""
    if shards.samples < batch:
        raise PipelineError(
            f"{shards.where} has {shards.samples} samples to train on, fewer than a batch of"
            f" {batch}: build it from more data, or lower train.batch_size."
        )


def _count(store: Store, key: str, index_sha256: str) -> int:
    """Count the samples of a shard with its index, as older manifests do not hold the number."""
    import pyarrow.parquet as pq

    index = _read_index(store, key, index_sha256)
    return int(pq.read_metadata(io.BytesIO(index)).num_rows)


def _read_index(store: Store, key: str, sha256: str) -> bytes:
    index = index_key(key)
    try:
        data = store.read(index)
    except FileNotFoundError:
        raise _missing(store, index) from None
    except OSError as error:
        raise _cannot_open(error, f"{store.label}/{index}") from error
    if sha256_bytes(data) != sha256:
        raise PipelineError(f"{store.label}/{index} was altered or cut short: {_ADVICE}.")
    return data


def _missing(store: Store, key: str) -> PipelineError:
    return PipelineError(f"{store.label}/{key} is missing: {_ADVICE}.")


def _cannot_open(error: OSError, where: str) -> PipelineError:
    if error.errno == errno.EMFILE:
        return PipelineError(
            f"{where} cannot be opened, this process has too many files open: lower train.lanes, or"
            " raise the limit with `ulimit -n`."
        )
    return storage_error(error, where)


class OpenShard:
    """A shard that can be read, with the place and the hash of every sample in its tar.

    Args:
        shard: the shard.
        where: path or URI of the tar, for messages.
        index: the checked index.
        fetch: reads the tar; takes an offset and a size in bytes, and returns fewer bytes only at
            the end of the tar.
    """

    def __init__(
        self, shard: Shard, where: str, index: pa.Table, fetch: Callable[[int, int], bytes]
    ) -> None:
        self.shard, self.where = shard, where
        # Arrow's strings stay: many shards are open, and Python's take twice the memory.
        self.keys, self.sha256 = index["key"], index["sha256"]
        self.offset, self.size = index["offset"].to_numpy(), index["size"].to_numpy()
        self.columns = index.drop_columns(_COLUMNS)
        self._fetch = fetch

    def read(self, position: int) -> bytes:
        """Return the payload of a sample.

        Raises:
            ValueError: the bytes are not those that were stored.
        """
        data = self._fetch(int(self.offset[position]), int(self.size[position]))
        if len(data) != self.size[position]:
            raise ValueError("the shard is shorter than its index says")
        # The bytes are in the processor's cache now: this takes a twentieth of the decoding time.
        if sha256_bytes(data) != self.sha256[position].as_py():
            raise ValueError("its bytes are not those that were stored")
        return data

    def name_of(self, position: int) -> str:
        """Return the sample's key and its shard, for messages."""
        return f"sample {self.keys[position]} of {self.where}"


class ShardFiles:
    """Opens shards, and checks each sample that is read from them.

    Args:
        store: the root.
        cache: keeps shards of a store that is not a folder, or None.
    """

    def __init__(self, store: Store, cache: ShardCache | None) -> None:
        self.store, self.cache = store, cache
        self.opened = 0  # shards opened so far
        self._sound: set[str] = set()
        self._lock = threading.Lock()

    def open(self, shard: Shard) -> OpenShard:
        """Open a shard to read most of it: its tar is an open local file.

        Raises:
            PipelineError: a file is missing or cannot be opened, or the index is damaged.
        """
        index, where = self._index(shard), f"{self.store.label}/{shard.key}"
        try:
            file = self._file(shard)
        except FileNotFoundError:
            raise _missing(self.store, shard.key) from None
        except OSError as error:
            raise _cannot_open(error, where) from error
        opened = OpenShard(shard, where, index, partial(_read_file, file))
        weakref.finalize(opened, os.close, file)  # when no decoder holds the shard any more
        with self._lock:
            self.opened += 1
        return opened

    def open_in_place(self, shard: Shard, columns: Sequence[str] = ()) -> OpenShard:
        """Open a shard to read a few of its samples: each is one range read, on S3 one request.

        Validation reads a few pairs out of many shards. Evaluation reads images in random order,
        so it would have to keep every shard of the split on disk. Range reads need no disk and no
        file that stays open, and in memory only the index and the samples in use.

        Args:
            shard: the shard.
            columns: further columns of the index to keep.

        Raises:
            PipelineError: the index is missing or damaged. Reading raises it for a missing tar.
        """
        fetch = partial(_read_in_place, self.store, shard.key)
        return OpenShard(
            shard, f"{self.store.label}/{shard.key}", self._index(shard, columns), fetch
        )

    def _file(self, shard: Shard) -> int:
        """Return a descriptor of the tar."""
        if folder := self.store.local_folder:
            return os.open(folder / checked_key(shard.key), os.O_RDONLY | os.O_CLOEXEC)
        if self.cache is not None:
            kept = self.cache.open(self.store, shard.key, shard.sha256, shard.size)
            if kept is not None:
                if self._is_sound(kept, shard):
                    return kept
                os.close(kept)
                self.cache.drop(shard.sha256)  # this disk has altered the file, not the store
        with nameless_file() as nameless:
            self._receive(shard.key, nameless)
            return os.dup(nameless.fileno())

    def _receive(self, key: str, into: BinaryIO) -> None:
        with naming_temporary_folder():
            try:
                self.store.receive(key, into)
            except FileNotFoundError:  # the object, not the temporary file
                raise _missing(self.store, key) from None
            into.flush()

    def _is_sound(self, file: int, shard: Shard) -> bool:
        """Return whether a cached file has the right bytes. Each file is hashed once a process."""
        if shard.sha256 in self._sound:
            return os.fstat(file).st_size == shard.size
        if not _has_hash(file, shard):
            return False
        with self._lock:
            self._sound.add(shard.sha256)
        return True

    def _index(self, shard: Shard, columns: Sequence[str] = ()) -> pa.Table:
        data = _read_index(self.store, shard.key, shard.index_sha256)
        table = read_table(data, [*_COLUMNS, *columns])
        if table.num_rows != shard.samples:
            raise PipelineError(
                f"the index of {self.store.label}/{shard.key} has {table.num_rows} samples, not the"
                f" {shard.samples} of the manifest: {_ADVICE}."
            )
        return table


def _read_file(file: int, offset: int, size: int) -> bytes:
    return os.pread(file, size, offset)


def _read_in_place(store: Store, key: str, offset: int, size: int) -> bytes:
    try:
        if folder := store.local_folder:
            # Takes half the time of a Python file, which makes up for most of the hash's time.
            file = os.open(folder / checked_key(key), os.O_RDONLY | os.O_CLOEXEC)
            try:
                return os.pread(file, size, offset)
            finally:
                os.close(file)
        return store.read_range(key, offset, size)
    except FileNotFoundError:
        raise _missing(store, key) from None
    except OSError as error:
        raise storage_error(error, f"{store.label}/{key}") from error


def _has_hash(file: int, shard: Shard) -> bool:
    """Return whether a file has the shard's bytes: no, if the disk cannot read them."""
    sha256, at, piece = hashlib.sha256(), 0, memoryview(bytearray(_PIECE))
    try:
        if os.fstat(file).st_size != shard.size:
            return False
        while size := os.preadv(file, [piece], at):
            sha256.update(piece[:size])
            at += size
    except OSError:
        return False
    return sha256.hexdigest() == shard.sha256
