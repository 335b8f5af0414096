"""Layouts of published datasets: which split each file belongs to."""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import takewhile

from data_prep.core.errors import ConfigError
from data_prep.raw.listing import ROWS, SPLITS, Listing

IGNORED = "ignored: "  # starts the problem of a file that is not part of the set; not a failure
OUTSIDE = f"{IGNORED}outside the folders train, val, validation and test"
CONTAINERS = r"\.(?:zip|tar|tar\.gz|tgz|parquet)"
_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_WORDS = "|".join(sorted(_FOLDERS, key=len, reverse=True))
_NAMED = re.compile(rf"({_WORDS})(?:[-_]?\d{{4}})?", re.IGNORECASE)  # also train2017
_SHARD = re.compile(rf"({_WORDS})(?:[-_.]?\d+)?(?:[-_.][^/]*)?{CONTAINERS}", re.IGNORECASE)
_WEAK = ("dev", "eval", "evaluation")  # names of splits only next to a folder train

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
    """Return the split by the folders that are called train, val and test, if there are some.

    These are the top folders, or those in the only top folder. Otherwise they are at any depth, as
    in `images/train` next to `labels/train`, or in `cats/test` next to `dogs/train`.
    """
    items = Counter(map(_folder_of, _keys(listing)))
    parts = {folder: tuple(folder.split("/")) if folder else () for folder in items}
    common = _common_parts(parts.values())
    found = _splits_at_top(parts, common) or _splits_at_depth(parts, items, len(common))
    if found is None:
        return None
    return lambda key: found[_folder_of(key)]


def lost_splits(keys: Iterable[str]) -> list[str]:
    """Return the folders that look like splits of a source in which `_folders` found none.

    A folder `train` without others says nothing: all photos of the source may be trained on.
    """
    folders = [tuple(folder.split("/")) for folder in set(map(_folder_of, keys)) if folder]
    start = len(_common_parts(folders))
    named: dict[str, str] = {}
    pairs: dict[tuple[str, ...], dict[str, str]] = {}  # by the rest of the names
    for parts in sorted(folders):
        for depth, part in enumerate(parts[start:], start + 1):
            if _folder_split(part) not in (None, "train") and part.lower() not in _WEAK:
                named[part] = "/".join(parts[:depth])
            for split, rest in _inner_splits(part):
                pairs.setdefault(rest, {}).setdefault(split, "/".join(parts[:depth]))
    pair = next((places for places in pairs.values() if len(places) > 1), {})
    return sorted((named or pair).values())


def _folder_of(key: str) -> str:
    """Return the folder of a key; Windows separates its parts by backslashes."""
    return (key.replace("\\", "/") if "\\" in key else key).rpartition("/")[0]


_Parts = tuple[str, ...]  # of the path of a folder
_Found = dict[str, str | None]  # the split of each folder; None: not part of the set


def _common_parts(folders: Iterable[_Parts]) -> _Parts:
    """Return the folder that all items share. Items outside of folders do not count."""
    inside = [parts for parts in folders if parts]
    if not inside:
        return ()
    first, last = min(inside), max(inside)
    same = (one == two for one, two in zip(first, last, strict=False))
    return first[: sum(takewhile(bool, same))]


def _splits_at_top(folders: Mapping[str, _Parts], common: _Parts) -> _Found | None:
    """Return the splits by the top folders, or by those in the only top folder."""
    for depth in range(len(common) + 1):
        split = {
            folder: _folder_split(parts[depth])
            if len(parts) > depth and parts[:depth] == common[:depth]
            else None
            for folder, parts in folders.items()
        }
        if _are_splits(split):
            return split
    return None


def _splits_at_depth(
    folders: Mapping[str, _Parts], items: Mapping[str, int], start: int
) -> _Found | None:
    """Return the splits by the depth at which most items have one.

    If a folder has no split at this depth, its first part with a split decides.

    Args:
        folders: the parts of each folder.
        items: the number of items in each folder.
        start: the number of parts that all folders share.
    """
    count: Counter[int] = Counter()
    for folder, parts in folders.items():
        count.update(
            {d: items[folder] for d in range(start, len(parts)) if _folder_split(parts[d])}
        )
    best = max(count, key=lambda depth: (count[depth], -depth), default=0)
    found: _Found = {
        folder: next(filter(None, map(_folder_split, parts[best : best + 1] + parts[start:])), None)
        for folder, parts in folders.items()
    }
    return found if _are_splits(found) else None


def _are_splits(found: _Found) -> bool:
    splits = set(found.values()) - {None}
    return "train" in splits and len(splits) > 1


@lru_cache(maxsize=4096)
def _folder_split(name: str) -> str | None:
    """Return the split in the name of a folder, or of an archive or table in its place."""
    named = _NAMED.fullmatch(name) or _SHARD.fullmatch(name)
    return _FOLDERS[named[1].lower()] if named else None


@lru_cache(maxsize=4096)
def _inner_splits(part: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return each split that a name such as `photos_test` has in it, with the rest of the name."""
    words = re.split(r"[-_. ]+", part.lower())
    if re.search(rf"{CONTAINERS}$", part, re.IGNORECASE):
        words = [word for word in words if not word.isdigit()]  # the number of a shard
    return [
        (_FOLDERS[word], tuple(words[:at] + words[at + 1 :]))
        for at, word in enumerate(words)
        if word in _FOLDERS and len(words) > 1
    ]


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
