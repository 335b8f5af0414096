"""Sources: the raw photographs, listed, hashed and inspected.

A photograph is known by its relative key and the sha256 of its bytes. The fingerprint is a cache
that spares reading a file again, never identity.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep import pictures
from data_prep.digest import sha256_bytes
from data_prep.errors import PipelineError, storage_error
from data_prep.pool import run_tasks
from data_prep.progress import Progress
from data_prep.shards import decode_table
from data_prep.stage import MANIFEST, read_manifest
from data_prep.storage import Store

COLUMNS = {
    "key": "string",
    "size": "int64",
    "fingerprint": "string",
    "sha256": "string",
    "width": "int32",
    "height": "int32",
    "format": "string",
    "mode": "string",
    "whole": "bool",
    "error": "string",
}  # of sources.parquet
_CHUNK = 64  # files in one task of a worker


@dataclass(frozen=True)
class Item:
    """A listed file: `key` is its POSIX path below the source, `location` where to read it."""

    key: str
    location: str
    size: int
    fingerprint: str

    @property
    def is_image(self) -> bool:
        return self.extension in pictures.EXTENSIONS

    @property
    def extension(self) -> str:
        """Lower case, without the dot."""
        return os.path.splitext(self.key)[1][1:].lower()


@dataclass(frozen=True)
class Source:
    """What is known of a listed file. Files that are no images are not read: no sha256."""

    item: Item
    sha256: str = ""
    width: int = 0  # in pixels, upright; 0: unknown
    height: int = 0
    format: str = ""
    mode: str = ""
    whole: bool = False  # it was decoded to its end
    error: str = ""  # why it cannot be used; empty: it can

    @property
    def key(self) -> str:
        return self.item.key

    def row(self) -> dict[str, Any]:
        """Its row in sources.parquet."""
        row = {**vars(self), "key": self.key}
        row |= {"size": self.item.size, "fingerprint": self.item.fingerprint}
        return {column: row[column] for column in COLUMNS}


def check_folder(folder: Path) -> None:
    """Raise PipelineError unless `folder` is one: cheap enough to be asked before all work."""
    if not folder.exists():
        raise PipelineError(
            f"the photo folder {folder.absolute()} does not exist: give another with --photos or"
            " images.source (it counts from the folder that the command runs in)."
        )
    if not folder.is_dir():
        raise PipelineError(f"{folder} is a file: images.source must be a folder of photographs.")
    try:
        empty = not any(folder.iterdir())
    except OSError as error:
        raise storage_error(error, str(folder)) from error
    if empty:
        raise PipelineError(f"the photo folder {folder} is empty: put photographs into it.")


def list_items(folder: Path) -> list[Item]:
    """Every file below `folder` that is not hidden, sorted by key.

    Symbolic links are followed, each folder once. Raises PipelineError when the folder is missing,
    is a file, cannot be read or holds no file.
    """
    check_folder(folder)
    items: list[Item] = []
    seen: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise storage_error(error, error.filename) from error

    for at, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        here = os.stat(at)
        if (here.st_dev, here.st_ino) in seen:  # a link back to a folder already listed
            folders.clear()
            continue
        seen.add((here.st_dev, here.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        items.extend(
            item
            for name in names
            if not name.startswith(".") and (item := _item(folder, Path(at, name))) is not None
        )
    if not items:
        raise PipelineError(f"the photo folder {folder} is empty: put photographs into it.")
    return sorted(items, key=lambda item: item.key)


def read_item(item: Item) -> bytes:
    """The file's bytes. Raises PipelineError when it cannot be read now."""
    try:
        return Path(item.location).read_bytes()
    except FileNotFoundError:
        raise PipelineError(
            f"{item.location} is gone since the folder was listed: run the same command again."
        ) from None
    except OSError as error:
        raise PipelineError(f"cannot read {item.location}: {error.strerror}.") from error


def examine(
    items: Iterable[Item], known: Mapping[str, Mapping[str, Any]], max_pixels: int, workers: int
) -> list[Source]:
    """Hash and inspect every image, in the order of `items`.

    `known` has rows of an earlier sources.parquet by key; a file whose fingerprint is the same is
    not read again. A picture of more than `max_pixels` is hashed, not decoded.
    """
    sources = {item.key: _recall(item, known.get(item.key), max_pixels) for item in items}
    unread = [
        source.item for source in sources.values() if source.item.is_image and not source.sha256
    ]
    tasks = [
        (unread[start : start + _CHUNK], max_pixels) for start in range(0, len(unread), _CHUNK)
    ]
    if unread:
        count = 0
        with (
            Progress("read photographs", len(unread), "files") as progress,
            closing(run_tasks(_read_chunk, tasks, workers)) as results,
        ):
            for chunk in results:
                sources.update((source.key, source) for source in chunk)
                progress.update(count := count + len(chunk))
    return list(sources.values())


def known_sources(store: Store, top: str) -> dict[str, dict[str, Any]]:
    """Rows of the newest committed version's sources.parquet, by key; a cache, so none will do."""
    versions = []
    for entry in store.list(top):
        folder, _, file = entry.key.rpartition("/")
        if file == MANIFEST:
            try:
                versions.append((read_manifest(store, folder)["created"], folder))
            except PipelineError:
                continue
    if not versions:
        return {}
    try:
        rows = decode_table(store.read(f"{max(versions)[1]}/sources.parquet"))
    except (FileNotFoundError, ValueError):
        return {}
    return {row["key"]: row for row in rows}


def _item(folder: Path, path: Path) -> Item | None:
    """The item of a path; None for what is no file (a socket, a pipe)."""
    # A name that is not UTF-8 is shown escaped; `location` keeps what the system needs.
    key = path.relative_to(folder).as_posix().encode("utf-8", "surrogateescape")
    name = key.decode("utf-8", "backslashreplace")
    try:
        found = path.stat()
    except FileNotFoundError:
        return Item(name, str(path), 0, "")  # a link to nothing
    if not stat.S_ISREG(found.st_mode):
        return None
    fingerprint = f"{found.st_size}-{found.st_mtime_ns}-{found.st_ino}"
    return Item(name, str(path), found.st_size, fingerprint)


def _recall(item: Item, row: Mapping[str, Any] | None, max_pixels: int) -> Source:
    """What an earlier row still tells of the item."""
    if row is None or row["fingerprint"] != item.fingerprint or not item.is_image:
        return Source(item)
    tried = row["whole"] or row["error"] or row["width"] * row["height"] > max_pixels
    return Source(item, **{name: row[name] for name in _RECALLED}) if tried else Source(item)


_RECALLED = ("sha256", "width", "height", "format", "mode", "whole", "error")


def _read_chunk(task: tuple[list[Item], int]) -> list[Source]:
    items, max_pixels = task
    return [_read_source(item, max_pixels) for item in items]


def _read_source(item: Item, max_pixels: int) -> Source:
    if not item.fingerprint:
        return Source(item, error="it is a link to a file that does not exist")
    data = read_item(item)
    try:
        facts = pictures.inspect(data, max_pixels)
    except pictures.PictureError as error:
        return Source(item, sha256_bytes(data), error=str(error))
    return Source(item, sha256_bytes(data), **vars(facts))
