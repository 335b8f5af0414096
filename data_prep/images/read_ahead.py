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
from data_prep.pictures.formats import LOOK, looks_like_photo
from data_prep.raw.listing import Item

if TYPE_CHECKING:
    from data_prep.raw.source import Reader, Source

_AHEAD_BYTES = 128 << 20  # of items that wait in memory
_UNKNOWN_SIZE = 1 << 20  # bytes assumed for an item of unknown size

_WHOLE = 64 << 10  # bytes; a smaller item is read whole even if it may not be a photo

ReadItem = tuple[Item, Callable[[], bytes]]  # the call returns the bytes, or raises


class NotAPhotoError(ItemError):
    """The first bytes of an item are not those of an image; `data` is all of it, if it was read."""

    def __init__(self, key: str, data: bytes | None) -> None:
        name = key.rpartition("/")[2]
        _, dot, extension = name.rpartition(".")
        ending = f"extension .{extension[:20].lower()}" if dot else "no extension"
        super().__init__(f"not an image: {ending}, and not the content of one")
        self.data = data


def read_items(
    reader: Reader, items: Sequence[Item], max_bytes: int, unsure: frozenset[int] = frozenset()
) -> Generator[ReadItem, None, None]:
    """Yield every item in order, with a call that returns its bytes or raises.

    Threads read ahead if the reader profits from several at once.

    Args:
        reader: of the items.
        items: to read.
        max_bytes: of an item.
        unsure: places of items that may not be photos. Of a large one only the first bytes are
            read, if they are not those of an image; the call raises NotAPhotoError then.
    """

    def read(place: int, item: Item) -> bytes:
        if place not in unsure:
            return reader.read(item, max_bytes)
        data = None
        if 0 <= item.size <= min(_WHOLE, max_bytes):
            data = reader.read(item, max_bytes)
        if not looks_like_photo(reader.head(item, LOOK) if data is None else data[:LOOK]):
            raise NotAPhotoError(item.key, data)
        return reader.read(item, max_bytes) if data is None else data

    if reader.threads <= 1:
        for place, item in enumerate(items):
            yield item, partial(read, place, item)
        return
    pool = ThreadPoolExecutor(reader.threads)
    running: deque[tuple[Item, Future[bytes], int]] = deque()
    waiting, held = iter(enumerate(items)), 0
    following = next(waiting, None)
    try:
        while following is not None or running:
            while following is not None and len(running) < 2 * reader.threads:
                place, coming = following
                size = coming.size if coming.size >= 0 else _UNKNOWN_SIZE
                size = min(size, max_bytes)
                if running and held + size > _AHEAD_BYTES:
                    break
                future = pool.submit(read, place, coming)
                running.append((coming, future, size))
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
