"""Versions of an image dataset: what is committed under its name, and what a version holds.

A version may have a parent, whose untouched shards it refers to instead of copying them.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import FileRecord, Manifest, StageRef, load_reference, read_manifest
from data_prep.core.paths import MANIFEST, images_folder
from data_prep.core.progress import say
from data_prep.core.storage.store import Store
from data_prep.images.plan import Hashes, key_hashes
from data_prep.raw.listing import SPLITS, Item
from data_prep.shards.shards import UNTHREADED

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

SOURCES = "sources.parquet"
OUTCOMES = ("sample", "duplicate", "failed", "ignored")  # of a listed item
_SHARD = re.compile(rf"(?:\.\./[^/]+/)?((?:{'|'.join(SPLITS)})-\d{{6,}})\.(?:tar|parquet)")


@dataclass(frozen=True)
class Version:
    """A committed version: its manifest and the columns of its sources.parquet, sorted by key."""

    store: Store
    manifest: Manifest
    table: pa.Table

    @property
    def folder(self) -> str:
        return self.manifest.folder

    @property
    def number(self) -> int:
        return int(self.manifest.summary["version"])

    @property
    def reference(self) -> StageRef:
        return load_reference(self.store, self.folder)

    def shards(self) -> dict[str, list[FileRecord]]:
        """The records of each shard's tar and index by the shard's name; paths are relative to this
        version's folder."""
        found: dict[str, list[FileRecord]] = {}
        for record in self.manifest.files:
            match = _SHARD.fullmatch(record.path)
            if match:
                found.setdefault(match[1], []).append(record)
        return found

    def tars(self) -> dict[str, str]:
        """The key under the root of each shard's tar, by the shard's name."""
        return {
            name: posixpath.normpath(posixpath.join(self.folder, file.path))
            for name, files in self.shards().items()
            for file in files
            if file.path.endswith(".tar")
        }

    def hashes(self) -> Hashes:
        return key_hashes(self.table["key"])

    def check_shards(self) -> None:
        """Raise PipelineError unless every shard is there in its size: a new version builds on
        them. Their bytes are `dpnet verify`'s to check."""
        sizes: dict[str, dict[str, int]] = {}
        for files in self.shards().values():
            for file in files:
                key = posixpath.normpath(posixpath.join(self.folder, file.path))
                folder = posixpath.dirname(key)
                if folder not in sizes:
                    sizes[folder] = {entry.key: entry.size for entry in self.store.list(folder)}
                if sizes[folder].get(key) != file.size:
                    raise PipelineError(
                        f"{self.store.uri}/{key} is missing or has another size, and version"
                        f" {self.number} needs it: put it back, or run the same command with"
                        " --repack for a version that does not."
                    )

    def names(self) -> list[str]:
        """The names of the shards, sorted."""
        return sorted(self.shards())

    def splits(self) -> NDArray[np.int8]:
        """Each item's split as its place in SPLITS, -1 for what is no picture by its name."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        codes = pc.index_in(self.table["split"], pa.array(SPLITS))
        return np.asarray(codes.fill_null(-1).to_numpy(), np.int8)

    def outcomes(self) -> NDArray[np.int8]:
        """Each item's outcome as its place in OUTCOMES."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        codes = pc.index_in(self.table["outcome"], pa.array(OUTCOMES))
        return np.asarray(codes.fill_null(-1).to_numpy(), np.int8)

    def sha256(self) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """uint8 [n, 32], and which rows have one."""
        return decode_hashes(self.table["sha256"])


def known_members(version: Version | None) -> Callable[[str, int], list[Item] | None]:
    """For `Source.list`: what the version knows of a container that has not changed since."""

    def members(container: str, fingerprint: int) -> list[Item] | None:
        import pyarrow as pa
        import pyarrow.compute as pc

        if version is None or "container" not in version.table.column_names:
            return None
        table = version.table.select(["key", "size", "fingerprint", "container", "offset", "block"])
        rows = table.filter(pc.equal(table["container"], container))
        mark = pa.scalar(fingerprint, pa.uint64())
        if not len(rows) or not pc.all(pc.equal(rows["fingerprint"], mark)).as_py():
            return None
        return [Item(**{**row, "container": -1}) for row in rows.to_pylist()]

    return members


def versions(store: Store, name: str) -> list[Manifest]:
    """The manifests of all committed versions of a dataset, oldest first; damaged ones are told of
    and left out."""
    found = []
    top = images_folder(name)
    for entry in store.list(top):
        folder, _, file = entry.key.rpartition("/")
        if file != MANIFEST or posixpath.dirname(folder) != top:
            continue
        try:
            manifest = read_manifest(store, folder)
            int(manifest.summary["version"])
        except (PipelineError, KeyError, TypeError, ValueError):
            say(f"images: {folder} is damaged or of an older format: it is not looked at.")
            continue
        found.append(manifest)
    return sorted(found, key=lambda m: (m.summary["version"], m.created, m.folder))


def load_version(store: Store, manifest: Manifest) -> Version:
    import pyarrow.parquet as pq

    key = f"{manifest.folder}/{SOURCES}"
    try:
        with store.open(key) as file:
            table = pq.read_table(file, **UNTHREADED)
    except (FileNotFoundError, ValueError):  # pyarrow's ArrowInvalid is a ValueError
        raise PipelineError(
            f"{store.uri}/{key} is missing or damaged: restore it, or delete"
            f" {manifest.folder} and run the same command again."
        ) from None
    return Version(store, manifest, table)


def decode_hashes(column: pa.ChunkedArray) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """A column of hexadecimal sha256 as uint8 [n, 32], zero where it is null, and where not."""
    import numpy as np

    parts = [np.zeros((0, 32), np.uint8)]
    for chunk in column.chunks:
        for start in range(0, len(chunk), 1 << 16):
            text = chunk.slice(start, 1 << 16).fill_null("0" * 64).to_pylist()
            raw = bytes.fromhex("".join(text))
            parts.append(np.frombuffer(raw, np.uint8).reshape(-1, 32))
    there = np.asarray(column.is_valid().to_numpy(), np.bool_)
    return np.concatenate(parts), there
