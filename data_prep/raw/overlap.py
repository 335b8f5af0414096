"""Keep a source and the root apart: shards of a root must never be read as photos."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from data_prep.core import paths
from data_prep.core.errors import ConfigError
from data_prep.core.storage.uri import S3Address, parse_uri
from data_prep.raw.listing import Listing

# The folders that a root fills. Others below it, such as `photos`, are the user's.
_OWN = (
    *(paths.IMAGES, paths.MASKS, paths.RUNS, paths.EVALUATIONS, paths.REGISTRY, paths.RETRAINS),
    *(paths.PREFECT, paths.UP, paths.MLFLOW_ARTIFACTS),
)
_STAGE = re.compile(
    rf"(?:^|/)(?:(?:{paths.IMAGES}|{paths.MASKS}|{paths.REGISTRY}|{paths.RETRAINS})/[^/]+/"
    rf"|{paths.RUNS}/[^/]+-|{paths.EVALUATIONS}/)[0-9a-f]{{12}}/{re.escape(paths.MANIFEST)}$"
)


def check_apart(source: str, root: str, option: str = "images.source") -> None:
    """Refuse a source that contains the root, or that is inside a folder that the root fills.

    Symbolic links are followed. Raises ConfigError.

    Args:
        source: a path or URI.
        root: a path or URI.
        option: the option that names the source.
    """
    inner, outer = parse_uri(source), parse_uri(root)
    if isinstance(inner, S3Address) or isinstance(outer, S3Address):
        if not (isinstance(inner, S3Address) and isinstance(outer, S3Address)):
            return
        places = [f"/{address.bucket}/{address.prefix}".rstrip("/") for address in (inner, outer)]
        above = [list(_prefixes(place)) for place in places]
        own = {f"{places[1]}/{name}": name for name in _OWN}
    else:
        places = [_identity(os.path.realpath(path)) for path in (inner, outer)]
        above = [list(map(_identity, _prefixes(os.path.realpath(path)))) for path in (inner, outer)]
        own = {_identity(os.path.realpath(outer / name)): name for name in _OWN}
    if places[0] in above[1]:
        raise ConfigError(
            f"{option} {source} contains the root {root}, so its shards would be read as photos."
            f" Choose a root outside of {option}, or move the photos into a folder of their own."
        )
    for place in above[0]:
        if place in own:
            raise ConfigError(
                f"{option} {source} is inside {own[place]}, a folder that the root {root} fills"
                " itself. Choose another root, or move the photos."
            )


def check_no_root(listing: Listing, uri: str, option: str = "images.source") -> None:
    """Refuse a source in which there is a root, such as one behind a link. Raises ConfigError."""
    import pyarrow.compute as pc

    keys = listing.table["key"]
    for key in keys.filter(pc.ends_with(keys, f"/{paths.MANIFEST}")).to_pylist():
        if _STAGE.search(key):
            raise ConfigError(
                f"{option} {uri} contains a root with {key}, so its shards would be read as"
                " photos. Move the root out of the source, or give the folder of the photos."
            )


def _prefixes(path: str) -> Iterator[str]:
    """Yield an absolute path and all paths above it, but not the top."""
    while path not in ("", "/"):
        yield path
        path = path.rpartition("/")[0]
    yield "/"


def _identity(path: str) -> str:
    """Return the number of an existing file, which is the same under all its names; else the path.

    A mount or another case of letters is a name that links do not show.
    """
    try:
        status = os.stat(path)
    except OSError:
        return path
    return f"{status.st_dev}:{status.st_ino}"
