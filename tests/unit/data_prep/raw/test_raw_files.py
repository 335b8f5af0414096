"""Folders and prefixes as raw sources. S3 is moto's server, or Ceph in slow tests."""

from __future__ import annotations

import os
import pickle
import subprocess
import tracemalloc
from pathlib import Path

import pytest
from raw_places import LIMIT, Place, contents, keys, open_and_list, place
from servers import Server

from data_prep.core.errors import ConfigError, ItemError, PipelineError, StorageError
from data_prep.raw.files import escape, unescape
from data_prep.raw.listing import Item
from data_prep.raw.local_files import LocalFiles
from data_prep.raw.source import check_source, open_source

__all__ = ["place"]


def test_files_of_all_sub_folders_are_listed_by_key_and_hidden_ones_are_not(place: Place) -> None:
    for name in ("b.png", "a/z.jpg", "a/B/c.PNG", ".hidden.png", ".folder/x.png", "notes.txt"):
        place.put(name, name.encode())
    source = open_source(place.uri)
    assert keys(source.list()) == ["a/B/c.PNG", "a/z.jpg", "b.png", "notes.txt"]
    assert contents(source)["a/B/c.PNG"] == b"a/B/c.PNG"


def test_names_with_spaces_newlines_and_unicode_are_read(
    place: Place, request: pytest.FixtureRequest
) -> None:
    names = ["a b.jpg", "grün/ß 猫.jpg", "50%20.jpg", "a#b?c.jpg", "'\"&<>.jpg"]
    if "moto" not in request.node.name:  # moto cannot store it
        names.append("new\nline.jpg")
    for name in names:
        place.put(name, name.encode())
    assert contents(open_source(place.uri)) == {name: name.encode() for name in names}


def test_a_file_uri_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b/x.jpg").write_bytes(b"x")
    assert keys(open_and_list((tmp_path / "a b").as_uri())) == ["x.jpg"]


def test_the_fingerprint_changes_only_with_its_file(place: Place) -> None:
    place.put("a", b"1")
    place.put("b", b"1")
    first = {item.key: item for item in open_and_list(place.uri).items()}
    assert first["a"].size == 1
    assert 0 not in (first["a"].fingerprint, first["b"].fingerprint)
    place.put("a", b"2")
    second = {item.key: item for item in open_and_list(place.uri).items()}
    assert second["a"].fingerprint != first["a"].fingerprint
    assert second["b"] == first["b"]


def test_a_copy_with_the_same_times_has_the_same_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "one/a").write_bytes(b"1")
    subprocess.run(["cp", "-a", tmp_path / "one", tmp_path / "two"], check=True)
    (one,) = open_and_list(str(tmp_path / "one")).items()
    assert [one] == list(open_and_list(str(tmp_path / "two")).items())


def test_a_linked_folder_is_followed_and_a_loop_of_links_ends(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.png").write_bytes(b"a")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "photos/loop").symlink_to(tmp_path / "photos")
    (tmp_path / "photos/self.png").symlink_to(tmp_path / "photos/self.png")
    listing = open_and_list(str(tmp_path / "photos"))
    assert keys(listing) == ["linked/a.png", "self.png"]
    assert list(listing.problems) == ["self.png"]


def test_a_broken_link_is_listed_with_its_problem(tmp_path: Path) -> None:
    (tmp_path / "link.png").symlink_to(tmp_path / "nowhere.png")
    listing = open_and_list(str(tmp_path))
    assert listing.problems == {"link.png": "it is a link to a file that does not exist"}


def test_pipes_and_sockets_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"a")
    os.mkfifo(tmp_path / "pipe.png")
    assert keys(open_and_list(str(tmp_path))) == ["a.png"]


def test_a_name_that_is_not_unicode_is_listed_and_read(tmp_path: Path) -> None:
    for name in (b"\xff.png", b"\\xff.png", b"a\\b.png", b"\\x5cxff.png"):
        Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).write_bytes(name)
    found = contents(open_source(str(tmp_path)))
    assert found["\\xff.png"] == b"\xff.png"
    assert found["a\\b.png"] == b"a\\b.png"
    assert sorted(map(bytes, found.values())) == sorted(  # type: ignore[arg-type]
        [b"\xff.png", b"\\xff.png", b"a\\b.png", b"\\x5cxff.png"]
    )


@pytest.mark.parametrize(
    "name", [b"\xff", b"\\xff", b"\\x5cxff", b"\\\xff", b"\\x\xff", b"\\x8\xff", "ü\\xe4".encode()]
)
def test_unescape_restores_every_name(name: bytes) -> None:
    key = escape(name.decode("utf-8", "surrogateescape"))
    key.encode()
    assert unescape(key).encode("utf-8", "surrogateescape") == name


@pytest.mark.parametrize("check", [check_source, open_and_list])
@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        ("", r"does not exist\. Correct the path"),
        ("file", r"is not a source\. Give a folder"),
        ("folder", r"is empty\. Put photos into it"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_with_advice(
    tmp_path: Path, make: str, sentence: str, check: object
) -> None:
    assert callable(check)
    photos = tmp_path / "photos"
    if make:
        photos.write_text("") if make == "file" else photos.mkdir()
    with pytest.raises(PipelineError, match=sentence) as caught:
        check(str(photos))
    assert str(photos) in str(caught.value)


def test_a_folder_of_empty_folders_is_empty(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    with pytest.raises(PipelineError, match=r"is empty\. Put photos into it"):
        open_and_list(str(tmp_path))


@pytest.mark.parametrize("check", [check_source, open_and_list])
def test_an_empty_prefix_and_an_absent_object_are_refused(moto_root: str, check: object) -> None:
    assert callable(check)
    with pytest.raises(PipelineError, match=f"there is nothing at {moto_root}"):
        check(moto_root)
    with pytest.raises(PipelineError, match=f"{moto_root}/a.zip does not exist"):
        check(f"{moto_root}/a.zip")


@pytest.mark.parametrize("check", [check_source, open_and_list])
def test_a_missing_bucket_is_reported(moto_root: str, check: object) -> None:
    assert callable(check)
    with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist"):
        check("s3://no-such-bucket/photos")


@pytest.mark.parametrize("uri", ["https://me:secret@host/photos", "gs://bucket/x", "s3:///x"])
def test_another_scheme_is_refused_without_showing_a_password(uri: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_source(uri)
    assert "secret" not in str(caught.value)
    assert "s3://" in str(caught.value)


def test_an_unknown_layout_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"layout 'imagenet' is unknown\. Use one of auto, files"):
        check_source(str(tmp_path), "imagenet")


def test_a_file_deleted_after_the_listing_fails_as_an_item(place: Place) -> None:
    place.put("a", b"a")
    with open_source(place.uri).reader() as reader, pytest.raises(ItemError, match="it is gone"):
        reader.read(Item("b", 1, 1), LIMIT)


def test_a_file_over_the_limit_fails_as_an_item(place: Place) -> None:
    place.put("a", b"12345")
    place.put("empty", b"")
    with open_source(place.uri).reader() as reader:
        assert reader.read(Item("a", 5, 1), 5) == b"12345"
        assert reader.read(Item("empty", 0, 1), 5) == b""
        with pytest.raises(ItemError, match="larger than 4 bytes"):
            reader.read(Item("a", 5, 1), 4)


def test_a_file_without_read_permission_ends_the_build_with_a_mocked_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a").write_bytes(b"a")
    with open_source(str(tmp_path)).reader() as reader:
        monkeypatch.setattr("data_prep.raw.local_files.open", refuse, raising=False)
        with pytest.raises(PipelineError, match="a: Permission denied"):
            reader.read(Item("a", 1, 1), LIMIT)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PipelineError, match=r"Permission denied\. Check its permissions"):
        open_and_list(str(tmp_path))


def test_a_folder_removed_during_the_listing_is_left_out_with_a_mocked_scan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gone").mkdir()
    (tmp_path / "a").write_bytes(b"a")
    scan = os.scandir

    def vanish(folder: str) -> object:
        if folder.endswith("gone"):
            os.rmdir(folder)
        return scan(folder)

    monkeypatch.setattr(os, "scandir", vanish)
    assert keys(open_and_list(str(tmp_path))) == ["a"]


def test_keys_that_lead_out_of_a_prefix_are_listed_with_a_problem(
    moto: Server, moto_root: str
) -> None:
    import boto3

    client = boto3.client("s3")
    bucket, _, prefix = moto_root.removeprefix("s3://").partition("/")
    for name in ("ok.jpg", "../out.jpg", "a/../../out.jpg", "/absolute.jpg", "back\\slash.jpg"):
        client.put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=b"x")
    listing = open_and_list(moto_root)
    assert "ok.jpg" in keys(listing)
    assert set(keys(listing)) - {"ok.jpg"} == set(listing.problems)
    assert {"/absolute.jpg", "back\\slash.jpg"} <= set(listing.problems)
    with open_source(moto_root).reader() as reader, pytest.raises(ItemError):
        reader.read(Item("back\\slash.jpg", 1, 1), LIMIT)


def test_a_source_is_small_and_can_be_pickled(place: Place) -> None:
    for number in range(10):
        place.put(f"{number}.jpg")
    source = open_source(place.uri)
    source.list()
    packed = pickle.dumps(source)
    assert len(packed) < 1000
    with pickle.loads(packed).reader() as reader:
        assert reader.read(Item("7.jpg", 1, 1), LIMIT) == b"x"
        assert reader.threads == (16 if place.is_remote else 1)


def test_walking_keeps_only_one_folder_in_memory(tmp_path: Path) -> None:
    for number in range(3000):
        os.mknod(tmp_path / f"{number:06d}.jpg")
    tracemalloc.start()
    assert sum(1 for _ in LocalFiles(tmp_path).walk()) == 3000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100_000  # bytes
