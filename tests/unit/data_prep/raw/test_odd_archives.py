"""Archives that ordinary tools make and readers lose members of: joined ones, links, samples."""

from __future__ import annotations

import gzip
import io
import os
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from raw_places import by_name, contents, keys, open_and_list

from data_prep.raw.layouts import IGNORED
from data_prep.raw.links import LINK
from data_prep.raw.source import open_source

KINDS = ["tar", "tgz", "zip"]


def packed(kind: str, files: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    """Return an archive with files and symbolic links."""
    into = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(into, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
            for name, target in (links or {}).items():
                link = zipfile.ZipInfo(name)
                link.create_system, link.external_attr = 3, 0o120777 << 16
                archive.writestr(link, target)
        return into.getvalue()
    with tarfile.open(fileobj=into, mode="w:gz" if kind == "tgz" else "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return into.getvalue()


def listed(folder: Path, kind: str, data: bytes, layout: str = "auto") -> dict[str, str]:
    """Return each key of an archive with its split, or with the reason why it is not used."""
    (folder / f"set.{kind}").write_bytes(data)
    listing = open_and_list(str(folder / f"set.{kind}"), layout)
    return {item.key: listing.problems.get(item.key, item.split) for item in listing.items()}


# Joined archives.


@pytest.mark.parametrize("kind", KINDS)
def test_each_of_several_joined_archives_is_read(tmp_path: Path, kind: str) -> None:
    parts = [{f"{part}.jpg": bytes([part]) * 700, "same.jpg": bytes([part])} for part in range(3)]
    (tmp_path / f"set.{kind}").write_bytes(b"".join(packed(kind, part) for part in parts))
    source = open_source(str(tmp_path / f"set.{kind}"))
    found = contents(source)
    assert {key: found[key] for key in ("0.jpg", "1.jpg", "2.jpg")} == {
        f"{part}.jpg": bytes([part]) * 700 for part in range(3)
    }
    same = [found[key] for key in ("same.jpg", "same#2.jpg", "same#3.jpg")]
    assert sorted(same, key=str) == [b"\0", b"\1", b"\2"]
    assert contents(source, by_name) == found


def test_a_tar_that_was_joined_and_then_cut_off_is_reported(tmp_path: Path) -> None:
    whole = packed("tar", {"1.jpg": b"1"}) + packed("tar", {"2.jpg": b"2" * 3000})[:2000]
    (tmp_path / "set.tar").write_bytes(whole)
    listing = open_and_list(str(tmp_path))
    assert keys(listing) == ["set.tar/1.jpg", "set.tar/2.jpg"]
    assert list(listing.problems) == ["set.tar/2.jpg"]


@pytest.mark.parametrize("kind", ["tar", "tgz"])
@pytest.mark.parametrize("after", [b"x" * 3000, bytes(1 << 21), b"\x1f\x8b" * 300])
def test_other_bytes_after_an_archive_change_nothing(
    tmp_path: Path, kind: str, after: bytes
) -> None:
    whole = packed("tar", {"1.jpg": b"1"}) + (after if kind == "tar" else b"")
    data = whole if kind == "tar" else gzip.compress(whole) + after
    assert listed(tmp_path, kind, data) == {"1.jpg": ""}


def test_a_program_before_a_zip_is_not_an_archive(tmp_path: Path) -> None:
    data = b"#!program PK\5\6" * 99 + packed("zip", {"1.jpg": b"1"})
    assert listed(tmp_path, "zip", data) == {"1.jpg": ""}


# Links.


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_is_one_more_name_of_its_member_and_counted(tmp_path: Path, kind: str) -> None:
    links = {"b/link.jpg": "../a/1.jpg", "c.jpg": "b/link.jpg", "out.jpg": "/etc/passwd",
             "up.jpg": "../1.jpg", "itself.jpg": "itself.jpg", "latest": "gone"}  # fmt: skip
    data = packed(kind, {"a/1.jpg": b"one", "a/2.jpg": b"two"}, links)
    found = listed(tmp_path, kind, data)
    assert {key for key, problem in found.items() if not problem} == {"a/1.jpg", "a/2.jpg"}
    assert found["b/link.jpg"] == found["c.jpg"] == f"{LINK}a/1.jpg"
    failed = {key for key, problem in found.items() if problem and not problem.startswith(IGNORED)}
    assert failed == {"out.jpg", "up.jpg", "itself.jpg"}
    assert "which is not in the archive" in found["latest"]
    source = open_source(str(tmp_path / f"set.{kind}"))
    assert contents(source)["c.jpg"] == contents(source, by_name)["c.jpg"] == b"one"


@pytest.mark.parametrize("kind", KINDS)
def test_links_give_the_splits_of_a_source(tmp_path: Path, kind: str) -> None:
    files = {f"all/{number}.jpg": bytes([number]) for number in range(4)}
    links = {"train/0.jpg": "../all/0.jpg", "train/1.jpg": "../all/1.jpg",
             "test/1.jpg": "../all/1.jpg", "val/2.jpg": "../all/2.jpg"}  # fmt: skip
    found = listed(tmp_path, kind, packed(kind, files, links))
    assert {key: split for key, split in found.items() if not split.startswith(IGNORED)} == {
        "train/0.jpg": "train", "test/1.jpg": "test", "val/2.jpg": "val",
    }  # fmt: skip
    assert found["all/1.jpg"] == found["train/1.jpg"] == f"{IGNORED}the same file as test/1.jpg"
    assert found["all/3.jpg"].startswith(f"{IGNORED}outside")


@pytest.mark.parametrize("kind", KINDS)
def test_a_linked_folder_gives_the_splits_of_a_source(tmp_path: Path, kind: str) -> None:
    files = {"part1/x/0.jpg": b"0", "part2/1.jpg": b"1"}
    links = {"train": "part1", "test": "./part2/", "loop": ".", "part1/up": ".."}
    found = listed(tmp_path, kind, packed(kind, files, links))
    used = {key: split for key, split in found.items() if not split.startswith(IGNORED)}
    assert used == {"train/x/0.jpg": "train", "test/1.jpg": "test"}
    assert found["loop"] == f"{IGNORED}a link to a folder that contains it"
    assert found["part2/1.jpg"] == f"{IGNORED}the same file as test/1.jpg"


@pytest.mark.parametrize("kind", KINDS)
def test_a_link_to_a_hidden_file_is_an_item(tmp_path: Path, kind: str) -> None:
    data = packed(kind, {".store/1": b"1"}, {"a.jpg": ".store/1", "b.jpg": ".store/1"})
    assert listed(tmp_path, kind, data) == {"a.jpg": "", "b.jpg": f"{LINK}.store/1"}


@pytest.mark.parametrize("form", ["gnu", "posix", "ustar", "v7"])
def test_hard_links_of_tar_are_read(tmp_path: Path, form: str) -> None:
    work = tmp_path / "work"
    long = "long" * 15
    for name in ("all/1.jpg", f"{long}/2.jpg"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_bytes(name.encode())
    for folder, target in (("train", "all/1.jpg"), ("val", f"{long}/2.jpg")):
        (work / folder).mkdir()
        os.link(work / target, work / folder / "3.jpg")
    command = ["tar", "cf", tmp_path / "set.tar", f"--format={form}", "--sort=name", "-C", work]
    subprocess.run([*command, "."], check=True)
    data = (tmp_path / "set.tar").read_bytes()
    found = listed(tmp_path, "tar", data)
    assert [key for key, split in found.items() if split in ("train", "val")] == [
        "train/3.jpg", "val/3.jpg",
    ]  # fmt: skip
    source = open_source(str(tmp_path / "set.tar"))
    assert contents(source)["val/3.jpg"] == f"{long}/2.jpg".encode()


def test_links_before_a_cut_are_listed(tmp_path: Path) -> None:
    data = packed("tar", {"1.jpg": b"1"}, {"2.jpg": "1.jpg"})[: 3 * 512]
    found = listed(tmp_path, "tar", data)
    assert found["2.jpg"] == f"{LINK}1.jpg"
    assert any("end mark" in problem for problem in found.values())


def test_a_part_of_a_file_of_several_tars_fails(tmp_path: Path) -> None:
    header = tarfile.TarInfo("1.jpg")
    header.type, header.size = b"M", 512
    data = header.tobuf(tarfile.GNU_FORMAT) + bytes(512) + packed("tar", {"2.jpg": b"2"})
    found = listed(tmp_path, "tar", data)
    assert "a part of a file" in found.pop("1.jpg")
    assert found == {"2.jpg": ""}


# WebDataset.

DOTS = [f"22.05.{number:02d}" for number in range(40)]
ENDINGS = [("jpg", "png")[number % 2] for number in range(40)]


def samples(tmp_path: Path, names: list[str], layout: str = "auto") -> dict[str, str]:
    data = packed("tar", {name: name.encode() for name in names})
    return listed(tmp_path, "tar", data, layout)


@pytest.mark.parametrize("layout", ["auto", "webdataset"])
def test_dots_in_a_stem_do_not_join_samples(tmp_path: Path, layout: str) -> None:
    photos = [f"{stem}.{ending}" for stem, ending in zip(DOTS, ENDINGS, strict=True)]
    names = [
        name for pair in zip(photos, DOTS, strict=True) for name in (pair[0], f"{pair[1]}.json")
    ]
    assert samples(tmp_path, names, layout) == dict.fromkeys(photos, "")


@pytest.mark.parametrize("layout", ["auto", "webdataset"])
@pytest.mark.parametrize(
    "photos",
    [
        ["trip.01.jpg"],
        ["trip.left.jpg", "trip.right.jpg"],
        ["trip.01.jpg", "trip.02.jpg"],
        ["trip.cam1.png", "trip.cam2.png", "trip.depth.png"],
        ["trip.jpg", "trip.jpg"],
    ],
)
def test_every_photo_of_a_sample_is_an_item(tmp_path: Path, photos: list[str], layout: str) -> None:
    with tarfile.open(tmp_path / "set.tar", "w") as archive:
        for name in [*photos, "trip.txt", "zoo.jpg", "zoo.txt"]:
            archive.addfile(tarfile.TarInfo(name))
    found = listed(tmp_path, "tar", (tmp_path / "set.tar").read_bytes(), layout)
    used = {key for key, problem in found.items() if not problem}
    photos = [name for name in photos if "depth" not in name]
    expected = {*photos, "zoo.jpg"} | ({"trip#2.jpg"} if photos[0] == "trip.jpg" else set())
    assert used - {"trip.txt", "zoo.txt"} == expected


def test_an_image_that_describes_a_photo_is_ignored_with_a_reason(tmp_path: Path) -> None:
    names = ["1.jpg", "1.seg.png", "1.json", "2.mask.png", "2.img.png", "2.json", "3.seg.png",
             "3.json", "4.jpg", "4.png", "4.json"]  # fmt: skip
    reason = f"{IGNORED}its sample has the photo "
    assert samples(tmp_path, names) == {
        "1.jpg": "", "1.seg.png": f"{reason}1.jpg", "2.img.png": "",
        "2.mask.png": f"{reason}2.img.png", "3.seg.png": "", "4.jpg": "",
        "4.png": f"{reason}4.jpg",
    }  # fmt: skip
