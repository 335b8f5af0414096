"""Masks from files: reading, polarity, and the recipe external."""

import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import other_formats
import pytest
from numpy.typing import NDArray
from PIL import Image

from data_prep.core.errors import ConfigError, ItemError, PipelineError
from data_prep.core.manifest import StageRef, read_manifest
from data_prep.core.pool import run_tasks
from data_prep.core.storage.local import LocalStore
from data_prep.masks.codec import valid_from_png
from data_prep.masks.external import FilePool, find_polarity
from data_prep.masks.mask_file import Conversion, PackedMask, hole_mask, white_pixels
from data_prep.masks.plan import BINS, split_seed
from data_prep.masks.read_files import MaskFile, Reading, files_digest, load_masks, read_files
from data_prep.masks.recipes import draw, hole_ratio
from data_prep.masks.settings import MasksSettings
from data_prep.masks.stage import prepare_masks
from data_prep.raw.source import open_source
from data_prep.shards.shards import iterate_shard, read_index, split_shards

SIZE = 32
CONFIG = MasksSettings(
    name="files",
    size=SIZE,
    recipes={"box": 1.0},
    eval_recipes={"external": 1.0},
    external="to be set",
    train=4,
    eval_per_bin=4,
    max_attempts=100,
)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make 24 masks with white holes, four in each ratio bin, in two folders."""
    folder = tmp_path / "masks"
    for number, (low, high) in enumerate(BINS.values()):
        for copy in range(4):
            share = low + (high - low) * (copy + 1) / 5
            save(folder / str(copy % 2) / f"{number} {copy}.png", bar(share, 100, copy))
    return folder


def bar(share: float, side: int, turns: int) -> NDArray[np.uint8]:
    """Return a mask with a white block of this share in a corner."""
    block = round(side * share**0.5)
    mask = np.zeros((side, side), np.uint8)
    mask[:block, :block] = 255
    return np.rot90(mask, turns).copy()


def save(path: Path, pixels: NDArray[np.generic], **options: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)


def encoded(image: Image.Image, format: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def with_files(folder: Path, **changes: object) -> MasksSettings:
    return CONFIG.model_copy(update={"external": str(folder), **changes})


def reading_of(folder: Path, size: int = SIZE, dilate: int = 0) -> Reading:
    return Reading(open_source(str(folder), "files"), Conversion(size, dilate), run_tasks, 1)


def found_in(folder: Path, size: int = SIZE, dilate: int = 0) -> list[MaskFile]:
    return read_files(reading_of(folder, size, dilate), {})


def rows_of(store: LocalStore, ref: StageRef, split: str) -> list[dict]:
    return [row for tar in split_shards(store, ref.folder, split) for row in read_index(store, tar)]


def holes_of(store: LocalStore, ref: StageRef, split: str) -> list[NDArray[np.bool_]]:
    tars = split_shards(store, ref.folder, split)
    samples = [files for tar in tars for _, files in iterate_shard(store, tar)]
    return [valid_from_png(files["png"]) == 0 for files in samples]


# One file

HALF = np.zeros((8, 8), np.uint8)
HALF[:, 4:] = 255


@pytest.mark.parametrize(
    ("image", "name"),
    [
        (Image.fromarray(HALF), "gray"),
        (Image.fromarray(HALF).convert("1"), "bits"),
        (Image.fromarray(HALF).convert("RGB"), "colour"),
        (Image.fromarray(HALF).convert("P"), "palette"),
        (Image.fromarray(HALF // 255), "labels 0 and 1"),
        (Image.fromarray(HALF.astype(np.uint16) * 257), "16 bits"),
        (Image.fromarray(np.dstack([HALF] * 3 + [HALF * 0 + 255])), "opaque"),
        (Image.fromarray(np.dstack([HALF * 0] * 3 + [HALF])), "alpha"),
        (Image.fromarray(np.dstack([255 - HALF, HALF])), "gray and alpha"),
    ],
)
def test_bright_or_opaque_pixels_are_white(image: Image.Image, name: str) -> None:
    assert (white_pixels(encoded(image)) == (HALF > 0)).all(), name


def test_a_mask_stored_as_jpeg_is_thresholded() -> None:
    mask = draw("strokes", 0, 1, 256)
    white = white_pixels(encoded(Image.fromarray(mask), "JPEG"))
    assert (white != (mask > 0)).mean() < 0.005


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"hello", "not an image"),
        (encoded(Image.fromarray(draw("strokes", 0, 1, 256)))[:300], "truncated"),
        (encoded(Image.new("1", (10_000, 9_000))), "10000x9000 pixels"),
    ],
)
def test_a_file_that_is_not_a_mask_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(ItemError, match=reason):
        white_pixels(data)


def test_other_formats_that_pillow_knows_are_no_masks_and_start_no_program(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = other_formats.trap_ghostscript(tmp_path / "bin", monkeypatch)
    names = other_formats.write_all(tmp_path / "formats")
    for name in names:
        with pytest.raises(ItemError, match=other_formats.REASON):
            white_pixels((tmp_path / "formats" / name).read_bytes())
    shutil.copy(tmp_path / "formats" / names[0], folder / names[0])
    assert {file.reason for file in found_in(folder) if file.kind == "failed"} == {
        other_formats.REASON
    }
    assert not started.exists()


@pytest.mark.parametrize("side", [20, 32, 57, 64, 100, 512])
def test_a_mask_of_any_side_keeps_its_hole_ratio(side: int) -> None:
    white = draw("free-form", 0, 5, side) > 0
    mask = hole_mask(white, "white-hole", Conversion(SIZE, 0))
    assert mask.shape == (SIZE, SIZE)
    assert set(np.unique(mask)) == {0, 255}
    assert hole_ratio(mask) == pytest.approx(white.mean(), abs=0.03)


def test_a_wide_mask_is_stretched_and_not_cropped() -> None:
    white = np.zeros((50, 200), bool)
    white[:, :50] = True
    mask = hole_mask(white, "white-hole", Conversion(SIZE, 0))
    assert (mask[:, : SIZE // 4] == 255).all()
    assert not mask[:, SIZE // 4 :].any()


@pytest.mark.parametrize("scale", [2, 3.5, 8, 31, 40])
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_strokes_thinner_than_a_pixel_are_kept_when_a_mask_shrinks(
    scale: float, offset: int
) -> None:
    side = round(SIZE * scale)
    white = np.zeros((side, side), bool)
    white[:, side // 3 + offset] = True
    rows = np.arange(side)
    white[rows, np.minimum(rows // 2 + side // 2 + offset, side - 1)] = True
    mask = hole_mask(white, "white-hole", Conversion(SIZE, 0)) > 0
    per_row = mask.sum(axis=1)
    assert per_row.min() >= 2
    assert per_row.max() <= 6


def test_the_edge_of_a_large_hole_does_not_move_when_a_mask_shrinks() -> None:
    rows, columns = np.indices((256, 256))
    disc = (rows - 128) ** 2 + (columns - 128) ** 2 < 80**2
    for hole in (disc, rows + columns < 200):
        mask = hole_mask(hole, "white-hole", Conversion(64, 0))
        whole = hole.reshape(64, 4, 64, 4).mean(axis=(1, 3))
        assert ((mask > 0) == (whole >= 0.5)).all()
        assert hole_ratio(mask) == pytest.approx(hole.mean(), rel=0.02)


def test_holes_grow_by_the_requested_pixels() -> None:
    white = np.zeros((SIZE, SIZE), bool)
    white[10, 20] = True
    rows, columns = np.nonzero(hole_mask(white, "white-hole", Conversion(SIZE, 3)))
    assert (rows.min(), rows.max()) == (7, 13)
    assert (columns.min(), columns.max()) == (17, 23)
    assert len(rows) < 49  # a disc


def test_black_can_be_the_hole() -> None:
    hole = draw("box", 0, 0, SIZE)
    assert (hole_mask(hole == 0, "black-hole", Conversion(SIZE, 0)) == hole).all()


def test_a_mask_is_packed_and_unpacked_unchanged() -> None:
    mask = draw("strokes", 0, 3, 33)
    made = PackedMask.of(mask)
    assert (made.mask(33) == mask).all()
    assert made.ratio == hole_ratio(mask)


# The hole colour


def shares(*pairs: tuple[float, float]) -> list[MaskFile]:
    return [MaskFile(f"{n}.png", 1, 1, "mask", white=w, rim=r) for n, (w, r) in enumerate(pairs)]


@pytest.mark.parametrize("recipe", ["free-form", "lama-medium", "box", "box-random"])
@pytest.mark.parametrize("hole", ["white", "black"])
def test_the_hole_colour_is_found_from_the_set_and_explained(
    tmp_path: Path, recipe: str, hole: str
) -> None:
    for index in range(20):
        mask = draw(recipe, 0, index, 64)
        save(tmp_path / f"{index}.png", mask if hole == "white" else 255 - mask)
    polarity, sentence = find_polarity(found_in(tmp_path), "the set")
    assert polarity == f"{hole}-hole"
    assert sentence.startswith(f"masks: {hole} is the hole in the set, because 20 of its 20")
    assert "masks.external_polarity" in sentence


def test_one_mask_with_a_large_hole_does_not_decide_for_the_set() -> None:
    few = [(0.3, 0.2)] * 3 + [(0.8, 0.9)]
    assert find_polarity(shares(*few), "it")[0] == "white-hole"
    assert find_polarity(shares(*[(1 - w, 1 - r) for w, r in few]), "it")[0] == "black-hole"


def test_edges_count_as_much_as_the_area() -> None:
    assert find_polarity(shares((0.55, 0.0)), "it")[0] == "white-hole"
    assert find_polarity(shares((0.45, 1.0)), "it")[0] == "black-hole"


@pytest.mark.parametrize("pairs", [[(0.3, 0.2)] * 7 + [(0.8, 0.9)] * 3, [(0.5, 0.5)] * 4])
def test_a_set_without_agreement_is_an_error_that_asks_for_the_option(
    pairs: list[tuple[float, float]],
) -> None:
    with pytest.raises(ConfigError, match=r"not clear.*set masks\.external_polarity"):
        find_polarity(shares(*pairs), "it")


# The set


def test_every_file_has_a_kind(folder: Path) -> None:
    save(folder / "white.png", np.full((9, 9), 255, np.uint8))
    save(folder / "black.bmp", np.zeros((9, 9), np.uint8))
    (folder / "notes.txt").write_text("hello")
    (folder / "cut.png").write_bytes((folder / "0" / "3 2.png").read_bytes()[:60])
    found = found_in(folder)
    assert [file.key for file in found] == sorted(file.key for file in found)
    kinds = {file.key: file.kind for file in found if file.kind != "mask"}
    assert kinds == {
        "white.png": "blank",
        "black.bmp": "blank",
        "notes.txt": "ignored",
        "cut.png": "failed",
    }
    assert len(found) == 28
    assert "truncated" in next(file.reason for file in found if file.key == "cut.png")


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("phone.HEIC", b"\0\0\0\x18ftypheic" + bytes(60), "unknown format"),
        ("phone", b"\0\0\0\x18ftypheic" + bytes(60), "unknown format"),
        ("photo.png", encoded(Image.radial_gradient("L")), "it is mostly grey"),
    ],
)
def test_a_picture_that_is_no_mask_is_a_broken_file(
    folder: Path, name: str, data: bytes, reason: str
) -> None:
    (folder / name).write_bytes(data)
    (file,) = [each for each in found_in(folder) if each.kind not in ("mask", "blank")]
    assert (file.key, file.kind) == (name, "failed")
    assert reason in file.reason


def test_many_broken_files_are_an_error_that_names_some(folder: Path) -> None:
    for number in range(2):
        (folder / f"cut{number}.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(PipelineError, match=r"2 of the 26 mask files in .*cut0\.png: it is broken"):
        found_in(folder)


def test_a_folder_without_masks_is_an_error(tmp_path: Path) -> None:
    save(tmp_path / "white.png", np.full((9, 9), 255, np.uint8))
    with pytest.raises(PipelineError, match=r"holds no mask \(1 files, 1 of only one colour"):
        found_in(tmp_path)


def test_the_digest_depends_on_keys_and_contents_only(folder: Path, tmp_path: Path) -> None:
    first = files_digest(found_in(folder))
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    (moved / "notes.txt").write_text("hello")
    assert files_digest(found_in(moved, size=16, dilate=1)) == first
    (moved / "0" / "0 0.png").rename(moved / "0" / "renamed.png")
    assert files_digest(found_in(moved)) != first


def test_a_file_changed_between_two_reads_is_an_error(folder: Path) -> None:
    reading = reading_of(folder)
    rows = {file.key: file.row() for file in found_in(folder)}
    known = read_files(reading, rows)
    assert not any(file.masks for file in known)
    save(folder / "0" / "0 0.png", bar(0.3, 100, 1))
    with pytest.raises(PipelineError, match=r"0/0 0\.png .* has changed"):
        load_masks(reading, known, "white-hole")


def test_all_files_are_used_once_before_they_repeat_in_another_order() -> None:
    made = [(str(n), PackedMask(0.2, False, b"")) for n in range(16)]
    pool = FilePool(made, flips=False)
    turns = [
        [pool.mask(pool.candidate(7, turn * 16 + n)).key for n in range(16)] for turn in range(3)
    ]
    assert all(set(turn) == {key for key, _ in made} for turn in turns)
    assert turns[0] != turns[1] != turns[2]
    assert turns[0] != [pool.mask(pool.candidate(8, n)).key for n in range(16)]


def test_the_index_decides_the_flips_and_they_are_optional() -> None:
    mask = draw("free-form", 0, 2, 16)
    made = [("a", PackedMask.of(mask))]
    pool = FilePool(made, flips=True)
    drawn = [pool.mask(pool.candidate(7, n)).mask(16) for n in range(40)]
    expected = {m.tobytes() for m in (mask, mask[::-1], mask[:, ::-1], mask[::-1, ::-1])}
    assert {m.tobytes() for m in drawn} == expected
    assert (drawn[3] == pool.mask(pool.candidate(7, 3)).mask(16)).all()
    plain = FilePool(made, flips=False)
    assert all((plain.mask(plain.candidate(7, n)).mask(16) == mask).all() for n in range(9))


# The stage


def test_evaluation_masks_come_from_the_files(
    store: LocalStore, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ref = prepare_masks(with_files(folder), store)
    assert ref.summary["bins"] == dict.fromkeys(BINS, 4)
    rows, holes = rows_of(store, ref, "eval"), holes_of(store, ref, "eval")
    assert {row["recipe"] for row in rows} == {"external"}
    assert {row["seed"] for row in rows} == {split_seed(0, "eval")}
    assert len({row["file"] for row in rows}) == 24
    for row, hole in zip(rows, holes, strict=True):
        white = white_pixels((folder / row["file"]).read_bytes())
        assert (hole == (hole_mask(white, "white-hole", Conversion(SIZE, 0)) > 0)).all()
        assert row["hole_ratio"] == pytest.approx(hole.mean())
        assert row["touches_border"]
    assert {row["file"] for row in rows_of(store, ref, "train")} == {""}
    assert ref.summary["external"] == {
        "polarity": "white-hole",
        "files": 24,
        "used": {"eval": 24},
        "outside": 0,
        "blank": 0,
        "failed": 0,
        "ignored": 0,
    }
    assert "white is the hole" in caplog.text


def test_an_archive_gives_the_same_set_as_its_folder(
    store: LocalStore, folder: Path, tmp_path: Path
) -> None:
    ref = prepare_masks(with_files(folder), store)
    with zipfile.ZipFile(tmp_path / "masks.zip", "w") as archive:
        for path in sorted(folder.rglob("*.png")):
            archive.write(path, path.relative_to(folder))
    again = prepare_masks(with_files(tmp_path / "masks.zip"), store)
    assert again.skipped
    assert again.request_digest == ref.request_digest


def test_an_unchanged_folder_is_not_read_again_and_a_changed_file_makes_a_new_set(
    store: LocalStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_masks(with_files(folder), store)
    read: list[str] = []
    original = white_pixels

    def counted(data: bytes) -> NDArray[np.bool_]:
        read.append("")
        return original(data)

    monkeypatch.setattr("data_prep.masks.read_files.white_pixels", counted)
    again = prepare_masks(with_files(folder), store)
    assert again.skipped
    assert not read
    moved = folder.rename(folder.parent / "moved")
    assert prepare_masks(with_files(moved), store).skipped
    read.clear()
    save(moved / "0" / "0 0.png", bar(0.31, 100, 1))
    changed = prepare_masks(with_files(moved, eval_per_bin=3), store)
    assert not changed.skipped
    sources = [read_manifest(store, ref.folder).sources for ref in (first, changed)]
    assert sources[0]["external"] != sources[1]["external"]


def test_known_files_can_make_masks_of_another_size(store: LocalStore, folder: Path) -> None:
    prepare_masks(with_files(folder), store)
    larger = prepare_masks(with_files(folder, size=64), store)
    assert {row["width"] for row in rows_of(store, larger, "eval")} == {64}
    assert all(hole.shape == (64, 64) for hole in holes_of(store, larger, "eval"))


def test_setting_the_polarity_that_auto_finds_requests_the_same_set(
    store: LocalStore, folder: Path
) -> None:
    found = prepare_masks(with_files(folder), store)
    said = prepare_masks(with_files(folder, external_polarity="white-hole"), store)
    other = prepare_masks(with_files(folder, external_polarity="black-hole", eval_per_bin=1), store)
    assert said.skipped
    assert said.request_digest == found.request_digest != other.request_digest
    assert other.summary["external"]["outside"] > 0


def test_external_can_be_mixed_with_other_recipes(store: LocalStore, folder: Path) -> None:
    config = with_files(folder, recipes={"box": 1.0, "external": 1.0}, train=60, eval_recipes=BOX)
    rows = rows_of(store, prepare_masks(config, store), "train")
    recipes = [row["recipe"] for row in rows]
    assert 15 < recipes.count("external") < 45
    assert all((row["file"] != "") == (row["recipe"] == "external") for row in rows)


BOX = {"box": 1.0}


def test_both_splits_share_no_file(store: LocalStore, folder: Path) -> None:
    config = with_files(folder, recipes={"external": 1.0}, train=40, eval_per_bin=2)
    ref = prepare_masks(config, store)
    files = {s: {row["file"] for row in rows_of(store, ref, s)} for s in ("train", "eval")}
    assert not files["train"] & files["eval"]
    assert sum(ref.summary["external"]["used"].values()) == 24


def test_the_same_files_give_the_same_bytes_in_any_number_of_processes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipes = {"recipes": {"box": 1.0, "external": 1.0}, "external_flips": True}
    config = with_files(folder, **recipes, train=50, eval_per_bin=2, shard_samples=20)
    one, two = LocalStore(tmp_path / "one"), LocalStore(tmp_path / "two")
    first = prepare_masks(config.model_copy(update={"workers": 1}), one)
    monkeypatch.setattr("data_prep.masks.stage.POOL_MASKS", 0)
    monkeypatch.setattr("data_prep.masks.read_files.POOL_FILES", 0)
    monkeypatch.setattr("data_prep.masks.read_files.CHUNK", 5)
    second = prepare_masks(config.model_copy(update={"workers": 2}), two)
    assert first.content_digest == second.content_digest


def test_masks_outside_all_ratio_bins_are_not_used(store: LocalStore, folder: Path) -> None:
    save(folder / "much.png", bar(0.9, 100, 0))
    config = with_files(folder, recipes={"external": 1.0}, eval_recipes=BOX, train=50)
    ref = prepare_masks(config, store)
    assert ref.summary["external"]["outside"] == 1
    assert "much.png" not in {row["file"] for row in rows_of(store, ref, "train")}


def test_a_source_without_a_usable_mask_is_an_error(store: LocalStore, folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"no mask between 1 and 60 % hole for the eval split"):
        prepare_masks(with_files(folder, external_dilate=32), store)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"recipes": {"external": 1}}, "masks.external is missing"),
        ({"external": "somewhere"}, "no recipe draws from it"),
    ],
)
def test_the_option_external_and_its_recipe_need_each_other(options: dict, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        MasksSettings(**options)
