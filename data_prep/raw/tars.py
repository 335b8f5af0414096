"""Tar archives, read header by header; compressed ones (gzip) from front to back.

`tarfile` only decodes headers here. By itself it would take a kilobyte of memory per member, and
accept an archive that is cut off.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from itertools import chain, groupby, islice, pairwise
from threading import Lock
from typing import BinaryIO, NamedTuple

from data_prep.core.errors import ItemError
from data_prep.core.tar_format import BLOCK, padded
from data_prep.pictures.formats import is_picture_name
from data_prep.raw.files import Blob, too_large
from data_prep.raw.layouts import IGNORED
from data_prep.raw.links import Link, Stored, linked_members
from data_prep.raw.members import CUT, Bounds, Member, checked_name, member_of
from data_prep.raw.samples import images_of, stem_of

_LONGEST_NAME = 1 << 20  # bytes of an extended header; a longer one is damage or an attack
UNENDED = "it may be cut off: its end mark is missing"
ReadAt = Callable[[int, int], bytes]  # (offset, size) → bytes, fewer at the end


class Tar:
    """A tar archive. An offset is the place of a member's data in the uncompressed tar."""

    def __init__(self, blob: Blob, compressed: bool, samples: bool | None) -> None:
        """Open an archive.

        Args:
            blob: The file.
            compressed: Whether the file is compressed by gzip.
            samples: Whether consecutive members `key.jpg`, `key.json` … are one WebDataset sample,
                and only its image counts as a member. None: the first members decide.
        """
        self._blob, self._samples = blob, samples
        self._unpacked = _Forward(blob) if compressed else None
        self.weight = 2 * _WINDOW if compressed else BLOCK  # bytes in memory

    def members(self) -> Iterator[Member]:
        found = self._files()
        if self._samples is None:
            first, fault = _first(found)
            rest = found if fault is None else _raise(fault)
            found = chain(first, rest)
            if not _are_samples(first):
                yield from found
                return
        elif not self._samples:
            yield from found
            return
        for stem, sample in groupby(found, key=lambda member: stem_of(member.name)):
            members = list(sample)
            images = images_of(stem, members)
            yield from images
            if any(member.problem == CUT for member in members if member not in images):
                raise ItemError("it is cut off")

    def read(self, offset: int, size: int, limit: int) -> bytes:
        if size > limit:
            raise too_large(limit)
        if self._unpacked is not None:
            data = self._unpacked.read_at(offset, size)
        else:
            data = self._blob.read_at(offset, size)
        if len(data) < size:
            raise ItemError(CUT)
        return data

    def head(self, offset: int, size: int, count: int) -> bytes:
        return self.read(offset, min(size, count), count)

    def _files(self) -> Iterator[Member]:
        bounds = Bounds(self._blob.size)
        if self._unpacked is not None:
            yield from _tar_files(self._unpacked.read_at, self._unpacked.reaches, bounds)
            return
        with self._blob.open() as file:

            def read_at(offset: int, size: int) -> bytes:
                file.seek(offset)
                return file.read(size)

            yield from _tar_files(read_at, lambda end: end <= self._blob.size, bounds)


def _tar_files(read_at: ReadAt, reaches: Callable[[int], bool], bounds: Bounds) -> Iterator[Member]:
    """Yield every file that is not hidden.

    The links come last, and then the error that ended the archive early, if any.

    `reaches(end)` returns whether the archive has at least `end` bytes.
    """
    links: list[Link] = []
    fault = None
    try:
        yield from _plain_files(read_at, reaches, bounds, links)
    except ItemError as error:
        fault = error
    if links:
        yield from linked_members(links, _stored_files(read_at))
    if fault is not None:
        raise fault


def _stored_files(read_at: ReadAt) -> Iterator[Stored]:
    """Yield the place of each file, as far as the archive can be read."""
    try:
        for entry in _entries(read_at):
            if entry.is_file and not entry.is_sparse:
                yield Stored(entry.name, entry.size, entry.at)
    except ItemError:  # reported before
        return


def _plain_files(
    read_at: ReadAt, reaches: Callable[[int], bool], bounds: Bounds, links: list[Link]
) -> Iterator[Member]:
    """Yield every file that is not hidden, and add the links to `links`."""
    for entry in _entries(read_at):
        bounds.add(entry.name, entry.link.target if entry.link else "")
        if entry.link is not None:
            links.append(entry.link)
        if not entry.is_file:
            if entry.problem and (
                member := member_of(entry.name, entry.size, entry.at, entry.problem)
            ):
                yield member
            continue
        try:
            whole = reaches(entry.at + entry.size)
        except ItemError:  # a broken stream
            whole = False
        problem = "" if whole else CUT
        if entry.is_sparse:
            problem = "it is stored as a sparse file, which is not supported"
        member = member_of(entry.name, entry.size, entry.at, problem)
        if member is not None:
            yield member
        if not whole:
            if member is None or member.problem != CUT:
                raise ItemError("it is cut off")
            return


class _Entry(NamedTuple):
    """A header of the archive, with the place of the data in bytes."""

    name: str
    at: int
    size: int
    is_file: bool
    is_sparse: bool
    link: Link | None = None
    problem: str = ""  # of an entry that is neither a file, a folder nor a link


def _entries(read_at: ReadAt) -> Iterator[_Entry]:
    """Yield the headers of the archive, each with its extended headers applied.

    Another archive may follow the end mark, as after `cat a.tar b.tar`. It is read too.
    """
    at, longer = 0, {}  # type: int, dict[str, bytes]
    while True:
        block = read_at(at, BLOCK)
        if len(block) == BLOCK and not any(block):
            following = _archive_after(read_at, at)
            if following is None:
                return
            at, longer = following, {}
            continue
        if not block and at:
            raise ItemError(UNENDED)
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            raise ItemError(_broken_header(at, len(block))) from None
        at += BLOCK
        if header.type in _EXTENDED:
            longer.update(_extension(read_at, header, at))
            at += padded(header.size)
            continue
        name, target = (
            longer[field].decode("utf-8", "surrogateescape") if field in longer else plain
            for field, plain in (("path", header.name), ("linkpath", header.linkname))
        )
        checked_name(name)
        checked_name(target)
        size = _number(longer["size"]) if "size" in longer else header.size
        is_sparse = header.type == tarfile.GNUTYPE_SPARSE or any("GNU.sparse" in k for k in longer)
        longer = {}
        if size < 0:
            raise ItemError(_broken_header(at - BLOCK, BLOCK))
        if header.type == tarfile.GNUTYPE_SPARSE and block[482]:  # its map continues in more blocks
            while (block := read_at(at, BLOCK)) and block[504:505] > b"\0":
                at += BLOCK
            at += BLOCK
        link = None
        if header.issym() or header.islnk():
            link = Link(name, target, header.islnk())
        yield _Entry(name, at, size, header.isreg(), is_sparse, link, _unusual(header))
        if header.isreg() or header.type not in tarfile.SUPPORTED_TYPES:
            at += padded(size)


def _archive_after(read_at: ReadAt, at: int) -> int | None:
    """Return the place of the archive that follows an end mark at `at`; None without one.

    Other bytes there are not part of the archive, whether they are damaged or not.
    """
    try:
        while data := read_at(at, _STEP):
            if rest := data.lstrip(b"\0"):
                at += (len(data) - len(rest)) // BLOCK * BLOCK
                tarfile.TarInfo.frombuf(read_at(at, BLOCK), "utf-8", "surrogateescape")
                return at
            at += len(data)
    except (ItemError, tarfile.HeaderError):
        pass
    return None


def _unusual(header: tarfile.TarInfo) -> str:
    """Return the problem of an entry of a type that only some programs write."""
    if header.type in tarfile.SUPPORTED_TYPES or header.type in _NO_FILES:
        return ""
    if header.type == _CONTINUED:
        return "it is a part of a file that began in another archive. Join the archives first"
    return f"{IGNORED}its type {header.type.decode('latin-1')!r} does not belong to a file"


def _extension(read_at: ReadAt, header: tarfile.TarInfo, at: int) -> dict[str, bytes]:
    """Return the fields that an extended header, with its data at `at`, gives to the next one."""
    if not 0 <= header.size <= _LONGEST_NAME:
        raise ItemError(_broken_header(at - BLOCK, BLOCK))
    data = read_at(at, header.size)
    if len(data) < header.size:
        raise ItemError("it is cut off")
    if header.type == tarfile.GNUTYPE_LONGNAME:
        return {"path": data.rstrip(b"\0")}
    if header.type == tarfile.GNUTYPE_LONGLINK:
        return {"linkpath": data.rstrip(b"\0")}
    if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
        return _pax(data)
    return {}


_CONTINUED = b"M"  # of GNU tar
_NO_FILES = (b"D", b"V", b"N", b"A", b"E", b"I")  # folders, labels, and attributes of files
_EXTENDED = (
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
)


def _broken_header(at: int, length: int) -> str:
    if not at:
        return "it is not a tar archive" if length else "it is empty"
    if length < BLOCK:
        return "it is cut off"
    return f"it is broken at byte {at}: members after it are not listed"


def _number(digits: bytes) -> int:
    return int(digits) if digits.isdigit() else -1


def _pax(data: bytes) -> dict[str, bytes]:
    """Return the records `length key=value` of an extended header that are used.

    Others are left out, because any number of extended headers may follow each other.
    """
    found, at = {}, 0
    while record := re.compile(rb"(\d{1,7}) ([^=]+)=").match(data, at):
        end = at + int(record[1])
        if end <= record.end() or end > len(data):
            break
        key = record[2].decode("utf-8", "replace")
        if key in ("path", "linkpath", "size"):
            found[key] = data[record.end() : end - 1]
        elif "GNU.sparse" in key:
            found["GNU.sparse"] = b""
        at = end
    return found


# tar.gz -------------------------------------------------------------------------------------------

_STEP = 1 << 20  # bytes decompressed in one step
_WINDOW = 16 << 20  # last bytes that stay in memory, since threads read out of order


class _Forward:
    """Reads at offsets of a gzip stream. A read far back starts again at the beginning."""

    def __init__(self, blob: Blob) -> None:
        self._blob = blob
        self._lock = Lock()
        self._restart()

    def read_at(self, offset: int, size: int) -> bytes:
        """Return these bytes, fewer at the end. Raises ItemError if the stream is broken."""
        with self._lock:
            if offset < self._start:
                self._restart()
            while self._end < offset + size and self._advance(offset):
                pass
            return self._held(offset, size)

    def reaches(self, end: int) -> bool:
        return end == 0 or len(self.read_at(end - 1, 1)) == 1

    def _restart(self) -> None:
        self._raw: BinaryIO | None = None
        self._chunks: deque[bytes] = deque()
        self._start = self._end = 0  # of the bytes in memory
        self._is_broken = False

    def _advance(self, wanted: int) -> bool:
        """Decompress more and keep the bytes from `wanted` on. Return False at the end."""
        if self._raw is None:
            self._raw = self._blob.open()
            self._stream = gzip.GzipFile(fileobj=self._raw)
        if self._is_broken:
            reason = "it is broken or cut off: it cannot be decompressed"
            raise ItemError(reason if self._end else "it is not a gzip archive, or it is broken")
        pieces, size = [], 0
        try:
            while size < _STEP and (piece := self._stream.read1(_STEP)):
                pieces.append(piece)
                size += len(piece)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            self._is_broken = True  # reported after the bytes before it
        if not size:
            return self._is_broken
        chunk = b"".join(pieces)
        self._chunks.append(chunk)
        self._end += size
        while self._end - self._start - len(self._chunks[0]) >= _WINDOW and (
            self._start + len(self._chunks[0]) <= wanted
        ):
            self._start += len(self._chunks.popleft())
        return True

    def _held(self, offset: int, size: int) -> bytes:
        parts, at = [], self._start
        for chunk in self._chunks:
            if at + len(chunk) > offset and at < offset + size:
                parts.append(chunk[max(0, offset - at) : offset + size - at])
            at += len(chunk)
        return b"".join(parts)


# WebDataset ---------------------------------------------------------------------------------------

_LOOKED_AT = 16  # first members, which show whether an archive contains samples


def _first(members: Iterator[Member]) -> tuple[list[Member], ItemError | None]:
    """Return the first members, and the error that ended them early, if any."""
    first: list[Member] = []
    try:
        for member in islice(members, _LOOKED_AT):
            first.append(member)
    except ItemError as fault:
        return first, fault
    return first, None


def _raise(fault: ItemError) -> Iterator[Member]:
    raise fault
    yield


def _are_samples(members: list[Member]) -> bool:
    """Return whether an image and another file with the same stem follow one another."""
    return any(
        stem_of(one.name) == stem_of(two.name)
        and is_picture_name(one.name) != is_picture_name(two.name)
        for one, two in pairwise(members)
    )
