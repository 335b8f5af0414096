"""Links inside archives: symbolic and hard links that name other members of the same archive.

A link is one more name of a member. It is not read as a second photo. But a dataset may give its
splits by links, such as `test/1.jpg` for `all/1.jpg`; then the member is used under that name.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from data_prep.pictures.formats import is_picture_name
from data_prep.raw.files import escape, is_hidden
from data_prep.raw.layouts import IGNORED
from data_prep.raw.listing import Listing
from data_prep.raw.members import LONGEST_NAME, Member, member_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LINK = f"{IGNORED}a link to "  # starts the problem of a link whose member is an item itself
LONGEST_TARGET = LONGEST_NAME  # bytes
_MOST_STEPS = 40  # from a link to a link, as on Linux


class Link(NamedTuple):
    """A link: its name and its target, both as they are stored."""

    name: str
    target: str
    is_hard: bool = False  # its target is a name in the archive, not relative to the link


class Stored(NamedTuple):
    """The place of a file in its archive."""

    name: str
    size: int
    offset: int


def linked_members(links: Iterable[Link], files: Iterable[Stored]) -> Iterator[Member]:
    """Yield a member for each link to a file, and one for each file of a linked folder.

    The problem of a member says which file it links to. A link to a hidden file has no problem,
    because the file itself is not an item. Each folder is followed once.

    Args:
        links: the links of an archive.
        files: all its files, in stored order.
    """
    links = list(links)
    targets = {posixpath.normpath(link.name): _target(link) for link in links}
    ends = [_followed(_target(link), targets) for link in links]
    places, below = _places(set(ends), files)
    used: set[int] = set()
    for link, end in zip(links, ends, strict=True):
        name = posixpath.normpath(link.name)
        found = []
        if end in places:
            found = [(link.name, places[end])]
        elif end == "." or name.startswith(f"{end}/"):
            problem = f"{IGNORED}a link to a folder that contains it"
        elif end in below:
            rests = ((file, file.name[len(end) :]) for file in below.pop(end))
            found = [(f"{name}{rest}", file) for file, rest in rests]
        else:
            problem = f"it is a link to {link.target!r}, which is not in the archive"
            problem = problem if is_picture_name(name) else IGNORED + problem
        if not found and (member := member_of(link.name, 0, -1, problem)) is not None:
            yield member
        for name, file in found:
            hidden = is_hidden(escape(file.name)) and file.offset not in used
            used.add(file.offset)
            problem = "" if hidden else f"{LINK}{escape(file.name)}"
            if (member := member_of(name, file.size, file.offset, problem)) is not None:
                yield member


def _target(link: Link) -> str:
    """Return the path in the archive that a link names; one that leads out starts with `/` or `..`.

    Tars may store all names below `./`, so hard links name `./a.jpg` for `a.jpg`.
    """
    folder = "" if link.is_hard else posixpath.dirname(link.name)
    return posixpath.normpath(posixpath.join(folder, link.target))


def _followed(path: str, targets: dict[str, str]) -> str:
    """Return the path at the end of all links on the way."""
    for _ in range(_MOST_STEPS):
        parts = path.split("/")
        heads = ("/".join(parts[:count]) for count in range(1, len(parts) + 1))
        head = next((head for head in heads if head in targets), None)
        if head is None:
            return path
        path = posixpath.normpath(targets[head] + path[len(head) :])
    return path


def _places(
    wanted: set[str], files: Iterable[Stored]
) -> tuple[dict[str, Stored], dict[str, list[Stored]]]:
    """Return the wanted files by name, and the files below each wanted folder."""
    places: dict[str, Stored] = {}
    below: dict[str, list[Stored]] = {}
    for stored in files:
        file = stored._replace(name=posixpath.normpath(stored.name))
        if file.name in wanted:
            places[file.name] = file
        folder = posixpath.dirname(file.name)
        while folder not in ("", "/"):
            if folder in wanted:
                below.setdefault(folder, []).append(file)
            folder = posixpath.dirname(folder)
    return places, below


def settle_links(listing: Listing) -> Listing:
    """Return the listing with each member under the name that gives its split, if a link does.

    Of all names of a member one is an item. Names in a split of the source come first, in the order
    test, val, train, as for copies. The others get a problem that names it.
    """
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    if "split" not in listing.table.column_names or "container" not in listing.table.column_names:
        return listing
    linked = [key for key, problem in listing.problems.items() if problem.startswith(LINK)]
    if not linked:
        return listing
    problems = dict(listing.problems)
    table = listing.table
    is_link = np.asarray(pc.is_in(table["key"], pa.array(linked, pa.large_string())).to_numpy())
    offset = table["offset"].to_numpy()
    rows = np.flatnonzero(np.isin(offset, offset[is_link]))
    split = table["split"].to_numpy()
    for named in _same_place(table["container"].to_numpy(), offset, rows):
        keys = table["key"].take(pa.array(named)).to_pylist()
        candidates = [
            (-int(split[row]), bool(is_link[row]), key)
            for row, key in zip(named.tolist(), keys, strict=True)
            if split[row] >= 0 and (not problems.get(key) or is_link[row])
        ]
        if candidates and is_link[named].any():
            kept = min(candidates)[2]
            problems |= dict.fromkeys(keys, f"{IGNORED}the same file as {kept}")
            del problems[kept]
    return Listing(table, listing.containers, problems)


def _same_place(
    container: NDArray[np.int32], offset: NDArray[np.int64], rows: NDArray[np.int64]
) -> Iterator[NDArray[np.int64]]:
    """Yield the rows of each member: those with the same container and offset."""
    import numpy as np

    rows = rows[np.lexsort((offset[rows], container[rows]))]
    other = (np.diff(container[rows]) != 0) | (np.diff(offset[rows]) != 0)
    yield from np.split(rows, np.flatnonzero(other) + 1)
