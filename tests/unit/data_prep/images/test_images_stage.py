"""The images stage: photos in, shards out, with the same bytes after any interruption."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
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
    reasons,
    record,
    rows,
    samples,
    shards_of,
    table,
    tiles,
)
from PIL import Image
from resumed_counts import record_resumed

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import PipelineError
from data_prep.core.manifest import FileRecord, read_manifest
from data_prep.core.storage.local import LocalStore
from data_prep.images import build as image_build
from data_prep.images import next_version, parent_state
from data_prep.images import shard_task as image_shards
from data_prep.images.findings import OUTCOMES
from data_prep.images.outcomes import Outcomes
from data_prep.images.settings import ImagesSettings
from data_prep.images.stage import prepare_images
from data_prep.pictures.prepare import prepare
from data_prep.raw.local_files import LocalFiles
from data_prep.shards.shards import read_index, sha256_of, split_shards, write_shard
from dpnet.pipeline.verify import verify


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return photographs(tmp_path / "photos")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(files: LocalFiles, key: str, limit: int) -> bytes:
        pytest.fail(f"{key} was read")

    monkeypatch.setattr(LocalFiles, "read", read)


def record_writes(monkeypatch: pytest.MonkeyPatch, most: int = 1_000) -> list[str]:
    """Return a list that gets the names of written shards; Ctrl-C is raised after `most`."""
    written: list[str] = []

    def write(place: Any, name: str, found: Iterator[Any]) -> list[FileRecord]:
        if len(written) == most:
            raise KeyboardInterrupt
        written.append(name)
        return write_shard(place, name, found)

    monkeypatch.setattr(image_shards, "write_shard", write)
    return written


def test_a_center_crop_is_the_mean_of_the_middle_and_names_its_photo(
    folder: Path, store: LocalStore
) -> None:
    ref = prepare_images(crops(folder, format="png"), store)
    found = all_samples(store, ref)
    assert len(found) == ref.summary["photographs"] == 12
    for key, files in found:
        sidecar = record(files)
        data = (folder / sidecar["relative_key"]).read_bytes()
        middle = pixels(data)[:, 8:72]  # of 80 x 64 pixels
        means = middle.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
        assert np.abs(pixels(files["png"]) - means).max() <= 1
        assert sidecar == {
            "key": key,
            "width": 32,
            "height": 32,
            "original_width": 80,
            "original_height": 64,
            "relative_key": sidecar["relative_key"],
            "source_sha256": sha256_bytes(data),
            "split": sidecar["split"],
        }


def test_short_side_keeps_the_whole_photo(folder: Path, store: LocalStore) -> None:
    ref = prepare_images(crops(folder, mode="short-side", format="webp"), store)
    for _, files in all_samples(store, ref):
        with Image.open(io.BytesIO(files["webp"])) as image:
            assert (image.format, image.size) == ("WEBP", (40, 32))
        assert (record(files)["width"], record(files)["height"]) == (40, 32)


def test_keep_stores_unchanged_files_with_the_extension_of_their_true_format(
    folder: Path, store: LocalStore
) -> None:
    photograph(folder / "Straße.JPG", 90)
    photograph(folder / "small.png", 91, width=5, height=3)
    photograph(folder / "a.bmp", 92).rename(folder / "a.tif")
    ref = prepare_images(crops(folder, mode="keep"), store)
    found = {record(files)["relative_key"]: files for _, files in all_samples(store, ref)}
    assert len(found) == 15
    for key, files in found.items():
        assert payload(files) == (folder / key).read_bytes()
        assert record(files)["source_sha256"] == sha256_bytes(payload(files))
    assert set(found["Straße.JPG"]) == {"jpg", "json"}
    assert set(found["a.tif"]) == {"bmp", "json"}


def test_tiles_are_cut_at_every_scale_and_all_tiles_of_a_photo_are_in_one_split(
    folder: Path, store: LocalStore
) -> None:
    ref = prepare_images(tiles(folder, format="png"), store)
    sides = set()
    for _, files in all_samples(store, ref):
        sidecar = record(files)
        left, top, side = sidecar["tile"]
        sides.add(side)
        if side == 32:
            whole = pixels((folder / sidecar["relative_key"]).read_bytes())
            assert (pixels(files["png"]) == whole[top : top + 32, left : left + 32]).all()
    assert sides == {32, 48}
    split = homes(store, ref)  # asserts that each photo has one split
    assert len(split) == 12
    assert set(split.values()) == set(SPLITS)


def test_max_tiles_limits_the_tiles_of_one_photo(folder: Path, store: LocalStore) -> None:
    ref = prepare_images(tiles(folder, max_tiles=5), store)
    assert sum(figures["samples"] for figures in ref.summary["splits"].values()) == 60
    assert {row["samples"] for row in table(store, ref, "sources")} == {5}


@pytest.mark.parametrize("make", [crops, tiles])
def test_the_summary_and_the_index_describe_the_shards(
    folder: Path, store: LocalStore, make: Any
) -> None:
    ref = prepare_images(make(folder, shard_samples=120 if make is tiles else 3), store)
    for split, figures in ref.summary["splits"].items():
        shards = split_shards(store, ref.folder, split)
        assert len(shards) == figures["shards"] >= 1
        own = [(shard, row) for shard in shards for row in read_index(store, shard)]
        assert len(own) == figures["samples"]
        for (shard, row), (key, files) in zip(own, samples(store, ref, split), strict=True):
            sidecar = record(files)
            assert row["key"] == key
            assert row["split"] == sidecar["split"] == split
            assert store.read_range(shard, row["offset"], row["size"]) == files["jpg"]
            assert row["sha256"] == sha256_bytes(files["jpg"])
            same = ("width", "height", "relative_key", "source_sha256")
            assert [row[name] for name in same] == [sidecar[name] for name in same]
    assert ref.summary["splits"]["train"]["shards"] > 1
    assert verify(store, ref.folder).problems == []


def test_samples_are_stored_in_the_order_of_key_hashes_in_shards_of_even_size(
    folder: Path, store: LocalStore
) -> None:
    ref = prepare_images(crops(folder, shard_samples=4), store)
    stored = [record(files)["relative_key"] for _, files in samples(store, ref, "train")]
    assert stored == sorted(stored, key=lambda key: sha256_bytes(key.encode()))
    sizes = [len(read_index(store, s)) for s in split_shards(store, ref.folder, "train")]
    assert sum(sizes) == 10
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("options", [{"shard_samples": 3}, {"mode": "keep", "shard_samples": 2}])
def test_one_and_two_workers_write_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(next_version, "POOL_ITEMS", 1)
    monkeypatch.setattr(parent_state, "POOL_ITEMS", 1)
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "z.png").write_bytes((folder / "trip 0/0.png").read_bytes())
    made = []
    for workers in (1, 2):
        store = LocalStore(tmp_path / f"root{workers}")
        ref = prepare_images(crops(folder, workers=workers, **options), store)
        tables = [table(store, ref, name) for name in ("sources", "failures", "duplicates")]
        made.append((ref.content_digest, ref.summary, files_of(store, ref), tables))
    assert made[0] == made[1]
    assert len(made[0][2]) >= 10


def test_an_interrupted_build_resumes_at_the_next_shard(
    folder: Path, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = crops(folder, shard_samples=3)
    whole = LocalStore(tmp_path / "whole")
    expected = prepare_images(config, whole)
    written = record_writes(monkeypatch, most=2)
    with pytest.raises(KeyboardInterrupt):
        prepare_images(config, store)
    left = [entry.key for entry in store.list()]
    assert not any(key.endswith("manifest.json") for key in left)
    assert sum("/work/" in key for key in left) == len(written) == 2
    begun = list(written)
    written = record_writes(monkeypatch)
    resumed = record_resumed(monkeypatch)
    ref = prepare_images(config, store)
    shards = [row["shard"] for row in table(store, ref, "sources")]
    assert resumed["prepare images"] == sum(shard in begun for shard in shards)
    assert not set(written) & set(begun)
    assert {f"{name}.tar" for name in written + begun} <= set(files_of(store, ref))
    assert files_of(store, ref) == files_of(whole, expected)
    assert ref.summary == expected.summary
    assert table(store, ref, "sources") == table(whole, expected, "sources")
    assert not list(store.list(f"{ref.folder}/work"))
    assert verify(store, ref.folder).problems == []


@pytest.mark.parametrize("harm", ["flip a byte", "remove the index", "break the record"])
def test_a_shard_damaged_after_the_interruption_is_built_again(
    folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch, harm: str
) -> None:
    config = crops(folder, shard_samples=3)
    written = record_writes(monkeypatch, most=2)
    with pytest.raises(KeyboardInterrupt):
        prepare_images(config, store)
    first = written[0]
    (place,) = store.folder.rglob(f"{first}.tar")
    if harm == "flip a byte":
        data = bytearray(place.read_bytes())
        data[700] ^= 1
        place.write_bytes(data)
    elif harm == "remove the index":
        place.with_suffix(".parquet").unlink()
    else:
        (place.parent / f"work/{first}.parquet").write_bytes(b"PAR1 no table PAR1")
    written = record_writes(monkeypatch)
    ref = prepare_images(config, store)
    assert written[0] == first
    assert verify(store, ref.folder).problems == []


def test_a_build_interrupted_while_it_drops_duplicates_resumes(
    folder: Path, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(0, 12, 2):
        data = (folder / f"trip {number % 3}/{number}.png").read_bytes()
        (folder / f"copy {number}.png").write_bytes(data)
    config = crops(folder, shard_samples=3)
    whole = LocalStore(tmp_path / "whole")
    expected = prepare_images(config, whole)
    assert expected.summary["duplicates"] == 6
    planned = len(record_all_writes(monkeypatch, config, LocalStore(tmp_path / "count")))
    for most in range(planned - 3, planned):  # interrupted after some were dropped
        monkeypatch.undo()
        written = record_writes(monkeypatch, most=most)
        again = LocalStore(tmp_path / f"root {most}")
        with pytest.raises(KeyboardInterrupt):
            prepare_images(config, again)
        rest = record_writes(monkeypatch)
        ref = prepare_images(config, again)
        assert len(written) + len(rest) == planned  # nothing twice
        assert files_of(again, ref) == files_of(whole, expected)
        assert table(again, ref, "sources") == table(whole, expected, "sources")


def record_all_writes(
    monkeypatch: pytest.MonkeyPatch, config: ImagesSettings, store: LocalStore
) -> list[str]:
    written = record_writes(monkeypatch)
    prepare_images(config, store)
    return written


def test_photos_changed_after_an_interruption_leave_no_old_content(
    folder: Path, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy is dropped and the build is interrupted; then the photo is not a copy any more."""
    for number in range(6):
        photograph(folder / f"more/{number}.bmp", 50 + number)
    twin = folder / "more/9.bmp"
    twin.write_bytes((folder / "more/0.bmp").read_bytes())
    config = crops(folder, shard_samples=3)
    monkeypatch.setattr(image_build, "check_splits", lambda *rest: 1 / 0)  # after the dropping
    with pytest.raises(ZeroDivisionError):
        prepare_images(config, store)
    monkeypatch.undo()
    photograph(folder / "more/0.bmp", 99)  # the size is the same, so the request is the same
    ref = prepare_images(config, store)
    assert ref.summary["duplicates"] == 0
    whole = LocalStore(tmp_path / "whole")
    assert files_of(store, ref) == files_of(whole, prepare_images(config, whole))
    assert verify(store, ref.folder).problems == []


def test_a_second_call_is_skipped_and_reads_no_photo(
    folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "broken.jpg").write_bytes(b"no image")
    first = prepare_images(crops(folder), store)
    forbid_reading(monkeypatch)
    written = record_writes(monkeypatch)
    before = list(store.list())
    again = prepare_images(crops(folder), store)
    assert (first.skipped, again.skipped) == (False, True)
    assert (again.content_digest, again.summary) == (first.content_digest, first.summary)
    assert not written
    assert list(store.list()) == before


def test_new_file_dates_or_a_moved_folder_make_no_new_version(
    folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_images(crops(folder), store)
    monkeypatch.setattr(next_version, "POOL_ITEMS", 2)
    monkeypatch.setattr(parent_state, "POOL_ITEMS", 2)
    monkeypatch.setattr(parent_state, "HASHED_AT_ONCE", 2)
    for path in folder.rglob("*.png"):
        os.utime(path, (1, 1))
    assert prepare_images(crops(folder, workers=2), store).skipped
    folder.rename(folder.with_name("moved"))
    moved = prepare_images(crops(folder.with_name("moved")), store)
    assert moved.skipped
    assert moved.folder == first.folder


def test_files_that_are_not_images_are_ignored_with_a_reason(
    folder: Path, store: LocalStore
) -> None:
    (folder / "notes.txt").write_text("nice trip")
    (folder / "README").write_text("hello")
    photograph(folder / "x.png", 70).rename(folder / "scan")
    ref = prepare_images(crops(folder), store)
    assert (ref.summary["ignored"], ref.summary["failed"], ref.summary["photographs"]) == (2, 0, 13)
    assert table(store, ref, "failures") == [
        {
            "key": "README",
            "kind": "ignored",
            "sha256": sha256_bytes(b"hello"),
            "reason": "not an image: no extension, and not the content of one",
        },
        {
            "key": "notes.txt",
            "kind": "ignored",
            "sha256": None,
            "reason": "not an image: extension .txt",
        },
    ]


def test_a_broken_photo_is_recorded_and_the_others_are_stored(
    folder: Path, store: LocalStore
) -> None:
    (folder / "broken.jpg").write_bytes(b"no image at all")
    ref = prepare_images(crops(folder), store)
    assert (ref.summary["photographs"], ref.summary["failed"]) == (12, 1)
    (row,) = table(store, ref, "failures")
    assert (row["key"], row["kind"]) == ("broken.jpg", "failed")
    assert row["sha256"] == sha256_bytes(b"no image at all")
    assert row["reason"] == "it is not an image, or of an unknown format"


def test_photos_outside_the_limits_are_recorded(folder: Path, store: LocalStore) -> None:
    photograph(folder / "small.png", 50, width=31, height=64)
    photograph(folder / "large.png", 51, width=200, height=64)
    (folder / "long.png").write_bytes(bytes(50_000))
    config = crops(folder, max_pixels=6000, max_bytes=49_999, max_failure_ratio=0.5)
    assert reasons(store, prepare_images(config, store)) == {
        "small.png": "it has 31x64 pixels, its shorter side needs 32",
        "large.png": "it has 200x64 pixels, images.max_pixels is 6000",
        "long.png": "it is larger than 49999 bytes",
    }


def test_with_too_many_failures_nothing_is_committed_and_finished_shards_are_kept(
    folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x.jpg", "y.jpg", "z.jpg"):
        (folder / name).write_bytes(b"")
    with pytest.raises(PipelineError, match=r"3 of the 1\d image files") as caught:
        prepare_images(crops(folder, shard_samples=5), store)
    assert "it is empty; " in str(caught.value)
    assert "images.max_failure_ratio, which is 0.05" in str(caught.value)
    assert not any(entry.key.endswith("manifest.json") for entry in store.list())
    done = {path.stem for path in store.folder.rglob("*.tar")}
    assert done
    written = record_writes(monkeypatch)
    ref = prepare_images(crops(folder, shard_samples=5, max_failure_ratio=0.2), store)
    assert ref.summary["failed"] == 3
    assert not done & set(written)


def test_too_many_failures_stop_the_build_before_all_files_are_read(
    tmp_path: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photographs(tmp_path / "photos", 3)
    for number in range(60):
        (folder / f"{number}.jpg").write_bytes(b"broken")
    read: list[str] = []
    real = LocalFiles.read
    monkeypatch.setattr(
        LocalFiles, "read", lambda files, key, limit: read.append(key) or real(files, key, limit)
    )
    with pytest.raises(PipelineError, match="that were tried cannot be used"):
        prepare_images(crops(folder, shard_samples=5), store)
    assert len(read) < 20


def test_one_failure_is_always_accepted(tmp_path: Path, store: LocalStore) -> None:
    folder = photographs(tmp_path / "photos", 4)
    (folder / "x.jpg").write_bytes(b"")
    ref = prepare_images(crops(folder, max_failure_ratio=0), store)
    assert ref.summary["failed"] == 1


def test_of_identical_files_the_lowest_key_stays(folder: Path, store: LocalStore) -> None:
    data = (folder / "trip 0/0.png").read_bytes()
    (folder / "copy.png").write_bytes(data)
    ref = prepare_images(crops(folder, val=0.001, test=0.001, near_duplicates="off"), store)
    assert (ref.summary["photographs"], ref.summary["duplicates"]) == (12, 1)
    (row,) = table(store, ref, "duplicates")
    other = {"copy.png": "trip 0/0.png", "trip 0/0.png": "copy.png"}[row["kept"]]
    assert (row["key"], row["sha256"]) == (other, sha256_bytes(data))
    splits = {r["key"]: r["split"] for r in table(store, ref, "sources")}
    if splits["copy.png"] == splits["trip 0/0.png"]:
        assert (row["kept"], row["reason"]) == ("copy.png", "the same bytes")
    assert row["key"] not in homes(store, ref)
    kept = prepare_images(crops(folder, dedupe="off"), store)
    assert (kept.summary["photographs"], kept.summary["duplicates"]) == (13, 0)


@pytest.fixture
def split_folder(tmp_path: Path) -> Path:
    places = ["train/a", "train/b", "train/c", "val/d", "val/e", "test/f", "test/g"]
    for number, place in enumerate(places):
        photograph(tmp_path / f"photos/{place}.png", number)
    return tmp_path / "photos"


def test_of_copies_in_two_splits_test_wins_over_val_and_val_over_train(
    split_folder: Path, store: LocalStore
) -> None:
    def copy(source: str, target: str) -> None:
        (split_folder / target).write_bytes((split_folder / source).read_bytes())

    copy("train/a.png", "val/z.png")
    copy("train/b.png", "test/z.png")
    copy("val/d.png", "test/y.png")
    copy("train/c.png", "train/z.png")
    ref = prepare_images(crops(split_folder), store)
    found = {r["key"]: (r["kept"], r["reason"]) for r in table(store, ref, "duplicates")}
    assert found == {
        "train/a.png": ("val/z.png", "the same bytes in another split"),
        "train/b.png": ("test/z.png", "the same bytes in another split"),
        "val/d.png": ("test/y.png", "the same bytes in another split"),
        "train/z.png": ("train/c.png", "the same bytes"),
    }
    assert set(homes(store, ref)) == {r for r, o in outcomes(store, ref).items() if o == "sample"}
    assert homes(store, ref)["val/z.png"] == "val"
    figures = {split: f["samples"] for split, f in ref.summary["splits"].items()}
    assert figures == {"train": 1, "val": 2, "test": 4}
    off = prepare_images(crops(split_folder, dedupe="off"), store)
    assert off.summary["duplicates"] == 0
    assert len(homes(store, off)) == 11
    assert verify(store).problems == []


@pytest.mark.parametrize("what", ["report", "drop", "off"])
def test_near_duplicates_are_reported_and_dropped_only_on_request(
    split_folder: Path, store: LocalStore, what: str
) -> None:
    with Image.open(split_folder / "test/f.png") as image:
        image.save(split_folder / "train/near.jpg", quality=80)
    with Image.open(split_folder / "test/g.png") as image:
        image.save(split_folder / "val/near.jpg", quality=80)
    ref = prepare_images(crops(split_folder, near_duplicates=what), store)
    found = table(store, ref, "near_duplicates")
    if what == "off":
        assert found == []
    else:
        pairs = {(r["key"], r["split"], r["other"], r["other_split"], r["dropped"]) for r in found}
        assert pairs == {
            ("train/near.jpg", "train", "test/f.png", "test", what == "drop"),
            ("val/near.jpg", "val", "test/g.png", "test", False),
        }
        assert all(0 <= r["distance"] <= 4 for r in found)
    dropped = {r["key"]: r["kept"] for r in table(store, ref, "duplicates")}
    assert dropped == ({"train/near.jpg": "test/f.png"} if what == "drop" else {})
    assert ("train/near.jpg" in homes(store, ref)) == (what != "drop")
    assert verify(store, ref.folder).problems == []


def test_split_folders_are_the_splits_and_photos_outside_are_ignored(
    split_folder: Path, store: LocalStore
) -> None:
    photograph(split_folder / "other/x.png", 80)
    ref = prepare_images(crops(split_folder), store)
    counts = {split: figures["samples"] for split, figures in ref.summary["splits"].items()}
    assert counts == {"train": 3, "val": 2, "test": 2}
    assert ref.summary["ignored"] == 1
    assert reasons(store, ref) == {
        "other/x.png": "outside the folders train, val, validation and test"
    }
    assert homes(store, ref)["test/f.png"] == "test"


def test_every_listed_file_is_in_sources_and_has_exactly_one_outcome(
    folder: Path, store: LocalStore
) -> None:
    (folder / "a.txt").write_text("text")
    (folder / "b.jpg").write_text("text")
    (folder / "trip 0/copy.png").write_bytes((folder / "trip 0/0.png").read_bytes())
    ref = prepare_images(crops(folder), store)
    listed = [row["key"] for row in table(store, ref, "sources")]
    rest = [row["key"] for name in ("failures", "duplicates") for row in table(store, ref, name)]
    assert sorted([*homes(store, ref), *rest]) == listed
    assert len(listed) == ref.summary["listed"] == 15
    places = (ref.summary[kind] for kind in ("photographs", "failed", "ignored", "duplicates"))
    assert sum(places) == 15


def test_sources_has_the_facts_about_every_item(folder: Path, store: LocalStore) -> None:
    (folder / "a.txt").write_text("text")
    (folder / "b.jpg").write_text("text")
    ref = prepare_images(crops(folder, shard_samples=4), store)
    by_key = {row["key"]: row for row in table(store, ref, "sources")}
    assert list(by_key) == sorted(by_key)
    inside = {row["relative_key"]: row for row in rows(store, ref)}
    for key, row in by_key.items():
        assert row["size"] == (folder / key).stat().st_size
        assert row["fingerprint"] > 0
        if row["outcome"] == "sample":
            assert row["sha256"] == inside[key]["source_sha256"]
            assert (row["width"], row["height"], row["format"]) == (80, 64, "PNG")
            assert (row["samples"], row["split"]) == (1, inside[key]["split"])
            assert row["reason"] is None
            shard = read_index(store, f"{ref.folder}/{row['shard']}.tar")
            assert key in [r["relative_key"] for r in shard]
    other = ("sha256", "shard", "split", "outcome", "samples")
    assert [by_key["a.txt"][n] for n in other] == [None, None, None, "ignored", 0]
    failed = [by_key["b.jpg"][n] for n in ("sha256", "shard", "outcome", "samples")]
    assert failed == [sha256_bytes(b"text"), None, "failed", 0]


@pytest.mark.parametrize("fault", ["lose an item", "give one item two outcomes", "forget a shard"])
def test_nothing_is_committed_if_the_accounts_do_not_add_up(
    folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    real = Outcomes.add_findings

    def add_findings(self: Outcomes, *rest: Any) -> None:
        real(self, *rest)
        if fault == "lose an item":
            self.code[0] = -1
        elif fault == "give one item two outcomes":
            self.code[0] = OUTCOMES.index("failed")
        else:
            self.shard[0] = -1

    monkeypatch.setattr(Outcomes, "add_findings", add_findings)
    with pytest.raises(PipelineError, match="the accounts do not add up"):
        prepare_images(crops(folder), store)
    assert not any(entry.key.endswith("manifest.json") for entry in store.list())


def test_nothing_is_committed_if_a_worker_does_not_report_every_item(
    folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = image_build.build_shard

    def build_shard(task: Any) -> Any:
        done = real(task)
        return image_shards.ShardResult(done.files, done.findings[:-1])

    monkeypatch.setattr(image_build, "build_shard", build_shard)
    with pytest.raises(PipelineError, match="items, but its record names"):
        prepare_images(crops(folder), store)
    assert not any(entry.key.endswith("manifest.json") for entry in store.list())


def test_files_about_this_machine_do_not_count_as_content(folder: Path, store: LocalStore) -> None:
    ref = prepare_images(crops(folder), store)
    assert set(files_of(store, ref)) == set(shards_of(store, ref))
    every = {file.path for file in read_manifest(store, ref.folder).files}
    tables = ("sources", "failures", "duplicates", "near_duplicates")
    assert {"config.json", "train.urls", *(f"{name}.parquet" for name in tables)} <= every
    saved = json.loads(store.read(f"{ref.folder}/config.json"))
    assert ImagesSettings(**saved) == crops(folder)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["a.txt", "b.bak.csv"], "holds no image file"),
        (["a.jpg", "b.jpg", "c.jpg"], r"none of the 3 image files in .* is usable: a\.jpg: it is"),
        (["a", "b", "c"], "holds no image file"),
        (["a.jpg"], "too few photos: 1, but at least 3 are needed"),
        ([], "is empty"),
    ],
)
def test_a_folder_without_a_usable_photo_is_reported_in_one_sentence(
    tmp_path: Path, store: LocalStore, names: list[str], sentence: str
) -> None:
    (tmp_path / "photos").mkdir()
    for name in names:
        (tmp_path / "photos" / name).write_text("no image")
    with pytest.raises(PipelineError, match=sentence) as caught:
        prepare_images(crops(tmp_path / "photos", max_failure_ratio=1), store)
    assert "\n" not in str(caught.value)


def test_two_photos_are_too_few(tmp_path: Path, store: LocalStore) -> None:
    photographs(tmp_path / "photos", 2)
    with pytest.raises(PipelineError, match="too few photos: 2, but at least 3 are needed"):
        prepare_images(crops(tmp_path / "photos"), store)


def test_nothing_is_committed_if_a_split_has_no_usable_photo(
    split_folder: Path, store: LocalStore
) -> None:
    for path in (split_folder / "val").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(PipelineError, match=r"has no usable photo for the split val"):
        prepare_images(crops(split_folder, max_failure_ratio=0.5), store)
    assert not any(entry.key.endswith("manifest.json") for entry in store.list())


def test_webdataset_tarfile_and_gnu_tar_read_the_shards(folder: Path, store: LocalStore) -> None:
    photograph(folder / "ä b\n%.d/é漢.x.jpg", 60)
    ref = prepare_images(crops(folder, shard_samples=4), store)
    mine = all_samples(store, ref)
    lines = [
        (split, line)
        for split in SPLITS
        for line in store.read(f"{ref.folder}/{split}.urls").decode().splitlines()
    ]
    tars = [str(store.path(ref.folder) / line) for _, line in lines]
    dataset = wds.WebDataset(tars, shardshuffle=False).decode("pil")
    for (key, files), sample in zip(mine, dataset, strict=True):
        assert sample["__key__"] == key
        assert sample["jpg"].size == (32, 32)
        assert sample["json"] == record(files)
    listed: list[str] = []
    for tar in tars:
        done = subprocess.run(["tar", "-tf", tar], capture_output=True, text=True, check=True)
        assert done.stderr == ""
        with tarfile.open(tar) as opened:
            assert opened.getnames() == done.stdout.splitlines()
        listed += done.stdout.splitlines()
    assert listed == [f"{key}.{extension}" for key, files in mine for extension in files]


def test_one_range_read_gets_an_image_from_a_tar(folder: Path, store: LocalStore) -> None:
    ref = prepare_images(crops(folder), store)
    config = crops(folder)
    for split in SPLITS:
        for shard in split_shards(store, ref.folder, split):
            for row in read_index(store, shard):
                data = store.read_range(shard, row["offset"], row["size"])
                original = (folder / row["relative_key"]).read_bytes()
                (piece,) = prepare(original, config.cutting, row["relative_key"]).pieces
                assert data == piece.data
            assert sha256_of(store, shard)[1] % 512 == 0
