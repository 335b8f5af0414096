"""Explain why no path of a list names a file."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from urllib.parse import unquote

from data_prep.raw.files import Files, escape, unescape

_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def why_missing(files: Files, key: str) -> str:
    """Return a sentence that says why a list has no file at this key, and what to do.

    Args:
        files: of the list's folder.
        key: of a file in the list that does not exist.
    """
    path = unescape(key)
    first = ""
    for reading, reason in _readings(path):
        first = first or reason
        for candidate in _places(reading):
            if files.look(escape(candidate)) is not None:
                where = "" if candidate == reading else f" The file is at {files.where(candidate)}."
                return f"{reason or _RELATIVE.format(files.uri)}{where}"
    return first or _RELATIVE.format(files.uri)


_RELATIVE = (
    "Relative paths start at the folder of the list, {}. Correct the paths or move the list."
)


def _readings(path: str) -> Iterator[tuple[str, str]]:
    """Yield what a written path may mean, each with the reason; none for the path itself."""
    path = path.removeprefix("file:")
    if _DRIVE.match(path) or "\\" in path:
        plain = _DRIVE.sub("", path, count=1) if _DRIVE.match(path) else path
        reason = "It is a path of Windows. Write a relative path with slashes."
        yield plain.replace("\\", "/"), reason
    raw = path.encode("utf-8", "surrogateescape")
    if any("\udc80" <= letter <= "\udcff" for letter in path):
        yield raw.decode("latin-1"), "The list is not in UTF-8. Save it as UTF-8."
    if unquote(path) != path:
        yield unquote(path), "It is written as in a URL, such as %20 for a blank. Write it plainly."
    for form in ("NFC", "NFD"):
        if (other := unicodedata.normalize(form, path)) != path:
            yield other, "Its accents are stored in another way (NFC or NFD). Copy the file's name."
    words = [word for word in re.split(r"[,;\t]| +(?=\S+$)", path.strip().strip("\"'")) if word]
    if words and words[0] != path:
        yield words[0], "Its line has more than a path. Give a .csv file with a column path."
    yield path, ""


def _places(path: str) -> Iterator[str]:
    """Yield a path, and where its file may be if the path starts at another folder."""
    path = path.lstrip("/")
    yield path
    parts = path.split("/")
    for count in range(1, min(len(parts), 8)):
        yield "/".join(parts[count:])
    yield f"../{path}"
    yield f"../../{path}"
