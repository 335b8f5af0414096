"""The figures and text of `inspect` and `log` for prepared images and masks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_root
from PIL import Image

from data_prep.core.errors import PipelineError
from data_prep.core.storage.local import LocalStore
from data_prep.images.settings import ImagesSettings
from data_prep.images.stage import prepare_images
from data_prep.inspection import inspect as inspection
from data_prep.inspection.contact_sheet import PER_SPLIT, image_sheet, tars_for
from data_prep.inspection.find_set import committed, find_set
from data_prep.inspection.inspect import COUNTS, inspect_images, inspect_masks, log_images
from data_prep.inspection.text import images_text, log_text, masks_text
from data_prep.masks.settings import MasksSettings
from data_prep.masks.stage import prepare_masks


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalStore, list[str], str]:
    """Make a root with three versions of images and a set of masks; return their folders.

    The second version adds to the first; the third has other settings.
    """
    top = tmp_path_factory.mktemp("built")
    store, photos = LocalStore(top / "root"), small_root.photographs(top / "photos", 40)
    (photos / "notes.txt").write_text("not a photo")
    (photos / "broken.png").write_bytes((photos / "00.png").read_bytes()[:300])
    (photos / "empty.png").write_bytes(b"")
    shutil.copyfile(photos / "01.png", photos / "copy.png")
    Image.new("RGB", (700, 520), (200, 30, 30)).save(photos / "red.jpg")
    config = ImagesSettings(
        source=str(photos), name="small", size=32, shard_samples=4, val=0.2, test=0.2
    )
    config = config.model_copy(update={"max_failure_ratio": 0.2})
    folders = [prepare_images(config, store).folder]
    for number in range(3):
        Image.new("RGB", (90, 80), (0, 60 * number, 200)).save(photos / f"new{number}.png")
    (photos / "02.png").unlink()
    folders.append(prepare_images(config, store).folder)
    folders.append(prepare_images(config.model_copy(update={"size": 40}), store).folder)
    masks = MasksSettings(name="small", size=32, train=10, eval_per_bin=3, shard_samples=5)
    return store, folders, prepare_masks(masks, store).folder


@pytest.fixture
def store(built: tuple[LocalStore, list[str], str]) -> LocalStore:
    return built[0]


@pytest.fixture
def folders(built: tuple[LocalStore, list[str], str]) -> list[str]:
    return built[1]


def test_a_version_is_shown_with_its_counts_failures_sides_and_formats(
    store: LocalStore, folders: list[str]
) -> None:
    found = json.loads(json.dumps(inspect_images(store, folders[0])))
    items = found["items"]
    assert items["listed"] == 45
    assert (items["photographs"], items["failed"]) == (41, 2)
    assert (items["ignored"], items["duplicates"]) == (1, 1)
    assert sum(split["samples"] for split in found["splits"].values()) == 41
    tars = [entry for entry in store.list(folders[0]) if entry.key.endswith(".tar")]
    assert sum(split["bytes"] for split in found["splits"].values()) == sum(t.size for t in tars)
    assert sum(split["shards"] for split in found["splits"].values()) == len(tars)
    assert found["sides"] == [[32, 64, 40], [512, 768, 1]]
    assert found["formats"] == {"PNG": 40, "JPEG": 1}
    assert {reason["first"] for reason in found["reasons"]} == {"broken.png", "empty.png"}
    assert (found["version"], found["parent"]) == (1, None)


def test_bytes_of_inherited_shards_are_counted(store: LocalStore, folders: list[str]) -> None:
    found = inspect_images(store, folders[1])
    assert found["parent"] == folders[0].rpartition("/")[2]
    sizes = {entry.key: entry.size for entry in store.list("images")}
    lines = [
        f"images/small/{line.removeprefix('../')}"
        if line.startswith("..")
        else f"{folders[1]}/{line}"
        for split in found["splits"]
        for line in store.read(f"{folders[1]}/{split}.urls").decode().split()
    ]
    assert sum(split["bytes"] for split in found["splits"].values()) == sum(
        sizes[line] for line in lines
    )


def test_the_text_of_a_version_fits_a_terminal(store: LocalStore, folders: list[str]) -> None:
    text = images_text(inspect_images(store, folders[0]))
    assert max(map(len, text.splitlines())) <= 100
    assert "45 listed, 41 photos, 2 failed, 1 ignored, 1 duplicates" in text
    assert "40 PNG, 1 JPEG" in text
    assert "32-63          40 ####" in text
    assert "(first 'broken.png')" in text


def test_reasons_that_differ_only_in_numbers_are_counted_together(
    store: LocalStore, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons = ["it has 3x5 pixels", "it has 12x5 pixels", "it is truncated", None]
    batch = {"key": ["a", "b", "c", "d"], "kind": ["failed"] * 3 + ["ignored"], "reason": reasons}
    monkeypatch.setattr(inspection, "_table", lambda *_: iter([batch]))
    assert inspection._reasons(store, folders[0]) == [
        {"reason": "it has #x# pixels", "items": 2, "first": "a"},
        {"reason": "it is truncated", "items": 1, "first": "c"},
    ]


def test_masks_are_shown_by_bin_and_recipe(built: tuple[LocalStore, list[str], str]) -> None:
    store, _, folder = built
    found = json.loads(json.dumps(inspect_masks(store, folder)))
    assert {
        name: sum(own.values()) for name, own in found["bins"]["eval"].items()
    } == dict.fromkeys(found["bins"]["eval"], 3)
    assert sum(sum(own.values()) for own in found["bins"]["train"].values()) == 10
    recipes = {recipe for own in found["bins"]["eval"].values() for recipe in own}
    assert recipes <= {"free-form", "strokes"}
    text = masks_text(found)
    assert "train    10 masks in 2 shards" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_contact_sheet_has_images_of_every_split_and_is_the_same_every_time(
    store: LocalStore, folders: list[str]
) -> None:
    sheet = np.asarray(image_sheet(store, folders[1]))
    assert np.array_equal(sheet, np.asarray(image_sheet(store, folders[1])))
    coloured = (sheet.max(axis=2).astype(int) - sheet.min(axis=2) > 40).any(axis=1)
    bands = np.diff(np.flatnonzero(np.diff(coloured.astype(int)) == 1)).size + 1
    assert bands >= 3
    assert sheet.shape[1] <= 1300


def test_a_contact_sheet_reads_samples_not_whole_shards(
    store: LocalStore, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(self: LocalStore, key: str) -> bytes:
        assert not key.endswith(".tar"), f"{key} was read whole"
        return real(self, key)

    real = LocalStore.read
    monkeypatch.setattr(LocalStore, "read", refused)
    image_sheet(store, folders[0])


def test_images_are_spread_over_the_shards() -> None:
    many = tars_for([str(number) for number in range(1000)])
    assert len(many) == PER_SPLIT
    assert {number for _, number in many} == {1}
    assert tars_for(["a", "b"]) == [("a", 18), ("b", 18)]
    assert tars_for([]) == []


def test_a_damaged_sample_is_reported_with_advice(
    store: LocalStore, folders: list[str], tmp_path: Path
) -> None:
    shutil.copytree(store.folder, tmp_path / "copy")
    copy = LocalStore(tmp_path / "copy")
    tar = f"{folders[0]}/train-000000.tar"
    copy.write(tar, bytes(len(copy.read(tar))))
    with pytest.raises(PipelineError, match=r"sample .* cannot be decoded: run `dpnet verify`"):
        image_sheet(copy, folders[0])
    copy.write(f"{folders[0]}/train-000000.parquet", b"not a parquet file")
    with pytest.raises(PipelineError, match=r"the index of .* cannot be decoded: run `dpnet"):
        image_sheet(copy, folders[0])
    copy.write(f"{folders[0]}/sources.parquet", b"not a parquet file")
    with pytest.raises(PipelineError, match=r"sources.parquet cannot be read .* `dpnet verify`"):
        inspect_images(copy, folders[0])


def test_a_set_is_found_by_folder_uri_manifest_and_name(
    store: LocalStore, folders: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, root = store.folder / folders[0], str(store.folder)
    for what in (str(path), f"{path}/", path.as_uri(), f"{path}/manifest.json"):
        found, folder = find_set("images", what, "/nowhere")
        assert (found.uri, folder) == (store.uri, folders[0])
    assert find_set("images", "small", root)[1] == folders[2]
    assert find_set("masks", "small", root)[1].startswith("masks/small/")
    monkeypatch.chdir(path.parent)
    assert find_set("images", path.name, "/nowhere")[1] == folders[0]


@pytest.mark.parametrize("what", ["images/small", "nosuch/folder", ".", "s", "../small"])
def test_a_place_without_a_set_is_refused_with_advice(
    store: LocalStore, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(store.folder)
    with pytest.raises(PipelineError, match=r"is not a folder of prepared images|it has small"):
        find_set("images", what, str(store.folder))


def test_a_folder_of_masks_is_not_a_set_of_images(built: tuple[LocalStore, list[str], str]) -> None:
    store, _, masks = built
    with pytest.raises(PipelineError, match="is not a folder of prepared images"):
        find_set("images", str(store.folder / masks), "")


def test_the_log_has_the_changes_and_the_parent_of_each_version(
    store: LocalStore, folders: list[str]
) -> None:
    first, second, third = json.loads(json.dumps(log_images(store, "small")))
    digests = [folder.rpartition("/")[2] for folder in folders]
    assert [v["digest"] for v in (first, second, third)] == digests
    assert [v["version"] for v in (first, second, third)] == [1, 2, 3]
    assert [v["parent"] for v in (first, second, third)] == [None, digests[0], None]
    assert (second["added"], second["removed"], second["changed"]) == (3, 1, 0)
    assert (first["listed"], second["listed"]) == (45, 47)
    assert [(v["failed"], v["ignored"]) for v in (first, second)] == [(2, 1), (2, 1)]
    assert second["shards_inherited"] > 0
    assert second["shards_written"] > 0
    assert (first["shards_inherited"], third["shards_inherited"]) == (0, 0)
    assert first["other_settings"] == second["other_settings"] == []
    assert "size" in third["other_settings"]
    assert sum(second["splits"].values()) == 43


def test_the_log_is_a_table_with_a_line_for_each_version(
    store: LocalStore, folders: list[str]
) -> None:
    head, *lines = log_text(log_images(store, "small")).splitlines()
    assert head.split()[:3] == ["version", "digest", "date"]
    assert head.split()[3:9] == ["listed", "added", "removed", "changed", "failed", "ignored"]
    assert len(lines) == 3
    assert lines[1].endswith(folders[0].rpartition("/")[2])
    assert "(other " in lines[2]
    assert "_side" not in "".join(lines)


@pytest.mark.parametrize("options", [{"min_side": 40}, {"mode": "tiles"}, {"mode": "keep"}])
def test_the_log_names_settings_as_the_user_writes_them_or_in_words(
    options: dict[str, Any],
) -> None:
    requested = ImagesSettings(source="x", near_duplicates="drop", **options).request_settings()
    row = {"version": 1, "digest": "0", "created": "2026", "splits": {}, "parent": None}
    row |= {"shards_written": 1, "shards_inherited": 0, **dict.fromkeys(COUNTS, 1)}
    for name in requested:
        line = log_text([{**row, "other_settings": [name]}]).splitlines()[1]
        shown = line.partition("(other ")[2].rstrip(")")
        if name in ImagesSettings.model_fields:
            assert shown == name
        else:
            assert shown.count(" ") >= 2  # words
    assert log_text([{**row, "other_settings": ["needed_side", "size"]}]).endswith("(other size)")


def test_an_unknown_name_is_refused_with_the_known_names(store: LocalStore, tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match=r"has no images named 'other': it has small\."):
        log_images(store, "other")
    with pytest.raises(PipelineError, match=r"has no masks named 'other': it has none yet\."):
        committed(LocalStore(tmp_path), "masks", "other")
    with pytest.raises(PipelineError, match=r"'\.\./x' is not a name of images"):
        log_images(store, "../x")
