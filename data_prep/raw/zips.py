"""Zip archives, read by means of their directory.

`zipfile` is not used, because it takes a kilobyte of memory per member and does not limit the size
of a decompressed member. The format is PKWARE's APPNOTE.TXT.
"""

from __future__ import annotations

import bz2
import struct
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data_prep.core.errors import ItemError
from data_prep.raw.files import Blob, too_large
from data_prep.raw.links import LONGEST_TARGET, Link, Stored, linked_members
from data_prep.raw.members import CUT, Bounds, Member, checked_name, member_of

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_HEADER = struct.Struct("<4s5H3L2H")
_LONGEST_DIRECTORY = 1 << 30  # bytes, about ten million members
_PART = 8 << 20  # bytes of a directory that are read at a time
_SLACK = 256  # bytes; most extra fields are shorter, so one read fetches header and data
_ENCRYPTED, _UTF8 = 1, 0x800


class Zip:
    """A zip archive. An offset is the byte in the directory where a member's entry starts."""

    def __init__(self, blob: Blob) -> None:
        """Read the directory. Raises ItemError if there is none."""
        self._blob = blob
        self._directory, self._shifts = _read_directories(blob)
        self.weight = len(self._directory)  # bytes in memory

    def members(self) -> Iterator[Member]:
        """Yield every member, the links last."""
        links, bounds = list[Link](), Bounds(self._blob.size)
        for at, entry in self._entries():
            if entry.is_link:
                links.append(Link(entry.name, self._target(entry)))
                bounds.add(*links[-1][:2])
            elif (member := member_of(entry.name, entry.size, at)) is not None:
                yield member
        if links:
            files = ((at, entry) for at, entry in self._entries() if not entry.is_link)
            yield from linked_members(links, (Stored(e.name, e.size, at) for at, e in files))

    def read(self, offset: int, size: int, limit: int) -> bytes:
        """Return the member's bytes, decompressed up to `limit` and checked by checksum."""
        return self._content(self._entry(offset), limit)

    def _entries(self) -> Iterator[tuple[int, _Entry]]:
        """Yield the entries that are not folders, each with its place in the directory."""
        at = 0
        while at < len(self._directory):
            entry = self._entry(at)
            if not entry.name.endswith("/"):
                yield at, entry
            at = entry.end

    def _target(self, link: _Entry) -> str:
        """Return the target of a link, which is its content; empty if it cannot be read."""
        try:
            return self._content(link, LONGEST_TARGET).decode("utf-8", "surrogateescape")
        except ItemError:
            return ""

    def _content(self, entry: _Entry, limit: int) -> bytes:
        _check(entry)
        # Compression can make random bytes a little longer, but not more than this.
        if entry.size > limit or entry.stored > limit + limit // 8 + 4096:
            raise too_large(limit)
        data = self._packed(entry, entry.stored)
        if len(data) < entry.stored:
            raise ItemError("it is cut off")
        content = _METHODS[entry.method](data, limit)
        if len(content) > limit:
            raise too_large(limit)
        if len(content) != entry.size or zlib.crc32(content) != entry.crc:
            raise ItemError("it is broken: its checksum is wrong")
        return content

    def head(self, offset: int, size: int, count: int) -> bytes:
        """Return the member's first bytes, not checked; the rest is not decompressed."""
        entry = self._entry(offset)
        _check(entry)
        data = self._packed(entry, min(entry.stored, count + _HEADS[entry.method]))
        try:
            if entry.method == _DEFLATED:
                return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, count)
            return bz2.BZ2Decompressor().decompress(data, count) if entry.method else data
        except (zlib.error, OSError, EOFError):
            raise ItemError("it is broken: it cannot be decompressed") from None

    def _packed(self, entry: _Entry, count: int) -> bytes:
        """Return the first `count` bytes of a member as they are stored, fewer at the end."""
        at = entry.header
        data = self._blob.read_at(at, _HEADER.size + len(entry.name) + _SLACK + count)
        if len(data) < _HEADER.size or data[:4] != b"PK\3\4":
            raise ItemError("it is broken: its header is not at the place in the directory")
        fields = _HEADER.unpack_from(data)
        start = _HEADER.size + fields[9] + fields[10]
        missing = start + count - len(data)
        if missing > 0:
            data += self._blob.read_at(at + len(data), missing)
        return data[start : start + count]

    def _entry(self, at: int) -> _Entry:
        directory = self._directory
        if at + _ENTRY.size > len(directory) or directory[at : at + 4] != b"PK\1\2":
            raise ItemError("its directory is broken")
        fields = _ENTRY.unpack_from(directory, at)
        made_by, flags, method, crc = fields[1], fields[3], fields[4], fields[7]
        stored, size, header, mode = fields[8], fields[9], fields[16], fields[15] >> 16
        name_end = at + _ENTRY.size + fields[10]
        extra_end = name_end + fields[11]
        name = directory[at + _ENTRY.size : name_end]
        if 0xFFFFFFFF in (stored, size, header):
            extra = directory[name_end:extra_end]
            size, stored, header = _wide(extra, size, stored, header)
        is_link = made_by >> 8 in (3, 19) and mode & 0xF000 == 0xA000  # made on Unix or on a Mac
        header += next(shift for end, shift in self._shifts if at < end)
        return _Entry(
            checked_name(_decoded(name, flags)), size, stored, header, method, flags, crc, is_link,
            extra_end + fields[12],
        )  # fmt: skip


class _Entry(NamedTuple):
    name: str
    size: int
    stored: int
    header: int  # its place in the file
    method: int
    flags: int
    crc: int
    is_link: bool
    end: int


def _check(entry: _Entry) -> None:
    """Raise ItemError unless we can decompress the member."""
    if entry.flags & _ENCRYPTED:
        raise ItemError("it is encrypted")
    if entry.method not in _METHODS:
        raise ItemError(f"it is compressed by method {entry.method}, which is not supported")


def _read_directories(blob: Blob) -> tuple[bytes, list[tuple[int, int]]]:
    """Return the directory, and (end, number to add to the stored offsets) for each part of it.

    After `cat a.zip b.zip` the file has two archives, and each has a directory. That of the last
    archive is the first part.
    """
    start, size, shift = _find_directory(blob, blob.size)
    whole, shifts = b"", list[tuple[int, int]]()
    while True:
        if len(whole) + size > _LONGEST_DIRECTORY:
            raise ItemError(f"its directory is longer than {_LONGEST_DIRECTORY} bytes")
        whole += _read_directory(blob, start, size)
        shifts.append((len(whole), shift))
        before = shift
        if before < _END.size:
            return whole, shifts
        try:
            start, size, shift = _find_directory(blob, before)
        except ItemError:  # such as a program before the archive
            return whole, shifts
        if not size or blob.read_at(start, 4) != b"PK\1\2":
            return whole, shifts


def _read_directory(blob: Blob, start: int, size: int) -> bytes:
    """Return a directory. A large one is checked part by part: it may be a hole in the file."""
    if start + size > blob.size:
        raise ItemError("it is cut off")
    parts, at = [], 0
    while at < size:
        parts.append(blob.read_at(start + at, min(_PART, size - at)))
        if len(parts[-1]) < min(_PART, size - at):
            raise ItemError("it is cut off")
        at += len(parts[-1])
        if at < size and b"PK\1\2" not in parts[-1]:
            raise ItemError("its directory is broken")
    return b"".join(parts)


def _find_directory(blob: Blob, stop: int) -> tuple[int, int, int]:
    """Return the directory's start and size, and the number to add to all stored offsets.

    The archive ends at the byte `stop` of the file.
    """
    length = min(stop, _END.size + 0xFFFF)
    tail = blob.read_at(stop - length, length)
    at = tail.rfind(b"PK\5\6")
    while at >= 0 and (
        len(tail) < at + _END.size or at + _END.size + _END.unpack_from(tail, at)[7] > len(tail)
    ):
        at = tail.rfind(b"PK\5\6", 0, at)
    if at < 0:
        if blob.read_at(0, 4) == b"PK\3\4":
            raise ItemError(CUT)
        raise ItemError("it is not a zip archive, or it is cut off")
    _, disk, first_disk, _, _, size, offset, _ = _END.unpack_from(tail, at)
    end = stop - length + at
    wide = _find_wide_end(blob, end)
    if wide is not None:
        end, size, offset = wide
    elif disk or first_disk:
        raise ItemError("it is one of several parts of an archive. Join the parts first")
    start = end - size
    if start < 0:
        raise ItemError("its directory is broken")
    if size and blob.read_at(start, 4) != b"PK\1\2":  # there is something after the directory
        return offset, size, 0
    return start, size, start - offset  # above 0 if there is a program before the archive


def _find_wide_end(blob: Blob, end: int) -> tuple[int, int, int] | None:
    """Return (place, directory's size, directory's offset) of the Zip64 end record, if any."""
    if end < 20:
        return None
    signature, _, offset, _ = struct.unpack("<4sLQL", blob.read_at(end - 20, 20))
    if signature != b"PK\6\7":
        return None
    for place in (offset, end - 20 - _END64.size):
        record = blob.read_at(place, _END64.size) if place >= 0 else b""
        if len(record) == _END64.size and record[:4] == b"PK\6\6":
            return place, *_END64.unpack(record)[8:10]
    raise ItemError("its directory is broken")


def _wide(extra: bytes, *values: int) -> list[int]:
    """Return the values, with each 2^32 - 1 replaced from the Zip64 extra field in order."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1:
            wide = iter(
                struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4)
            )
            try:
                return [next(wide) if value == 0xFFFFFFFF else value for value in values]
            except (StopIteration, RuntimeError):
                break
        at += 4 + length
    raise ItemError("its directory is broken")


def _decoded(name: bytes, flags: int) -> str:
    """Return a stored name. Without the flag it should be CP437, but UTF-8 is as common."""
    if flags & _UTF8 or name.isascii():
        return name.decode("utf-8", "surrogateescape")
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.decode("cp437")


def _stored(data: bytes, limit: int) -> bytes:
    return data


def _inflated(data: bytes, limit: int) -> bytes:
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        content = inflate.decompress(data, limit + 1)
    except zlib.error:
        raise ItemError("it is broken: it cannot be decompressed") from None
    if len(content) <= limit and not inflate.eof:
        raise ItemError("it is broken: it cannot be decompressed")
    return content


def _bunzipped(data: bytes, limit: int) -> bytes:
    expand = bz2.BZ2Decompressor()
    try:
        content = expand.decompress(data, limit + 1)
    except (OSError, EOFError):
        raise ItemError("it is broken: it cannot be decompressed") from None
    if len(content) <= limit and not expand.eof:
        raise ItemError("it is broken: it cannot be decompressed")
    return content


_METHODS: dict[int, Callable[[bytes, int], bytes]] = {0: _stored, 8: _inflated, 12: _bunzipped}
_DEFLATED = 8
# Stored bytes that give the first decompressed ones, by method. bzip2 expands whole blocks.
_HEADS = {0: 0, _DEFLATED: 4096, 12: 1 << 20}
