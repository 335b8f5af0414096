import io
import itertools
import json
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image
from pydantic import ValidationError

from data_prep.core.errors import ConfigError, PipelineError, StorageError
from data_prep.core.stage import MANIFEST, Request, StageRef
from data_prep.core.storage.local import LocalStore
from data_prep.masks import stage as masks_module
from data_prep.masks.codec import _unpacked, encode_png, valid_from_png
from data_prep.masks.plan import (
    BINS,
    Candidate,
    border_counts,
    fill_bins,
    pick_recipe,
    ratio_bin,
    recipes_by_bin,
    split_seed,
    touches_border,
    training_mask,
)
from data_prep.masks.recipes import RECIPES, draw, hole_ratio
from data_prep.masks.settings import MasksSettings
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


# Config


@pytest.mark.parametrize("field", ["recipes", "eval_recipes"])
def test_an_unknown_recipe_is_an_error_that_lists_the_known_ones(field: str) -> None:
    with pytest.raises(ConfigError, match=f"masks.{field}: 'squiggle'.*free-form.*outpaint"):
        MasksSettings(**{field: {"free-form": 1, "squiggle": 1}})


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_that_is_not_above_0_is_an_error(weight: float) -> None:
    with pytest.raises(ConfigError, match=r"masks\.recipes\.box is"):
        MasksSettings(recipes={"box": weight})


def test_no_recipe_at_all_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"masks\.recipes is empty"):
        MasksSettings(recipes={})


@pytest.mark.parametrize(
    "wrong", [{"sise": 64}, {"size": 8}, {"train": 0}, {"name": "../up"}, {"name": ""}]
)
def test_a_misspelt_key_or_a_value_out_of_range_is_an_error(wrong: dict) -> None:
    with pytest.raises(ValidationError):
        MasksSettings(**wrong)


# Encoding and measures


def test_a_mask_is_stored_with_white_holes_and_read_as_1_for_known() -> None:
    hole = np.zeros((17, 17), np.uint8)
    hole[2:5, 3:11] = 255
    png = encode_png(hole)
    picture = Image.open(io.BytesIO(png))
    assert picture.mode == "1"
    assert (np.asarray(picture.convert("L")) == hole).all()
    valid = valid_from_png(png)
    assert valid.dtype == np.uint8
    assert (valid == (hole == 0)).all()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


ADAM7 = [
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
]


def png_of(
    hole: np.ndarray, *, filtered: bool = False, interlaced: bool = False, parts: int = 1
) -> bytes:
    """A 1-bit PNG as another program may write it."""
    lines = b""
    for top, left, down, right in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        part = hole[top::down, left::right]
        for row in np.packbits(part > 0, axis=1) if part.size else []:
            if filtered:  # each byte less the one before
                row = np.diff(row, prepend=np.uint8(0))
            lines += bytes([filtered]) + row.tobytes()
    packed = zlib.compress(lines)
    header = struct.pack(">IIBBBBB", hole.shape[1], hole.shape[0], 1, 0, 0, 0, interlaced)
    cuts = [len(packed) * number // parts for number in range(parts + 1)]
    pixels = b"".join(chunk(b"IDAT", packed[a:b]) for a, b in itertools.pairwise(cuts))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def with_pillow(data: bytes) -> np.ndarray:
    return (np.asarray(Image.open(io.BytesIO(data)).convert("L")) < 128).astype(np.uint8)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_mask_of_our_own_is_unpacked_as_a_general_reader_reads_it(recipe: str) -> None:
    for index, size in enumerate([*range(16, 34), 63, 64, 65, 100, 256]):
        hole = draw(recipe, 0, index, size)
        png = encode_png(hole)
        unpacked = _unpacked(png)
        assert unpacked is not None
        assert unpacked.dtype == np.uint8
        assert (unpacked == (hole == 0)).all()
        assert (unpacked == with_pillow(png)).all()
        assert (valid_from_png(png) == unpacked).all()


@pytest.mark.parametrize(
    ("how", "unpacked"),
    [
        ({}, True),
        ({"filtered": True}, False),
        ({"interlaced": True}, False),
        ({"parts": 2}, False),
        ({"parts": 5}, False),
    ],
)
@pytest.mark.parametrize("size", [17, 64])
def test_a_png_that_another_program_wrote_is_read_too(how: dict, unpacked: bool, size: int) -> None:
    hole = draw("free-form", 1, 2, size)
    png = png_of(hole, **how)
    assert (_unpacked(png) is not None) == unpacked
    assert (valid_from_png(png) == (hole == 0)).all()
    assert (with_pillow(png) == (hole == 0)).all()


def test_gray_values_from_128_up_are_holes() -> None:
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    file = io.BytesIO()
    Image.fromarray(gray).save(file, "PNG")
    assert (valid_from_png(file.getvalue()) == (gray < 128)).all()


def test_a_mask_with_any_bit_flipped_is_the_same_mask_or_an_error() -> None:
    hole = draw("strokes", 0, 0, 32)
    png = encode_png(hole)
    refused = 0
    for at in range(8 * len(png)):
        if at // 8 in (33, 34):
            continue  # a length of gigabytes, for which the general reader takes memory: slow
        altered = bytearray(png)
        altered[at // 8] ^= 1 << at % 8
        try:
            valid = valid_from_png(bytes(altered))
        except PipelineError:
            refused += 1
        else:
            assert (valid == (hole == 0)).all()
    assert refused > 8 * (len(png) - 30)  # what is not: check sums, the end mark


def test_a_mask_that_was_cut_short_is_an_error() -> None:
    png = encode_png(draw("strokes", 0, 0, 32))
    for length in range(len(png) - 12):  # the end mark has nothing to say
        with pytest.raises(PipelineError, match="not a readable PNG"):
            valid_from_png(png[:length])
    short = png_of(np.zeros((15, 16), np.uint8))
    longer = short.replace(struct.pack(">II", 16, 15), struct.pack(">II", 16, 16))
    assert _unpacked(longer) is None  # fewer pixels than it says


@pytest.mark.parametrize("data", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_no_picture_are_an_error(data: bytes) -> None:
    with pytest.raises(PipelineError, match="not a readable PNG"):
        valid_from_png(data)


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.0, None),
        (0.01, None),
        (0.0101, "0.01-0.10"),
        (0.1, "0.01-0.10"),
        (0.1001, "0.10-0.20"),
        (0.25, "0.20-0.30"),
        (0.5, "0.40-0.50"),
        (0.6, "0.50-0.60"),
        (0.6001, None),
        (1.0, None),
    ],
)
def test_a_bin_holds_its_upper_end_and_not_its_lower(ratio: float, expected: str | None) -> None:
    assert ratio_bin(ratio) == expected


@pytest.mark.parametrize(
    ("size", "y", "x", "expected"),
    [
        (512, 50, 50, False),
        (512, 49, 256, True),
        (512, 256, 462, True),
        (512, 461, 461, False),
        (256, 25, 25, False),
        (256, 24, 128, True),
        (256, 128, 231, True),
    ],
)
def test_the_border_is_50_pixels_wide_at_512(size: int, y: int, x: int, expected: bool) -> None:
    mask = np.zeros((size, size), np.uint8)
    mask[y, x] = 255
    assert touches_border(mask) is expected


# Plans


def candidates(ratios: list[float]) -> list[Candidate]:
    return [Candidate("box", 0, index, ratio, False) for index, ratio in enumerate(ratios)]


@pytest.mark.parametrize(
    ("ratios", "per_bin", "max_attempts", "kept", "used"),
    [
        ([0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.05], 1, 9, [[0], [1], [2], [3], [4], [5]], 6),
        ([0.25, 0.25, 0.25, 0.25, 0.25], 2, 3, [[], [], [0, 1], [], [], []], 3),
        ([0.0, 0.7, 0.0], 1, 2, [[], [], [], [], [], []], 2),
        ([0.05, 0.25, 0.05, 0.25, 0.05, 0.05], 2, 3, [[0, 2], [], [1, 3], [], [], []], 4),
        ([0.05, 0.25, 0.25, 0.25, 0.05], 2, 3, [[0], [], [1, 2], [], [], []], 4),
    ],
)
def test_bins_are_filled_in_order_until_full_or_given_up(
    ratios: list[float], per_bin: int, max_attempts: int, kept: list[list[int]], used: int
) -> None:
    stream = iter(candidates(ratios))
    filled = fill_bins(stream, per_bin, max_attempts)
    assert [[c.index for c in found] for found in filled.values()] == kept
    assert len(list(stream)) == len(ratios) - used


@pytest.mark.parametrize(
    ("border", "kept"), [("any", [0, 1]), ("inside", [0, 2]), ("touching", [1, 3])]
)
def test_bins_can_hold_masks_clear_of_the_border_alone_or_at_it_alone(
    border: str, kept: list[int]
) -> None:
    drawn = [Candidate("box", 0, index, 0.25, index % 2 == 1) for index in range(6)]
    filled = fill_bins(drawn, 2, 9, border)  # type: ignore[arg-type]
    assert [candidate.index for candidate in filled["0.20-0.30"]] == kept
    counts = {"inside": sum(i % 2 == 0 for i in kept), "touching": sum(i % 2 for i in kept)}
    assert border_counts(filled)["0.20-0.30"] == counts


def test_advice_on_a_bin_heeds_the_border() -> None:
    inside = recipes_by_bin(64, "inside")
    assert "box" in inside["0.20-0.30"]
    assert not {"half", "outpaint"} & {recipe for found in inside.values() for recipe in found}
    assert "half" in recipes_by_bin(64, "touching")["0.40-0.50"]


def test_recipes_are_picked_by_weight_whatever_their_order() -> None:
    weights = {"strokes": 3.0, "box": 1.0}
    picks = [pick_recipe(weights, 1, n) for n in range(2000)]
    assert 0.72 < Counter(picks)["strokes"] / 2000 < 0.78
    assert picks == [pick_recipe({"box": 1.0, "strokes": 3.0}, 1, n) for n in range(2000)]
    assert picks != [pick_recipe(weights, 2, n) for n in range(2000)]


def test_a_training_mask_is_redrawn_with_the_same_recipe_until_it_lies_in_a_bin() -> None:
    weights = {"strokes": 1.0, "box": 1.0}
    redrawn = 0
    for number in range(60):
        candidate, mask = training_mask(weights, 3, number, 32)
        assert candidate.recipe == pick_recipe(weights, 3, number)
        assert ratio_bin(hole_ratio(mask)) == ratio_bin(candidate.ratio) is not None
        assert candidate.index % 2**32 == number
        redrawn += candidate.index != number
    assert redrawn > 5


def test_train_and_eval_draw_from_different_streams() -> None:
    assert split_seed(0, "train") != split_seed(0, "eval")
    assert split_seed(0, "train") != split_seed(1, "train")
    assert max(split_seed(s, "eval") for s in range(100)) < 2**52


@pytest.mark.parametrize("size", [16, 64, 256])
def test_every_bin_has_a_recipe_that_fills_it(size: int) -> None:
    advice = recipes_by_bin(size)
    assert list(advice) == list(BINS)
    assert all(advice.values())
    assert "box" in advice["0.20-0.30"]
    assert "half" in advice["0.40-0.50"]
    assert not {"box", "half", "lama-thin", "lama-medium"} & set(advice["0.50-0.60"])


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
def test_a_row_says_what_the_stored_mask_is(store: LocalStore, split: str) -> None:
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


def test_a_mask_is_one_range_read_of_its_shard(store: LocalStore) -> None:
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


def test_evaluation_masks_can_have_recipes_of_their_own(store: LocalStore) -> None:
    config = SMALL.model_copy(update={"recipes": {"box": 1.0}, "eval_recipes": {"outpaint": 1.0}})
    ref = prepare_masks(config, store)
    assert {row["recipe"] for row in rows_of(store, ref, "train")} == {"box"}
    assert {row["recipe"] for row in rows_of(store, ref, "eval")} == {"outpaint"}


@pytest.mark.parametrize("border", ["inside", "touching"])
def test_evaluation_masks_can_be_asked_to_keep_clear_of_the_border_or_to_touch_it(
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


def test_what_is_asked_for_without_new_options_has_the_digest_that_it_had() -> None:
    # Of the version before `eval_border` and mask files: sets that are there are not made again.
    request = Request("masks", "mixed", "masks/mixed", MasksSettings().request_settings(None))
    assert request.digest.startswith("f88754fb0bb6")


def test_more_training_masks_begin_with_the_same_ones(store: LocalStore) -> None:
    few = samples_of(store, prepare_masks(SMALL, store), "train")
    more = prepare_masks(SMALL.model_copy(update={"train": 70}), store)
    assert samples_of(store, more, "train")[:50] == few


def test_the_same_config_gives_the_same_bytes_in_any_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, together = LocalStore(tmp_path / "a"), LocalStore(tmp_path / "b")
    first = prepare_masks(SMALL.model_copy(update={"workers": 1}), alone)
    monkeypatch.setattr(masks_module, "POOL_MASKS", 0)
    second = prepare_masks(SMALL.model_copy(update={"workers": 2}), together)
    assert first.request_digest == second.request_digest
    assert first.content_digest == second.content_digest
    assert contents(alone, first) == contents(together, second)


def test_a_second_call_is_skipped_and_another_seed_is_other_work(store: LocalStore) -> None:
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
    """Refuses to write after `left` objects."""

    left = 5

    def write(self, key: str, data: bytes) -> None:
        if self.left == 0:
            raise StorageError(f"cannot use {key}: the disk is full.")
        self.left -= 1
        super().write(key, data)


def test_finished_shards_are_taken_up_and_damaged_ones_made_again(tmp_path: Path) -> None:
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
    ref = prepare_masks(SMALL, store)
    assert not ref.skipped
    assert kept.stat().st_mtime_ns == before
    assert contents(store, ref) == contents(expected_store, expected)


def test_a_bin_that_cannot_be_filled_is_left_out_and_said(
    store: LocalStore, capsys: pytest.CaptureFixture[str]
) -> None:
    config = SMALL.model_copy(update={"recipes": {"box": 1.0, "half": 1.0}, "max_attempts": 100})
    ref = prepare_masks(config, store)
    assert ref.summary["bins"] == {"0.20-0.30": 4, "0.40-0.50": 4}
    assert ref.summary["unreachable"] == ["0.01-0.10", "0.10-0.20", "0.30-0.40", "0.50-0.60"]
    assert ref.summary["splits"]["eval"]["samples"] == 8
    assert len(rows_of(store, ref, "eval")) == 8
    note = ref.summary["notes"][-1]
    assert "0.50-0.60" in note
    assert "strokes" in note
    assert note in capsys.readouterr().err


def test_no_bin_that_can_be_filled_is_an_error_and_nothing_is_left(store: LocalStore) -> None:
    config = SMALL.model_copy(update={"eval_recipes": {"strokes": 1.0}, "max_attempts": 1})
    with pytest.raises(ConfigError, match=r"masks\.eval_recipes: strokes cannot fill"):
        prepare_masks(config, store)
    assert not list(store.list())


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_alone_makes_a_set(store: LocalStore, recipe: str) -> None:
    config = SMALL.model_copy(update={"recipes": {recipe: 1.0}, "eval_recipes": SMALL.recipes})
    rows = rows_of(store, prepare_masks(config, store), "train")
    assert [row["recipe"] for row in rows] == [recipe] * 50


def test_importing_the_stage_is_cheap() -> None:
    code = (
        "import sys, data_prep.masks.stage; print({'numpy', 'cv2', 'pyarrow'} & set(sys.modules))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
