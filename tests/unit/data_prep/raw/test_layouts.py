"""Layouts give the split of every file of a published dataset by its key."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from raw_places import Place, open_and_list, place

from data_prep.core.errors import ConfigError
from data_prep.raw.layouts import IGNORED, OUTSIDE, lost_splits

__all__ = ["place"]
PHOTOS = Path(__file__).parents[5] / "shared/data/photos"


def splits(folder: Path, layout: str, names: list[str]) -> dict[str, str]:
    """Return the split of every item of a folder, "ignored" for one outside of the set."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if not (folder / name).exists():
            (folder / name).write_bytes(b"x")
    return listed(str(folder), layout)


def listed(uri: str, layout: str) -> dict[str, str]:
    listing = open_and_list(uri, layout)
    ignored = {key for key, why in listing.problems.items() if why.startswith(IGNORED)}
    assert ignored == set(listing.problems)
    return {item.key: "ignored" if item.key in ignored else item.split for item in listing.items()}


@pytest.mark.parametrize("below", ["", "photos/", "photos.zip/"])
@pytest.mark.parametrize("val", ["val", "validation"])
def test_auto_finds_folders_named_after_splits_also_one_level_down(
    tmp_path: Path, below: str, val: str
) -> None:
    names = [f"{below}train/x/1.jpg", f"{below}{val}/2.jpg", f"{below}test/3.jpg"]
    found = splits(tmp_path, "auto", [*names, f"{below}extra/4.jpg", f"{below}LICENSE"])
    assert found == {
        **dict(zip(names, ("train", "val", "test"), strict=True)),
        f"{below}extra/4.jpg": "ignored",
        f"{below}LICENSE": "ignored",
    }


def test_auto_needs_train_and_another_split(tmp_path: Path) -> None:
    names = ["train/1.jpg", "other/2.jpg", "val.jpg"]
    assert splits(tmp_path / "a", "auto", names) == dict.fromkeys(names, "")
    names = ["val/1.jpg", "test/2.jpg"]
    assert splits(tmp_path / "b", "auto", names) == dict.fromkeys(names, "")


@pytest.mark.parametrize(
    "names",
    [
        ["Train/1.jpg", "Val/2.jpg", "TEST/3.jpg"],
        ["train2017/1.jpg", "val2017/2.jpg", "test-2017/3.jpg"],
        ["train2017.zip/1.jpg", "VAL2017.zip/2.jpg", "test.zip/3.jpg"],
        ["images/train/1.jpg", "images/val/2.jpg", "images/test/3.jpg", "labels/test/3.txt"],
        ["a/b/c/train/1.jpg", "a/b/c/val/x/2.jpg", "a/b/c/test/3.jpg"],
        ["cats/train/1.jpg", "cats/val/2.jpg", "dogs/test/3.jpg"],
        ["test/x/train/1.jpg", "test/x/val/2.jpg", "test/x/test/3.jpg"],
        ["train/train/1.jpg", "train/val/2.jpg", "bus/test/3.jpg", "bus/train/4.jpg"],
        ["set\\train\\1.jpg", "set\\val\\2.jpg", "set\\test\\3.jpg"],
        ["set.zip/Train\\a\\1.jpg", "set.zip/Val\\2.jpg", "set.zip/Test\\3.jpg"],
        ["train/1.jpg", "dev/2.jpg", "eval/3.jpg"],
        ["one/train-0.tar/1.jpg", "one/val-0.tar/2.jpg", "two/test-0.tar/3.jpg"],
    ],
)
def test_auto_sees_the_usual_names_and_places_of_splits(tmp_path: Path, names: list[str]) -> None:
    found = splits(tmp_path, "auto", names)
    assert [found[name] for name in names[:3]] == ["train", "val", "test"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["val/1.jpg", "test/2.jpg"], ["test", "val"]),
        (["photos/1.jpg", "more/Test/2.jpg"], ["more/Test"]),
        (["train_images/1.jpg", "test_images/2.jpg"], ["test_images", "train_images"]),
        (["data_256/1.jpg", "val_256/2.jpg", "test_256/3.jpg"], ["test_256", "val_256"]),
        (["my-train-00.tar/1.jpg", "my-test-01.tar/1.jpg"], ["my-test-01.tar", "my-train-00.tar"]),
        (["x\\1.jpg", "x\\test2015\\2.jpg"], ["x/test2015"]),
    ],
)
def test_names_of_splits_that_are_not_used_are_found(
    tmp_path: Path, names: list[str], expected: list[str]
) -> None:
    assert splits(tmp_path, "auto", names) == dict.fromkeys(sorted(names), "")
    assert lost_splits(names) == expected


@pytest.mark.parametrize(
    "names",
    [
        ["val2017/1.jpg", "val2017/x/2.jpg"],  # all photos are of one split
        ["a/test/1.jpg", "a/test/2.jpg", "readme.jpg"],
        ["bus/1.jpg", "train/2.jpg", "car/3.jpg"],  # a vehicle
        ["crash_test/1.jpg", "developers/2.jpg", "dev/3.jpg"],
        ["test.jpg", "val.jpg", "latest/1.jpg"],
    ],
)
def test_ordinary_names_are_no_splits(tmp_path: Path, names: list[str]) -> None:
    assert splits(tmp_path, "auto", names) == dict.fromkeys(sorted(names), "")
    assert lost_splits(names) == []


def test_files_outside_the_split_folders_are_ignored_with_a_reason(tmp_path: Path) -> None:
    splits(tmp_path, "auto", ["train/1.jpg", "val/2.jpg", "3.jpg"])
    assert open_and_list(str(tmp_path)).problems == {"3.jpg": OUTSIDE}


def test_archives_and_tables_named_after_splits_count_as_split_folders(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002.tar", "train.zip", "validation-00000.tar"):
        if name.endswith("zip"):
            with zipfile.ZipFile(tmp_path / name, "w") as archive:
                archive.writestr("1.jpg", "x")
        else:
            with tarfile.open(tmp_path / name, "w") as tar:
                tar.addfile(tarfile.TarInfo("1.jpg"), io.BytesIO())
    assert listed(str(tmp_path), "auto") == {
        "train-00000-of-00002.tar/1.jpg": "train",
        "train.zip/1.jpg": "train",
        "validation-00000.tar/1.jpg": "val",
    }


def test_the_layout_files_finds_no_splits(tmp_path: Path) -> None:
    names = ["train/1.jpg", "val/2.jpg", "3.jpg"]
    assert splits(tmp_path, "files", names) == dict.fromkeys(sorted(names), "")


def test_places2_as_folders_and_as_archives(tmp_path: Path) -> None:
    found = splits(
        tmp_path / "standard",
        "places2",
        [
            "places365_standard/train/airfield/00000001.jpg",
            "places365_standard/train/val/00000002.jpg",
            "places365_standard/val/airfield/Places365_val_00000435.jpg",
            "places365_standard/train.txt",
        ],
    )
    assert list(found.values()) == ["ignored", "train", "train", "val"]
    found = splits(
        tmp_path / "large",
        "places2",
        [
            "data_large/a/airport_terminal/00000001.jpg",
            "test_large/Places365_test_00000001.jpg",
            "val_large/Places365_val_00000001.jpg",
            "filelist_places365/places365_val.txt",
        ],
    )
    assert list(found.values()) == ["train", "ignored", "test", "val"]
    for name, member in (
        ("train_256_places365standard.tar", "data_256/a/airfield/00000001.jpg"),
        ("val_256.tar", "val_256/Places365_val_00000001.jpg"),
        ("test_256.tar", "test_256/Places365_test_00000001.jpg"),
    ):
        (tmp_path / "archives").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "archives" / name, "w") as tar:
            tar.addfile(tarfile.TarInfo(member), io.BytesIO())
    assert list(listed(str(tmp_path / "archives"), "places2").values()) == ["test", "train", "val"]
    (uri,) = (tmp_path / "archives").glob("val*")
    assert list(listed(str(uri), "places2").values()) == ["val"]


PARTITION = b"000001.jpg 0\n000002.jpg 1\r\n000003.jpg 2\n"


def celeba_zip() -> bytes:
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w") as archive:
        for number in range(1, 5):
            archive.writestr(f"img_align_celeba/{number:06d}.jpg", "x")
    return into.getvalue()


@pytest.mark.parametrize("folder", ["", "Img/"])
def test_celeba_uses_its_list_next_to_the_archive_or_in_the_folder(
    place: Place, folder: str
) -> None:
    uri = place.put(f"{folder}img_align_celeba.zip", celeba_zip())
    place.put(f"{'Eval/' if folder else ''}list_eval_partition.txt", PARTITION)
    expected = ["train", "val", "test", "ignored"]
    assert list(listed(uri, "celeba").values()) == expected
    found = listed(place.uri, "celeba")
    assert [found[key] for key in sorted(found) if "celeba" in key] == expected
    assert len(found) == 5


def test_celeba_is_read_from_its_folder_of_photos(tmp_path: Path) -> None:
    (tmp_path / "list_eval_partition.txt").write_bytes(PARTITION)
    found = splits(tmp_path / "img_align_celeba", "celeba", ["000002.jpg", "000003.png"])
    assert found == {"000002.jpg": "val", "000003.png": "test"}


def test_celeba_without_its_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"needs list_eval_partition\.txt"):
        splits(tmp_path, "celeba", ["img_align_celeba/000001.jpg"])
    (tmp_path / "list_eval_partition.txt").write_text("image partition\n")
    with pytest.raises(ConfigError, match=r"has no line such as '000001\.jpg 0'"):
        splits(tmp_path, "celeba", [])


def test_celeba_hq_uses_the_lists_of_celeba_if_both_exist(tmp_path: Path) -> None:
    names = [f"CelebA-HQ-img/{number}.jpg" for number in range(4)]
    names.append("CelebAMask-HQ-mask-anno/0/00000_hair.png")
    found = splits(tmp_path, "celeba-hq", names)
    assert list(found.values()) == ["", "", "", "", "ignored"]
    mapping = "idx     orig_idx    orig_file\n0       2   000003.jpg\n1       0     000001.jpg\n"
    (tmp_path / "CelebA-HQ-to-CelebA-mapping.txt").write_text(f"{mapping}2 1 000002.jpg\n")
    (tmp_path / "list_eval_partition.txt").write_bytes(PARTITION)
    found = splits(tmp_path, "celeba-hq", [])
    images = {key: split for key, split in found.items() if "/" in key}
    assert list(images.values()) == ["test", "train", "val", "ignored", "ignored"]
    assert list(listed(str(tmp_path / "CelebA-HQ-img"), "celeba-hq").values()) == [
        "test", "train", "val", "ignored",
    ]  # fmt: skip


def test_paris_street_view_without_the_corrupted_ones(tmp_path: Path) -> None:
    names = [
        "paris_eval/paris_eval_corrupted/001_im.png",
        "paris_eval/paris_eval_gt/001_im.png",
        "paris_train_original/48.8_2.3.JPG",
    ]
    assert list(splits(tmp_path, "paris-street-view", names).values()) == [
        "ignored", "test", "train",
    ]  # fmt: skip


def test_bsds500_without_the_ground_truth(tmp_path: Path) -> None:
    top = "BSR/BSDS500/data"
    names = [
        f"{top}/groundTruth/train/100075.mat",
        f"{top}/images/test/100007.jpg",
        f"{top}/images/test/Thumbs.db",
        f"{top}/images/train/100075.jpg",
        f"{top}/images/val/101085.jpg",
    ]
    assert list(splits(tmp_path, "bsds500", names).values()) == [
        "ignored", "test", "ignored", "train", "val",
    ]  # fmt: skip


@pytest.mark.skipif(not PHOTOS.is_dir(), reason=f"no photos at {PHOTOS}")
def test_the_photos_of_paris_street_view_on_this_machine_match_the_layout() -> None:
    found = list(listed(str(PHOTOS / "bsds500"), "bsds500").values())
    assert {split: found.count(split) for split in set(found)} == {
        "train": 200, "val": 100, "test": 200,
    }  # fmt: skip
    found = list(listed(str(PHOTOS / "clothing"), "auto").values())
    assert len(found) == 3782
    assert found.count("ignored") == 1


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("places2", "places365_standard"),
        ("celeba-hq", "CelebA-HQ-img"),
        ("paris-street-view", "paris_train_original"),
        ("bsds500", "train, val and test"),
    ],
)
def test_an_error_names_the_files_that_a_layout_expects(
    tmp_path: Path, layout: str, expected: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{layout}\. It expects .*{expected}"):
        splits(tmp_path, layout, ["some/photo.jpg"])
