"""The size of a dataset before it is built, compared with what the stage then makes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from small_root import photographs

from data_prep.core.manifest import StageRef, read_manifest
from data_prep.core.storage.local import LocalStore
from data_prep.images.settings import ImagesSettings
from data_prep.images.stage import prepare_images
from data_prep.images.survey import survey
from data_prep.masks.settings import MasksSettings
from data_prep.masks.shard_task import planned_sizes
from data_prep.masks.stage import prepare_masks
from data_prep.shards.split_size import SplitSize


def settings_of(folder: Path, **more: Any) -> ImagesSettings:
    common: dict[str, Any] = {"name": "small", "size": 32, "shard_samples": 7}
    return ImagesSettings(source=str(folder), **{**common, "val": 0.2, "test": 0.2, **more})


def made(store: LocalStore, ref: StageRef, split: str) -> SplitSize:
    tars = [
        file
        for file in read_manifest(store, ref.folder).files
        if file.path.rpartition("/")[2].startswith(f"{split}-") and file.path.endswith(".tar")
    ]
    return SplitSize(
        sum(tar.samples or 0 for tar in tars), len(tars), sum(tar.size for tar in tars)
    )


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"format": "png", "shard_samples": 100},
        {"mode": "keep"},
        {"mode": "short-side"},
        {"mode": "tiles", "tile": [24, 32], "max_tiles": 3, "shard_samples": 30},
    ],
    ids=["crop", "png", "keep", "short-side", "tiles"],
)
def test_a_survey_of_all_photos_has_the_samples_shards_and_bytes_that_the_stage_makes(
    more: dict[str, Any], tmp_path: Path
) -> None:
    folder, store = photographs(tmp_path / "photos", 30), LocalStore(tmp_path / "root")
    (folder / "broken.png").write_bytes(b"not an image")
    settings = settings_of(folder, **more)
    before = survey(settings, store)
    assert not (tmp_path / "root").exists()
    ref = prepare_images(settings, store)
    assert before.splits == {split: made(store, ref, split) for split in ("train", "val", "test")}
    assert (before.photos, before.looked_at, before.failed) == (31, 31, 1)
    assert before.photo_bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert before.seconds > 0
    assert before.committed is None


def test_a_survey_of_a_part_has_the_shards_of_all_photos_and_nearly_their_bytes(
    tmp_path: Path,
) -> None:
    folder, store = photographs(tmp_path / "photos", 60), LocalStore(tmp_path / "root")
    before = survey(settings_of(folder), store, most=5)
    assert before.looked_at == 15
    ref = prepare_images(settings_of(folder), store)
    for split, size in before.splits.items():
        real = made(store, ref, split)
        assert (size.samples, size.shards) == (real.samples, real.shards)
        assert size.bytes == pytest.approx(real.bytes, rel=0.2)


def test_the_size_of_a_later_version_has_the_shards_that_stay(tmp_path: Path) -> None:
    folder, store = photographs(tmp_path / "photos", 30), LocalStore(tmp_path / "root")
    first = prepare_images(settings_of(folder), store)
    again = survey(settings_of(folder), store)
    assert again.committed is not None
    assert (again.photos, again.looked_at) == (0, 0)
    assert again.splits["train"] == made(store, first, "train")
    for number in range(8):
        shutil.copy(folder / f"{number:02d}.png", folder / f"new{number}.png")
        with (folder / f"new{number}.png").open("ab") as file:  # other bytes, the same pixels
            file.write(bytes([number]))
    before = survey(settings_of(folder), store)
    assert before.photos == 8
    ref = prepare_images(settings_of(folder), store)
    assert ref.summary["added"] == 8
    assert before.splits == {split: made(store, ref, split) for split in ("train", "val", "test")}


def test_the_sizes_of_few_masks_are_those_that_the_stage_makes(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    settings = MasksSettings(train=30, size=64, eval_per_bin=3, shard_samples=8)
    before = planned_sizes(settings, 30)
    ref = prepare_masks(settings, store)
    train, evaluation = made(store, ref, "train"), made(store, ref, "eval")
    assert before["train"] == train
    assert (before["eval"].samples, before["eval"].shards) == (
        evaluation.samples, evaluation.shards,
    )  # fmt: skip
    assert before["eval"].bytes == pytest.approx(evaluation.bytes, rel=0.25)


def test_masks_of_files_are_planned_without_the_files() -> None:
    settings = MasksSettings(
        train=10, size=32, eval_per_bin=1, recipes={"external": 1.0}, external="/no/such/folder"
    )
    assert planned_sizes(settings, 4)["train"].samples == 10
