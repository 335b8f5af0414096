"""A seekable file on top of range reads."""

from __future__ import annotations

import io
from collections.abc import Callable

SMALLEST_BLOCK = 256 << 10  # bytes; after a jump, so that scattered small reads waste little
LARGEST_BLOCK = 8 << 20  # bytes; reading in order doubles the block up to this size


class RangeReader(io.BufferedIOBase):
    """A file that reads ahead in blocks. Not thread-safe.

    Blocks grow while the file is read in order. Only one block is in memory, whatever the size of
    the object. A seek by itself sends no request, and neither does reading the held block again.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        """Read `size` bytes by `fetch(offset, size)`, which is never called beyond the end."""
        self._fetch, self._size = fetch, size
        self._position = 0
        self._buffer, self._start = b"", 0  # the held block and its offset
        self._ahead = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        self._check_open()
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._check_open()
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError(f"cannot seek to {base + offset}, before the start")
        self._position = base + offset
        return self._position

    def read(self, size: int | None = -1, /) -> bytes:
        self._check_open()
        left = max(0, self._size - self._position)
        wanted = left if size is None or size < 0 else min(size, left)
        pieces = []
        while wanted:
            at = self._position - self._start
            if 0 <= at < len(self._buffer):
                piece = self._buffer[at : at + wanted]
            elif wanted >= LARGEST_BLOCK:  # one request, without a copy
                piece = self._fetch(self._position, wanted)
                self._buffer, self._start = b"", self._position + wanted
            else:
                self._load(wanted)
                piece = self._buffer[:wanted]
            pieces.append(piece)
            self._position += len(piece)
            wanted -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def read1(self, size: int = -1, /) -> bytes:
        return self.read(LARGEST_BLOCK if size < 0 else size)

    def _load(self, wanted: int) -> None:
        """Fetch the block that starts at the position and has at least `wanted` bytes."""
        end = self._start + len(self._buffer)
        # A short skip forward, such as over padding, still counts as reading in order.
        onward = self._ahead and end <= self._position <= end + self._ahead
        self._ahead = min(2 * self._ahead, LARGEST_BLOCK) if onward else SMALLEST_BLOCK
        size = min(max(wanted, self._ahead), self._size - self._position)
        self._buffer = b""  # free the old block before the new one arrives
        self._buffer, self._start = self._fetch(self._position, size), self._position

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the file is closed")
