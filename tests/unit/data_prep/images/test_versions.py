"""Versions of an image dataset: each holds the photos of its source and reuses older shards."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from image_sets import (
    SPLITS,
    all_samples,
    crops,
    files_of,
    homes,
    outcomes,
    payload,
    photograph,
    photographs,
    record,
    shards_of,
    table,
    tiles,
)

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import PipelineError
from data_prep.core.manifest import StageRef, read_manifest
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.store import Store
from data_prep.images.settings import ImagesSettings
from data_prep.images.stage import prepare_images
from data_prep.images.versions import versions
from data_prep.pictures.formats import EXTENSIONS
from data_prep.pictures.limits import PhotoError
from data_prep.pictures.prepare import prepare
from data_prep.raw.local_files import LocalFiles
from data_prep.shards.shards import split_shards
from dpnet.pipeline.verify import verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photographs(tmp_path / "photos", 16)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


def small(source: object, **options: Any) -> ImagesSettings:
    return crops(source, **{"shard_samples": 4, "val": 0.2, "test": 0.2, **options})


def own_shards(store: LocalStore, ref: StageRef) -> set[str]:
    """Return the names of the shards in the version's own folder."""
    return {path.stem for path in store.path(ref.folder).glob("*.tar")}


def parent_of(store: Store, ref: StageRef) -> str:
    inputs = read_manifest(store, ref.folder).inputs
    return inputs["parent"].folder if "parent" in inputs else ""


def home(store: Store, ref: StageRef, key: str) -> str:
    """Return the name of the shard that holds an item."""
    return next(row["shard"] for row in table(store, ref, "sources") if row["key"] == key)


def counts(ref: StageRef) -> tuple[int, int, int]:
    return tuple(ref.summary[name] for name in ("added", "removed", "changed"))  # type: ignore[return-value]


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the time and the inode of every file."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            status = path.stat()
            found[str(path)] = (status.st_mtime_ns, status.st_ino)
    return found


def clean(store: Store, ref: StageRef) -> None:
    assert verify(store, ref.folder).problems == []


def test_added_photos_go_into_new_shards_and_the_version_refers_to_the_parents_shards(
    folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_images(small(folder), store)
    before = states(store.path(first.folder))
    added = [f"new/{number}.png" for number in range(8)]
    for number, key in enumerate(added):
        photograph(folder / key, 100 + number)
    read: list[str] = []
    real = LocalFiles.read
    monkeypatch.setattr(
        LocalFiles, "read", lambda files, key, limit: read.append(key) or real(files, key, limit)
    )
    second = prepare_images(small(folder), store)
    assert sorted(read) == added
    assert counts(second) == (8, 0, 0)
    assert second.summary["version"] == 2
    assert parent_of(store, second) == first.folder
    assert states(store.path(first.folder)) == before
    assert {home(store, second, key) for key in added} == own_shards(store, second)
    assert not own_shards(store, second) & own_shards(store, first)
    assert shards_of(store, first).items() <= shards_of(store, second).items()
    manifest = read_manifest(store, second.folder)
    inherited = {f.path for f in manifest.files if f.path.startswith("../")}
    name = first.folder.rpartition("/")[2]
    assert inherited == {f"../{name}/{path}" for path in shards_of(store, first)}
    assert len(homes(store, second)) == 24
    clean(store, second)


def test_any_reader_gets_the_whole_version_from_the_lists(folder: Path, store: LocalStore) -> None:
    prepare_images(small(folder), store)
    photograph(folder / "new.png", 100)
    prepare_images(small(folder), store)
    photograph(folder / "newer.png", 101)
    ref = prepare_images(small(folder), store)
    keys = []
    for split in SPLITS:
        lines = store.read(f"{ref.folder}/{split}.urls").decode().splitlines()
        tars = [str(store.path(ref.folder) / line) for line in lines]
        for sample in wds.WebDataset(tars, shardshuffle=False).decode("pil"):
            keys.append(sample["json"]["relative_key"])
            assert sample["jpg"].size == (32, 32)
    assert sorted(keys) == sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))


def test_removed_photos_rewrite_only_the_shards_that_held_them(
    folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_images(small(folder), store)
    held = home(store, first, "trip 1/4.png")
    (folder / "trip 1/4.png").unlink()
    monkeypatch.setattr(LocalFiles, "read", lambda *rest: pytest.fail("something was read"))
    second = prepare_images(small(folder), store)
    assert counts(second) == (0, 1, 0)
    assert own_shards(store, second) == {held}
    assert set(homes(store, first)) - set(homes(store, second)) == {"trip 1/4.png"}
    rest = {n: s for n, s in shards_of(store, first).items() if not n.startswith(held)}
    assert rest.items() <= shards_of(store, second).items()
    clean(store, second)


def test_a_shard_with_all_photos_removed_is_not_in_the_next_version(
    folder: Path, store: LocalStore
) -> None:
    first = prepare_images(small(folder), store)
    held = home(store, first, "trip 1/4.png")
    for row in table(store, first, "sources"):
        if row["shard"] == held:
            (folder / row["key"]).unlink()
    second = prepare_images(small(folder), store)
    assert not own_shards(store, second)
    assert f"{held}.tar" not in shards_of(store, second)
    assert held not in store.read(f"{second.folder}/train.urls").decode()
    clean(store, second)
    photograph(folder / "trip 1/4.png", 4)
    third = prepare_images(small(folder), store)
    assert shards_of(store, second).items() <= shards_of(store, third).items()
    clean(store, third)


@pytest.mark.parametrize("make", [small, lambda f: tiles(f, val=0.2, test=0.2)])
def test_a_changed_photo_rewrites_its_shard_in_place(
    folder: Path, store: LocalStore, tmp_path: Path, make: Callable[[Path], ImagesSettings]
) -> None:
    first = prepare_images(make(folder), store)
    photograph(folder / "trip 1/4.png", 99)
    second = prepare_images(make(folder), store)
    assert counts(second) == (0, 0, 1)
    assert own_shards(store, second) == {home(store, first, "trip 1/4.png")}
    # The order depends on the keys only, so a first build makes the same shards.
    whole = LocalStore(tmp_path / "whole")
    assert shards_of(store, second) == shards_of(whole, prepare_images(make(folder), whole))
    assert second.content_digest != first.content_digest
    clean(store, second)


def test_the_same_shards_have_the_same_content_digest_after_any_history(
    folder: Path, store: LocalStore
) -> None:
    first = prepare_images(small(folder), store)
    data = (folder / "trip 1/4.png").read_bytes()
    photograph(folder / "trip 1/4.png", 99)
    changed = prepare_images(small(folder), store)
    (folder / "trip 1/4.png").write_bytes(data)
    back = prepare_images(small(folder), store)
    assert shards_of(store, back) == shards_of(store, first)
    assert back.content_digest == first.content_digest != changed.content_digest
    assert parent_of(store, back) == changed.folder
    clean(store, back)


def test_each_of_several_changes_back_and_forth_is_found(tmp_path: Path, store: LocalStore) -> None:
    """Bitmaps of one shape have the same size, so only their content shows a change."""
    folder = tmp_path / "photos"
    for number in range(8):
        photograph(folder / f"{number}.bmp", number)
    for seed in (3, 50, 3, 51, 50, 3, 52):
        photograph(folder / "3.bmp", seed)
        ref = prepare_images(small(folder), store)
        (row,) = (r for r in table(store, ref, "sources") if r["key"] == "3.bmp")
        assert row["sha256"] == sha256_bytes((folder / "3.bmp").read_bytes())
        check(store, ref, small(folder), folder)


def test_a_photo_that_returns_with_other_content_is_a_new_photo(
    tmp_path: Path, store: LocalStore
) -> None:
    folder = tmp_path / "photos"
    for number in range(8):
        photograph(folder / f"{number}.bmp", number)
    prepare_images(small(folder), store)
    for seed in (50, 51):
        photograph(folder / "new.bmp", seed)
        check(store, prepare_images(small(folder), store), small(folder), folder)
        (folder / "new.bmp").unlink()
        check(store, prepare_images(small(folder), store), small(folder), folder)


def test_repacking_reads_every_photo_again(tmp_path: Path, store: LocalStore) -> None:
    folder = tmp_path / "photos"
    for number in range(8):
        photograph(folder / f"{number}.bmp", number)
    prepare_images(small(folder), store)
    photograph(folder / "3.bmp", 50)
    second = prepare_images(small(folder), store)
    third = prepare_images(small(folder), store, repack=True)
    assert (third.summary["version"], parent_of(store, third)) == (3, "")
    assert shards_of(store, third) == shards_of(store, second)
    check(store, third, small(folder), folder)
    assert prepare_images(small(folder), store).folder == third.folder


def test_repacking_makes_full_shards_of_many_small_ones(folder: Path, store: LocalStore) -> None:
    prepare_images(small(folder), store)
    for number in range(5):
        photograph(folder / f"new {number}.png", 100 + number)
        before = prepare_images(small(folder), store)
    packed = prepare_images(small(folder), store, repack=True)
    assert len(shards_of(store, packed)) < len(shards_of(store, before))
    assert homes(store, packed).keys() == homes(store, before).keys()
    assert packed.summary["version"] == before.summary["version"] + 1
    clean(store, packed)
    photograph(folder / "last.png", 200)
    last = prepare_images(small(folder), store)
    assert parent_of(store, last) == packed.folder
    clean(store, last)


def test_after_the_kept_copy_is_removed_its_duplicate_is_stored(
    folder: Path, store: LocalStore
) -> None:
    (folder / "trip 1/z.png").write_bytes((folder / "trip 1/4.png").read_bytes())
    first = prepare_images(small(folder), store)
    (row,) = table(store, first, "duplicates")
    (folder / row["kept"]).unlink()
    second = prepare_images(small(folder), store)
    assert second.summary["duplicates"] == 0
    assert row["key"] in homes(store, second)
    check(store, second, small(folder), folder)


def test_after_the_kept_copy_changes_its_duplicate_is_stored(
    folder: Path, store: LocalStore
) -> None:
    (folder / "trip 1/z.png").write_bytes((folder / "trip 1/4.png").read_bytes())
    first = prepare_images(small(folder), store)
    (row,) = table(store, first, "duplicates")
    photograph(folder / row["kept"], 77)
    second = prepare_images(small(folder), store)
    assert second.summary["duplicates"] == 0
    assert {row["key"], row["kept"]} <= homes(store, second).keys()
    check(store, second, small(folder), folder)


def test_a_new_copy_of_higher_rank_removes_the_old_one_from_its_shard(
    folder: Path, store: LocalStore
) -> None:
    first = prepare_images(small(folder), store)
    held = home(store, first, "trip 1/4.png")
    split = homes(store, first)["trip 1/4.png"]
    # Of copies in one split the lowest key stays, so the new copy wins in the same split.
    for number in range(100):
        copy = folder / f"a copy {number}.png"
        copy.write_bytes((folder / "trip 1/4.png").read_bytes())
        second = prepare_images(small(folder), store)
        check(store, second, small(folder), folder)
        if "trip 1/4.png" not in homes(store, second):
            break
        copy.unlink()
    assert second.summary["duplicates"] == 1
    assert homes(store, second)[copy.name] in (split, "val", "test")
    assert held in own_shards(store, second)


def test_near_duplicates_of_new_photos_leave_train_and_return_when_those_are_removed(
    tmp_path: Path, store: LocalStore
) -> None:
    from PIL import Image

    folder = tmp_path / "photos"
    places = ["train/a", "train/b", "train/c", "val/d", "test/e"]
    for number, place in enumerate(places):
        photograph(folder / f"{place}.png", number)
    config = small(folder, near_duplicates="drop")
    first = prepare_images(config, store)
    with Image.open(folder / "train/a.png") as image:
        image.save(folder / "test/near.jpg")
    second = prepare_images(config, store)
    assert homes(store, first).keys() - homes(store, second).keys() == {"train/a.png"}
    assert outcomes(store, second)["train/a.png"] == "duplicate"
    clean(store, second)
    (folder / "test/near.jpg").unlink()
    third = prepare_images(config, store)
    assert homes(store, third) == homes(store, first)
    clean(store, third)


def test_retrying_reads_only_the_failed_items(
    folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x.jpg", "y.jpg"):
        (folder / name).write_bytes(b"broken")
    config = small(folder, max_failure_ratio=0.5)
    first = prepare_images(config, store)
    assert prepare_images(config, store).skipped
    read: list[str] = []
    real = LocalFiles.read

    def repaired(files: LocalFiles, key: str, limit: int) -> bytes:
        read.append(key)
        return real(files, "trip 1/4.png" if key == "y.jpg" else key, limit) + b"more"

    monkeypatch.setattr(LocalFiles, "read", repaired)
    second = prepare_images(config, store, retry_failed=True)
    assert sorted(read) == ["x.jpg", "y.jpg"]
    assert (first.summary["failed"], second.summary["failed"]) == (2, 1)
    assert outcomes(store, second)["y.jpg"] == "sample"
    assert shards_of(store, first).items() <= shards_of(store, second).items()
    assert parent_of(store, second) == first.folder
    clean(store, second)


def test_each_retry_tries_the_failed_items_again(
    folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "x.jpg").write_bytes(b"broken")
    prepare_images(small(folder), store)
    still = prepare_images(small(folder), store, retry_failed=True)
    assert still.summary["failed"] == 1
    real = LocalFiles.read
    monkeypatch.setattr(
        LocalFiles, "read", lambda files, key, limit: real(files, "trip 1/4.png", limit) + b"more"
    )
    repaired = prepare_images(small(folder), store, retry_failed=True)
    assert repaired.summary["failed"] == 0
    clean(store, repaired)


def test_retrying_without_failed_items_makes_no_new_version(
    folder: Path, store: LocalStore
) -> None:
    first = prepare_images(small(folder), store)
    assert prepare_images(small(folder), store, retry_failed=True).folder == first.folder


def test_a_repaired_photo_is_found_without_a_retry_option(folder: Path, store: LocalStore) -> None:
    (folder / "x.png").write_bytes(b"broken")
    prepare_images(small(folder), store)
    photograph(folder / "x.png", 60)
    second = prepare_images(small(folder), store)
    assert (second.summary["failed"], second.summary["photographs"]) == (0, 17)
    check(store, second, small(folder), folder)


def test_other_settings_start_a_separate_line_of_versions(folder: Path, store: LocalStore) -> None:
    first = prepare_images(small(folder), store)
    photograph(folder / "new.png", 100)
    large = prepare_images(small(folder, size=48), store)
    assert (large.summary["version"], parent_of(store, large)) == (2, "")
    third = prepare_images(small(folder), store)
    assert third.summary["version"] == 3
    assert parent_of(store, third) == first.folder
    photograph(folder / "newer.png", 101)
    fourth = prepare_images(small(folder, size=48), store)
    assert parent_of(store, fourth) == large.folder
    for ref in (first, large, third, fourth):
        clean(store, ref)
    assert len(versions(store, "photographs")) == 4


def test_a_new_text_file_makes_a_version_with_the_same_content(
    folder: Path, store: LocalStore
) -> None:
    first = prepare_images(small(folder), store)
    (folder / "notes.txt").write_text("nice trip")
    (folder / "README").write_text("hello")
    second = prepare_images(small(folder), store)
    assert not second.skipped
    assert second.content_digest == first.content_digest
    assert second.summary["ignored"] == 2
    assert not own_shards(store, second)
    (folder / "notes.txt").write_text("nicer trip")
    assert prepare_images(small(folder), store).folder == second.folder
    clean(store, second)


def test_a_photo_keeps_its_split_when_more_arrive(tmp_path: Path, store: LocalStore) -> None:
    folder = photographs(tmp_path / "photos", 4)  # so few that empty splits get a photo
    config = crops(folder, val=0.1, test=0.1, shard_samples=10)
    known: dict[str, str] = {}
    for generation in range(4):
        ref = prepare_images(config, store)
        now = homes(store, ref)
        assert known.items() <= now.items()
        known = now
        for number in range(25):
            photograph(folder / f"{generation}/{number}.png", 1000 * generation + number + 100)
    assert len(known) == 79
    clean(store, ref)


def write_list(path: Path, lines: dict[str, str]) -> None:
    text = "path,split\n" + "".join(f"{key},{split}\n" for key, split in lines.items())
    path.write_text(text)


@pytest.fixture
def listed(folder: Path) -> tuple[Path, dict[str, str]]:
    """A list file with splits, and its lines."""
    keys = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.png"))
    lines = {key: SPLITS[max(0, n - 10) % 3] for n, key in enumerate(keys)}
    path = folder / "list.csv"
    write_list(path, lines)
    return path, lines


def test_a_changed_split_in_a_list_moves_the_photo(
    listed: tuple[Path, dict[str, str]], store: LocalStore
) -> None:
    path, lines = listed
    config = small(path)
    first = prepare_images(config, store)
    assert homes(store, first) == lines
    moved = next(key for key, split in lines.items() if split == "train")
    lines[moved] = "test"
    write_list(path, lines)
    second = prepare_images(config, store)
    assert homes(store, second) == lines
    assert counts(second) == (0, 0, 1)
    assert len(own_shards(store, second)) == 2  # the shard that it left, and the new one
    clean(store, second)
    lines[moved] = "train"
    write_list(path, lines)
    third = prepare_images(config, store)
    assert homes(store, third) == lines
    clean(store, third)


def test_duplicates_are_decided_again_when_a_list_changes_their_splits(
    listed: tuple[Path, dict[str, str]], store: LocalStore, folder: Path
) -> None:
    path, lines = listed
    low, high = "a copy.png", "z copy.png"
    for key in (low, high):
        photograph(folder / key, 70)
    for splits in [("train", "val"), ("train", "train"), ("val", "train"), ("test", "val")]:
        lines[low], lines[high] = splits
        write_list(path, lines)
        ref = prepare_images(small(path), store)
        kept = homes(store, ref)
        winner = low if SPLITS.index(splits[0]) >= SPLITS.index(splits[1]) else high
        assert {low, high} & kept.keys() == {winner}
        assert kept[winner] == lines[winner]
        clean(store, ref)


def test_a_listed_photo_that_is_missing_leaves_its_shard(
    listed: tuple[Path, dict[str, str]], store: LocalStore, folder: Path
) -> None:
    path, lines = listed
    config = small(path, shard_samples=1, max_failure_ratio=0.2)
    prepare_images(config, store)
    gone = next(key for key, split in lines.items() if split == "train")
    data = (folder / gone).read_bytes()
    (folder / gone).unlink()
    second = prepare_images(config, store)
    assert gone not in homes(store, second)
    assert outcomes(store, second)[gone] == "failed"
    clean(store, second)
    (folder / gone).write_bytes(data)
    third = prepare_images(config, store)
    assert homes(store, third) == lines
    clean(store, third)


def test_of_a_zip_with_more_members_only_the_new_ones_go_into_new_shards(
    folder: Path, store: LocalStore, tmp_path: Path
) -> None:
    import zipfile

    path = tmp_path / "photos.zip"

    def pack(keys: list[str]) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for key in keys:
                archive.write(folder / key, key)

    keys = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.png"))
    pack(keys[:12])
    first = prepare_images(small(path), store)
    assert prepare_images(small(path), store).skipped
    pack(keys)
    second = prepare_images(small(path), store)
    assert counts(second) == (4, 0, 0)
    assert shards_of(store, first).items() <= shards_of(store, second).items()
    assert sorted(homes(store, second)) == keys
    clean(store, second)


def test_a_damaged_parent_gives_an_error_that_says_what_to_do(
    folder: Path, store: LocalStore
) -> None:
    first = prepare_images(small(folder), store)
    store.write(f"{first.folder}/sources.parquet", b"no table")
    photograph(folder / "new.png", 100)
    with pytest.raises(PipelineError, match=r"sources\.parquet is missing or damaged\. Restore it"):
        prepare_images(small(folder), store)


def test_a_version_with_a_damaged_manifest_is_reported_and_not_used(
    folder: Path, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    prepare_images(small(folder), store)
    store.write("images/photographs/0123456789ab/manifest.json", b"{")
    photograph(folder / "new.png", 100)
    second = prepare_images(small(folder), store)
    assert "0123456789ab is damaged" in caplog.text
    assert second.summary["version"] == 2
    clean(store, second)


def test_a_dataset_without_a_readable_version_is_not_built_again(
    folder: Path, store: LocalStore
) -> None:
    first = prepare_images(small(folder), store)
    photograph(folder / "new.png", 100)
    manifest = json.loads(store.read(f"{first.folder}/manifest.json"))
    store.write(f"{first.folder}/manifest.json", json.dumps({**manifest, "format": 2}).encode())
    before = list(store.list())
    with pytest.raises(
        PipelineError, match=r"no version of .* can be read: .* Restore it .* again"
    ):
        prepare_images(small(folder), store)
    assert list(store.list()) == before


def test_an_interrupted_later_version_resumes(
    folder: Path, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(folder)
    prepare_images(config, store)
    (folder / "trip 1/4.png").unlink()
    photograph(folder / "trip 1/1.png", 55)
    (folder / "a copy.png").write_bytes((folder / "trip 2/2.png").read_bytes())
    for number in range(6):
        photograph(folder / f"new/{number}.png", 100 + number)
    shutil.copytree(store.folder, tmp_path / "whole")
    whole = LocalStore(tmp_path / "whole")
    expected = prepare_images(config, whole)
    for most in range(6):
        again = LocalStore(tmp_path / f"root {most}")
        shutil.copytree(store.folder, again.folder)
        interrupt_at(monkeypatch, config, again, most)
        ref = prepare_images(config, again)
        assert files_of(again, ref) == files_of(whole, expected)
        assert table(again, ref, "sources") == table(whole, expected, "sources")
        clean(again, ref)


def interrupt_at(
    monkeypatch: pytest.MonkeyPatch, config: ImagesSettings, store: LocalStore, most: int
) -> None:
    """Run a build that Ctrl-C interrupts after `most` shards."""
    from data_prep.images import shard_task as image_shards
    from data_prep.shards.shards import write_shard

    written: list[str] = []

    def write(place: Any, name: str, found: Any) -> Any:
        if len(written) == most:
            raise KeyboardInterrupt
        written.append(name)
        return write_shard(place, name, found)

    with monkeypatch.context() as patch:
        patch.setattr(image_shards, "write_shard", write)
        with pytest.raises(KeyboardInterrupt):
            prepare_images(config, store)


# The expected contents of a version, computed in the simplest way.


def usable(folder: Path, config: ImagesSettings) -> dict[str, tuple[str, list[bytes]]]:
    """Return the SHA-256 and the samples of every usable photo, by key."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.suffix[1:].lower() in EXTENSIONS:
            key, data = str(path.relative_to(folder)), path.read_bytes()
            try:
                pieces = prepare(data, config.cutting, key).pieces
            except PhotoError:
                continue
            found[key] = (sha256_bytes(data), [piece.data for piece in pieces])
    return found


def check(store: Store, ref: StageRef, config: ImagesSettings, folder: Path) -> None:
    """Check that the version holds each photo of the folder exactly once, and verify it."""
    items = usable(folder, config)
    split = {row["key"]: row["split"] for row in table(store, ref, "sources")}
    best: dict[str, str] = {}
    for key, (sha256, _) in items.items():
        rank = (-SPLITS.index(split[key]), key)
        if sha256 not in best or rank < (-SPLITS.index(split[best[sha256]]), best[sha256]):
            best[sha256] = key
    stored: dict[str, list[bytes]] = {}
    for _, files in all_samples(store, ref):
        sidecar = record(files)
        stored.setdefault(sidecar["relative_key"], []).append(payload(files))
        assert sidecar["source_sha256"] == items[sidecar["relative_key"]][0]
        assert sidecar["split"] == split[sidecar["relative_key"]]
    assert stored == {key: items[key][1] for key in best.values()}
    every = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert sorted(split) == every
    assert ref.summary["listed"] == len(every)
    clean(store, ref)


class Editor:
    """Random edits of a folder."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random, self.count = folder, random.Random(seed), 0

    def edit(self) -> str:
        edits = [self.add, self.add, self.remove, self.change, self.move, self.copy, self.touch]
        edits += [self.spoil, self.write_text, self.put_back]
        chosen = self.random.choice(edits)
        chosen()
        return chosen.__name__

    def some(self) -> Path:
        paths = sorted(p for p in self.folder.rglob("*") if p.suffix in (".bmp", ".png"))
        return self.random.choice(paths)

    def new(self) -> Path:
        self.count += 1
        kind = self.random.choice(["bmp", "png"])
        return self.folder / f"{self.random.choice('abc')}/{self.count}.{kind}"

    def add(self) -> None:
        for _ in range(self.random.randint(1, 5)):
            photograph(self.new(), self.random.randrange(10**6), 40, 36)

    def remove(self) -> None:
        if len(list(self.folder.rglob("*.*"))) > 12:
            self.some().unlink()

    def change(self) -> None:
        photograph(self.some(), self.random.randrange(8), 40, 36)  # also back to an earlier content

    def move(self) -> None:
        path = self.some()
        path.rename(path.with_name(f"moved {path.name}"))

    def copy(self) -> None:
        target = self.random.choice([self.new(), self.some()])
        target.parent.mkdir(exist_ok=True)
        source = self.some()
        if source != target:
            target.write_bytes(source.read_bytes())

    def touch(self) -> None:
        os.utime(self.some(), ns=(0, self.random.randrange(10**18)))

    def spoil(self) -> None:
        path = self.some()
        path.write_bytes(path.read_bytes()[: self.random.choice([0, 100])])

    def write_text(self) -> None:
        self.count += 1
        (self.folder / f"{self.count}.txt").write_text("text")

    def put_back(self) -> None:
        photograph(self.folder / "a/x.bmp", self.random.randrange(3), 40, 36)


@pytest.mark.parametrize("seed", range(15))
def test_after_random_edits_a_version_holds_exactly_the_photos_of_the_folder(
    tmp_path: Path, store: LocalStore, seed: int
) -> None:
    folder = tmp_path / "photos"
    for number in range(14):
        photograph(folder / f"{number}.bmp", number, 40, 36)
    editor = Editor(folder, seed)
    options: dict[str, Any] = {"shard_samples": 4, "val": 0.25, "test": 0.25}
    options |= {"size": 16, "max_failure_ratio": 1, "near_duplicates": "off"}
    if seed % 5 == 4:
        options |= {"mode": "tiles", "tile": [16, 24], "max_tiles": 2, "shard_samples": 8}
    config = crops(folder, **options)
    known: dict[str, str] = {}
    for step in range(6):
        done = [editor.edit() for _ in range(editor.random.randint(1, 3))] if step else []
        try:
            ref = prepare_images(config, store)
        except PipelineError as error:
            if "has no usable photo for" not in str(
                error
            ):  # the edits may have emptied val or test
                raise
            continue
        check(store, ref, config, folder)
        assert prepare_images(config, store).folder == ref.folder, done
        now = {r["key"]: r["split"] for r in table(store, ref, "sources") if r["split"]}
        both = known.keys() & now.keys()
        moved = [key for key in both if known[key] != now[key]]
        assert len(moved) <= 2, done  # only to fill a split that would be empty
        known |= now
    assert len(versions(store, config.name)) >= 2
    assert verify(store).problems == []


@pytest.mark.parametrize("seed", range(5))
def test_after_random_edits_of_a_list_a_version_holds_exactly_its_photos(
    tmp_path: Path, store: LocalStore, seed: int
) -> None:
    chance = random.Random(seed)
    folder, path = tmp_path / "photos", tmp_path / "photos/list.csv"
    lines = {f"{n}.bmp": SPLITS[n % 3] for n in range(15)}
    for number, key in enumerate(lines):
        photograph(folder / key, number, 40, 36)
    options = {"size": 16, "max_failure_ratio": 1, "near_duplicates": ("off", "drop")[seed % 2]}
    config = small(path, shard_samples=chance.randint(1, 4), **options)
    for _ in range(7):
        write_list(path, lines)
        ref = prepare_images(config, store)
        clean(store, ref)
        there = {key: split for key, split in lines.items() if (folder / key).exists()}
        best: dict[bytes, str] = {}
        for key in sorted(there, key=lambda key: (-SPLITS.index(there[key]), key)):
            best.setdefault((folder / key).read_bytes(), key)
        kept = {key: lines[key] for key in best.values()}
        near = {r["key"] for r in table(store, ref, "near_duplicates") if r["dropped"]}
        assert homes(store, ref) == {k: split for k, split in kept.items() if k not in near}
        assert set(outcomes(store, ref)) == set(lines)
        assert prepare_images(config, store).folder == ref.folder
        for _ in range(chance.randint(1, 3)):
            key, other = chance.sample(sorted(lines), 2)
            edit = chance.choice(["split", "split", "copy", "vanish", "appear", "change", "drop"])
            if edit == "split":
                lines[key] = chance.choice(SPLITS)
            elif edit == "copy" and (folder / other).exists():
                (folder / key).write_bytes((folder / other).read_bytes())
            elif edit == "vanish" and key > "5":
                (folder / key).unlink(missing_ok=True)
            elif edit == "drop" and key > "5":
                del lines[key]
            else:
                photograph(folder / key, chance.randrange(30), 40, 36)
        for number, split in enumerate(SPLITS):  # no split is empty
            lines[f"{number}.bmp"] = split
            photograph(folder / f"{number}.bmp", 1000 + number, 40, 36)


def test_a_manifest_names_the_parent_and_the_requested_settings(
    folder: Path, store: LocalStore
) -> None:
    first = prepare_images(small(folder), store)
    photograph(folder / "new.png", 100)
    second = prepare_images(small(folder), store)
    manifest = json.loads(store.read(f"{second.folder}/manifest.json"))
    assert manifest["inputs"]["parent"] == {
        "stage": "images",
        "folder": first.folder,
        "request_digest": first.request_digest,
        "content_digest": first.content_digest,
    }
    assert manifest["settings"] == small(folder).request_settings()
    found = versions(store, "photographs")
    assert [version.folder for version in found] == [first.folder, second.folder]


def test_a_version_is_not_built_on_a_missing_shard(folder: Path, store: LocalStore) -> None:
    ref = prepare_images(small(folder), store)
    tar = split_shards(store, ref.folder, "train")[0]
    store.delete(tar)
    with pytest.raises(
        PipelineError, match=rf"{tar} is missing or has another size, and version 1"
    ):
        prepare_images(small(folder), store)
    again = prepare_images(small(folder), store, repack=True)
    assert again.summary["version"] == 2
    assert not again.skipped


def test_a_build_says_how_its_source_differs_from_the_last_version(
    folder: Path, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    prepare_images(small(folder), store)
    assert "compared with version" not in caplog.text
    for path in sorted(folder.rglob("*.png"))[:2]:
        path.unlink()
    photograph(folder / "new.png", 99)
    prepare_images(small(folder), store)
    assert "compared with version 1: 1 item added, 2 removed and 0 changed" in caplog.text
    assert "was made from" not in caplog.text


@pytest.mark.parametrize("options", [{}, {"quality": 80}])
def test_another_source_under_the_name_of_a_dataset_is_a_warning(
    folder: Path,
    store: LocalStore,
    tmp_path: Path,
    options: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    prepare_images(small(f"{folder}/"), store)
    prepare_images(small(folder, **options), store)  # the same place, written in another way
    assert "was made from" not in caplog.text
    other = photographs(tmp_path / "other", 12)
    photograph(other / "more.png", 99)
    prepare_images(small(other, **options), store)
    (warning,) = (each.getMessage() for each in caplog.records if each.levelname == "WARNING")
    assert f"was made from {folder}" in warning
    assert f"this one will be made from {other}: if these are other photos" in warning
    assert "--name (images.name)" in warning


def test_the_log_says_which_of_two_duplicates_stays(
    folder: Path, store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    first = min(folder.rglob("*.png"))
    shutil.copy(first, folder / "zz.png")
    ref = prepare_images(small(folder), store)
    assert ref.summary["duplicates"] == 1
    assert (
        "1 duplicate left out: of identical files in several splits the one in test stays, else the"
        " one in val; in one split the one that comes first by name"
    ) in caplog.text
