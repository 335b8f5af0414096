"""Sets of mask files, such as the NVIDIA irregular set: the recipe `external`.

Which of black and white is the hole is asked of the whole set: published sets differ, and a single
mask can be more hole than not. What is known of a file is a `MaskFile`; a later run that finds the
same fingerprint does not read it again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

from data_prep.core.digest import content_digest, sha256_bytes
from data_prep.core.errors import ConfigError, ItemError, PipelineError
from data_prep.core.pool import Map
from data_prep.core.progress import Progress
from data_prep.masks.mask_file import Made, Making, Polarity, hole_mask, rim_share, white_pixels
from data_prep.masks.plan import Candidate, ratio_bin
from data_prep.masks.recipes import generator
from data_prep.raw.listing import Item, Listing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

EXTERNAL = "external"  # the name of this recipe
MAX_BYTES = 64 << 20  # of a mask file
MAX_FAILURE_RATIO = 0.05
MAJORITY = 0.75  # of the files must agree on what is the hole
CHUNK = 64  # files in one task of a worker
POOL_FILES = 1_000  # fewer are read here sooner than worker processes start

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
    """Reads items of a source; `threads` says how many reads at once pay."""

    @property
    def threads(self) -> int: ...

    def read(self, item: Item, limit: int) -> bytes: ...


class Source(Protocol):
    """Where the files are: what `data_prep.raw.open_source` gives."""

    @property
    def uri(self) -> str: ...

    def list(self) -> Listing: ...

    def reader(self) -> AbstractContextManager[Reader]: ...


@dataclass(frozen=True)
class MaskFile:
    """One listed file.

    `white` and `rim` are the shares of white pixels in all of it and along its edges. `blank` is
    all hole or all known. `made` has its mask for each polarity, if it was read in this run.
    """

    key: str
    size: int
    fingerprint: int
    kind: Kind
    sha256: str = ""
    white: float = 0.0
    rim: float = 0.0
    reason: str = ""
    made: Mapping[Polarity, Made] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """Its row in sources.parquet."""
        return {column: getattr(self, column) for column in COLUMNS}


@dataclass(frozen=True, slots=True)
class FromFile:
    """A mask that is to be stored: which candidate it is, and the file that it comes from."""

    candidate: Candidate
    key: str
    made: Made
    flips: tuple[bool, bool]  # left to right, upside down

    def mask(self, size: int) -> NDArray[np.uint8]:
        import numpy as np

        mask = self.made.mask(size)
        return np.ascontiguousarray(
            mask[:: -1 if self.flips[1] else 1, :: -1 if self.flips[0] else 1]
        )


class FilePool:
    """The masks that an `external` recipe draws from: those of the files whose hole share lies in
    a ratio bin."""

    def __init__(self, made: Sequence[tuple[str, Made]], flips: bool) -> None:
        self._made, self._flips = made, flips

    def __len__(self) -> int:
        return len(self._made)

    def candidate(self, seed: int, index: int) -> Candidate:
        """Candidate `index` of a stream, without its pixels."""
        _, made = self._made[_place(seed, index, len(self._made))]
        return Candidate(EXTERNAL, seed, index, made.ratio, made.touches)

    def mask(self, candidate: Candidate) -> FromFile:
        seed, index = candidate.seed, candidate.index
        key, made = self._made[_place(seed, index, len(self._made))]
        flips = (False, False)
        if self._flips:
            left_right, up_down = generator(f"mask/{EXTERNAL}/{seed}", index).random(2) < 0.5
            flips = (bool(left_right), bool(up_down))
        return FromFile(candidate, key, made, flips)


def _place(seed: int, index: int, count: int) -> int:
    """Which of `count` files mask `index` uses: all in random order, then all in another one."""
    return int(_order(seed, index // count, count)[index % count])


@lru_cache(maxsize=4)
def _order(seed: int, turn: int, count: int) -> NDArray[np.int64]:
    return generator(f"files/{seed}", turn).permutation(count)


def read_files(
    source: Source,
    making: Making,
    known: Mapping[str, Mapping[str, Any]],
    run: Map,
    workers: int,
) -> list[MaskFile]:
    """Every listed file, sorted by key; those with a row in `known` and its fingerprint unread.

    Raises PipelineError when there is no mask among them or too many are broken.
    """
    from data_prep.raw.layouts import IGNORED

    listing = source.list()
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
    files.update((file.key, file) for file in _read(source, making, unread, run, workers))
    found = [files[key] for key in sorted(files)]
    _check(source, found)
    return found


def made_masks(
    source: Source,
    making: Making,
    files: Sequence[MaskFile],
    polarity: Polarity,
    run: Map,
    workers: int,
) -> list[tuple[MaskFile, Made]]:
    """The mask of each file that is one, in order; files that an earlier run read are read now.

    Raises PipelineError when one of these has changed since the source was listed.
    """
    unread = {file.key for file in files if file.kind == "mask" and not file.made}
    made = {file.key: file.made[polarity] for file in files if file.made}
    if unread:
        items = [item for item in source.list().items() if item.key in unread]
        again = {file.key: file for file in _read(source, making, items, run, workers)}
        for file in files:
            if file.key in unread:
                now = again.get(file.key)
                if now is None or now.sha256 != file.sha256:
                    raise PipelineError(
                        f"the mask file {file.key} in {source.uri} has changed since it was"
                        " listed: run the same command again."
                    )
                made[file.key] = now.made[polarity]
    return [(file, made[file.key]) for file in files if file.kind == "mask"]


def find_polarity(files: Sequence[MaskFile], where: str) -> tuple[Polarity, str]:
    """What is the hole in these files, and a sentence that says so.

    Known pixels usually are the more, and have the more of the edges: a file speaks for white holes
    if the shares of white in all of it and along its edges are together below 1. Raises ConfigError
    if the files do not agree.
    """
    masks = [file for file in files if file.kind == "mask"]
    votes: Counter[Polarity] = Counter()
    for file in masks:
        if file.white + file.rim != 1:
            votes["white-hole" if file.white + file.rim < 1 else "black-hole"] += 1
    polarity: Polarity = max(POLARITIES, key=lambda p: votes[p])
    white, black = votes["white-hole"], votes["black-hole"]
    if votes[polarity] < MAJORITY * len(masks):
        raise ConfigError(
            f"masks.external: it is not clear what is the hole in {where}, for of {len(masks)} mask"
            f" files {white} are more black and {black} more white, counting area and edges: set"
            " masks.external_polarity to white-hole or black-hole."
        )
    hole, other = ("white", "black") if polarity == "white-hole" else ("black", "white")
    sentence = (
        f"masks: {hole} is taken as hole in {where}, because {votes[polarity]} of its {len(masks)}"
        f" masks are more {other}, counting area and edges: set masks.external_polarity if that is"
        " wrong."
    )
    return polarity, sentence


def files_digest(files: Sequence[MaskFile]) -> str:
    """Digest of the mask files' keys and contents; where they lie is not in it."""
    return content_digest((file.key, file.sha256) for file in files if file.kind == "mask")


def pools(
    made: Sequence[tuple[MaskFile, Made]], splits: Sequence[str], flips: bool, where: str
) -> dict[str, FilePool]:
    """What each of `splits` draws from. Two of them share no file: half each, by content.

    Raises ConfigError if nothing is left for one.
    """
    usable = [(file, mask) for file, mask in made if ratio_bin(mask.ratio)]
    dealt = {
        split: FilePool(
            [
                (file.key, mask)
                for file, mask in usable
                if int(file.sha256[:8], 16) % len(splits) == number
            ],
            flips,
        )
        for number, split in enumerate(splits)
    }
    for split, pool in dealt.items():
        if not len(pool):
            raise ConfigError(
                f"masks.external: {where} has no mask between 1 and 60 % hole for the {split}"
                f" split: of {len(made)} masks {len(usable)} are in that range, and each goes to"
                f" one of the splits {', '.join(splits)}: give more files,"
                " another masks.external_polarity or a smaller masks.external_dilate."
            )
    return dealt


def _read(
    source: Source, making: Making, items: Sequence[Item], run: Map, workers: int
) -> Iterator[MaskFile]:
    if not items:
        return
    # One after the other in their archive: that is how archives are read fast.
    order = sorted(items, key=lambda item: (item.container, item.block, item.offset, item.key))
    workers = workers if len(order) > POOL_FILES else 1
    chunks = [order[start : start + CHUNK] for start in range(0, len(order), CHUNK)]
    count = 0
    with (
        Progress("mask files", len(order), "files") as progress,
        closing(run(partial(_read_chunk, source, making), chunks, workers)) as results,
    ):
        for chunk in results:
            yield from chunk
            progress.update(count := count + len(chunk))


def _read_chunk(source: Source, making: Making, items: Sequence[Item]) -> list[MaskFile]:
    with source.reader() as reader, ThreadPoolExecutor(reader.threads) as threads:
        read = threads.map(partial(_bytes_of, reader), items)
        return [_examined(item, data, making) for item, data in zip(items, read, strict=True)]


def _bytes_of(reader: Reader, item: Item) -> bytes | ItemError:
    try:
        return reader.read(item, MAX_BYTES)
    except ItemError as error:
        return error


def _examined(item: Item, data: bytes | ItemError, making: Making) -> MaskFile:
    from data_prep.pictures.formats import looks_like_image

    file = MaskFile(item.key, item.size, item.fingerprint, "failed")
    if isinstance(data, ItemError):
        # It may be well another time: without a fingerprint it is read again then.
        return replace(file, fingerprint=0, reason=str(data))
    file = replace(file, sha256=sha256_bytes(data))
    try:
        white = white_pixels(data)
    except ItemError as error:
        kind: Kind = "failed" if looks_like_image(data[:32]) or _named_image(item) else "ignored"
        return replace(file, kind=kind, reason=str(error))
    if white.all() or not white.any():
        reason = f"it is all {'white' if white.all() else 'black'}"
        return replace(file, kind="blank", white=float(white.all()), reason=reason)
    made = {polarity: Made.of(hole_mask(white, polarity, making)) for polarity in POLARITIES}
    return replace(file, kind="mask", white=float(white.mean()), rim=rim_share(white), made=made)


def _named_image(item: Item) -> bool:
    from data_prep.pictures.formats import EXTENSIONS

    return item.key.rpartition(".")[2].lower() in EXTENSIONS


def _check(source: Source, files: Sequence[MaskFile]) -> None:
    kinds = Counter(file.kind for file in files)
    failed = [file for file in files if file.kind == "failed"]
    pictures = len(files) - kinds["ignored"]
    first = "; ".join(f"{file.key}: {file.reason}" for file in failed[:2])
    if len(failed) > max(1, MAX_FAILURE_RATIO * pictures):
        raise PipelineError(
            f"{len(failed)} of the {pictures} mask files in {source.uri} cannot be used ({first}):"
            " repair or remove them."
        )
    if not kinds["mask"]:
        blank = f", {kinds['blank']} of one colour alone" if kinds["blank"] else ""
        raise PipelineError(
            f"masks.external: {source.uri} holds no mask ({len(files)} files{blank}"
            f"{f', {first}' if first else ''}): give a folder or archive of black and white"
            " pictures."
        )
