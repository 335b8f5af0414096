"""A seekable file over anything that can be read by ranges."""

from __future__ import annotations

import io
from collections.abc import Callable

SMALLEST_BLOCK = 256 << 10  # bytes; after a jump, so that scattered small reads waste little
LARGEST_BLOCK = 8 << 20  # bytes; reading on doubles the block up to here


class RangeReader(io.BufferedIOBase):
    """Reads ahead in blocks that grow while the reading goes on; a seek costs nothing by itself.

    `fetch(offset, size)` returns exactly those bytes; it is never asked beyond `size`, the length
    of the whole in bytes. One block is held, so memory is bounded whatever the object's size, and a
    seek backward inside of it asks nothing of the server. Not thread-safe.
    """

    def __init__(self, fetch: Callable[[int, int], bytes], size: int) -> None:
        self._fetch, self._size = fetch, size
        self._position = 0
        self._buffer, self._start = b"", 0  # the block held, and its offset
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
            elif wanted >= LARGEST_BLOCK:  # no copy of what was asked for in one go
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
        """Hold the block that starts at the position and has at least `wanted` bytes."""
        end = self._start + len(self._buffer)
        # A short skip forward (padding, a member that is passed over) is still reading on.
        onward = self._ahead and end <= self._position <= end + self._ahead
        self._ahead = min(2 * self._ahead, LARGEST_BLOCK) if onward else SMALLEST_BLOCK
        size = min(max(wanted, self._ahead), self._size - self._position)
        self._buffer = b""  # let go of the old block before the new one comes
        self._buffer, self._start = self._fetch(self._position, size), self._position

    def _check_open(self) -> None:
        if self.closed:
            raise ValueError("the file is closed")
