"""Layouts of published datasets: which split each file belongs to."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from data_prep.core.errors import ConfigError
from data_prep.raw.listing import ROWS, SPLITS, Listing

IGNORED = "ignored: "  # starts the problem of a file that is not part of the set; not a failure
OUTSIDE = f"{IGNORED}outside the folders train, val, validation and test"
CONTAINERS = r"\.(?:zip|tar|tar\.gz|tgz|parquet)"
_FOLDERS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_SHARD = re.compile(
    rf"(train|training|val|valid|validation|test|testing)(?:[-_.][^/]*)?{CONTAINERS}", re.IGNORECASE
)

TextOf = Callable[[str], str | None]  # returns the text of a file in or next to the source
SplitOf = Callable[[str], str | None]  # by key; "": not decided; None: not part of the set


@dataclass(frozen=True)
class Layout:
    """The places of a set's files.

    `pattern` matches keys and has groups named after the splits. If a list contains the splits, it
    has the group `number` instead.
    """

    pattern: re.Pattern[str]
    expected: str  # the files that there should be, for messages


PRESETS: Mapping[str, Layout] = {
    "places2": Layout(
        re.compile(
            r"(?:^|/)(?:(?P<train>train|data_256|data_large)|(?P<val>val|val_256|val_large)"
            r"|(?P<test>test|test_256|test_large))/"
        ),
        "the folders or archives of Places365: places365_standard/{train,val}, or data_256,"
        " val_256 and test_256 (or _large)",
    ),
    "celeba": Layout(
        re.compile(r"(?:^|/)(?P<number>\d{6})\.(?i:jpg|png)$"),
        "img_align_celeba.zip or its folder, with list_eval_partition.txt next to it",
    ),
    "celeba-hq": Layout(
        re.compile(r"(?:^|(?:^|/)CelebA-HQ-img/)(?P<number>\d{1,5})\.(?i:jpg|png)$"),
        "the folder CelebA-HQ-img of CelebAMask-HQ",
    ),
    "paris-street-view": Layout(
        re.compile(
            r"(?:^|/)(?:(?P<train>paris_train_original)|(?P<test>paris_eval_gt))/[^/]+"
            r"\.(?i:jpg|jpeg|png)$"
        ),
        "the folders paris_train_original and paris_eval/paris_eval_gt",
    ),
    "bsds500": Layout(
        re.compile(
            r"(?:^|(?<!groundTruth)/)(?:(?P<train>train)|(?P<val>val)|(?P<test>test))/[^/]+"
            r"\.(?i:jpg|png)$"
        ),
        "the folders train, val and test of its images",
    ),
}
LAYOUTS = ("auto", "files", "webdataset", *PRESETS)


def check_layout(layout: str) -> None:
    """Raise ConfigError if there is no such layout."""
    if layout not in LAYOUTS:
        raise ConfigError(f"the layout {layout!r} is unknown. Use one of {', '.join(LAYOUTS)}.")


def are_samples(layout: str) -> bool | None:
    """Return whether tars hold WebDataset samples; None if their first members decide."""
    return {"webdataset": True, "files": False}.get(layout)


def apply_layout(listing: Listing, layout: str, uri: str, text_of: TextOf) -> Listing:
    """Return the listing with the splits of the layout.

    A file that is not part of the layout gets a problem. A listing with splits stays as it is.

    Args:
        listing: The items of the source.
        layout: One of `LAYOUTS`.
        uri: The source's address, for messages.
        text_of: Returns the text of a file in or next to the source, None if there is none.

    Raises:
        ConfigError: The source has no file of the layout, or a list of splits is missing or broken.
    """
    if layout == "files" or "split" in listing.table.column_names:
        return listing
    if layout not in PRESETS:
        split_of = _folders(listing)
        return listing if split_of is None else _split(listing, split_of, OUTSIDE)
    split_of = _preset(layout, uri, text_of)
    done = _split(listing, split_of, f"{IGNORED}not part of {layout}")
    if all(done.problems.get(key, "").startswith(IGNORED) for key in _keys(done)):
        raise ConfigError(
            f"{uri} has no file of the layout {layout}. It expects {PRESETS[layout].expected}."
        )
    return done


def _keys(listing: Listing) -> Iterator[str]:
    column = listing.table["key"]
    for start in range(0, len(column), ROWS):
        yield from column.slice(start, ROWS).to_pylist()


def _split(listing: Listing, split_of: SplitOf, reason: str) -> Listing:
    """Add a column of splits; `reason` is the problem of files that are not part of the set."""
    import pyarrow as pa

    codes = array("b")
    problems = dict(listing.problems)
    places = {"": -1, **{split: code for code, split in enumerate(SPLITS)}}
    for key in _keys(listing):
        split = split_of(key)
        if split is None:
            problems.setdefault(key, reason)
        codes.append(places[split or ""])
    table = listing.table.append_column("split", pa.array(codes, pa.int8()))
    return Listing(table, listing.containers, problems)


def _folders(listing: Listing) -> SplitOf | None:
    """Return the split by top folder, or by the folders in the only top folder, if any."""
    below = ""
    for _ in range(2):
        start = len(below)
        tops = {key[start:].partition("/")[0] for key in _keys(listing) if "/" in key[start:]}
        found = {_folder_split(top) for top in tops} - {None}
        if "train" in found and len(found) > 1:
            return lambda key: _below(key, below)
        if len(tops) != 1:
            break
        below = f"{tops.pop()}/"
    return None


def _below(key: str, below: str) -> str | None:
    if not key.startswith(below):
        return None
    top, slash, _ = key[len(below) :].partition("/")
    return _folder_split(top) if slash else None


@lru_cache(maxsize=4096)
def _folder_split(name: str) -> str | None:
    """Return the split in the name of a folder, or of an archive or table in its place."""
    if name in _FOLDERS:
        return _FOLDERS[name]
    shard = _SHARD.fullmatch(name)
    return _FOLDERS[shard[1].lower()] if shard else None


def _preset(layout: str, uri: str, text_of: TextOf) -> SplitOf:
    pattern = PRESETS[layout].pattern
    if layout == "celeba":
        text = text_of(_PARTITION)
        if text is None:
            raise ConfigError(
                f"the layout celeba needs {_PARTITION}, which contains the splits. Put it next to"
                f" the photos of {uri}."
            )
        listed = _partition(text, uri)
        return lambda key: listed.get(_number(pattern, key))
    if layout == "celeba-hq":
        mapping, text = text_of(_MAPPING), text_of(_PARTITION)
        if mapping is None or text is None:
            return lambda key: "" if _number(pattern, key) >= 0 else None
        origins, listed = _origins(mapping), _partition(text, uri)
        return lambda key: listed.get(origins.get(_number(pattern, key), -1))

    def split_of(key: str) -> str | None:
        found = pattern.search(key)
        return found.lastgroup if found else None

    return split_of


_PARTITION = "list_eval_partition.txt"  # lines `000001.jpg 0`: 0 train, 1 val, 2 test
_MAPPING = (
    "CelebA-HQ-to-CelebA-mapping.txt"  # lines `0 119613 119614.jpg`: its number, an index, CelebA's
)


def _number(pattern: re.Pattern[str], key: str) -> int:
    found = pattern.search(key)
    return int(found["number"]) if found else -1


def _partition(text: str, uri: str) -> dict[int, str]:
    """Return the split of every CelebA number."""
    lines = re.findall(r"^(\d+)\.\w+[\s,]+([012])\s*$", text, re.MULTILINE)
    if not lines:
        raise ConfigError(
            f"{_PARTITION} of {uri} has no line such as '000001.jpg 0'. Download it again."
        )
    return {int(number): SPLITS[int(code)] for number, code in lines}


def _origins(text: str) -> dict[int, int]:
    """Return the CelebA number of every CelebA-HQ number."""
    lines = re.findall(r"^\s*(\d+)\s+\d+\s+(\d+)\.\w+\s*$", text, re.MULTILINE)
    return {int(number): int(origin) for number, origin in lines}
