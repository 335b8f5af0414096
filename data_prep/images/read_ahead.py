"""Read the items of a source in order, in advance where the source is far away."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import ItemError
from data_prep.raw.listing import Item

if TYPE_CHECKING:
    from data_prep.raw.source import Reader, Source

_AHEAD_BYTES = 128 << 20  # of items that wait in memory
_UNKNOWN_SIZE = 1 << 20  # bytes assumed for an item of unknown size

ReadItem = tuple[Item, Callable[[], bytes]]  # the call returns the bytes, or raises


def read_items(
    reader: Reader, items: Sequence[Item], max_bytes: int
) -> Generator[ReadItem, None, None]:
    """Yield every item in order, with a call that returns its bytes or raises.

    Threads read ahead if the reader profits from several at once.
    """
    if reader.threads <= 1:
        for item in items:
            yield item, partial(reader.read, item, max_bytes)
        return
    pool = ThreadPoolExecutor(reader.threads)
    running: deque[tuple[Item, Future[bytes], int]] = deque()
    waiting, held = iter(items), 0
    following = next(waiting, None)
    try:
        while following is not None or running:
            while following is not None and len(running) < 2 * reader.threads:
                size = following.size if following.size >= 0 else _UNKNOWN_SIZE
                size = min(size, max_bytes)
                if running and held + size > _AHEAD_BYTES:
                    break
                future = pool.submit(reader.read, following, max_bytes)
                running.append((following, future, size))
                held += size
                following = next(waiting, None)
            item, future, size = running.popleft()
            yield item, future.result
            held -= size
    finally:
        pool.shutdown(cancel_futures=True)


def hash_items(task: tuple[Source, Sequence[Item], int]) -> list[str]:
    """Return the SHA-256 of each item's bytes, empty for an item that cannot be read.

    `task` is the source, its items, and the most bytes of an item.
    """
    source, items, max_bytes = task
    hashes = []
    with source.reader() as reader, closing(read_items(reader, items, max_bytes)) as read:
        for _, get_bytes in read:
            try:
                hashes.append(sha256_bytes(get_bytes()))
            except ItemError:
                hashes.append("")
    return hashes
