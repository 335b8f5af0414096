"""The sample photos are written as files."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from data_prep.core.errors import PipelineError, StorageError
from data_prep.raw import sample_photos as photos
from data_prep.raw.sample_photos import write_sample_photos


def test_every_photo_is_written_into_its_split_and_can_be_opened(tmp_path: Path) -> None:
    write_sample_photos(tmp_path)
    for split, count in {"train": 10, "val": 2, "test": 3}.items():
        files = sorted((tmp_path / split).iterdir())
        assert len(files) == count
        for file in files:
            with Image.open(file) as image:
                image.load()
                assert min(image.size) >= 300


def test_no_photo_is_in_two_splits_and_the_motorcycles_share_one() -> None:
    names = [name for split in photos.SAMPLE_PHOTOS.values() for name in split]
    assert len(names) == len(set(names))
    motorcycles = [
        s for s, own in photos.SAMPLE_PHOTOS.items() if any("motorcycle" in n for n in own)
    ]
    assert motorcycles == ["train"]


def test_an_equal_file_is_not_touched_and_an_altered_file_is_written_again(
    tmp_path: Path,
) -> None:
    write_sample_photos(tmp_path)
    coins, moon = tmp_path / "train/coins.png", tmp_path / "train/moon.png"
    before, whole = coins.stat(), moon.read_bytes()
    moon.write_bytes(whole[:100])
    write_sample_photos(tmp_path)
    assert (coins.stat().st_mtime_ns, coins.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert moon.read_bytes() == whole


def test_a_photo_missing_from_scikit_image_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(photos.SAMPLE_PHOTOS, "train", ("unicorn.png",))
    with pytest.raises(PipelineError, match=r"does not contain the photo unicorn\.png"):
        write_sample_photos(tmp_path)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "photos").write_text("I am a file")
    with pytest.raises(StorageError, match="photos/train"):
        write_sample_photos(tmp_path / "photos")
