"""The masks stage: settings, committed sets, and resuming."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import webdataset
from pydantic import ValidationError
from resumed_counts import record_resumed

from data_prep.core.errors import ConfigError, StorageError
from data_prep.core.manifest import StageRef
from data_prep.core.paths import MANIFEST
from data_prep.core.stage import Request
from data_prep.core.storage.local import LocalStore
from data_prep.masks import stage as masks_module
from data_prep.masks.codec import valid_from_png
from data_prep.masks.plan import (
    BINS,
    ratio_bin,
    split_seed,
    touches_border,
)
from data_prep.masks.recipes import RECIPES, draw
from data_prep.masks.settings import MasksSettings
from data_prep.masks.shard_task import evaluation_notes
from data_prep.masks.stage import prepare_masks
from data_prep.shards.shards import iterate_shard, read_index, split_shards

SMALL = MasksSettings(name="small", size=32, train=50, eval_per_bin=4, shard_samples=20)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def rows_of(store: LocalStore, ref: StageRef, split: str) -> list[dict]:
    return [row for tar in split_shards(store, ref.folder, split) for row in read_index(store, tar)]


def samples_of(store: LocalStore, ref: StageRef, split: str) -> list[tuple[str, dict[str, bytes]]]:
    return [s for tar in split_shards(store, ref.folder, split) for s in iterate_shard(store, tar)]


def contents(store: LocalStore, ref: StageRef) -> dict[str, bytes]:
    keys = [entry.key for entry in store.list(ref.folder)]
    return {key: store.read(key) for key in keys if not key.endswith(MANIFEST)}


# Settings


@pytest.mark.parametrize("field", ["recipes", "eval_recipes"])
def test_an_unknown_recipe_is_an_error_that_lists_the_known_ones(field: str) -> None:
    with pytest.raises(ConfigError, match=f"masks.{field}: 'squiggle'.*free-form.*outpaint"):
        MasksSettings(**{field: {"free-form": 1, "squiggle": 1}})


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_not_above_0_is_an_error(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"masks\.recipes\.box is"):
        MasksSettings(recipes={"box": weight})


def test_no_recipe_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"masks\.recipes is empty"):
        MasksSettings(recipes={})


@pytest.mark.parametrize(
    "wrong", [{"sise": 64}, {"size": 8}, {"train": 0}, {"name": "../up"}, {"name": ""}]
)
def test_a_wrong_option_name_or_value_is_an_error(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        MasksSettings(**wrong)


# The stage


def test_every_bin_gets_the_same_number_of_evaluation_masks(store: LocalStore) -> None:
    ref = prepare_masks(SMALL, store)
    rows = rows_of(store, ref, "eval")
    touching = Counter(row["ratio_bin"] for row in rows if row["touches_border"])
    assert ref.summary == {
        "splits": {"train": {"samples": 50, "shards": 3}, "eval": {"samples": 24, "shards": 2}},
        "bins": dict.fromkeys(BINS, 4),
        "borders": {b: {"inside": 4 - touching[b], "touching": touching[b]} for b in BINS},
        "unreachable": [],
        "notes": [],
    }
    assert [row["ratio_bin"] for row in rows] == [name for name in BINS for _ in range(4)]
    for name in BINS:
        indices = [row["index"] for row in rows if row["ratio_bin"] == name]
        assert indices == sorted(indices)


@pytest.mark.parametrize("split", ["train", "eval"])
def test_a_row_describes_the_stored_mask(store: LocalStore, split: str) -> None:
    ref = prepare_masks(SMALL, store)
    rows, samples = rows_of(store, ref, split), samples_of(store, ref, split)
    assert len(rows) == len(samples) == ref.summary["splits"][split]["samples"]
    for row, (key, files) in zip(rows, samples, strict=True):
        valid = valid_from_png(files["png"])
        redrawn = draw(row["recipe"], row["seed"], row["index"], SMALL.size)
        assert row["key"] == key
        assert (valid == (redrawn == 0)).all()
        assert (row["width"], row["height"]) == (32, 32)
        assert row["hole_ratio"] == pytest.approx(1 - valid.mean())
        assert row["ratio_bin"] == ratio_bin(row["hole_ratio"])
        assert row["touches_border"] == touches_border(redrawn)
        sidecar = json.loads(files["json"])
        assert sidecar == {name: row[name] for name in sidecar}
        assert {"hole_ratio", "ratio_bin", "recipe", "seed", "touches_border"} <= set(sidecar)


def test_one_range_read_gets_a_mask_from_its_shard(store: LocalStore) -> None:
    ref = prepare_masks(SMALL, store)
    tar = split_shards(store, ref.folder, "train")[1]
    row = read_index(store, tar)[3]
    png = store.read_range(tar, row["offset"], row["size"])
    assert (valid_from_png(png) == (draw(row["recipe"], row["seed"], row["index"], 32) == 0)).all()


def test_webdataset_reads_the_shards(store: LocalStore) -> None:
    ref = prepare_masks(SMALL, store)
    tars = [str(store.path(tar)) for tar in split_shards(store, ref.folder, "eval")]
    samples = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert len(samples) == 24
    assert all({"__key__", "png", "json"} <= set(sample) for sample in samples)


def test_splits_share_no_candidate(store: LocalStore) -> None:
    ref = prepare_masks(SMALL, store)
    seeds = {
        split: {row["seed"] for row in rows_of(store, ref, split)} for split in ("train", "eval")
    }
    assert seeds == {
        "train": {split_seed(0, "train")},
        "eval": {split_seed(0, "eval")},
    }


def test_evaluation_masks_can_have_their_own_recipes(store: LocalStore) -> None:
    settings = SMALL.model_copy(update={"recipes": {"box": 1.0}, "eval_recipes": {"outpaint": 1.0}})
    ref = prepare_masks(settings, store)
    assert {row["recipe"] for row in rows_of(store, ref, "train")} == {"box"}
    assert {row["recipe"] for row in rows_of(store, ref, "eval")} == {"outpaint"}


@pytest.mark.parametrize("border", ["inside", "touching"])
def test_evaluation_masks_can_be_limited_to_inside_the_border_or_touching_it(
    store: LocalStore, border: str
) -> None:
    wanted = {"recipes": {"box-random": 1.0}, "eval_border": border, "max_attempts": 300}
    ref = prepare_masks(SMALL.model_copy(update=wanted), store)
    rows = rows_of(store, ref, "eval")
    assert rows
    assert {row["touches_border"] for row in rows} == {border == "touching"}
    assert len({row["touches_border"] for row in rows_of(store, ref, "train")}) == 2
    bins = {"inside": 4 * (border == "inside"), "touching": 4 * (border == "touching")}
    assert all(counts == bins for counts in ref.summary["borders"].values())
    assert prepare_masks(SMALL, store).request_digest != ref.request_digest


def test_without_newer_options_the_request_digest_is_unchanged() -> None:
    # The digest of the version before `eval_border` and mask files: old sets are not made again.
    request = Request("masks", "mixed", "masks/mixed", MasksSettings().request_settings(None))
    assert request.digest.startswith("f88754fb0bb6")


def test_a_larger_training_set_starts_with_the_same_masks(store: LocalStore) -> None:
    few = samples_of(store, prepare_masks(SMALL, store), "train")
    more = prepare_masks(SMALL.model_copy(update={"train": 70}), store)
    assert samples_of(store, more, "train")[:50] == few


def test_the_same_settings_give_the_same_bytes_in_any_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, together = LocalStore(tmp_path / "a"), LocalStore(tmp_path / "b")
    first = prepare_masks(SMALL.model_copy(update={"workers": 1}), alone)
    monkeypatch.setattr(masks_module, "POOL_MASKS", 0)
    second = prepare_masks(SMALL.model_copy(update={"workers": 2}), together)
    assert first.request_digest == second.request_digest
    assert first.content_digest == second.content_digest
    assert contents(alone, first) == contents(together, second)


def test_a_second_call_is_skipped_and_another_seed_makes_another_set(store: LocalStore) -> None:
    first = prepare_masks(SMALL, store)
    again = prepare_masks(SMALL, store)
    other = prepare_masks(SMALL.model_copy(update={"seed": 1}), store)
    assert (first.skipped, again.skipped, other.skipped) == (False, True, False)
    assert again.content_digest == first.content_digest != other.content_digest
    assert first.folder.startswith("masks/small/")


def test_naming_the_default_evaluation_recipes_changes_nothing(store: LocalStore) -> None:
    first = prepare_masks(SMALL, store)
    named = SMALL.model_copy(update={"eval_recipes": dict(SMALL.recipes)})
    assert prepare_masks(named, store).skipped
    assert first.request_digest == prepare_masks(named, store).request_digest


class BreakingStore(LocalStore):
    """A store that refuses to write after `left` objects."""

    left = 5

    def write(self, key: str, data: bytes) -> None:
        if self.left == 0:
            raise StorageError(f"cannot use {key}: the disk is full.")
        self.left -= 1
        super().write(key, data)


def test_finished_shards_are_reused_and_damaged_ones_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected_store = LocalStore(tmp_path / "whole")
    expected = prepare_masks(SMALL, expected_store)
    with pytest.raises(StorageError, match="disk is full"):
        prepare_masks(SMALL, BreakingStore(tmp_path / "broken"))
    store = LocalStore(tmp_path / "broken")
    assert not store.exists(f"{expected.folder}/{MANIFEST}")
    kept = store.path(f"{expected.folder}/train-000000.tar")
    damaged = store.path(f"{expected.folder}/train-000001.tar")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = kept.stat().st_mtime_ns
    resumed = record_resumed(monkeypatch)
    ref = prepare_masks(SMALL, store)
    assert not ref.skipped
    assert resumed["masks"] == 74 - SMALL.shard_samples  # all but the damaged shard
    assert kept.stat().st_mtime_ns == before
    assert contents(store, ref) == contents(expected_store, expected)


def test_a_bin_that_cannot_be_filled_is_left_out_and_reported(
    store: LocalStore, caplog: pytest.LogCaptureFixture
) -> None:
    settings = SMALL.model_copy(update={"recipes": {"box": 1.0, "half": 1.0}, "max_attempts": 100})
    ref = prepare_masks(settings, store)
    assert ref.summary["bins"] == {"0.20-0.30": 4, "0.40-0.50": 4}
    assert ref.summary["unreachable"] == ["0.01-0.10", "0.10-0.20", "0.30-0.40", "0.50-0.60"]
    assert ref.summary["splits"]["eval"]["samples"] == 8
    assert len(rows_of(store, ref, "eval")) == 8
    note = ref.summary["notes"][-1]
    assert "0.50-0.60" in note
    assert "strokes" in note
    assert note in caplog.text


def test_it_is_an_error_if_no_bin_can_be_filled_and_nothing_is_written(store: LocalStore) -> None:
    settings = SMALL.model_copy(update={"eval_recipes": {"strokes": 1.0}, "max_attempts": 1})
    with pytest.raises(ConfigError, match=r"masks\.eval_recipes: strokes cannot fill"):
        prepare_masks(settings, store)
    assert not list(store.list())


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_can_make_a_set_without_others(store: LocalStore, recipe: str) -> None:
    settings = SMALL.model_copy(update={"recipes": {recipe: 1.0}, "eval_recipes": SMALL.recipes})
    rows = rows_of(store, prepare_masks(settings, store), "train")
    assert [row["recipe"] for row in rows] == [recipe] * 50


def test_importing_the_stage_is_cheap() -> None:
    code = (
        "import sys, data_prep.masks.stage; print({'numpy', 'cv2', 'pyarrow'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_the_note_about_a_bin_with_few_masks_says_what_to_change() -> None:
    few, none = evaluation_notes(SMALL, {"0.50-0.60": 3, "0.40-0.50": 0})
    assert "give weight to" in few
    assert "masks.eval_recipes, raise masks.max_attempts, or lower masks.eval_per_bin to 3" in few
    assert "give weight to" in none
    assert "eval_per_bin" not in none
