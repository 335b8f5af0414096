"""The committed versions of an image dataset, and the contents of one version.

A version may have a parent. It then refers to the parent's unchanged shards instead of copying
them.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_prep.core.errors import PipelineError, StorageError
from data_prep.core.manifest import (
    FileRecord,
    Manifest,
    ManifestHead,
    StageRef,
    read_head,
    read_manifest,
    reference,
)
from data_prep.core.paths import MANIFEST, images_folder, manifest_key
from data_prep.core.storage.store import Store
from data_prep.core.text import printable
from data_prep.images.findings import OUTCOMES
from data_prep.images.keys import Hashes, key_hashes
from data_prep.raw.listing import RULES, SPLITS, Item
from data_prep.shards.shards import read_table

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

log = logging.getLogger(__name__)

SOURCES = "sources.parquet"  # the outcome of every listed item, sorted by key
LISTED_BY = b"listing"  # in its metadata: the `RULES` by which the source was listed
_SHARD = re.compile(rf"(?:\.\./[^/]+/)?((?:{'|'.join(SPLITS)})-\d{{6,}})\.(?:tar|parquet)")


@dataclass(frozen=True)
class Version:
    """A committed version: its manifest, and the columns of its sources.parquet."""

    store: Store
    manifest: Manifest
    table: pa.Table

    @property
    def folder(self) -> str:
        """Return the version's folder under the root."""
        return self.manifest.folder

    @property
    def number(self) -> int:
        """Return the version's number, from 1."""
        return int(self.manifest.summary["version"])

    @property
    def reference(self) -> StageRef:
        """Return the reference to the stage that made the version."""
        return reference(self.manifest, 0.0, skipped=True)

    def shards(self) -> dict[str, list[FileRecord]]:
        """Return the records of each shard's tar and index, by the shard's name.

        Paths are relative to this version's folder.
        """
        found: dict[str, list[FileRecord]] = {}
        for record in self.manifest.files:
            match = _SHARD.fullmatch(record.path)
            if match:
                found.setdefault(match[1], []).append(record)
        return found

    def tars(self) -> dict[str, str]:
        """Return the key under the root of each shard's tar, by the shard's name."""
        return {
            name: posixpath.normpath(posixpath.join(self.folder, file.path))
            for name, files in self.shards().items()
            for file in files
            if file.path.endswith(".tar")
        }

    def hashes(self) -> Hashes:
        """Return the hashes of the items' keys."""
        return key_hashes(self.table["key"])

    def check_shards(self) -> None:
        """Check that every shard exists with its size, because a new version builds on them.

        `dpnet verify` checks their bytes. Raises PipelineError.
        """
        sizes: dict[str, dict[str, int]] = {}
        for files in self.shards().values():
            for file in files:
                key = posixpath.normpath(posixpath.join(self.folder, file.path))
                folder = posixpath.dirname(key)
                if folder not in sizes:
                    sizes[folder] = {entry.key: entry.size for entry in self.store.list(folder)}
                if sizes[folder].get(key) != file.size:
                    raise PipelineError(
                        f"{self.store.label}/{key} is missing or has another size, and version"
                        f" {self.number} needs it. Restore it, or run the same command with"
                        " --repack to make a version that does not need it."
                    )

    def names(self) -> list[str]:
        """Return the names of the shards, sorted."""
        return sorted(self.shards())

    def splits(self) -> NDArray[np.int8]:
        """Return each item's split as its place in SPLITS, -1 for an item that is not a photo."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        codes = pc.index_in(self.table["split"], pa.array(SPLITS))
        return np.asarray(codes.fill_null(-1).to_numpy(), np.int8)

    def outcomes(self) -> NDArray[np.int8]:
        """Return each item's outcome as its place in OUTCOMES."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        codes = pc.index_in(self.table["outcome"], pa.array(OUTCOMES))
        return np.asarray(codes.fill_null(-1).to_numpy(), np.int8)

    def sha256(self) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """Return the SHA-256 of the items' bytes, uint8 [n, 32], and which items have one."""
        return decode_hashes(self.table["sha256"])


def known_members(version: Version | None) -> Callable[[str, int], list[Item] | None]:
    """Return a function that gives `Source.list` the members of unchanged containers.

    It knows nothing of a version that was listed by other rules: those may have lost members.
    """
    same_rules = (
        version is not None
        and (version.table.schema.metadata or {}).get(LISTED_BY) == str(RULES).encode()
    )

    def members(container: str, fingerprint: int) -> list[Item] | None:
        import pyarrow as pa
        import pyarrow.compute as pc

        if version is None or not same_rules:
            return None
        if "container" not in version.table.column_names:
            return None
        table = version.table.select(["key", "size", "fingerprint", "container", "offset", "block"])
        rows = table.filter(pc.equal(table["container"], container))
        mark = pa.scalar(fingerprint, pa.uint64())
        if not len(rows) or not pc.all(pc.equal(rows["fingerprint"], mark)).as_py():
            return None
        return [Item(**{**row, "container": -1}) for row in rows.to_pylist()]

    return members


def committed_folders(store: Store, name: str) -> list[str]:
    """Return the folders of a dataset's committed versions, sorted. No manifest is read."""
    return [f for f in store.folders(images_folder(name)) if store.exists(manifest_key(f))]


def versions(store: Store, name: str) -> list[ManifestHead]:
    """Return the manifests of a dataset's committed versions without their files, oldest first.

    Damaged manifests are reported and left out. Raises PipelineError if none can be read: to build
    everything again without a word could take days.
    """
    found, damaged = [], []
    for folder in committed_folders(store, name):
        try:
            manifest = read_head(store, folder)
            int(manifest.summary["version"])
        except StorageError:
            raise
        except (PipelineError, KeyError, TypeError, ValueError):
            _warn_damaged(folder)
            damaged.append(folder)
            continue
        found.append(manifest)
    if damaged and not found:
        raise _none_readable(store, name, damaged)
    return sorted(found, key=lambda m: (m.summary["version"], m.created, m.folder))


def newest_version(store: Store, heads: Sequence[ManifestHead]) -> Version:
    """Read the newest of some versions of a dataset whose manifest is undamaged.

    Args:
        store: the root.
        heads: the versions, oldest first; at least one.

    Raises:
        PipelineError: no manifest is undamaged, or the version's table is missing or damaged.
    """
    for head in reversed(heads):
        try:
            manifest = read_manifest(store, head.folder)
        except StorageError:
            raise
        except PipelineError:
            _warn_damaged(head.folder)
            continue
        return load_version(store, manifest)
    raise _none_readable(store, heads[0].name, [head.folder for head in heads])


def _warn_damaged(folder: str) -> None:
    log.warning("images: %s is damaged or of another format: it is not used.", printable(folder))


def _none_readable(store: Store, name: str, damaged: Sequence[str]) -> PipelineError:
    top = images_folder(name)
    return PipelineError(
        f"no version of {store.label}/{top} can be read: the {MANIFEST} of"
        f" {', '.join(damaged[:5])} is damaged or of another format. Restore it from a backup,"
        " or use the version of dpnet that wrote it. To build the dataset again, choose another"
        f" images.name, or remove {top}."
    )


def load_version(store: Store, manifest: Manifest) -> Version:
    """Read a version's table of sources. Raises PipelineError if it is missing or damaged."""
    key = f"{manifest.folder}/{SOURCES}"
    try:
        with store.open(key) as file:
            table = read_table(file)
    except (FileNotFoundError, ValueError):  # pyarrow's ArrowInvalid is a ValueError
        raise PipelineError(
            f"{store.label}/{key} is missing or damaged. Restore it, or delete"
            f" {manifest.folder} and run the same command again."
        ) from None
    return Version(store, manifest, table)


def decode_hashes(column: pa.ChunkedArray) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Decode a column of hexadecimal SHA-256.

    Returns:
        uint8 [n, 32], zero for null values, and which values are not null.
    """
    import numpy as np

    parts = [np.zeros((0, 32), np.uint8)]
    for chunk in column.chunks:
        for start in range(0, len(chunk), 1 << 16):
            text = chunk.slice(start, 1 << 16).fill_null("0" * 64).to_pylist()
            raw = bytes.fromhex("".join(text))
            parts.append(np.frombuffer(raw, np.uint8).reshape(-1, 32))
    valid = np.asarray(column.is_valid().to_numpy(), np.bool_)
    return np.concatenate(parts), valid
