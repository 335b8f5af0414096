from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.core.storage.local import LocalStore
from data_prep.inspection.contact_sheet import CELL, GAP, PAPER, contact_sheet, mask_sheet
from data_prep.masks.plan import BINS
from data_prep.masks.settings import MasksSettings
from data_prep.masks.stage import prepare_masks

RED, BLUE = (255, 0, 0), (0, 0, 255)


def cells(sheet: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    return (np.asarray(sheet) == colour).all(axis=2)


def test_each_row_has_its_caption_and_images() -> None:
    images = [Image.new("RGB", (40, 40), RED), Image.new("RGB", (40, 40), BLUE)]
    sheet = contact_sheet([("first", images), ("second", images[:1])], 42)
    red, blue = cells(sheet, RED), cells(sheet, BLUE)
    assert red.sum() == 2 * 40 * 40
    assert blue.sum() == 40 * 40
    assert np.flatnonzero(red.any(axis=0)).max() < np.flatnonzero(blue.any(axis=0)).min()
    above = np.asarray(sheet)[: np.flatnonzero(blue.any(axis=1)).min() - 1]
    assert (above < 100).any()  # letters


def test_the_same_rows_give_the_same_pixels() -> None:
    rows = [("a caption", [Image.effect_noise((99, 50), 50)])]
    assert contact_sheet(rows, 64).tobytes() == contact_sheet(rows, 64).tobytes()
    other = [("another", rows[0][1])]
    assert contact_sheet(rows, 64).tobytes() != contact_sheet(other, 64).tobytes()


@pytest.mark.parametrize(
    ("size", "shown"), [((100, 50), (40, 20)), ((50, 100), (20, 40)), ((10, 30), (10, 30))]
)
def test_a_large_image_is_reduced_to_its_cell_and_a_small_one_keeps_its_size(
    size: tuple[int, int], shown: tuple[int, int]
) -> None:
    found = cells(contact_sheet([("", [Image.new("RGB", size, RED)])], 42), RED)
    assert (found.any(axis=0).sum(), found.any(axis=1).sum()) == shown


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK", "LA"])
def test_images_of_any_mode_are_shown(mode: str) -> None:
    sheet = contact_sheet([("", [Image.new(mode, (300, 300))])], 42)
    assert sheet.mode == "RGB"
    assert (np.asarray(sheet)[10:] == np.asarray(sheet)[10:, :, :1]).all() or mode == "CMYK"


def test_a_long_row_continues_in_the_next_line() -> None:
    images = [Image.new("RGB", (40, 40), RED)] * 7
    found = cells(contact_sheet([("", images)], 42, columns=3), RED)
    assert found.sum() == 7 * 40 * 40
    assert found.any(axis=0).sum() == 3 * 40
    assert found.any(axis=1).sum() == 3 * 40


def test_a_caption_of_any_text_fits_on_the_sheet() -> None:
    short = contact_sheet([("x", [Image.new("L", (9, 9))])], 42)
    long = contact_sheet([("日本\nthe café " * 20, [])], 42)
    assert long.width > short.width
    assert (np.asarray(long)[:, -GAP:] == PAPER).all()


def test_no_rows_give_an_empty_sheet() -> None:
    assert contact_sheet([], 42).size == (2 * GAP, GAP)


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> tuple[LocalStore, MasksSettings]:
    config = MasksSettings(
        name="m", size=64, train=9, eval_per_bin=5, recipes={"box": 1, "half": 1}
    )
    config = config.model_copy(update={"max_attempts": 50})
    return LocalStore(tmp_path_factory.mktemp("root")), config


def test_a_mask_set_has_a_row_for_each_bin_and_one_of_training_masks(
    masks: tuple[LocalStore, MasksSettings],
) -> None:
    store, config = masks
    ref = prepare_masks(config, store)
    sheet = mask_sheet(store, ref.folder, per_bin=4)
    holes = np.asarray(sheet.convert("L"))
    line = CELL + GAP
    caption = (sheet.height - GAP - 3 * line) / (len(BINS) + 1)  # box and half fill two bins
    assert caption == 5 * GAP
    assert sheet.width >= 4 * line
    middle = int(GAP + 3 * caption + CELL / 2)  # of the row of boxes, 0.20 to 0.30
    for column in range(4):
        centre = GAP + column * line + CELL // 2
        assert holes[middle, centre] == 255
        assert holes[middle - 24, centre] == 0


def test_the_captions_count_the_masks_at_the_border(
    masks: tuple[LocalStore, MasksSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, config = masks
    texts: list[str] = []

    def captions(rows: list, cell: int, columns: int) -> Image.Image:
        texts.extend(text for text, _ in rows)
        return contact_sheet(rows, cell, columns)

    monkeypatch.setattr("data_prep.inspection.contact_sheet.contact_sheet", captions)
    mask_sheet(store, prepare_masks(config, store).folder)
    assert texts[0] == "evaluation, 0.01-0.10 hole: none"
    assert texts[2] == "evaluation, 0.20-0.30 hole: 5 masks, 0 of them at or near the border"
    assert texts[4] == "evaluation, 0.40-0.50 hole: 5 masks, 5 of them at or near the border"
    assert texts[6] == "training"
    assert len(texts) == 7


def test_a_sheet_is_saved_as_a_png(tmp_path: Path, masks: tuple[LocalStore, MasksSettings]) -> None:
    store, config = masks
    mask_sheet(store, prepare_masks(config, store).folder).save(tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").format == "PNG"
