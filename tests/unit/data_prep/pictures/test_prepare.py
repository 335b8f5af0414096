"""Preparing: the samples that are cut from a photo."""

from __future__ import annotations

import io
import threading

import cv2
import numpy as np
import pytest
import simplejpeg
from photo_files import (
    FORMATS,
    NOISE,
    RGB,
    by_pillow,
    difference,
    file,
    psnr,
    sample,
    smooth,
)
from PIL import Image

from data_prep.pictures.cutting import Cutting
from data_prep.pictures.formats import EXTENSIONS
from data_prep.pictures.limits import PhotoError
from data_prep.pictures.prepare import _resized, prepare
from data_prep.pictures.tiling import choose_tiles, square_tiles


def test_the_center_crop_is_the_largest_centred_square() -> None:
    assert (sample(file(RGB, "PNG"), size=40) == NOISE[:, 10:50]).all()
    assert (
        sample(file(NOISE.transpose(1, 0, 2), "PNG"), size=40) == NOISE[:, 10:50].transpose(1, 0, 2)
    ).all()


@pytest.mark.parametrize("resample", ["area", "lanczos"])
def test_resizing_is_antialiased(resample: str) -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    out = sample(file(stripes, "PNG"), size=24, resample=resample)
    assert (
        np.abs(out[:, 2:-2].astype(int) - 128).max() < 34
    )  # each covers 64/24 pixels, at most 3 of 8 more of one colour


def test_area_is_the_mean_of_the_pixels_covered() -> None:
    expected = NOISE[:, 10:50].reshape(20, 2, 20, 2, 3).mean((1, 3))
    assert np.abs(sample(file(RGB, "PNG"), size=20) - expected).max() <= 0.5


@pytest.mark.parametrize(("side", "size"), [(100, 64), (100, 51), (100, 49), (100, 30), (257, 64)])
def test_at_fractions_area_is_nearly_the_mean_of_the_pixels_covered(side: int, size: int) -> None:
    image = smooth(side, side)
    exact = cv2.resize(image.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
    assert psnr(_resized(image, size, size, "area"), exact) > 45
    noise = np.random.default_rng(2).integers(0, 256, (side, side, 3), dtype=np.uint8)
    exact = cv2.resize(noise.astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
    spread = [float(np.std(each)) for each in (_resized(noise, size, size, "area"), exact)]
    assert spread[0] < 1.05 * spread[1]  # it does not keep more of the finest detail


def test_lanczos_is_the_filter_of_pillow() -> None:
    expected = Image.fromarray(NOISE[:, 10:50]).resize((30, 30), Image.Resampling.LANCZOS)
    assert (sample(file(RGB, "PNG"), size=30, resample="lanczos") == np.asarray(expected)).all()


@pytest.mark.parametrize("resample", ["area", "lanczos"])
@pytest.mark.parametrize("mode", ["center-crop", "short-side"])
def test_a_small_photo_is_enlarged_unless_min_side_forbids_it(mode: str, resample: str) -> None:
    image = smooth(40, 60)
    out = sample(file(image, "PNG"), mode=mode, size=80, resample=resample)
    assert out.shape == ((80, 80, 3) if mode == "center-crop" else (80, 120, 3))
    whole = image[:, 10:50] if mode == "center-crop" else image
    expected = Image.fromarray(whole).resize((out.shape[1], 80), Image.Resampling.BICUBIC)
    assert psnr(out, np.asarray(expected)) > 38
    with pytest.raises(PhotoError, match=r"^it has 60x40 pixels, its shorter side needs 41$"):
        sample(file(image, "PNG"), mode=mode, size=80, min_side=41)


@pytest.mark.parametrize(("width", "height"), [(60, 40), (40, 60), (40, 40), (41, 40)])
def test_short_side_keeps_the_aspect(width: int, height: int) -> None:
    image = smooth(height, width)
    out = sample(file(image, "PNG"), mode="short-side", size=20)
    assert out.shape == (round(height / 2), round(width / 2), 3)
    expected = cv2.resize(image, out.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert psnr(out, expected) > 45


def test_a_very_long_and_narrow_photo_is_refused() -> None:
    thread = file(np.zeros((2, 60_000, 3), np.uint8), "PNG")
    with pytest.raises(PhotoError, match="60000x2 pixels, too long and narrow"):
        sample(thread, mode="short-side", size=256)
    assert sample(thread, mode="center-crop", size=16).shape == (16, 16, 3)
    wide = file(np.zeros((16, 17_000, 3), np.uint8), "PNG")
    with pytest.raises(PhotoError, match="too long and narrow"):
        prepare(wide, Cutting("short-side", size=16, format="webp"), "key")
    assert prepare(wide, Cutting("short-side", size=16), "key").pieces[0].width == 17_000


@pytest.mark.parametrize("format", FORMATS)
def test_keep_does_not_change_the_bytes_and_names_the_true_format(format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = format in ("JPEG", "PNG", "TIFF", "WEBP")
    data = file(RGB, format, **({"exif": exif} if turned else {}))
    prepared = prepare(data, Cutting("keep"), "key")
    (piece,) = prepared.pieces
    assert piece.data is data
    assert piece.extension in EXTENSIONS
    names = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}
    assert piece.extension == names.get(format, format.lower())
    assert (piece.width, piece.height) == ((40, 60) if turned else (60, 40))
    assert (piece.width, piece.height) == (prepared.width, prepared.height)


def test_keep_refuses_a_file_that_cannot_be_decoded() -> None:
    data = file(smooth(400, 600), "JPEG")
    with pytest.raises(PhotoError, match="it is truncated"):
        prepare(data[:-900], Cutting("keep"), "key")


def test_tiles_are_the_pixels_of_their_squares() -> None:
    how = Cutting("tiles", size=16, format="png", tile=(16, 24), tile_stride=0.5)
    prepared = prepare(file(RGB, "PNG"), how, "key")
    assert [piece.box for piece in prepared.pieces] == square_tiles(60, 40, (16, 24), 0.5)
    for piece in prepared.pieces:
        assert piece.box is not None
        left, top, side = piece.box
        square = NOISE[top : top + side, left : left + side]
        assert (by_pillow(piece.data) == _resized(square, 16, 16, "area")).all()
        assert (piece.width, piece.height, piece.extension) == (16, 16, "png")


def test_the_key_decides_which_max_tiles_tiles_are_cut() -> None:
    boxes = square_tiles(60, 40, (16,), 0.5)
    drawn = set()
    for key in ("a.png", "b.png"):
        how = Cutting("tiles", size=16, tile=(16,), tile_stride=0.5, max_tiles=5)
        pieces = prepare(file(RGB, "PNG"), how, key).pieces
        assert [piece.box for piece in pieces] == choose_tiles(key, boxes, 5)
        drawn.add(tuple(piece.box for piece in pieces))
    assert len(drawn) == 2


def test_a_photo_smaller_than_every_tile_is_refused() -> None:
    with pytest.raises(PhotoError, match="it has 60x40 pixels, its shorter side needs 48"):
        prepare(file(RGB, "PNG"), Cutting("tiles", tile=(48, 64)), "key")


@pytest.mark.parametrize(("format", "most"), [("jpeg", 15), ("webp", 20), ("png", 0)])
def test_a_sample_is_stored_in_the_requested_format(format: str, most: int) -> None:
    image = smooth(40, 40)
    (piece,) = prepare(file(image, "PNG"), Cutting(size=40, format=format), "key").pieces  # type: ignore[arg-type]
    stored = Image.open(io.BytesIO(piece.data))
    assert stored.format == format.upper()
    assert piece.extension == {"jpeg": "jpg"}.get(format, format)
    assert difference(np.asarray(stored), image) <= most
    if format == "jpeg":
        assert simplejpeg.decode_jpeg_header(piece.data)[3] == "420"


def test_a_higher_quality_gives_larger_files() -> None:
    for format in ("jpeg", "webp"):
        sizes = [
            len(
                prepare(file(RGB, "PNG"), Cutting(size=40, format=format, quality=q), "k")
                .pieces[0]
                .data
            )  # type: ignore[arg-type]
            for q in (50, 95)
        ]
        assert sizes[0] < sizes[1]


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
@pytest.mark.parametrize("resample", ["area", "lanczos"])
def test_the_bytes_are_the_same_every_time_and_in_any_thread(format: str, resample: str) -> None:
    how = Cutting(size=96, format=format, resample=resample)  # type: ignore[arg-type]
    data = file(smooth(400, 600), "JPEG", progressive=True)
    results = [prepare(data, how, "key")]
    before = cv2.getNumThreads()
    try:
        for threads in (1, 4):
            cv2.setNumThreads(threads)
            workers = [
                threading.Thread(target=lambda: results.append(prepare(data, how, "key")))
                for _ in range(3)
            ]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
    finally:
        cv2.setNumThreads(before)
    assert len(results) == 7
    assert all(result == results[0] for result in results)
