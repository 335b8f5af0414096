"""The images stage: photographs in, shards out; the same bytes however it got there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from data_prep import image_shards, images, sources
from data_prep.digest import sha256_bytes
from data_prep.errors import PipelineError
from data_prep.images import ImagesConfig, prepare_images
from data_prep.pictures import decode
from data_prep.shards import decode_table, iterate_shard, read_index, split_shards, write_shard
from data_prep.sources import read_item
from data_prep.stage import FileRecord, StageRef, read_manifest
from data_prep.storage import LocalStore


def photograph(path: Path, seed: int, width: int = 80, height: int = 64) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.Generator(np.random.Philox(seed))
    small = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(12):
        photograph(tmp_path / f"photos/trip {number % 3}/{number}.png", number)
    return tmp_path / "photos"


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


def tiles(folder: Path, **options: Any) -> ImagesConfig:
    defaults = {"mode": "tiles", "size": 32, "tile": [32, 48], "tile_stride": 0.5, "workers": 1}
    return ImagesConfig(source=folder, **{**defaults, "shard_samples": 50, **options})


def crops(folder: Path, **options: Any) -> ImagesConfig:
    return ImagesConfig(source=folder, **{"size": 32, "workers": 1, **options})


def content(store: LocalStore, ref: StageRef) -> dict[str, str]:
    """Hashes of the files on disk that count, by path."""
    return {
        file["path"]: sha256_bytes(store.read(f"{ref.folder}/{file['path']}"))
        for file in read_manifest(store, ref.folder)["files"]
        if file["content"]
    }


def samples(store: LocalStore, ref: StageRef, split: str) -> list[tuple[str, dict[str, bytes]]]:
    shards = split_shards(store, ref.folder, split)
    return [sample for shard in shards for sample in iterate_shard(store, shard)]


def table(store: LocalStore, ref: StageRef, name: str) -> list[dict[str, Any]]:
    return decode_table(store.read(f"{ref.folder}/{name}.parquet"))


def test_center_crops_are_one_sample_of_each_photograph(folder: Path, store: LocalStore) -> None:
    ref = prepare_images(crops(folder, format="png"), store)
    found = [s for split in ("train", "val", "test") for s in samples(store, ref, split)]
    assert len(found) == ref.summary["photographs"] == 12
    key, files = found[0]
    record = json.loads(files["json"])
    with Image.open(folder / record["relative_key"]) as original:
        crop = original.crop((8, 0, 72, 64)).resize((32, 32), Image.Resampling.LANCZOS)
    assert (np.asarray(decode(files["png"])) == np.asarray(crop)).all()
    data = (folder / record["relative_key"]).read_bytes()
    assert record == {
        "key": key,
        "width": 32,
        "height": 32,
        "original_width": 80,
        "original_height": 64,
        "relative_key": record["relative_key"],
        "source_sha256": sha256_bytes(data),
        "split": record["split"],
    }


def test_tiles_are_cut_at_every_scale_and_a_photograph_is_in_one_split(
    folder: Path, store: LocalStore
) -> None:
    ref = prepare_images(tiles(folder, format="png"), store)
    homes: dict[str, set[str]] = {}
    sides = set()
    for split in ("train", "val", "test"):
        for _, files in samples(store, ref, split):
            record = json.loads(files["json"])
            homes.setdefault(record["relative_key"], set()).add(split)
            left, top, side = record["tile"]
            sides.add(side)
            if side == 32:
                with Image.open(folder / record["relative_key"]) as original:
                    square = original.crop((left, top, left + 32, top + 32))
                assert (np.asarray(decode(files["png"])) == np.asarray(square)).all()
    assert sides == {32, 48}
    assert len(homes) == 12
    assert all(len(splits) == 1 for splits in homes.values())
    assert set.union(*homes.values()) == {"train", "val", "test"}


def test_the_summary_and_the_index_tell_what_the_shards_hold(
    folder: Path, store: LocalStore
) -> None:
    ref = prepare_images(tiles(folder), store)
    for split, figures in ref.summary["splits"].items():
        shards = split_shards(store, ref.folder, split)
        assert len(shards) == figures["shards"] >= 1
        rows = [(shard, row) for shard in shards for row in read_index(store, shard)]
        assert len(rows) == figures["samples"]
        stored = samples(store, ref, split)
        for (shard, row), (key, files) in zip(rows, stored, strict=True):
            assert row["key"] == key
            assert row["split"] == split
            assert store.read_range(shard, row["offset"], row["size"]) == files["jpg"]


def test_one_and_two_workers_write_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "_POOL_SAMPLES", 1)
    made = []
    for workers in (1, 2):
        store = LocalStore(tmp_path / f"root{workers}")
        ref = prepare_images(tiles(folder, workers=workers), store)
        made.append((ref.content_digest, content(store, ref)))
    assert made[0] == made[1]
    assert len(made[0][1]) > 8


def test_a_run_broken_off_is_taken_up_shard_by_shard(
    folder: Path, store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = LocalStore(tmp_path / "whole")
    expected = content(whole, prepare_images(tiles(folder), whole))
    written: list[str] = []

    def write_one(place: Any, name: str, *rest: Any) -> list[FileRecord]:
        if written:
            raise KeyboardInterrupt
        written.append(name)
        return write_shard(place, name, *rest)

    monkeypatch.setattr(image_shards, "write_shard", write_one)
    with pytest.raises(KeyboardInterrupt):
        prepare_images(tiles(folder), store)
    assert not any(entry.key.endswith("manifest.json") for entry in store.list())

    def write_and_note(place: Any, name: str, *rest: Any) -> list[FileRecord]:
        written.append(name)
        return write_shard(place, name, *rest)

    monkeypatch.setattr(image_shards, "write_shard", write_and_note)
    ref = prepare_images(tiles(folder), store)
    assert len(written) == len(set(written)) > 3  # the first shard was not made again
    assert content(store, ref) == expected


def test_a_second_call_is_skipped_and_reads_no_photograph(
    folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_images(crops(folder), store)
    monkeypatch.setattr(sources, "read_item", lambda item: pytest.fail(f"{item.key} was read"))
    again = prepare_images(crops(folder), store)
    assert again.skipped
    assert not first.skipped
    assert again.content_digest == first.content_digest
    assert again.summary == first.summary


def test_touching_a_photograph_or_moving_the_folder_makes_nothing_new(
    folder: Path, store: LocalStore
) -> None:
    first = prepare_images(crops(folder), store)
    os.utime(folder / "trip 0/0.png", (1, 1))
    assert prepare_images(crops(folder), store).skipped
    folder.rename(folder.with_name("moved"))
    moved = prepare_images(crops(folder.with_name("moved")), store)
    assert moved.skipped
    assert moved.request_digest == first.request_digest


def test_a_changed_photograph_and_a_new_one_make_a_new_version(
    folder: Path, store: LocalStore
) -> None:
    digests = {prepare_images(crops(folder), store).content_digest}
    photograph(folder / "trip 0/0.png", seed=99)
    digests.add(prepare_images(crops(folder), store).content_digest)
    photograph(folder / "new.png", seed=100)
    digests.add(prepare_images(crops(folder), store).content_digest)
    assert len(digests) == 3


def test_a_new_text_file_is_recorded_and_changes_no_content(
    folder: Path, store: LocalStore
) -> None:
    first = prepare_images(crops(folder), store)
    (folder / "notes.txt").write_text("nice trip")
    (folder / "README").write_text("hello")
    second = prepare_images(crops(folder), store)
    assert not second.skipped
    assert second.content_digest == first.content_digest
    assert (second.summary["ignored"], second.summary["failed"]) == (2, 0)
    assert table(store, second, "failures") == [
        {"key": key, "kind": "ignored", "sha256": "", "reason": f"not an image: {reason}"}
        for key, reason in [("README", "no extension"), ("notes.txt", "extension .txt")]
    ]


def test_a_broken_image_is_recorded_and_the_others_go_on(folder: Path, store: LocalStore) -> None:
    (folder / "broken.jpg").write_bytes(b"no image at all")
    ref = prepare_images(crops(folder), store)
    assert (ref.summary["photographs"], ref.summary["failed"]) == (12, 1)
    (row,) = table(store, ref, "failures")
    assert row["key"] == "broken.jpg"
    assert row["kind"] == "failed"
    assert row["reason"] == "it is not an image, or of an unknown format"


def test_photographs_too_small_or_too_large_are_recorded(folder: Path, store: LocalStore) -> None:
    photograph(folder / "small.png", 50, width=31, height=64)
    photograph(folder / "large.png", 51, width=200, height=64)
    config = crops(folder, max_pixels=6000, max_failure_ratio=0.5)
    reasons = {
        row["key"]: row["reason"] for row in table(store, prepare_images(config, store), "failures")
    }
    assert reasons == {
        "small.png": "it has 31x64 pixels, its shorter side needs 32",
        "large.png": "it has 200x64 pixels, images.max_pixels is 6000",
    }


def test_too_many_failures_commit_nothing_and_name_the_first_two(
    folder: Path, store: LocalStore
) -> None:
    for name in ("x.jpg", "y.jpg", "z.jpg"):
        (folder / name).write_bytes(b"")
    with pytest.raises(PipelineError, match=r"3 of the 15 image files") as caught:
        prepare_images(crops(folder), store)
    assert "(x.jpg: it is empty; y.jpg: it is empty)" in str(caught.value)
    assert "images.max_failure_ratio, which is 0.05" in str(caught.value)
    assert not list(store.list())
    assert prepare_images(crops(folder, max_failure_ratio=0.2), store).summary["failed"] == 3


def test_of_identical_files_the_lowest_key_stays(folder: Path, store: LocalStore) -> None:
    (folder / "copy.png").write_bytes((folder / "trip 0/0.png").read_bytes())
    ref = prepare_images(crops(folder), store)
    assert (ref.summary["photographs"], ref.summary["duplicates"]) == (12, 1)
    (row,) = table(store, ref, "duplicates")
    assert (row["key"], row["kept"]) == ("trip 0/0.png", "copy.png")
    kept = prepare_images(crops(folder, dedupe="off"), store)
    assert (kept.summary["photographs"], kept.summary["duplicates"]) == (13, 0)


def test_split_folders_are_the_splits_and_what_lies_outside_is_ignored(
    tmp_path: Path, store: LocalStore
) -> None:
    for number, place in enumerate(["train/a", "train/b", "train/c", "val/d", "test/e", "other/f"]):
        photograph(tmp_path / f"photos/{place}.png", number)
    ref = prepare_images(crops(tmp_path / "photos"), store)
    counts = {split: figures["samples"] for split, figures in ref.summary["splits"].items()}
    assert counts == {"train": 3, "val": 1, "test": 1}
    assert ref.summary["ignored"] == 1
    ((_, files),) = samples(store, ref, "test")
    assert json.loads(files["json"])["relative_key"] == "test/e.png"


def test_every_listed_file_is_in_sources_and_in_exactly_one_place(
    folder: Path, store: LocalStore
) -> None:
    (folder / "a.txt").write_text("text")
    (folder / "b.jpg").write_text("text")
    (folder / "trip 0/copy.png").write_bytes((folder / "trip 0/0.png").read_bytes())
    ref = prepare_images(crops(folder), store)
    listed = [row["key"] for row in table(store, ref, "sources")]
    used = [
        json.loads(files["json"])["relative_key"]
        for split in ("train", "val", "test")
        for _, files in samples(store, ref, split)
    ]
    rest = [row["key"] for name in ("failures", "duplicates") for row in table(store, ref, name)]
    assert sorted(used + rest) == listed
    assert len(listed) == 15


def test_files_that_tell_of_this_machine_are_no_content(folder: Path, store: LocalStore) -> None:
    ref = prepare_images(crops(folder), store)
    counted = content(store, ref)
    assert not {"sources.parquet", "config.json"} & set(counted)
    assert {"train-000000.tar", "train-000000.parquet", "train.urls"} <= set(counted)
    saved = json.loads(store.read(f"{ref.folder}/config.json"))
    assert ImagesConfig(**saved) == crops(folder)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (["a.txt", "b"], "holds no image file"),
        (["a.jpg", "b.jpg"], r"none of the 2 image files in .* is usable: a\.jpg: it is"),
        (["a.jpg"], r"none of the 1 image files in .* is usable: a\.jpg: it is"),
    ],
)
def test_a_folder_without_a_usable_photograph_is_told_in_one_sentence(
    tmp_path: Path, store: LocalStore, names: list[str], sentence: str
) -> None:
    for name in names:
        (tmp_path / "photos").mkdir(exist_ok=True)
        (tmp_path / "photos" / name).write_text("no image")
    with pytest.raises(PipelineError, match=sentence):
        prepare_images(crops(tmp_path / "photos"), store)


def test_two_photographs_are_too_few(tmp_path: Path, store: LocalStore) -> None:
    for number in range(2):
        photograph(tmp_path / f"photos/{number}.png", number)
    with pytest.raises(PipelineError, match="2 usable photographs in all, too few: at least 3"):
        prepare_images(crops(tmp_path / "photos"), store)


def test_a_photograph_that_changes_while_it_is_prepared_stops_the_stage(
    folder: Path, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_shards, "read_item", lambda item: read_item(item) + b"more")
    with pytest.raises(PipelineError, match="changed while it was prepared"):
        prepare_images(crops(folder), store)


def test_most_tiles_of_one_photograph_can_be_bounded(folder: Path, store: LocalStore) -> None:
    ref = prepare_images(tiles(folder, max_tiles=5), store)
    assert sum(figures["samples"] for figures in ref.summary["splits"].values()) == 60


def test_only_options_that_change_the_output_are_in_the_digest(folder: Path) -> None:
    plain = crops(folder).settings()
    same: dict[str, Any] = {
        "workers": 2,
        "max_failure_ratio": 0.5,
        "name": "other",
        "tile": [64],
        "max_tiles": 3,
    }
    assert crops(folder, **same).settings() == plain
    other: list[dict[str, Any]] = [
        {"size": 64},
        {"quality": 80},
        {"val": 0.1},
        {"min_side": 40},
        {"dedupe": "off"},
    ]
    assert all(crops(folder, **option).settings() != plain for option in other)
    assert (
        crops(folder, format="png", quality=3).settings() == crops(folder, format="png").settings()
    )
    assert tiles(folder, tile=[48, 32, 48]).settings() == tiles(folder).settings()


@pytest.mark.parametrize(
    "options",
    [
        {"sise": 64},
        {"size": 0},
        {"tile": []},
        {"tile": [4]},
        {"val": 0.4, "test": 0.4},
        {"name": "../x"},
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ImagesConfig(**{"source": "photos", **options})


def test_one_tile_side_may_be_given_as_a_number() -> None:
    assert ImagesConfig(source=Path("photos"), tile=128).tile == (128,)  # type: ignore[arg-type]
