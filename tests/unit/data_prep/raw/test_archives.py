"""Zip, tar and tar.gz archives as raw sources and in folders."""

from __future__ import annotations

import gzip
import io
import os
import random
import struct
import subprocess
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from raw_places import LIMIT, Place, by_name, contents, keys, open_and_list, place

from data_prep.core.errors import ConfigError, ItemError, PipelineError
from data_prep.raw import tars as tars_module
from data_prep.raw.layouts import IGNORED
from data_prep.raw.listing import Item
from data_prep.raw.source import open_source

__all__ = ["place"]
FILES = {"a/1.jpg": b"one", "a/2.jpg": b"", "b c/ü\n3.jpg": bytes(range(256)) * 40, "4": b"four"}
BOMB = 50 << 20  # bytes


def zipped(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return into.getvalue()


def tarred(files: dict[str, bytes], mode: str = "w", form: int = tarfile.PAX_FORMAT) -> bytes:
    into = io.BytesIO()
    with tarfile.open(fileobj=into, mode=mode, format=form) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return into.getvalue()


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


MAKERS: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "zip": zipped,
    "tar": tarred,
    "tar.gz": lambda files: tarred(files, "w:gz"),
    "tgz": lambda files: tarred(files, "w:gz"),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_an_archive_in_a_folder_is_listed_like_a_folder(place: Place, kind: str) -> None:
    place.put(f"sub/set.{kind}", MAKERS[kind](FILES))
    place.put("other.jpg", b"other")
    source = open_source(place.uri)
    listing = source.list()
    assert listing.containers == (f"sub/set.{kind}",)
    expected = {f"sub/set.{kind}/{name}": data for name, data in FILES.items()}
    assert contents(source) == {**expected, "other.jpg": b"other"}
    assert contents(source, by_name) == {**expected, "other.jpg": b"other"}
    assert all(i.size == len(expected[i.key]) for i in listing.items() if i.container == 0)


@pytest.mark.parametrize("kind", MAKERS)
def test_an_archive_is_a_source(place: Place, kind: str) -> None:
    source = open_source(place.put(f"set.{kind.upper()}", MAKERS[kind](FILES)))
    assert source.list().containers == ("",)
    assert contents(source) == FILES
    assert contents(source, by_name) == FILES


@pytest.mark.parametrize("kind", MAKERS)
def test_many_threads_read_the_same_bytes_in_any_order(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars_module, "_WINDOW", 4000)
    monkeypatch.setattr(tars_module, "_STEP", 1000)
    files = {f"{number:03d}.jpg": noise(700, number) for number in range(60)}
    (tmp_path / f"set.{kind}").write_bytes(MAKERS[kind](files))
    source = open_source(str(tmp_path))
    items = list(source.list().items())
    random.Random(1).shuffle(items)
    with source.reader() as reader, ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda item: reader.read(item, LIMIT), items))
    assert read == [files[item.key.rpartition("/")[2]] for item in items]


def test_a_compressed_tar_is_decompressed_once_when_it_is_read_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tars_module, "_WINDOW", 4000)
    monkeypatch.setattr(tars_module, "_STEP", 1000)
    files = {f"{number:03d}.jpg": noise(700, number) for number in range(60)}
    (tmp_path / "set.tgz").write_bytes(tarred(files, "w:gz"))
    opened = []

    class Counted(gzip.GzipFile):
        def __init__(self, **given: object) -> None:
            opened.append(1)
            super().__init__(**given)  # type: ignore[arg-type]

    monkeypatch.setattr(gzip, "GzipFile", Counted)
    source = open_source(str(tmp_path))
    items = sorted(source.list().items(), key=lambda item: item.offset)
    opened.clear()
    with source.reader() as reader:
        for item in items:
            reader.read(item, LIMIT)
        assert len(opened) == 1
        assert reader.read(items[0], LIMIT) == files["000.jpg"]  # a read backward starts again
    assert len(opened) == 2


@pytest.mark.parametrize("kind", MAKERS)
def test_an_unchanged_archive_is_not_opened_again(place: Place, kind: str) -> None:
    place.put(f"set.{kind}", MAKERS[kind](FILES))
    source = open_source(place.uri)
    first = source.list()
    requested: list[tuple[str, int]] = []

    def known(container: str, fingerprint: int) -> list[Item]:
        requested.append((container, fingerprint))
        return list(first.items())

    # Same size and time. If the archive were opened, the listing would fail.
    if not place.is_remote:
        path = Path(place.uri, f"set.{kind}")
        times = path.stat()
        path.write_bytes(b"x" * times.st_size)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    second = source.list(known)
    assert second.table.equals(first.table)
    assert requested == [(f"set.{kind}", next(first.items()).fingerprint)]


@pytest.mark.parametrize("kind", MAKERS)
def test_reading_a_changed_archive_is_an_error(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"set.{kind}").write_bytes(MAKERS[kind](FILES))
    source = open_source(str(tmp_path))
    items = list(source.list().items())
    (tmp_path / f"set.{kind}").write_bytes(MAKERS[kind]({**FILES, "0": b"more"}))
    with source.reader() as reader, pytest.raises(PipelineError, match="has changed since it was"):
        reader.read(items[0], LIMIT)


def test_an_item_of_a_deleted_archive_fails(place: Place) -> None:
    place.put("other.jpg")
    with open_source(place.uri).reader() as reader, pytest.raises(ItemError, match="it is gone"):
        reader.read(Item("set.zip/a.jpg", 1, 1, "", 0, 0, 0), LIMIT)


def test_a_folder_named_like_an_archive_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "set.zip").mkdir()
    (tmp_path / "set.zip/a.jpg").write_bytes(b"a")
    (tmp_path / "set.zip/in.tar").write_bytes(tarred({"b.jpg": b"b"}))
    assert contents(open_source(str(tmp_path))) == {
        "set.zip/a.jpg": b"a",
        "set.zip/in.tar/b.jpg": b"b",
    }


def test_an_archive_in_an_archive_is_an_ordinary_item(tmp_path: Path) -> None:
    inner = zipped(FILES)
    (tmp_path / "set.tar").write_bytes(tarred({"in.zip": inner}))
    assert contents(open_source(str(tmp_path))) == {"set.tar/in.zip": inner}


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_hidden_members_folders_and_pipes_are_not_items(tmp_path: Path, kind: str) -> None:
    work = tmp_path / "work"
    (work / "sub").mkdir(parents=True)
    (work / "__MACOSX").mkdir()
    for name in ("sub/a.jpg", ".DS_Store", "__MACOSX/._a.jpg"):
        (work / name).write_bytes(b"a")
    (work / "link.jpg").symlink_to("sub/a.jpg")
    os.link(work / "sub/a.jpg", work / "sub/hard.jpg")
    os.mkfifo(work / "pipe.jpg")
    archive = tmp_path / f"set.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            for name in ("sub", "sub/a.jpg", ".DS_Store", "__MACOSX/._a.jpg"):
                file.write(work / name, name)
            link = zipfile.ZipInfo("link.jpg")
            link.external_attr = 0o120777 << 16
            file.writestr(link, "sub/a.jpg")
    else:
        subprocess.run(["tar", "cf", archive, "--sort=name", "-C", work, "."], check=True)
    found = dict.fromkeys(["sub/a.jpg", "link.jpg"], b"a")
    if kind == "tar":
        found["sub/hard.jpg"] = b"a"
    assert contents(open_source(str(archive))) == found


@pytest.mark.parametrize("kind", MAKERS)
def test_names_that_leave_the_archive_have_a_problem(tmp_path: Path, kind: str) -> None:
    names = ["/etc/a.jpg", "../a.jpg", "b/../../a.jpg", "..\\a.jpg", "C:\\a.jpg"]
    (tmp_path / f"set.{kind}").write_bytes(MAKERS[kind](dict.fromkeys(names, b"a") | {"ok": b"a"}))
    listing = open_and_list(str(tmp_path))
    assert len(listing) == 6
    assert listing.problems == {
        f"set.{kind}/{name}": "its name leads out of the archive" for name in names
    }
    with open_source(str(tmp_path)).reader() as reader, pytest.raises(ItemError, match="leads out"):
        reader.read(Item(f"set.{kind}/../a.jpg", 1, 1), LIMIT)


@pytest.mark.parametrize("kind", ["zip", "tar", "tgz"])
def test_members_with_the_same_name_get_different_keys(tmp_path: Path, kind: str) -> None:
    with pytest.warns(UserWarning, match="Duplicate") if kind == "zip" else io.BytesIO():
        if kind == "zip":
            into = io.BytesIO()
            with zipfile.ZipFile(into, "w") as archive:
                for data in (b"1", b"2", b"3"):
                    archive.writestr("a.jpg", data)
            packed = into.getvalue()
        else:
            into = io.BytesIO()
            with tarfile.open(fileobj=into, mode="w:gz" if kind == "tgz" else "w") as tar:
                for data in (b"1", b"2", b"3"):
                    member = tarfile.TarInfo("a.jpg")
                    member.size = 1
                    tar.addfile(member, io.BytesIO(data))
            packed = into.getvalue()
    (tmp_path / f"set.{kind}").write_bytes(packed)
    source = open_source(str(tmp_path / f"set.{kind}"))
    assert contents(source) == {"a.jpg": b"1", "a#2.jpg": b"2", "a#3.jpg": b"3"}
    assert contents(source, by_name) == contents(source)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_member_over_the_limit_fails_and_others_are_read(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"set.{kind}").write_bytes(MAKERS[kind]({"a": b"12345", "b": b"123"}))
    source = open_source(str(tmp_path / f"set.{kind}"))
    large, small = source.list().items()
    with source.reader() as reader:
        with pytest.raises(ItemError, match="larger than 4 bytes"):
            reader.read(large, 4)
        assert reader.read(small, 4) == b"123"


@pytest.mark.parametrize("kind", MAKERS)
def test_a_broken_archive_is_one_failed_item_of_its_folder(place: Place, kind: str) -> None:
    place.put(f"set.{kind}", b"this is something else" * 100)
    place.put(f"empty.{kind}", b"")
    place.put("a.jpg")
    listing = open_and_list(place.uri)
    assert keys(listing) == ["a.jpg", f"empty.{kind}", f"set.{kind}"]
    assert set(listing.problems) == {f"empty.{kind}", f"set.{kind}"}
    assert "it is not a" in listing.problems[f"set.{kind}"]


@pytest.mark.parametrize("kind", MAKERS)
def test_a_broken_or_empty_archive_as_source_is_refused(place: Place, kind: str) -> None:
    uri = place.put(f"set.{kind}", b"this is something else" * 100)
    with pytest.raises(PipelineError, match=rf"set\.{kind} cannot be used: it is not a "):
        open_and_list(uri)
    with pytest.raises(PipelineError, match=r"is empty\. It must contain photos"):
        open_and_list(place.put(f"none.{kind}", MAKERS[kind]({})))


# Zip.


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_each_usual_compression_is_read_and_a_bomb_is_refused(tmp_path: Path, method: int) -> None:
    (tmp_path / "set.zip").write_bytes(zipped({"bomb": bytes(BOMB), "noise": noise(5000)}, method))
    source = open_source(str(tmp_path / "set.zip"))
    bomb, fine = source.list().items()
    with source.reader() as reader:
        assert reader.read(fine, 5000) == noise(5000)
        with pytest.raises(ItemError, match="larger than 100000 bytes"):
            reader.read(bomb, 100_000)


def with_false_size(archive: bytes, size: int) -> bytes:
    """Return the archive with another size of its only member in header and directory."""
    changed = bytearray(archive)
    directory = archive.rindex(b"PK\1\2")
    struct.pack_into("<L", changed, 22, size)
    struct.pack_into("<L", changed, directory + 24, size)
    return bytes(changed)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_a_bomb_with_a_false_size_is_not_decompressed(tmp_path: Path, method: int) -> None:
    (tmp_path / "set.zip").write_bytes(with_false_size(zipped({"bomb": bytes(BOMB)}, method), 10))
    source = open_source(str(tmp_path / "set.zip"))
    (bomb,) = source.list().items()
    assert bomb.size == 10
    with source.reader() as reader:
        tracemalloc.start()
        with pytest.raises(ItemError, match="larger than 100000 bytes"):
            reader.read(bomb, 100_000)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
        tracemalloc.stop()


def test_a_damaged_member_of_a_zip_fails(tmp_path: Path) -> None:
    plain = {"a.jpg": noise(500), "b.jpg": noise(400, 1)}
    whole = zipped(plain, zipfile.ZIP_STORED)
    flipped = bytearray(whole)
    flipped[100] ^= 1
    packed = bytearray(zipped(plain))
    packed[60:80] = bytes(20)
    for name, data in (("flipped", flipped), ("packed", packed)):
        (tmp_path / f"{name}.zip").write_bytes(data)
        found = contents(open_source(str(tmp_path / f"{name}.zip")))
        assert str(found["a.jpg"]).startswith("it is broken")
        assert found["b.jpg"] == plain["b.jpg"]


def test_a_truncated_zip_and_a_broken_directory_are_reported(tmp_path: Path) -> None:
    whole = zipped(FILES)
    (tmp_path / "cut.zip").write_bytes(whole[: len(whole) // 2])
    at = whole.rindex(b"PK\1\2")
    (tmp_path / "broken.zip").write_bytes(whole[:at] + b"XXXX" + whole[at + 4 :])
    listing = open_and_list(str(tmp_path))
    assert listing.problems == {
        "cut.zip": "the archive is cut off within it",
        "broken.zip": "its directory is broken",
    }
    assert "broken.zip/a/1.jpg" in keys(listing)


def test_encrypted_members_and_unknown_methods_have_a_reason(tmp_path: Path) -> None:
    whole = zipped({"a.jpg": b"a" * 100})
    directory = whole.rindex(b"PK\1\2")
    for name, place_of, value in (("encrypted", 8, 1), ("method", 10, 9)):
        changed = bytearray(whole)
        struct.pack_into("<H", changed, directory + place_of, value)
        (tmp_path / f"{name}.zip").write_bytes(changed)
    assert contents(open_source(str(tmp_path))) == {
        "encrypted.zip/a.jpg": "it is encrypted",
        "method.zip/a.jpg": "it is compressed by method 9, which is not supported",
    }


def test_zip64_and_archives_after_other_bytes_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = {f"{number}.jpg": noise(50, number) for number in range(30)}
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 40)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 10)
    wide = zipped(plain)
    assert b"PK\6\6" in wide
    monkeypatch.undo()
    (tmp_path / "wide.zip").write_bytes(wide)
    (tmp_path / "front.zip").write_bytes(b"#!program" * 99 + zipped(plain))
    (tmp_path / "wide-front.zip").write_bytes(b"#!program" * 99 + wide)
    for name in ("wide", "front", "wide-front"):
        assert contents(open_source(str(tmp_path / f"{name}.zip"))) == plain


def test_names_without_a_flag_are_read_as_utf8_or_code_page_437(tmp_path: Path) -> None:
    whole = zipped({"grXX.jpg": b"1", "grY.jpg": b"2"})
    whole = whole.replace(b"grXX", "grü".encode()).replace(b"grY", b"gr\x81")
    (tmp_path / "set.zip").write_bytes(whole)
    assert keys(open_and_list(str(tmp_path / "set.zip"))) == ["grü#2.jpg", "grü.jpg"]


# Tar.


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_every_kind_of_tar_are_read(tmp_path: Path, form: int) -> None:
    names = ["a" * 90 + "/" + "b" * 90 + ".jpg", "short.jpg"]
    if form != tarfile.USTAR_FORMAT:
        names += ["ü" * 200 + ".jpg"]
    plain = {name: name.encode() for name in names}
    (tmp_path / "set.tar").write_bytes(tarred(plain, "w", form))
    assert contents(open_source(str(tmp_path / "set.tar"))) == plain


def test_a_name_in_a_tar_that_is_not_unicode_is_listed_and_read(tmp_path: Path) -> None:
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        (tmp_path / "set.tar").write_bytes(tarred({"gr\udcfc.jpg": b"1"}, "w", form))
        source = open_source(str(tmp_path / "set.tar"))
        assert contents(source) == {"gr\\xfc.jpg": b"1"}
        assert contents(source, by_name) == {"gr\\xfc.jpg": b"1"}


def test_sparse_files_of_gnu_tar_have_a_problem_and_others_are_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse.bin").open("wb") as file:
        for number in range(40):
            file.seek(number << 16)
            file.write(b"x")
    (tmp_path / "z.jpg").write_bytes(b"z")
    for form in ("gnu", "posix"):
        subprocess.run(
            ["tar", "cSf", f"{form}.tar", f"--format={form}", "sparse.bin", "z.jpg"],
            cwd=tmp_path, check=True,
        )  # fmt: skip
        source = open_source(str(tmp_path / f"{form}.tar"))
        (problem,) = source.list().problems.values()
        assert problem == "it is stored as a sparse file, which is not supported"
        assert contents(source)["z.jpg"] == b"z"


@pytest.mark.parametrize("kind", ["tar", "tgz"])
@pytest.mark.parametrize(
    ("length", "listed", "problem"),
    [
        (7 * 512 + 100, ["1", "2", "3"], ("3", "the archive is cut off within it")),
        (6 * 512 + 100, ["1", "2"], ("", "it is cut off")),
        (9 * 512, ["1", "2", "3"], ("", "it may be cut off: its end mark is missing")),
    ],
)
def test_members_before_a_truncation_are_listed_and_it_is_reported(
    tmp_path: Path, kind: str, length: int, listed: list[str], problem: tuple[str, str]
) -> None:
    plain = {name: noise(700, int(name)) for name in ("1", "2", "3")}
    cut = tarred(plain, "w", tarfile.USTAR_FORMAT)[:length]
    (tmp_path / f"set.{kind}").write_bytes(cut if kind == "tar" else gzip.compress(cut))
    source = open_source(str(tmp_path))
    listing = source.list()
    where = f"set.{kind}/{problem[0]}".rstrip("/")
    assert set(keys(listing)) == {f"set.{kind}/{name}" for name in listed} | {where}
    assert listing.problems == {where: problem[1]}
    assert contents(source)[f"set.{kind}/1"] == plain["1"]
    assert contents(source)[f"set.{kind}/2"] == plain["2"]


def test_a_truncated_gzip_stream_is_reported_and_members_before_it_are_read(tmp_path: Path) -> None:
    plain = {name: noise(5000, int(name)) for name in ("1", "2", "3")}
    whole = tarred(plain, "w:gz")
    (tmp_path / "set.tgz").write_bytes(whole[: len(whole) // 2])
    source = open_source(str(tmp_path))
    assert source.list().problems == {"set.tgz/2": "the archive is cut off within it"}
    found = contents(source)
    assert found["set.tgz/1"] == plain["1"]
    assert str(found["set.tgz/2"]).startswith(("the archive is cut off", "it is broken or cut off"))


def test_a_flipped_byte_of_a_compressed_tar_is_reported(tmp_path: Path) -> None:
    plain = {str(name): noise(50_000, name) for name in range(4)}
    whole = bytearray(tarred(plain, "w:gz"))
    whole[-4] ^= 1  # of the length at the end
    (tmp_path / "set.tgz").write_bytes(whole)
    assert contents(open_source(str(tmp_path)))["set.tgz/0"] == plain["0"]
    for at in range(1000, len(whole), 20_000):
        broken = bytearray(whole)
        broken[at : at + 8] = bytes(8)
        (tmp_path / "set.tgz").write_bytes(broken)
        read = contents(open_source(str(tmp_path)))
        wrong = [key for key, data in read.items() if data != plain.get(key[-1])]
        assert wrong


def test_a_broken_header_is_reported_and_members_before_it_are_listed(tmp_path: Path) -> None:
    whole = bytearray(tarred({"1": b"1", "2": b"2", "3": b"3"}, "w", tarfile.USTAR_FORMAT))
    whole[1024 + 10] ^= 1
    (tmp_path / "set.tar").write_bytes(whole)
    listing = open_and_list(str(tmp_path))
    assert keys(listing) == ["set.tar", "set.tar/1"]
    assert listing.problems == {
        "set.tar": "it is broken at byte 1024: members after it are not listed"
    }


def test_a_container_with_a_problem_is_opened_again_next_time(tmp_path: Path) -> None:
    (tmp_path / "set.tar").write_bytes(tarred({"1": b"1", "../2": b"2"}))
    listing = open_and_list(str(tmp_path))
    marks = {item.key: item.fingerprint for item in listing.items()}
    assert marks["set.tar/1"] != 0
    assert marks["set.tar/../2"] == 0


# WebDataset.

SAMPLES = {
    "b/000.jpg": b"p0", "b/000.json": b"{}", "b/000.txt": b"t",
    "b/001.cls": b"1", "b/001.seg.png": b"p1",
    "b/002.json": b"{}",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["tar", "tgz"])
def test_only_the_images_of_a_webdataset_are_items(tmp_path: Path, kind: str) -> None:
    (tmp_path / f"set.{kind}").write_bytes(MAKERS[kind](SAMPLES))
    source = open_source(str(tmp_path / f"set.{kind}"))
    listing = source.list()
    assert keys(listing) == ["b/000.jpg", "b/001.seg.png", "b/002.json"]
    assert listing.problems == {"b/002.json": f"{IGNORED}its sample has no image"}
    assert contents(source, by_name)["b/001.seg.png"] == b"p1"


def test_the_layout_decides_whether_a_tar_has_samples(tmp_path: Path) -> None:
    (tmp_path / "set.tar").write_bytes(tarred(SAMPLES))
    assert len(open_and_list(str(tmp_path), "files")) == 6
    late = {f"{number}.jpg": b"p" for number in range(99)} | {"x.jpg": b"p", "x.json": b"{}"}
    (tmp_path / "set.tar").write_bytes(tarred(late))
    assert len(open_and_list(str(tmp_path))) == 101
    assert len(open_and_list(str(tmp_path), "webdataset")) == 100


def test_images_with_the_same_stem_alone_are_not_samples(tmp_path: Path) -> None:
    (tmp_path / "set.tar").write_bytes(tarred({"a.jpg": b"1", "a.png": b"2", "b.jpg": b"3"}))
    assert keys(open_and_list(str(tmp_path / "set.tar"))) == ["a.jpg", "a.png", "b.jpg"]


def test_the_layout_webdataset_needs_a_tar(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    with pytest.raises(ConfigError, match="contains no tar archive"):
        open_and_list(str(tmp_path), "webdataset")


def test_a_truncated_webdataset_is_listed_up_to_the_cut(tmp_path: Path) -> None:
    (tmp_path / "set.tar").write_bytes(tarred(SAMPLES, "w", tarfile.USTAR_FORMAT)[: 512 * 5])
    listing = open_and_list(str(tmp_path))
    assert keys(listing) == ["set.tar", "set.tar/b/000.jpg"]
    assert list(listing.problems) == ["set.tar"]
