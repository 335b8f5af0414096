"""Keys are the same on every machine: in any locale, and in any order of its folders."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from raw_places import keys, open_and_list

LIST = """
import json, sys
from data_prep.images.next_version import listing_digest
from data_prep.raw.source import open_source
found = {}
for uri in sys.argv[1:]:
    source = open_source(uri)
    listing = source.list()
    with source.reader() as reader:
        read = {item.key: reader.read(item, 9999).decode() for item in listing.items()}
    found[uri] = [read, listing_digest(listing)]
print(json.dumps([sys.getfilesystemencoding(), found]))
"""


def listed(locale: dict[str, str], *uris: Path) -> list[object]:
    environment = {**os.environ, **locale, "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "-c", LIST, *map(str, uris)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return list(json.loads(done.stdout))


def test_keys_and_digests_do_not_depend_on_the_locale(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    names = ["é.jpg", "e\u0301.jpg", "漢/字.jpg", "plain.jpg"]
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(ascii(name))
    Path(os.fsdecode(os.fsencode(folder) + b"/gr\xfc.jpg")).write_text("bytes")
    paths = [*names, f"{folder}/plain.jpg", f"{folder}/漢/字.jpg"]
    (folder / "list.txt").write_text("\n".join(paths), "utf-8")
    uris = (folder, folder / "list.txt")
    encoding, expected = listed({"LC_ALL": "C.UTF-8", "PYTHONUTF8": "1"}, *uris)
    assert encoding == "utf-8"
    assert set(expected[str(folder)][0]) == {*names, "gr\\xfc.jpg", "list.txt"}  # type: ignore[index]
    other, found = listed({"LC_ALL": "C", "PYTHONUTF8": "0"}, *uris)
    assert other != encoding
    assert found == expected


@pytest.mark.parametrize("backward", [False, True])
def test_a_folder_with_several_names_has_the_same_keys_in_any_order(
    tmp_path: Path, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in/all/b").mkdir(parents=True)
    (tmp_path / "in/all/b/1.jpg").write_bytes(b"1")
    (tmp_path / "in/a").symlink_to("all")
    (tmp_path / "in/test").symlink_to("all/b")
    real = os.scandir

    class Ordered:
        def __init__(self, path: str) -> None:
            with real(path) as entries:
                self._entries = sorted(entries, key=lambda entry: entry.name, reverse=backward)

        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            return iter(self._entries)

        def __exit__(self, *error: object) -> None:
            pass

    monkeypatch.setattr("data_prep.raw.local_files.os.scandir", Ordered)
    assert keys(open_and_list(str(tmp_path / "in"))) == ["test/1.jpg"]
