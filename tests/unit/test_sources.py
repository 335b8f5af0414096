"""Sources: listing a folder, hashing and inspecting what is in it, and remembering."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from data_prep import sources
from data_prep.digest import sha256_bytes
from data_prep.errors import PipelineError
from data_prep.sources import COLUMNS, Item, Source, examine, list_items, read_item


def picture(path: Path, side: int = 20) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (side, side)).save(path)


def look(folder: Path, known: dict[str, dict[str, object]] | None = None) -> list[Source]:
    return examine(list_items(folder), known or {}, max_pixels=10_000, workers=1)


def test_files_of_all_sub_folders_are_listed_by_key_and_hidden_ones_are_not(
    tmp_path: Path,
) -> None:
    for name in ("b.png", "a/z.jpg", "a/B/c.PNG", ".hidden.png", ".folder/x.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    items = list_items(tmp_path)
    assert [item.key for item in items] == ["a/B/c.PNG", "a/z.jpg", "b.png", "notes.txt"]
    assert [item.is_image for item in items] == [True, True, True, False]
    assert read_item(items[0]) == b"x"


def test_a_linked_folder_is_followed_and_a_loop_of_links_ends(tmp_path: Path) -> None:
    picture(tmp_path / "elsewhere/a.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/loop").symlink_to(tmp_path / "photos")
    assert [item.key for item in list_items(tmp_path / "photos")] == ["linked/a.png"]


def test_what_is_no_file_is_not_listed(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    os.mkfifo(tmp_path / "pipe.png")
    assert [item.key for item in list_items(tmp_path)] == ["a.png"]


def test_a_name_that_is_not_unicode_is_listed_and_read(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    os.rename(os.fsencode(tmp_path / "a.png"), os.fsencode(tmp_path) + b"/\xff.png")
    (source,) = look(tmp_path)
    assert source.key == "\\xff.png"
    assert source.whole


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda path: None, "does not exist: give another with --photos"),
        (lambda path: path.write_text(""), "is a file: images.source must be a folder"),
        (lambda path: path.mkdir(), "is empty: put photographs into it"),
        (lambda path: (path / "sub").mkdir(parents=True), "is empty: put photographs into it"),
    ],
)
def test_a_folder_that_cannot_be_used_is_told_in_one_sentence(
    tmp_path: Path, make: object, sentence: str
) -> None:
    assert callable(make)
    make(tmp_path / "photos")
    with pytest.raises(PipelineError, match=sentence) as caught:
        list_items(tmp_path / "photos")
    assert str(tmp_path / "photos") in str(caught.value)


def test_an_image_is_hashed_and_inspected(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    (source,) = look(tmp_path)
    assert source.sha256 == sha256_bytes((tmp_path / "a.png").read_bytes())
    assert (source.width, source.height, source.format, source.mode) == (20, 20, "PNG", "RGB")
    assert source.whole
    assert not source.error


def test_a_broken_image_and_a_broken_link_have_a_reason(tmp_path: Path) -> None:
    picture(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:50])
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    reasons = {source.key: source.error for source in look(tmp_path)}
    assert reasons["cut.png"].startswith("it is broken")
    assert reasons["link.png"] == "it is a link to a file that does not exist"
    assert not reasons["whole.png"]


def test_a_file_that_is_no_image_is_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "film.mp4").write_bytes(b"huge")
    monkeypatch.setattr(sources, "read_item", lambda item: pytest.fail("it was read"))
    assert look(tmp_path)[0].sha256 == ""


def test_a_file_gone_since_the_listing_is_an_error_and_not_a_failed_photograph(
    tmp_path: Path,
) -> None:
    picture(tmp_path / "a.png")
    items = list_items(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(PipelineError, match=r"a\.png is gone since the folder was listed"):
        examine(items, {}, 10_000, 1)


def test_known_files_are_not_read_again_and_changed_ones_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.png", "b.png", "broken.png"):
        picture(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    first = look(tmp_path)
    known = {source.key: source.row() for source in first}
    assert all(list(row) == list(COLUMNS) for row in known.values())
    picture(tmp_path / "b.png", side=30)
    read: list[str] = []

    def read_and_note(item: Item) -> bytes:
        read.append(item.key)
        return read_item(item)

    monkeypatch.setattr(sources, "read_item", read_and_note)
    second = look(tmp_path, known)
    assert read == ["b.png"]
    assert second[0] == first[0]
    assert second[1].width == 30
    assert second[2].error == first[2].error


def test_a_picture_over_the_limit_is_decoded_when_the_limit_is_raised(tmp_path: Path) -> None:
    picture(tmp_path / "a.png", side=200)
    (source,) = look(tmp_path)
    assert (source.width, source.whole, source.error) == (200, False, "")
    known = {source.key: source.row()}
    assert examine([source.item], known, 10_000, 1) == [source]
    assert examine([source.item], known, 50_000, 1)[0].whole


def test_workers_find_the_same_as_one_process(tmp_path: Path) -> None:
    for number in range(130):
        picture(tmp_path / f"{number}.png", side=10 + number % 7)
    items = list_items(tmp_path)
    assert examine(items, {}, 10_000, workers=2) == examine(items, {}, 10_000, workers=1)
