"""Shards: WebDataset tars with an index next to each, byte-identical for the same samples.

A shard is `<name>.tar` and `<name>.parquet`. Any WebDataset reader can read the tar without the
index. With the index, any sample is one range read. The index is written after the tar and holds
the tar's hash in its metadata, so a fitting index marks a finished shard. `<split>.urls` lists a
split's tars, one path per line, relative to the stage's folder.
"""

from __future__ import annotations

import hashlib
import io
import posixpath
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import PipelineError
from data_prep.core.manifest import FileRecord
from data_prep.core.storage.store import Store
from data_prep.core.tar_format import BLOCK, END, file_header, padding
from data_prep.core.temporary import naming_temporary_folder, temporary_file

if TYPE_CHECKING:
    import pyarrow as pa

_KEY = re.compile(r"[A-Za-z0-9_-]+")
# A command that ends while Arrow starts its threads would abort, so small tables use no threads.
_UNTHREADED = {"use_threads": False, "pre_buffer": False}
_PIECE = 8 << 20  # bytes read at a time
_TAR_SHA256, _TAR_SIZE = b"tar_sha256", b"tar_size"

# Key, {extension: data}, and more columns of the index, the same ones for all samples of a shard.
ShardSample = tuple[str, Mapping[str, bytes], Mapping[str, Any]]


class Place(Protocol):
    """A destination of files: a `data_prep.core.stage.Work`, or a `Folder` in a worker process."""

    @property
    def store(self) -> Store: ...

    def key(self, path: str) -> str: ...


@dataclass(frozen=True)
class Folder:
    """A folder of a store. Unlike a `Work`, it can be sent to another process."""

    store: Store
    folder: str

    def key(self, path: str) -> str:
        """Return the key of a path in the folder."""
        return f"{self.folder}/{path}"


class TarWriter:
    """A writer of samples into a tar, one after another; `size` is the size so far.

    Headers are USTAR with time, user and group 0, so the same samples give the same bytes. A key
    has at most 80 letters, digits, `_` and `-`.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.size = 0
        self._file, self._hash = file, hashlib.sha256()

    def add(self, key: str, files: Mapping[str, bytes]) -> int:
        """Append a sample; return the offset of the data of its first file."""
        assert _KEY.fullmatch(key), f"bad sample key {key!r}"
        assert len(key) <= 80, f"sample key {key!r} is too long for a tar header"
        first = self.size + BLOCK
        for extension, data in files.items():
            self._write(file_header(f"{key}.{extension}", len(data)))
            self._write(data)
            self._write(bytes(padding(len(data))))
        return first

    def close(self) -> str:
        """Write the end mark; return the tar's sha256."""
        self._write(END)
        return self._hash.hexdigest()

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)


def shard_name(split: str, number: int) -> str:
    """Return the name of a shard, such as "train-000012"."""
    return f"{split}-{number:06d}"


def write_file(place: Place, path: str, data: bytes, *, content: bool = True) -> FileRecord:
    """Write one file under the stage's folder; return its record."""
    place.store.write(place.key(path), data)
    return FileRecord(path, len(data), sha256_bytes(data), content)


def encode_table(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str] | None = None,
    metadata: Mapping[bytes, bytes] | None = None,
) -> bytes:
    """Return the bytes of a parquet file. The same rows give the same bytes.

    Args:
        rows: the rows.
        columns: names and pyarrow types of the columns ("string", "int64", …). Without them, the
            columns are those of the rows; there must be a row.
        metadata: metadata of the schema.
    """
    import pyarrow as pa

    schema = (
        pa.schema([(name, pa.type_for_alias(kind)) for name, kind in columns.items()])
        if columns is not None
        else None
    )
    return table_bytes(pa.Table.from_pylist([dict(row) for row in rows], schema=schema), metadata)


def table_bytes(table: Any, metadata: Mapping[bytes, bytes] | None = None) -> bytes:
    """Return the bytes of a parquet file with a pyarrow table, as `encode_table` writes them."""
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    # In one chunk, so that the bytes do not depend on how the table was put together.
    whole = table.combine_chunks().replace_schema_metadata(metadata)
    pq.write_table(whole, sink, compression="zstd")
    return sink.getvalue()


def read_table(source: bytes | BinaryIO, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a parquet file into memory, in this thread.

    Args:
        source: the file, or its bytes.
        columns: the columns to read; all without it.

    Raises:
        ValueError: it is damaged, or lacks one of the columns.
    """
    import pyarrow.parquet as pq

    file = io.BytesIO(source) if isinstance(source, bytes) else source
    table = pq.read_table(file, columns=columns and list(columns), **_UNTHREADED)
    if missing := set(columns or ()) - set(table.column_names):
        raise ValueError(f"it has no column {min(missing)!r}")
    return table


def decode_table(data: bytes) -> list[dict[str, Any]]:
    """Return the rows of a parquet file."""
    rows: list[dict[str, Any]] = read_table(data).to_pylist()
    return rows


def write_shard(work: Place, name: str, samples: Iterable[ShardSample]) -> list[FileRecord]:
    """Write `<name>.tar` and then its index; return the records of both.

    Samples are taken one by one and held on disk, not in memory. The first file of a sample is its
    payload. The index adds four columns to those of the sample: `key`, `offset` and `size` of the
    payload in the tar, and `sha256` of the payload.
    """
    index: list[dict[str, Any]] = []
    seen: set[str] = set()
    with temporary_file("shard") as file:
        tar = TarWriter(file)
        for key, files, columns in samples:
            assert key not in seen, f"{name}: two samples have the key {key}"
            seen.add(key)
            payload = next(iter(files.values()))
            with naming_temporary_folder():
                place = {"offset": tar.add(key, files), "size": len(payload)}
            index.append({"key": key, **place, "sha256": sha256_bytes(payload), **columns})
        assert index, f"{name} has no samples"
        with naming_temporary_folder():
            sha256 = tar.close()
            file.flush()
        work.store.upload(work.key(f"{name}.tar"), Path(file.name))
    mark = {_TAR_SHA256: sha256.encode(), _TAR_SIZE: str(tar.size).encode()}
    written = write_file(work, f"{name}.parquet", encode_table(index, metadata=mark))
    return [FileRecord(f"{name}.tar", tar.size, sha256, samples=len(index)), written]


def finished_shard(work: Place, name: str) -> list[FileRecord] | None:
    """Return the records of a whole shard, whose tar has the right hash; otherwise None."""
    import pyarrow.parquet as pq

    try:
        index = work.store.read(work.key(f"{name}.parquet"))
        footer = pq.read_metadata(io.BytesIO(index))
        mark = footer.metadata or {}
        sha256, size = sha256_of(work.store, work.key(f"{name}.tar"))
    except (FileNotFoundError, ValueError):  # pyarrow's ArrowInvalid is a ValueError
        return None
    if mark.get(_TAR_SHA256) != sha256.encode():
        return None
    return [
        FileRecord(f"{name}.tar", size, sha256, samples=footer.num_rows),
        FileRecord(f"{name}.parquet", len(index), sha256_bytes(index)),
    ]


def sha256_of(store: Store, key: str) -> tuple[str, int]:
    """Return the sha256 and the size of an object, which is read piece by piece."""
    sha256, size = hashlib.sha256(), 0
    while data := store.read_range(key, size, _PIECE):
        sha256.update(data)
        size += len(data)
        if len(data) < _PIECE:
            break
    return sha256.hexdigest(), size


def write_urls(work: Place, split: str, names: Iterable[str]) -> FileRecord:
    """Write `<split>.urls`, the list of tars of the shards `names` ("train-000000", …)."""
    return write_file(work, f"{split}.urls", "".join(f"{name}.tar\n" for name in names).encode())


def split_shards(store: Store, folder: str, split: str) -> list[str]:
    """Return the keys of a split's tars in order; `folder` is the stage's folder."""
    try:
        lines = store.read(f"{folder}/{split}.urls").decode().split()
    except FileNotFoundError:
        raise PipelineError(
            f"{store.label}/{folder} has no split {split!r}: {split}.urls is missing."
        ) from None
    except ValueError:
        raise PipelineError(
            f"{store.label}/{folder}/{split}.urls was altered: it is not text. Restore the file."
        ) from None
    return [posixpath.normpath(posixpath.join(folder, line)) for line in lines]


def read_index(
    store: Store, tar_key: str, columns: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """Return the rows of a shard's index in the order of the tar (see `write_shard`)."""
    rows: list[dict[str, Any]] = read_table(store.read(index_key(tar_key)), columns).to_pylist()
    return rows


def index_key(tar_key: str) -> str:
    """Return the key of a shard's index, which is next to its tar."""
    return f"{tar_key.removesuffix('.tar')}.parquet"


def iterate_shard(store: Store, tar_key: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yield the samples of a shard in tar order: (key, {extension: data}).

    The tar is read in place, so one sample at a time is in memory.
    """
    current, files = "", dict[str, bytes]()
    with store.open(tar_key) as file, tarfile.open(fileobj=file, mode="r:") as tar:
        while (info := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # a kilobyte for each file
            key, _, extension = info.name.partition(".")
            member = tar.extractfile(info)
            assert member is not None, f"{tar_key}: {info.name} is not a file"
            if key != current:
                if files:
                    yield current, files
                current, files = key, {}
            files[extension] = member.read()
    if files:
        yield current, files
