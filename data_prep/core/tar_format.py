"""The tar format as our shards use it: blocks, padding, the end mark and the USTAR header.

Numbers and fields follow POSIX.1-1988 ("ustar"), which `tarfile` implements.
"""

from __future__ import annotations

import tarfile

BLOCK = tarfile.BLOCKSIZE  # bytes; headers and data begin at multiples of it
END = bytes(2 * BLOCK)  # two empty blocks end an archive
# Fields of a header.
NAME, SIZE, CHECKSUM = slice(0, 100), slice(124, 135), slice(148, 156)
MAGIC, MAGIC_AT = b"ustar\x0000", 257
# A header with an empty name and no size: a regular file without owner or time.
PLAIN_HEADER = tarfile.TarInfo("").tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def padding(size: int) -> int:
    """Return the number of bytes that fill the last block after `size` bytes of data."""
    return -size % BLOCK


def padded(size: int) -> int:
    """Return the bytes that `size` bytes of data take up in an archive."""
    return size + padding(size)


def file_header(name: str, size: int) -> bytes:
    """Return the header of a regular file: the one of `tarfile`, at a tenth of its cost."""
    assert len(name) < 100, f"{name!r} is too long for a tar header"
    assert size < 8**11, f"{name} has {size} bytes, too many for a tar header"
    header = bytearray(PLAIN_HEADER)
    header[: len(name)] = name.encode("ascii")
    header[SIZE] = b"%011o" % size
    header[CHECKSUM] = _checksum(header)
    return bytes(header)


def checksum_fits(header: bytes) -> bool:
    """Return whether a header's bytes have the checksum that it holds."""
    return header[CHECKSUM] == _checksum(header)


def _checksum(header: bytes | bytearray) -> bytes:
    """Return the checksum field: the sum of all bytes, with the field itself as spaces."""
    total = sum(header) - sum(header[CHECKSUM]) + 8 * ord(" ")
    return b"%06o\0 " % total
