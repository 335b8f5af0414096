"""Read the mask files of a source.

The facts about each file are stored with the mask set. A later run does not read a file again if
its fingerprint is the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

from data_prep.core.apart import DECODE_S, guarded
from data_prep.core.digest import content_digest, sha256_bytes
from data_prep.core.errors import ItemError, PipelineError
from data_prep.core.pool import Map, run_apart, run_tasks
from data_prep.core.progress import Progress
from data_prep.core.text import printable
from data_prep.masks.mask_file import Conversion, PackedMask, hole_mask, rim_share, white_pixels
from data_prep.raw.listing import Item, Listing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from data_prep.masks.settings import Polarity

MAX_BYTES = 64 << 20  # of a mask file
MAX_FAILURE_RATIO = 0.05
CHUNK = 64  # files in one task of a worker
POOL_FILES = 1_000  # with fewer files, starting worker processes costs more time than it saves

POLARITIES: tuple[Polarity, ...] = ("white-hole", "black-hole")
Kind = Literal["mask", "blank", "failed", "ignored"]

COLUMNS = {
    "key": "string",
    "size": "int64",
    "fingerprint": "uint64",
    "sha256": "string",
    "white": "double",
    "rim": "double",
    "kind": "string",
    "reason": "string",
}  # of sources.parquet


class Reader(Protocol):
    """Reads items of a source; `threads` is the number of reads at once that is fastest."""

    @property
    def threads(self) -> int: ...

    def read(self, item: Item, limit: int) -> bytes: ...


class Source(Protocol):
    """The place of the files: the result of `data_prep.raw.source.open_source`."""

    @property
    def uri(self) -> str: ...

    def list(self) -> Listing: ...

    def reader(self) -> AbstractContextManager[Reader]: ...


@dataclass(frozen=True)
class MaskFile:
    """One listed file.

    Attributes:
        kind: "blank" is all hole or all known; "failed" is broken; "ignored" is not an image.
        white: share of white pixels.
        rim: share of white pixels along the edges.
        masks: its mask for each polarity, if it was read in this run.
    """

    key: str
    size: int
    fingerprint: int
    kind: Kind
    sha256: str = ""
    white: float = 0.0
    rim: float = 0.0
    reason: str = ""
    masks: Mapping[Polarity, PackedMask] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Return the file's row in sources.parquet."""
        return {column: getattr(self, column) for column in COLUMNS}


@dataclass(frozen=True)
class Reading:
    """The reading of mask files: from which source, into which masks, with how many workers."""

    source: Source
    conversion: Conversion
    run: Map
    workers: int


def read_files(reading: Reading, known: Mapping[str, Mapping[str, Any]]) -> list[MaskFile]:
    """Read every listed file, except those with the same fingerprint as their row in `known`.

    Returns:
        All listed files, sorted by key.

    Raises:
        PipelineError: there is no mask, or too many files are broken.
    """
    from data_prep.raw.layouts import IGNORED
    from data_prep.raw.overlap import check_no_root

    listing = reading.source.list()
    check_no_root(listing, reading.source.uri, "masks.external")
    files: dict[str, MaskFile] = {}
    unread: list[Item] = []
    for item in listing.items():
        facts = (item.key, item.size, item.fingerprint)
        if problem := listing.problems.get(item.key):
            kind: Kind = "ignored" if problem.startswith(IGNORED) else "failed"
            files[item.key] = MaskFile(*facts, kind, reason=problem.removeprefix(IGNORED))
        elif (row := known.get(item.key)) and item.fingerprint == row["fingerprint"] != 0:
            files[item.key] = MaskFile(**{column: row[column] for column in COLUMNS})
        else:
            unread.append(item)
    files.update((file.key, file) for file in _read(reading, unread))
    found = [files[key] for key in sorted(files)]
    _check(reading.source, found)
    return found


def load_masks(
    reading: Reading, files: Sequence[MaskFile], polarity: Polarity
) -> list[tuple[MaskFile, PackedMask]]:
    """Return the mask of each file that is one, in order; read the files that are not read yet.

    Raises PipelineError if one of these changed since the source was listed.
    """
    unread = {file.key for file in files if file.kind == "mask" and not file.masks}
    masks = {file.key: file.masks[polarity] for file in files if file.masks}
    if unread:
        items = [item for item in reading.source.list().items() if item.key in unread]
        now = {file.key: file for file in _read(reading, items)}
        for file in files:
            if file.key in unread:
                found = now.get(file.key)
                if found is None or found.sha256 != file.sha256:
                    raise PipelineError(
                        f"the mask file {printable(file.key)} in {reading.source.uri} has changed"
                        " since it was listed: run the same command again."
                    )
                masks[file.key] = found.masks[polarity]
    return [(file, masks[file.key]) for file in files if file.kind == "mask"]


def files_digest(files: Sequence[MaskFile]) -> str:
    """Return the digest of the mask files' keys and contents; their place does not count."""
    return content_digest((file.key, file.sha256) for file in files if file.kind == "mask")


def _read(reading: Reading, items: Sequence[Item]) -> Iterator[MaskFile]:
    """Read these items, and yield a MaskFile for each."""
    if not items:
        return
    # Archives are fast to read only in the order of their members.
    order = sorted(items, key=lambda item: (item.container, item.block, item.offset, item.key))
    workers = reading.workers if len(order) > POOL_FILES else 1
    chunks = [
        _Chunk(reading.source, reading.conversion, order[start : start + CHUNK], DECODE_S)
        for start in range(0, len(order), CHUNK)
    ]
    # Not in this process, which must not crash with a decoder.
    run = run_apart if reading.run is run_tasks else reading.run
    count = 0
    with (
        Progress("mask files", len(order), "files") as progress,
        closing(run(_read_chunk, chunks, workers)) as results,
    ):
        for chunk in results:
            yield from chunk
            progress.update(count := count + len(chunk))


@dataclass(frozen=True)
class _Chunk:
    """Files that one task reads; `careful` and `limit_s` are as in `ShardTask` of images."""

    source: Source
    conversion: Conversion
    items: Sequence[Item]
    limit_s: float
    careful: bool = False
    name: str = "mask files"

    def after_death(self) -> _Chunk | None:
        """Return the task to run after this one ended its worker process."""
        return None if self.careful else replace(self, careful=True)


def _read_chunk(chunk: _Chunk) -> list[MaskFile]:
    with (
        chunk.source.reader() as reader,
        ThreadPoolExecutor(reader.threads) as threads,
        guarded(white_pixels, chunk.limit_s, apart=chunk.careful) as whiten,
    ):
        read = threads.map(partial(_bytes_of, reader), chunk.items)
        return [
            _examined(item, data, chunk.conversion, whiten)
            for item, data in zip(chunk.items, read, strict=True)
        ]


def _bytes_of(reader: Reader, item: Item) -> bytes | ItemError:
    try:
        return reader.read(item, MAX_BYTES)
    except ItemError as error:
        return error


def _examined(
    item: Item,
    data: bytes | ItemError,
    conversion: Conversion,
    whiten: Callable[[bytes], NDArray[np.bool_]],
) -> MaskFile:
    """Return the facts about a file and its masks.

    Args:
        item: the file.
        data: its bytes, or the error of reading them.
        conversion: how it becomes a mask.
        whiten: `white_pixels`, perhaps in another process.
    """
    from data_prep.pictures.formats import LOOK, is_picture_name, looks_like_photo

    file = MaskFile(item.key, item.size, item.fingerprint, "failed")
    if isinstance(data, ItemError):
        # Reading may succeed next time: without a fingerprint the next run tries again.
        return replace(file, fingerprint=0, reason=str(data))
    file = replace(file, sha256=sha256_bytes(data))
    try:
        white = whiten(data)
    except ItemError as error:
        is_image = is_picture_name(item.key) or looks_like_photo(data[:LOOK])
        kind: Kind = "failed" if is_image else "ignored"
        return replace(file, kind=kind, reason=str(error))
    if white.all() or not white.any():
        reason = f"it is all {'white' if white.all() else 'black'}"
        return replace(file, kind="blank", white=float(white.all()), reason=reason)
    masks = {p: PackedMask.of(hole_mask(white, p, conversion)) for p in POLARITIES}
    return replace(file, kind="mask", white=float(white.mean()), rim=rim_share(white), masks=masks)


def _check(source: Source, files: Sequence[MaskFile]) -> None:
    """Check that there are masks, and few broken files. Raises PipelineError."""
    kinds = Counter(file.kind for file in files)
    failed = [file for file in files if file.kind == "failed"]
    images = len(files) - kinds["ignored"]
    first = "; ".join(printable(f"{file.key}: {file.reason}") for file in failed[:2])
    if len(failed) > max(1, MAX_FAILURE_RATIO * images):
        raise PipelineError(
            f"{len(failed)} of the {images} mask files in {source.uri} cannot be used ({first}):"
            " repair or remove them."
        )
    if not kinds["mask"]:
        blank = f", {kinds['blank']} of only one colour" if kinds["blank"] else ""
        raise PipelineError(
            f"masks.external: {source.uri} holds no mask ({len(files)} files{blank}"
            f"{f', {first}' if first else ''}): give a folder or archive of black and white"
            " images."
        )
