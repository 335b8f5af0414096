"""Places of raw sources in tests: a local folder, or a prefix on moto's server or Ceph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest

from data_prep.core.errors import ItemError
from data_prep.core.storage.open import open_store
from data_prep.raw.listing import Item, Listing
from data_prep.raw.source import Source, open_source

LIMIT = 10 << 20  # bytes


@dataclass
class Place:
    """A folder or prefix to put files into."""

    uri: str
    is_remote: bool

    def __post_init__(self) -> None:
        self._store = open_store(self.uri)

    def put(self, key: str, data: bytes = b"x") -> str:
        """Write a file and return its URI."""
        self._store.write(key, data)
        return f"{self.uri}/{key}"


@pytest.fixture(params=["local", "moto", pytest.param("ceph", marks=pytest.mark.slow)])
def place(request: pytest.FixtureRequest, tmp_path: object) -> Iterator[Place]:
    if request.param == "local":
        yield Place(f"{tmp_path}/photos", False)
    else:
        root = {"moto": "moto_root", "ceph": "s3_root"}[request.param]
        yield Place(request.getfixturevalue(root), True)


def keys(listing: Listing) -> list[str]:
    return [item.key for item in listing.items()]


def contents(
    source: Source, change: Callable[[Item], Item] = lambda item: item
) -> dict[str, object]:
    """Return the bytes or the failure of each changed item by its key."""
    found: dict[str, object] = {}
    with source.reader() as reader:
        for item in source.list().items():
            try:
                found[item.key] = reader.read(change(item), LIMIT)
            except ItemError as reason:
                found[item.key] = str(reason)
    return found


def by_name(item: Item) -> Item:
    """Return the item without its place in the container, so that it is found by name."""
    return Item(item.key, item.size, item.fingerprint)


def open_and_list(uri: str, layout: str = "auto") -> Listing:
    return open_source(uri, layout).list()
