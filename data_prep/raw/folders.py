"""A folder or prefix with the archives and tables in it, or one of these as a source."""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from data_prep.core.errors import ConfigError, ItemError, PipelineError
from data_prep.raw.files import GONE, Blob, Found
from data_prep.raw.layouts import IGNORED, apply_layout, are_samples
from data_prep.raw.links import settle_links
from data_prep.raw.listing import Item, Listing, collect
from data_prep.raw.local_files import LocalFiles
from data_prep.raw.members import LEADS_OUT, Member, bounded, leads_out
from data_prep.raw.s3_files import S3Files
from data_prep.raw.tables import RENAME, SEVERAL_COLUMNS, NoImagesError, Table
from data_prep.raw.tars import Tar
from data_prep.raw.zips import Zip

# Returns the items of an earlier listing for a container with this key and fingerprint.
Known = Callable[[str, int], Iterable[Item] | None]
_CONTAINER = re.compile(r"\.(zip|tar\.gz|tgz|tar|parquet)$", re.IGNORECASE)
_INSIDE = re.compile(r"\.(?:zip|tar\.gz|tgz|tar|parquet)(?=/)", re.IGNORECASE)
_HELD = 192 << 20  # bytes of memory for open containers in a process
_OPEN = 64  # containers
_REMEMBERED = 100_000  # keys
_LISTED_AT_ONCE = 8  # containers on S3


def nothing_known(container: str, fingerprint: int) -> None:
    """Know no earlier listing, so that every container is opened."""


class Container(Protocol):
    """An archive or a table. Several threads may read it."""

    weight: int  # bytes in memory, roughly

    def members(self) -> Iterator[Member]:
        """Yield every member. Raises ItemError where the container is broken."""

    def read(self, offset: int, size: int, limit: int) -> bytes:
        """Return a member's bytes. Raises ItemError if it cannot be used."""

    def head(self, offset: int, size: int, count: int) -> bytes:
        """Return a member's first bytes. Raises ItemError if it cannot be used."""


@dataclass(frozen=True)
class Folder:
    """The files of a folder or prefix; if `name` is not empty, those of one container in it."""

    files: LocalFiles | S3Files
    name: str
    layout: str

    @property
    def uri(self) -> str:
        return self.files.where(self.name) if self.name else self.files.uri

    def list(self, known: Known = nothing_known) -> Listing:
        problems: dict[str, str] = {}
        containers: MutableSequence[str] = []

        def items() -> Iterator[Item]:
            for item, problem in self._items(known, containers):
                if problem:
                    problems[item.key] = problem
                yield item

        listing = checked_listing(items(), containers, problems, self.uri)
        if not listing:
            raise empty_source(self.files, self.name)
        if self.layout == "webdataset" and not any(
            _is_tar(container or self.name) for container in containers
        ):
            raise ConfigError(
                f"{self.uri} contains no tar archive, which the layout webdataset needs. Choose"
                " another images.layout or source."
            )
        return settle_links(apply_layout(listing, self.layout, self.uri, self._text_of))

    def reader(self) -> FolderReader:
        return FolderReader(self)

    def open(self, key: str) -> Container:
        """Open the container with this key. Raises ItemError if it is gone or broken."""
        return _open(self.files.blob(key), are_samples(self.layout))

    def _items(self, known: Known, containers: MutableSequence[str]) -> Iterator[tuple[Item, str]]:
        """Yield every item with its problem, and add the containers' keys to `containers`."""
        waiting: list[Found] = []
        if self.name:
            found = self.files.look(self.name)
            if found is None:
                raise ConfigError(f"{self.uri} does not exist. Correct the path.")
            waiting.append(found)
        else:
            for file in self.files.walk():
                if is_container(file.key) and not file.problem:
                    waiting.append(file)
                else:
                    yield Item(file.key, file.size, file.fingerprint), file.problem
        containers.extend("" if self.name else file.key for file in waiting)
        if self.files.threads == 1 or len(waiting) == 1:
            for number, file in enumerate(waiting):
                yield from self._expand(number, file, known)
            return
        with ThreadPoolExecutor(_LISTED_AT_ONCE) as pool:
            for start in range(0, len(waiting), _LISTED_AT_ONCE):
                some = enumerate(waiting[start : start + _LISTED_AT_ONCE], start)
                for items in pool.map(lambda it: [*self._expand(it[0], it[1], known)], some):
                    yield from items

    def _expand(self, number: int, file: Found, known: Known) -> Iterator[tuple[Item, str]]:
        """Yield the members of a container, or the container with the reason of its failure."""
        key = "" if self.name else file.key
        prefix, names = f"{key}/" if key else "", _Unique()
        same = known(key, file.fingerprint)
        if same is not None:
            for it in same:
                # The layout decides the split again.
                yield Item(it.key, it.size, it.fingerprint, "", number, it.offset, it.block), ""
            return
        try:
            members = bounded(self.open(file.key).members(), file.size)
            for name, size, offset, block, problem in members:
                # A fingerprint of 0 makes the next listing open the container again.
                mark = 0 if problem else file.fingerprint
                item = Item(prefix + names.add(name), size, mark, "", number, offset, block)
                yield item, problem
            return
        except NoImagesError as error:
            reason = f"{IGNORED}{error}"
        except ItemError as error:
            reason = str(error)
        if not key and not names:
            reason = reason.removeprefix(IGNORED)
            advice = RENAME if reason.startswith(SEVERAL_COLUMNS) else "Replace the file"
            raise PipelineError(f"{self.uri} cannot be used: {reason}. {advice}.")
        yield Item(key or names.add(file.key), file.size, 0, "", number), reason

    def _text_of(self, name: str) -> str | None:
        """Return the text of a file in the folders where datasets keep their lists."""
        folders = ("", "Eval/", "Anno/", "../", "../Eval/", "../Anno/")
        return self.files.first_text(*(folder + name for folder in folders))


class FolderReader:
    """A reader that keeps the containers open that were used last."""

    def __init__(self, source: Folder) -> None:
        self._source = source
        self.threads = source.files.threads
        self._lock = threading.RLock()
        self._held: OrderedDict[str, _Held] = OrderedDict()
        self._are_files: dict[str, bool] = {}  # whether a key that looks like a container is a file

    def read(self, item: Item, limit: int) -> bytes:
        place = self._place(item)
        if place is None:
            return self._source.files.read(item.key, limit)
        container, offset, size = place
        return container.read(offset, size, limit)

    def head(self, item: Item, count: int) -> bytes:
        place = self._place(item)
        if place is None:
            return self._source.files.head(item.key, count)
        container, offset, size = place
        return container.head(offset, size, count)

    def _place(self, item: Item) -> tuple[Container, int, int] | None:
        """Return an item's container, with its offset and size there; None for a file."""
        container, name = self._locate(item.key)
        if container is None:
            return None
        if leads_out(name) and _extension(container) != "parquet":  # there a name is only a label
            raise ItemError(LEADS_OUT)
        held = self._hold(container)
        offset, size = item.offset, item.size
        if offset < 0:
            offset, size = held.find(name)
        elif item.fingerprint not in (0, held.fingerprint):
            where = self._source.files.where(container)
            raise PipelineError(
                f"{where} has changed since it was listed. Run the same command again."
            )
        return held.container, offset, size

    def __enter__(self) -> FolderReader:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.clear()

    def _locate(self, key: str) -> tuple[str | None, str]:
        """Return the key of the item's container (None for a file) and its name in there."""
        if self._source.name:
            return self._source.name, key
        for found in _INSIDE.finditer(key):
            container = key[: found.end()]
            if container not in self._are_files:
                if len(self._are_files) > _REMEMBERED:
                    self._are_files.clear()
                self._are_files[container] = self._source.files.look(container) is not None
            if self._are_files[container]:  # otherwise it is a folder with such a name
                return container, key[found.end() + 1 :]
        return None, key

    def _hold(self, key: str) -> _Held:
        with self._lock:
            held = self._held.get(key)
            if held is None:
                blob = self._source.files.blob(key)
                held = _Held(_open(blob, are_samples(self._source.layout)), blob)
                self._held[key] = held
            self._held.move_to_end(key)
            # A container that another thread still reads stays open until that thread is done.
            while len(self._held) > 1 and (
                len(self._held) > _OPEN or sum(h.weight for h in self._held.values()) > _HELD
            ):
                self._held.popitem(last=False)
            return held


class _Held:
    """An open container, with the places of its members after the first search by name."""

    def __init__(self, container: Container, blob: Blob) -> None:
        self.container, self.fingerprint, self._size = container, blob.fingerprint, blob.size
        self.weight = container.weight
        self._lock = threading.Lock()
        # By hash of the name, because names take more memory.
        self._places: dict[int, tuple[int, int]] | None = None

    def find(self, name: str) -> tuple[int, int]:
        """Return the offset and size of a member."""
        with self._lock:
            if self._places is None:
                places, names = {}, _Unique()
                try:
                    for member in bounded(self.container.members(), self._size):
                        places[hash(names.add(member.name))] = (member.offset, member.size)
                except ItemError:  # the members before the damage can be read
                    pass
                self._places = places
                self.weight += 200 * len(places)
        place = self._places.get(hash(name))
        if place is None or place[0] < 0:  # such as a link that leads nowhere
            raise ItemError(GONE)
        return place


class _Unique:
    """Names that get a number if they come again: `a.jpg`, `a#2.jpg`, `a#3.jpg` …

    The number stands before the extension, which tells the kind of the file. Only hashes are kept.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._last: dict[int, int] = {}  # the last number given to a repeated name

    def __bool__(self) -> bool:
        return bool(self._seen)

    def add(self, name: str) -> str:
        """Return the name, made unique."""
        mark = hash(name)
        if mark not in self._seen:
            self._seen.add(mark)
            return name
        count = self._last.get(mark, 1) + 1
        while hash(unique := _numbered(name, count)) in self._seen:
            count += 1
        self._last[mark] = count
        self._seen.add(hash(unique))
        return unique


def _numbered(name: str, number: int) -> str:
    """Return a path with a number before the extension of its last part."""
    start = max(name.rfind("/"), name.rfind("\\")) + 1
    dot = name.rfind(".", start + 1)  # not the dot of a name such as `.jpg`
    at = len(name) if dot < 0 else dot
    return f"{name[:at]}#{number}{name[at:]}"


def is_container(name: str) -> bool:
    """Return whether a file with this name is opened as an archive or a table."""
    return bool(_extension(name))


def _open(blob: Blob, samples: bool | None) -> Container:
    kind = _extension(blob.key)
    if kind == "zip":
        return Zip(blob)
    if kind == "parquet":
        return Table(blob)
    return Tar(blob, kind != "tar", samples)


def _extension(key: str) -> str:
    found = _CONTAINER.search(key)
    return found[1].lower() if found else ""


def _is_tar(key: str) -> bool:
    return _extension(key) in ("tar", "tar.gz", "tgz")


def checked_listing(
    items: Iterable[Item], containers: Iterable[str], problems: Mapping[str, str], uri: str
) -> Listing:
    """Return the listing of the items. Raises PipelineError if two have the same key."""
    try:
        return collect(items, containers, problems)
    except ValueError as error:
        # A bucket can contain an object and a "folder" with the same name.
        raise PipelineError(f"{uri} has two items called {error}. Rename one.") from None


def empty_source(files: LocalFiles | S3Files, name: str = "") -> PipelineError:
    """Return the error for a source without items."""
    if name:
        return PipelineError(f"{files.where(name)} is empty. It must contain photos.")
    if isinstance(files, LocalFiles):
        return PipelineError(f"the photo folder {files.uri} is empty. Put photos into it.")
    return PipelineError(f"there is nothing at {files.uri}. Put photos there or correct the URI.")
