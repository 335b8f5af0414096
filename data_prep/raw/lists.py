"""List files: paths or URIs in the lines of a .txt, a column of a .csv or a field of a .jsonl.

A key is the normalized path in the list: `a/b.jpg` or `../b.jpg` relative to the list's folder,
`file:/data/b.jpg` or `s3:/bucket/b.jpg` elsewhere. So a key also gives the place of its file.
"""

from __future__ import annotations

import csv
import io
import json
import os
import posixpath
import re
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TextIO
from urllib.parse import unquote, urlsplit

from data_prep.core.errors import ConfigError, ItemError, PipelineError
from data_prep.pictures.formats import is_picture_name
from data_prep.raw.files import Files, Found, escape
from data_prep.raw.folders import Known, checked_listing, nothing_known
from data_prep.raw.layouts import apply_layout
from data_prep.raw.listing import Item, Listing
from data_prep.raw.local_files import LocalFiles, local_name
from data_prep.raw.missing_paths import why_missing
from data_prep.raw.s3_files import S3Files, s3_files

MISSING = "missing: it is in the list, but there is no such file"
_PATHS = ("path", "uri", "url", "file", "filename", "image")  # names of columns and fields
_SPLIT = ("split", "partition", "subset")  # the same for the split
_SPLITS = {
    "": "",
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing", "eval"), "test"),
}
_LOOKED_UP = 4096  # lines per batch
LONGEST_ENTRY = 1 << 20  # characters of a line, or of a row of CSV with several lines
LONGEST_PATH = 4096  # characters; no system has longer ones
_REQUESTS = 16  # at the same time, to a server


@dataclass(frozen=True)
class ListFile:
    """The list file `name` and the files in it."""

    files: LocalFiles | S3Files
    name: str
    layout: str

    @property
    def uri(self) -> str:
        return self.files.where(self.name)

    def list(self, known: Known = nothing_known) -> Listing:
        problems: dict[str, str] = {}

        def items() -> Iterator[Item]:
            for item, problem in _Places(self.files, self.name).items():
                if problem:
                    problems[item.key] = problem
                yield item

        listing = checked_listing(items(), [], problems, self.uri)
        if not listing:
            raise PipelineError(f"{self.uri} contains no paths. Put the paths of photos into it.")
        if len(problems) == len(listing) and set(problems.values()) == {MISSING}:
            first = min(problems)
            problems[first] = f"{MISSING}. {self._why_all_missing(problems)}".rstrip(".")
            listing = Listing(listing.table, (), problems)
        return apply_layout(listing, self.layout, self.uri, self.files.first_text)

    def _why_all_missing(self, keys: Collection[str]) -> str:
        """Return why none of the keys names a file, and what to do."""
        if self.name.lower().endswith(".txt") and 2 * sum(map(_names_picture, keys)) < len(keys):
            return (
                "This text does not look like a list of photos. Give a list with the path of one"
                " photo in each line, or give another source."
            )
        return why_missing(self.files, min(keys))

    def reader(self) -> ListReader:
        return ListReader(_Places(self.files, self.name))


def _names_picture(line: str) -> bool:
    """Return whether a line of a list has the name of an image in it."""
    return any(map(is_picture_name, re.split(r"[\s,;\"']+", line)))


class ListReader:
    """A reader of the files in a list."""

    threads = 16  # some files may be on a server

    def __init__(self, places: _Places) -> None:
        self._places = places

    def read(self, item: Item, limit: int) -> bytes:
        return self._places.read(item.key, limit)

    def head(self, item: Item, count: int) -> bytes:
        return self._places.head(item.key, count)

    def __enter__(self) -> ListReader:
        return self

    def __exit__(self, *error: object) -> None:
        pass


class _Line(NamedTuple):
    number: int  # from 1
    path: str
    split: str


class _Places:
    """The places of the files in a list. The list is the file `name` of `files`."""

    def __init__(self, files: Files, name: str) -> None:
        self._files, self._name = files, name
        self._others: dict[str, Files] = {}

    def items(self) -> Iterator[tuple[Item, str]]:
        """Yield every file in the list once, with its problem, if any.

        Raises ConfigError with the number of the line if the list cannot be used.
        """
        lines = self._keyed()
        with ThreadPoolExecutor(_REQUESTS) as pool:
            while chunk := list(islice(lines, _LOOKED_UP)):
                keys = [key for key, _ in chunk]
                remote = any(isinstance(self._place(key)[0], S3Files) for key in keys)
                found = pool.map(self._look, keys) if remote else map(self._look, keys)
                for (key, split), file in zip(chunk, found, strict=True):
                    if file is None:
                        yield Item(key, -1, 0, split), MISSING
                    else:
                        yield Item(key, file.size, file.fingerprint, split), file.problem

    def read(self, key: str, limit: int) -> bytes:
        """Return the file's bytes. Raises ItemError if it is gone or larger than `limit` bytes."""
        files, name = self._place(key)
        return files.read(name, limit)

    def head(self, key: str, count: int) -> bytes:
        """Return the file's first bytes. Raises ItemError if it is gone."""
        files, name = self._place(key)
        return files.head(name, count)

    def _look(self, key: str) -> Found | None:
        files, name = self._place(key)
        return files.look(name)

    def _keyed(self) -> Iterator[tuple[str, str]]:
        """Yield each key once, with its split."""
        seen: dict[int, str] = {}  # by hash, so that a long list fits in memory
        for line in self._lines():
            try:
                key = self._key(line.path)
                split = _SPLITS[line.split.strip().lower()]
            except KeyError:
                raise self._error(
                    line.number,
                    f"the split {line.split[:40]!r} is unknown. Write train, val or test",
                ) from None
            except ValueError as error:
                raise self._error(line.number, str(error)) from None
            mark = hash(key)
            if mark not in seen:
                seen[mark] = split
                yield key, split
            elif seen[mark] != split:
                raise self._error(line.number, f"{key!r} was in another split before. Keep one")

    def _lines(self) -> Iterator[_Line]:
        try:
            raw = self._files.blob(self._name).open()
        except ItemError:
            where = self._files.where(self._name)
            raise ConfigError(f"{where} does not exist. Correct the path.") from None
        with io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as text:
            lines = _READERS[self._name.rpartition(".")[2].lower()](_Entries(text))
            for line in lines:
                if isinstance(line, str):
                    raise ConfigError(f"{self._files.where(self._name)}: {line}. Correct the list.")
                yield line

    def _key(self, written: str) -> str:
        """Return the key of a path. Raises ValueError with a reason if it is not a file's path."""
        if len(written) > LONGEST_PATH:
            raise ValueError(f"a path has more than {LONGEST_PATH} characters")
        if "\0" in written:
            raise ValueError("a path has a null character, so this is not a text file")
        try:
            written.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            raise ValueError("a path is not valid Unicode") from None
        scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", written)
        start = written[:6].lower()
        if start.startswith("s3:/"):
            bucket, _, name = written[4:].lstrip("/").partition("/")
            return self._s3_key(bucket, name)
        if start.startswith("file:/"):
            return self._local_key(unquote(urlsplit(written).path))
        if scheme:
            # The rest of the address may contain a password, so it is not repeated.
            raise ValueError(
                f"{scheme[1]}:// addresses cannot be read. Download the files first, for example"
                " with img2dataset"
            )
        if isinstance(self._files, LocalFiles):
            return self._local_key(written)
        if isinstance(self._files, S3Files) and not written.startswith("/"):
            store = self._files.store
            whole = posixpath.join(store.prefix, written)
            if re.search(r"(^|/)\.\.?(/|$)", whole):
                whole = posixpath.normpath(whole)
            return self._s3_key(store.bucket, whole)
        raise ValueError(f"{written!r} is not below the list's folder. Write s3://bucket/key")

    def _local_key(self, path: str) -> str:
        if isinstance(self._files, LocalFiles):
            folder = local_name(Path(os.path.abspath(self._files.folder)))
            if not path.startswith("/"):
                return escape(posixpath.normpath(path))
            path = posixpath.normpath(path)
            if path.startswith(f"{folder}/"):
                return escape(path[len(folder) + 1 :])
        return escape(f"file:/{posixpath.normpath(path).lstrip('/')}")

    def _s3_key(self, bucket: str, name: str) -> str:
        if not bucket or not name:
            raise ValueError("an s3:// address needs a bucket and a key. Write s3://bucket/key")
        if isinstance(self._files, S3Files) and self._files.store.bucket == bucket:
            prefix = f"{self._files.store.prefix}/".lstrip("/")
            if name.startswith(prefix):
                return escape(name[len(prefix) :])
        return escape(f"s3:/{bucket}/{name}")

    def _place(self, key: str) -> tuple[Files, str]:
        """Return the folder or bucket of a key, and the key in there."""
        if key.startswith("file:/"):
            return LocalFiles(Path("/")), key[len("file:/") :]
        if key.startswith("s3:/"):
            bucket, _, name = key[len("s3:/") :].partition("/")
            if bucket not in self._others:
                self._others[bucket] = s3_files(bucket, "")
            return self._others[bucket], name
        return self._files, key

    def _error(self, number: int, reason: str) -> ConfigError:
        return ConfigError(f"line {number} of {self._files.where(self._name)}: {reason}.")


class _Entries:
    """The lines of a list. `left` characters may follow in this entry; a reader sets it again.

    A list may come from strangers, and a line without an end would fill the memory.
    """

    def __init__(self, text: TextIO) -> None:
        self._text = text
        self.left = LONGEST_ENTRY
        self.is_too_long = False

    def __iter__(self) -> Iterator[str]:
        """Yield the lines up to the first entry that is too long."""
        while line := self._text.readline(self.left + 1):
            self.left -= len(line)
            if self.left < 0:
                self.is_too_long = True
                return
            yield line

    def begin(self) -> None:
        """Begin the next entry."""
        self.left = LONGEST_ENTRY


def _too_long(number: int) -> str:
    return f"line {number} is longer than {LONGEST_ENTRY} characters, so this is not a list"


def _text_lines(entries: _Entries) -> Iterator[_Line | str]:
    number = 0
    for number, line in enumerate(entries, 1):
        entries.begin()
        path = line.removesuffix("\n").removesuffix("\r")
        if path:
            yield _Line(number, path, "")
    if entries.is_too_long:
        yield _too_long(number + 1)


def _csv_lines(entries: _Entries) -> Iterator[_Line | str]:
    """Yield the rows, or a message if they cannot be read."""
    rows = csv.reader(entries)
    try:
        names = [name.strip().lower() for name in next(rows, [])]
        path_at = next((names.index(name) for name in _PATHS if name in names), -1)
        split_at = next((names.index(name) for name in _SPLIT if name in names), -1)
        if path_at < 0 and not entries.is_too_long:
            yield f"its first line has no column {', '.join(_PATHS[:-1])} or {_PATHS[-1]}"
            return
        entries.begin()
        for row in rows:
            entries.begin()
            if entries.is_too_long:
                break  # this row is not whole
            if row:
                path, split = (row[at] if 0 <= at < len(row) else "" for at in (path_at, split_at))
                if not path:
                    yield f"line {rows.line_num} has no path"
                    return
                yield _Line(rows.line_num, path, split)
    except csv.Error as error:
        yield f"line {rows.line_num} is not CSV ({error})"
        return
    if entries.is_too_long:
        yield _too_long(rows.line_num + 1)


def _json_lines(entries: _Entries) -> Iterator[_Line | str]:
    """Yield the objects, or a message if they cannot be read."""
    number = 0
    for number, line in enumerate(entries, 1):
        entries.begin()
        if line.strip():
            try:
                row: Any = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                yield f"line {number} is not a JSON object"
                return
            path = next((row[name] for name in _PATHS if row.get(name)), None)
            if not isinstance(path, str):
                yield f"line {number} has no field {', '.join(_PATHS[:-1])} or {_PATHS[-1]}"
                return
            yield _Line(
                number, path, str(next((row[name] for name in _SPLIT if row.get(name)), ""))
            )
    if entries.is_too_long:
        yield _too_long(number + 1)


_READERS = {"txt": _text_lines, "csv": _csv_lines, "jsonl": _json_lines}


def is_list(name: str) -> bool:
    """Return whether a file with this name is read as a list."""
    return name.rpartition(".")[2].lower() in _READERS
