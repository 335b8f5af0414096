"""Read the members of a tar that may be damaged, once, from front to back.

No size or name is trusted. After a bad header the reader searches for the next good one, so one
damage does not hide another.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from data_prep.core.tar_format import (
    BLOCK,
    MAGIC,
    MAGIC_AT,
    NAME,
    PLAIN_HEADER,
    SIZE,
    checksum_fits,
    padded,
    padding,
)

MEMBER_NAME = re.compile(r"[A-Za-z0-9_-]{1,80}\.[A-Za-z0-9.]{1,18}")
_CHUNK = 1 << 20  # bytes read at once
_MOST_SIDECAR = 1 << 20  # bytes of a sidecar; ours have a few hundred
_ZEROS = bytes(BLOCK)

Report = Callable[[str], None]  # takes a problem


@dataclass
class Member:
    """A file in the tar. If it is damaged, only its place in the index says which one it is."""

    key: str
    name: str
    offset: int = -1  # of its data in the tar
    size: int = -1
    sha256: str = ""
    sidecar: bytes | None = None
    damaged: bool = False


class TarReader:
    """A tar that is read once. `at` is the current byte, `sha256` the hash of all bytes so far."""

    def __init__(self, file: BinaryIO) -> None:
        self.at = 0
        self.sha256 = hashlib.sha256()
        self._file, self._buffer, self._next = file, b"", 0

    def _fill(self, size: int) -> int:
        """Buffer `size` bytes, fewer at the end of the file; return how many are ready."""
        while (ready := len(self._buffer) - self._next) < size:
            data = self._file.read(_CHUNK)
            if not data:
                return ready
            self.sha256.update(data)
            self._buffer, self._next = self._buffer[self._next :] + data, 0
        return ready

    def peek(self, size: int) -> bytes:
        """Return the next `size` bytes without moving on."""
        self._fill(size)
        return self._buffer[self._next : self._next + size]

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes (at most 1 MiB), fewer at the end of the file."""
        data = self.peek(size)
        self._next += len(data)
        self.at += len(data)
        return data

    def skip(self, size: int) -> tuple[int, str]:
        """Skip `size` bytes; return how many existed, and their sha256."""
        sha256, left = hashlib.sha256(), size
        while left and (data := self.take(min(left, _CHUNK))):
            sha256.update(data)
            left -= len(data)
        return size - left, sha256.hexdigest()

    def find_header(self) -> bool:
        """Move to the next whole header at any byte; without one, move to the end."""
        while self._fill(BLOCK) >= BLOCK:
            start = self._next
            mark = self._buffer.find(MAGIC, start + MAGIC_AT)
            header = len(self._buffer) - BLOCK + 1 if mark < 0 else mark - MAGIC_AT
            self.take(header - start)
            if mark >= 0 and self._fill(BLOCK) >= BLOCK:
                if checksum_fits(self._buffer[self._next : self._next + BLOCK]):
                    return True
                self.take(1)
        self.drain()
        return False

    def drain(self) -> None:
        """Read to the end."""
        while self.take(_CHUNK):
            pass


def _is_plain(block: bytes) -> bool:
    """Return whether a header has the mode and type of ours, no owner and no time."""
    parts = slice(100, 124), slice(136, 148), slice(156, BLOCK)
    return all(block[part] == PLAIN_HEADER[part] for part in parts)


def read_members(tar: TarReader, places: Mapping[int, str], report: Report) -> Iterator[Member]:
    """Yield the members of a tar in order.

    Args:
        tar: the reader, at the start of the tar.
        places: names of members by the byte of their header, from the index. The name has no
            extension for a payload.
        report: takes each problem of headers, padding and end.
    """
    while True:
        at = tar.at
        block = tar.take(BLOCK)
        if len(block) < BLOCK:
            report(f"is truncated: it ends at byte {tar.at}, without the mark of its end")
            return
        if block == _ZEROS and (at not in places or not any(tar.peek(BLOCK))):
            if _is_end(tar, at, report):
                return
            continue
        if not checksum_fits(block):
            place = places.get(at, "")
            if place:
                key = place.removesuffix(".json")
                what = "payload" if key == place else place
                report(f"sample {key}: bad header of its {what}, at byte {at}")
                yield Member(key, place, damaged=True)
            if not tar.find_header():
                if not place:
                    report(f"the mark of its end, at byte {at}, was altered")
                return
            if not place:
                report(f"there is no header at byte {at}; the next one is at byte {tar.at}")
            continue
        name = block[NAME].rstrip(b"\0").decode("ascii", "backslashreplace")
        key = name.partition(".")[0]
        try:
            size = int(block[SIZE], 8)
        except ValueError:
            size = -1
        if size < 0 or not MEMBER_NAME.fullmatch(name) or not _is_plain(block):
            report(f"member {name!r}, at byte {at}: no shard has such a header")
            if size < 0 or not MEMBER_NAME.fullmatch(name):
                tar.skip(max(0, padded(size)))
                continue
        yield _read_member(tar, key, name, size, report)


def _read_member(tar: TarReader, key: str, name: str, size: int, report: Report) -> Member:
    """Read the data of one member: a sidecar into memory, the hash of a payload."""
    member = Member(key, name, tar.at, size)
    if name.endswith(".json") and size <= _MOST_SIDECAR:
        member.sidecar = tar.take(size)
        there = len(member.sidecar)
    else:
        there, member.sha256 = tar.skip(size)
    if there < size:
        report(f"is truncated: it ends at byte {tar.at}, inside {name} of sample {key}")
        member.damaged = True
    elif any(tar.take(padding(size))):
        report(f"sample {key}: the padding after {name} is not empty")
    return member


def _is_end(tar: TarReader, at: int, report: Report) -> bool:
    """Return whether the tar ends with the block of zeros at byte `at`, which was just read."""
    second = tar.take(BLOCK)
    if len(second) < BLOCK:
        report("is truncated: the mark of its end is cut short")
        return True
    after = tar.at
    if second != _ZEROS:
        report(f"the mark of its end, at byte {at}, was altered")
    if tar.find_header():
        report(f"the mark of its end is at byte {at}, before a member at byte {tar.at}")
        return False
    if tar.at > after:
        report(f"{tar.at - after} bytes follow the mark of its end")
    return True
