"""Shards as open local files: where a shard's bytes come from, and whether they are the right ones.

A shard in a folder is read in place. One on S3 is fetched whole, into the cache if there is one,
else into a file without a name that lasts as long as it is open. So what is held in memory is the
page cache's affair alone, and another process that evicts or deletes a file takes nothing away.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import posixpath
import re
import tempfile
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import PipelineError, storage_error
from data_prep.core.stage import StageRef, read_manifest
from data_prep.core.storage.store import Store, checked_key
from data_prep.shards.shards import UNTHREADED
from dpnet.loading.shard_cache import ShardCache

if TYPE_CHECKING:
    import pyarrow as pa

_PIECE = 256 << 10  # bytes hashed at a time: they stay in the processor's cache
_ADVICE = "run `dpnet verify` on the root, and put the file back from a copy"


@dataclass(frozen=True)
class Shard:
    """A shard as its manifest names it; `key` is the tar's under the root."""

    key: str
    size: int  # bytes of the tar
    sha256: str
    index_sha256: str
    samples: int


@dataclass(frozen=True)
class ShardSet:
    """The shards of one split of a committed images or masks stage."""

    uri: str
    digest: str  # the stage's content digest
    shards: Sequence[Shard]

    @property
    def samples(self) -> int:
        return sum(shard.samples for shard in self.shards)


def find_shards(store: Store, ref: StageRef, split: str) -> ShardSet:
    """The shards of `split`, from one read of the manifest.

    Raises PipelineError where the stage is not committed, has no such split, or is no longer what
    `ref` names.
    """
    uri = f"{store.uri}/{ref.folder}"
    manifest = read_manifest(store, ref.folder)
    if manifest["content_digest"] != ref.content_digest:
        raise PipelineError(
            f"{uri} is another dataset than the one that training began with (content"
            f" {manifest['content_digest'][:12]}, not {ref.content_digest[:12]}): put the old one"
            " back, or run the same command again to start a new run on this one."
        )
    pattern = re.compile(rf"(?:\.\./[^/]+/)?({re.escape(split)}-\d+)\.(tar|parquet)")
    files: dict[tuple[str, str], dict[str, Any]] = {}
    for file in manifest["files"]:
        if match := pattern.fullmatch(file["path"]):
            files[match[1], match[2]] = file
    shards = []
    for name in sorted(name for name, kind in files if kind == "tar"):
        tar, index = files[name, "tar"], files[name, "parquet"]
        key = posixpath.normpath(posixpath.join(ref.folder, tar["path"]))
        samples = tar.get("samples") or _count(store, key, index["sha256"])
        shards.append(Shard(key, tar["size"], tar["sha256"], index["sha256"], samples))
    if not shards:
        raise PipelineError(f"the split {split!r} of {uri} is empty: build it from more data.")
    return ShardSet(uri, ref.content_digest, shards)


def check_enough(shards: ShardSet, batch: int) -> None:
    """Raise PipelineError where there is not even one batch."""
    if shards.samples < batch:
        raise PipelineError(
            f"{shards.uri} has {shards.samples} samples to train on, fewer than a batch of {batch}:"
            " build it from more data, or lower train.batch_size."
        )


def _count(store: Store, key: str, index_sha256: str) -> int:
    """Samples of a shard whose manifest, an older one, does not say it."""
    import pyarrow.parquet as pq

    index = _read_index(store, key, index_sha256)
    return int(pq.read_metadata(io.BytesIO(index)).num_rows)


def _read_index(store: Store, key: str, sha256: str) -> bytes:
    index = f"{key.removesuffix('.tar')}.parquet"
    try:
        data = store.read(index)
    except FileNotFoundError:
        raise _missing(store, index) from None
    if sha256_bytes(data) != sha256:
        raise PipelineError(f"{store.uri}/{index} was altered or cut short: {_ADVICE}.")
    return data


def _missing(store: Store, key: str) -> PipelineError:
    return PipelineError(f"{store.uri}/{key} is missing: {_ADVICE}.")


class OpenShard:
    """A shard's tar, open, with the place of every sample in it."""

    def __init__(self, shard: Shard, file: int, index: pa.Table) -> None:
        self.shard = shard
        # As Arrow has them: many shards are open, and a Python string takes twice its bytes.
        self.keys, self.sha256 = index["key"], index["sha256"]
        self.offset, self.size = index["offset"].to_numpy(), index["size"].to_numpy()
        self._file = file
        weakref.finalize(self, os.close, file)  # when nothing is left to decode from it

    def read(self, position: int) -> bytes:
        """The payload of a sample. Raises ValueError where it is not the one that was stored."""
        data = os.pread(self._file, int(self.size[position]), int(self.offset[position]))
        if len(data) != self.size[position]:
            raise ValueError("the shard is shorter than its index says")
        # Now that its bytes are at hand this takes a twentieth of what decoding them does.
        if sha256_bytes(data) != self.sha256[position].as_py():
            raise ValueError("its bytes are not those that were stored")
        return data


class ShardFiles:
    """Opens shards. What comes out of them is checked sample by sample: the manifest has the hash
    of the index, and the index that of each sample."""

    def __init__(self, store: Store, cache: ShardCache | None) -> None:
        self.store, self.cache = store, cache
        self.opened = 0  # shards opened so far
        self._sound: set[str] = set()
        self._lock = threading.Lock()

    def open(self, shard: Shard) -> OpenShard:
        """Raises PipelineError for a shard that is missing, or whose index is damaged."""
        where = f"{self.store.uri}/{shard.key}"
        try:
            index = self._index(shard)
            opened = OpenShard(shard, self._file(shard), index)
        except FileNotFoundError:
            raise _missing(self.store, shard.key) from None
        except OSError as error:
            if error.errno == errno.EMFILE:
                raise PipelineError(
                    f"{where} cannot be opened, this process has too many files open: lower"
                    " train.lanes, or raise the limit with `ulimit -n`."
                ) from error
            raise storage_error(error, where) from error
        with self._lock:
            self.opened += 1
        return opened

    def _file(self, shard: Shard) -> int:
        """A descriptor of the tar."""
        if folder := self.store.local_folder:
            return os.open(folder / checked_key(shard.key), os.O_RDONLY | os.O_CLOEXEC)
        if self.cache is not None:
            kept = self.cache.open(self.store, shard.key, shard.sha256, shard.size)
            if kept is not None:
                if self._is_sound(kept, shard):
                    return kept
                os.close(kept)
                self.cache.drop(shard.sha256)  # this disk has altered it, the store has not
        with tempfile.NamedTemporaryFile(prefix="dpnet-shard-") as named:
            self.store.download(shard.key, Path(named.name))
            return os.open(named.name, os.O_RDONLY | os.O_CLOEXEC)

    def _is_sound(self, file: int, shard: Shard) -> bool:
        """Whether a cached file has the right bytes; asked once in this process's life."""
        if shard.sha256 in self._sound:
            return os.fstat(file).st_size == shard.size
        if not _has_hash(file, shard):
            return False
        with self._lock:
            self._sound.add(shard.sha256)
        return True

    def _index(self, shard: Shard) -> pa.Table:
        import pyarrow.parquet as pq

        data = _read_index(self.store, shard.key, shard.index_sha256)
        names = ["key", "offset", "size", "sha256"]
        table = pq.read_table(io.BytesIO(data), columns=names, **UNTHREADED)
        if table.num_rows != shard.samples:
            raise PipelineError(
                f"the index of {self.store.uri}/{shard.key} has {table.num_rows} samples, not the"
                f" {shard.samples} of the manifest: {_ADVICE}."
            )
        return table


def _has_hash(file: int, shard: Shard) -> bool:
    """Whether these are the shard's bytes; not where the disk cannot read them."""
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
