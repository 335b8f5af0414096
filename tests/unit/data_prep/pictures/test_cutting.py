"""Pictures: every kind of file becomes upright sRGB and its samples, and what is broken is told."""

from __future__ import annotations

import contextlib
import io
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import Image, ImageCms, ImageOps, features

from data_prep.pictures.cutting import Cutting
from data_prep.pictures.decoding import decode_rgb
from data_prep.pictures.formats import EXTENSIONS, looks_like_image
from data_prep.pictures.limits import MAX_PIXELS, Limits, PhotoError
from data_prep.pictures.perceptual import phash
from data_prep.pictures.prepare import _resized, prepare
from data_prep.pictures.tiling import choose_tiles, square_tiles

REPOSITORY = Path(__file__).parents[4]
PHOTOS = REPOSITORY.parent / "shared" / "data" / "photos"
AS_IT_IS = Limits(MAX_PIXELS)
ALL = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"]
ALL += [
    name
    for name, feature in (("JPEG2000", "jpg_2000"), ("AVIF", "avif"))
    if features.check(feature)
]


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.Generator(np.random.Philox(seed)).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Like a photograph: large shapes, a little of everything."""
    coarse = Image.fromarray(noise(4, 5, 3, seed))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def file(image: Image.Image | np.ndarray, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(out, format, **options)
    return out.getvalue()


def pixels(data: bytes, at_least: int | None = None) -> np.ndarray:
    rgb = decode_rgb(data, AS_IT_IS, at_least).rgb
    assert rgb.dtype == np.uint8
    assert rgb.shape[2] == 3
    return rgb


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def sample(data: bytes, **how: object) -> np.ndarray:
    (piece,) = prepare(data, Cutting(format="png", **how), "key").pieces  # type: ignore[arg-type]
    stored = by_pillow(piece.data)
    assert stored.shape == (piece.height, piece.width, 3)
    return stored


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2))))


def difference(a: np.ndarray, b: np.ndarray | tuple[int, ...]) -> int:
    return int(np.abs(a.astype(int) - np.asarray(b).astype(int)).max())


NOISE = noise(40, 60)
RGB = Image.fromarray(NOISE)


# Kinds of pixels


def test_rgb_comes_as_it_is() -> None:
    assert (pixels(file(RGB, "PNG")) == NOISE).all()


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF", "PPM"])
def test_gray_becomes_three_equal_channels(format: str) -> None:
    gray = smooth(20, 30)[..., 0]
    out = pixels(file(gray, format))
    assert difference(out, gray[..., None]) <= (8 if format == "JPEG" else 0)
    assert (out == out[..., :1]).all()


@pytest.mark.parametrize("order", [">u2", "<u2"])
def test_sixteen_bits_of_gray_become_the_upper_eight(order: str) -> None:
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = (deep >> 8)[..., None]
    for format in ("PNG", "TIFF"):
        assert (pixels(file(deep.astype("<u2"), format)) == expected).all()
    raw = deep.astype(order).tobytes()
    mode = "I;16B" if order == ">u2" else "I;16"
    assert (pixels(file(Image.frombytes(mode, (256, 256), raw), "TIFF")) == expected).all()
    pgm = b"P5 256 256 65535\n" + deep.astype(">u2").tobytes()
    assert (pixels(pgm) == expected).all()


def test_sixteen_bits_of_colour_become_the_upper_eight() -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (32, 48, 3)).astype(np.uint16)
    for extension in (".png", ".tiff"):
        data = cv2.imencode(extension, deep[..., ::-1])[1].tobytes()
        assert (pixels(data) == deep >> 8).all()


def test_thirty_two_bits_that_hold_eight_are_not_shifted_away() -> None:
    gray = noise(20, 30, 1)
    assert (pixels(file(gray.astype(np.int32), "TIFF")) == gray[..., None]).all()
    assert (pixels(file(gray.astype(np.int32) * 257, "TIFF")) == gray[..., None]).all()


def test_a_palette_becomes_its_colours() -> None:
    palette = RGB.quantize(8)
    for format in ("PNG", "GIF", "BMP", "TIFF"):
        assert (pixels(file(palette, format)) == np.asarray(palette.convert("RGB"))).all()


def test_one_bit_becomes_black_and_white() -> None:
    one = RGB.convert("1")
    for format in ("PNG", "TIFF", "PPM", "BMP"):
        assert (pixels(file(one, format)) == np.asarray(one.convert("RGB"))).all()


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_alpha_is_laid_over_white(format: str) -> None:
    rgba = np.zeros((8, 12, 4), np.uint8)
    rgba[:, :4], rgba[:, 4:8], rgba[:, 8:] = (9, 8, 7, 255), (100, 0, 200, 128), (1, 2, 3, 0)
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    out = pixels(file(rgba, format, **options))
    assert (out[:, :4] == (9, 8, 7)).all()
    assert difference(out[:, 4:8], (177, 127, 227)) <= 1
    assert (out[:, 8:] == 255).all()


def test_gray_with_alpha_is_laid_over_white() -> None:
    la = np.zeros((8, 8, 2), np.uint8)
    la[:, :4], la[:, 4:] = (60, 255), (60, 0)
    out = pixels(file(Image.fromarray(la, "LA"), "PNG"))
    assert (out[:, :4] == 60).all()
    assert (out[:, 4:] == 255).all()


def test_a_transparent_colour_is_laid_over_white() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 9, 9, 9])
    assert (pixels(file(image, "PNG", transparency=0)) == 255).all()
    assert (pixels(file(image, "PNG", transparency=b"\xff\x00")) == 0).all()
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert (pixels(file(red, "PNG", transparency=(255, 0, 0))) == 255).all()
    assert (pixels(file(image.convert("L"), "PNG", transparency=0)) == 255).all()


RED = (200, 30, 40)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_becomes_rgb_and_what_adobe_inverted_is_inverted_back(format: str) -> None:
    data = file(Image.new("RGB", (32, 32), RED).convert("CMYK"), format)
    assert (b"Adobe" in data) == (format == "JPEG")
    picture = decode_rgb(data, AS_IT_IS)
    assert difference(picture.rgb, RED) < 6
    assert picture.mode == "CMYK"


def test_ycbcr_and_lab_become_rgb() -> None:
    red = Image.new("RGB", (32, 32), RED)
    assert difference(pixels(file(red.convert("YCbCr"), "TIFF")), RED) <= 2
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    in_lab = ImageCms.profileToProfile(red, srgb, lab, outputMode="LAB")
    assert in_lab is not None
    assert difference(pixels(file(in_lab, "TIFF")), RED) <= 3


def test_a_jpeg_of_rgb_without_a_colour_transform_keeps_its_colours() -> None:
    red = Image.new("RGB", (32, 32), RED)
    assert difference(pixels(file(red, "JPEG", keep_rgb=True, quality=95)), RED) <= 2


def test_floating_point_numbers_are_refused() -> None:
    with pytest.raises(PhotoError, match=r"^its pixels are floating-point numbers$"):
        pixels(file(np.zeros((8, 8), np.float32), "TIFF"))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "MPO"])
def test_of_several_pictures_the_first_counts(format: str) -> None:
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    data = file(first, format, save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
    picture = decode_rgb(data, AS_IT_IS)
    assert difference(picture.rgb, (255, 0, 0)) <= 3
    assert picture.format == {"MPO": "JPEG"}.get(format, format)


@pytest.mark.parametrize("format", ALL)
def test_every_format_is_decoded_and_told(format: str) -> None:
    data = file(smooth(40, 60), format)
    picture = decode_rgb(data, AS_IT_IS)
    assert (picture.width, picture.height, picture.format) == (60, 40, format)
    assert difference(picture.rgb, by_pillow(data)) <= 4


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_is_decoded_exactly(subsampling: str, progressive: bool) -> None:
    data = file(NOISE, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
    assert difference(pixels(data), by_pillow(data)) <= 1  # two versions of libjpeg-turbo


def test_a_jpeg_with_needless_bytes_is_decoded_all_the_same() -> None:
    data = file(smooth(40, 60), "JPEG")
    assert (pixels(data[:-2] + b"needless" + data[-2:]) == pixels(data)).all()
    assert (pixels(data + b"the camera's own notes") == pixels(data)).all()
    filled = data[:2] + b"\xff\xff" + data[2:]  # fill bytes before a marker
    assert difference(pixels(filled), pixels(data)) <= 1


# Orientation


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file(smooth(40, 60), format, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    picture = decode_rgb(data, AS_IT_IS)
    assert (picture.width, picture.height) == ((60, 40) if orientation < 5 else (40, 60))
    assert difference(picture.rgb, upright) <= 1
    assert difference(sample(data, size=20), sample(file(upright, "PNG"), size=20)) <= 1


def test_the_picture_of_a_camera_held_upright_stands_upright() -> None:
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:, :32] = 255  # what is left in the file is at the top (orientation 6)
    exif = Image.Exif()
    exif[0x0112] = 6
    out = pixels(file(stored, "JPEG", exif=exif))
    assert out.shape == (64, 32, 3)
    assert out[:30].min() > 250
    assert out[-30:].max() < 5


@pytest.mark.parametrize("value", [0, 9])
def test_an_orientation_that_does_not_exist_is_none(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert pixels(file(RGB, "JPEG", exif=exif)).shape == (40, 60, 3)


def test_broken_exif_is_no_reason_to_refuse_a_picture() -> None:
    data = file(smooth(40, 60), "JPEG")
    broken = b"Exif\0\0II*\0\xff\xff\xff\xff"
    segment = b"\xff\xe1" + struct.pack(">H", len(broken) + 2) + broken
    assert (pixels(data[:2] + segment + data[2:]) == pixels(data)).all()


# Colour profiles


def profile(space: bytes, **tags: bytes) -> bytes:
    """An ICC profile of version 2, see ICC.1:2001-04."""
    tags["wtpt"] = b"XYZ \0\0\0\0" + struct.pack(">iii", *(round(v * 65536) for v in D50))
    body, table = b"", b""
    start = 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name.encode() + struct.pack(">II", start + len(body), len(value))
        body += value + b"\0" * (-len(value) % 4)
    header = bytearray(128)
    kind, between = (b"prtr", b"Lab ") if "A2B0" in tags else (b"mntr", b"XYZ ")
    header[8:12], header[12:24] = b"\x02\x10\0\0", kind + space + between
    header[36:40] = b"acsp"
    header[68:80] = struct.pack(">iii", *(round(v * 65536) for v in D50))
    whole = bytes(header) + struct.pack(">I", len(tags)) + table + body
    return struct.pack(">I", len(whole)) + whole[4:]


D50 = (0.9642, 1.0, 0.8249)
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
# Red and blue change places in it.
TURNED = SRGB.replace(b"rXYZ", b"....").replace(b"bXYZ", b"rXYZ").replace(b"....", b"bXYZ")
LINEAR_GRAY = profile(b"GRAY", kTRC=b"curv\0\0\0\0\0\0\0\0")
# Without ink L* is 100, with black 0, with any other ink 50, which is the gray 119 of sRGB.
GRAY_INKS = profile(
    b"CMYK",
    A2B0=b"mft1\0\0\0\0\x04\x03\x02\0"
    + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    + bytes(range(256)) * 4
    + b"".join(bytes([255 * (i == 0) or 128 * (i % 2 == 0), 128, 128]) for i in range(16))
    + bytes(range(256)) * 3,
)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_colour_profile_is_converted_to_srgb(format: str) -> None:
    red = Image.new("RGB", (32, 32), (220, 20, 20))
    out = pixels(file(red, format, icc_profile=TURNED))
    assert difference(out, (20, 20, 220)) <= 12
    assert difference(pixels(file(red, format, icc_profile=SRGB)), pixels(file(red, format))) == 0


def test_a_profile_counts_under_alpha_and_in_a_palette() -> None:
    red = Image.new("RGBA", (32, 32), (220, 20, 20, 255))
    assert difference(pixels(file(red, "PNG", icc_profile=TURNED)), (20, 20, 220)) <= 12
    red.putalpha(0)
    assert difference(pixels(file(red, "PNG", icc_profile=TURNED)), (255, 255, 255)) == 0
    palette = Image.new("RGB", (32, 32), (220, 20, 20)).quantize(4)
    assert difference(pixels(file(palette, "PNG", icc_profile=TURNED)), (20, 20, 220)) <= 12


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_a_profile_for_gray_is_converted_to_srgb(format: str) -> None:
    out = pixels(file(Image.new("L", (32, 32), 55), format, icc_profile=LINEAR_GRAY))
    assert difference(out, (128, 128, 128)) <= 2  # 55/255 of the light


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_a_profile_for_cmyk_is_converted_to_srgb(format: str) -> None:
    red = Image.new("CMYK", (32, 32), (0, 255, 255, 0))
    assert difference(pixels(file(red, format, icc_profile=GRAY_INKS)), (119, 119, 119)) <= 2


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("bad", [b"no profile at all", TURNED[:200], LINEAR_GRAY, GRAY_INKS])
def test_a_profile_that_is_broken_or_for_other_colours_is_ignored(format: str, bad: bytes) -> None:
    assert (pixels(file(RGB, format, icc_profile=bad)) == pixels(file(RGB, format))).all()


def test_a_profile_in_several_segments_is_put_together() -> None:
    long = TURNED + b"\0" * 70_000  # what follows the last tag is not looked at
    out = pixels(file(Image.new("RGB", (32, 32), (220, 20, 20)), "JPEG", icc_profile=long))
    assert difference(out, (20, 20, 220)) <= 12


def test_no_profile_or_comment_travels_along() -> None:
    data = file(RGB, "PNG", icc_profile=TURNED)
    for format in ("jpeg", "png", "webp"):
        (piece,) = prepare(data, Cutting(size=40, format=format), "key").pieces  # type: ignore[arg-type]
        assert set(Image.open(io.BytesIO(piece.data)).info) <= {
            *("jfif", "jfif_version", "jfif_unit", "jfif_density"),
            *("loop", "background", "timestamp", "duration"),
        }


# Modes


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
    assert np.abs(out[:, 2:-2].astype(int) - 128).max() < 34  # 64/24 pixels each: 3 of 8 at most


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
    assert spread[0] < 1.05 * spread[1]  # it lets no more of the finest detail through


def test_lanczos_is_pillows() -> None:
    expected = Image.fromarray(NOISE[:, 10:50]).resize((30, 30), Image.Resampling.LANCZOS)
    assert (sample(file(RGB, "PNG"), size=30, resample="lanczos") == np.asarray(expected)).all()


@pytest.mark.parametrize("resample", ["area", "lanczos"])
@pytest.mark.parametrize("mode", ["center-crop", "short-side"])
def test_a_small_picture_is_enlarged_unless_a_side_is_asked_for(mode: str, resample: str) -> None:
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


def test_a_thread_of_a_picture_is_refused_and_not_made_huge() -> None:
    thread = file(np.zeros((2, 60_000, 3), np.uint8), "PNG")
    with pytest.raises(PhotoError, match="60000x2 pixels, too long and narrow"):
        sample(thread, mode="short-side", size=256)
    assert sample(thread, mode="center-crop", size=16).shape == (16, 16, 3)
    wide = file(np.zeros((16, 17_000, 3), np.uint8), "PNG")
    with pytest.raises(PhotoError, match="too long and narrow"):
        prepare(wide, Cutting("short-side", size=16, format="webp"), "key")
    assert prepare(wide, Cutting("short-side", size=16), "key").pieces[0].width == 17_000


@pytest.mark.parametrize("format", ALL)
def test_keep_keeps_the_bytes_and_names_the_true_format(format: str) -> None:
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


def test_keep_refuses_what_cannot_be_decoded() -> None:
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


def test_at_most_max_tiles_are_drawn_by_the_key() -> None:
    boxes = square_tiles(60, 40, (16,), 0.5)
    drawn = set()
    for key in ("a.png", "b.png"):
        how = Cutting("tiles", size=16, tile=(16,), tile_stride=0.5, max_tiles=5)
        pieces = prepare(file(RGB, "PNG"), how, key).pieces
        assert [piece.box for piece in pieces] == choose_tiles(key, boxes, 5)
        drawn.add(tuple(piece.box for piece in pieces))
    assert len(drawn) == 2


def test_a_picture_without_room_for_a_tile_is_refused() -> None:
    with pytest.raises(PhotoError, match="it has 60x40 pixels, its shorter side needs 48"):
        prepare(file(RGB, "PNG"), Cutting("tiles", tile=(48, 64)), "key")


@pytest.mark.parametrize(("format", "most"), [("jpeg", 15), ("webp", 20), ("png", 0)])
def test_a_sample_is_stored_in_the_format_asked_for(format: str, most: int) -> None:
    image = smooth(40, 40)
    (piece,) = prepare(file(image, "PNG"), Cutting(size=40, format=format), "key").pieces  # type: ignore[arg-type]
    stored = Image.open(io.BytesIO(piece.data))
    assert stored.format == format.upper()
    assert piece.extension == {"jpeg": "jpg"}.get(format, format)
    assert difference(np.asarray(stored), image) <= most
    if format == "jpeg":
        assert simplejpeg.decode_jpeg_header(piece.data)[3] == "420"


def test_quality_counts() -> None:
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
def test_the_same_bytes_come_each_time_in_whatever_thread(format: str, resample: str) -> None:
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


# Large pictures


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("resample", ["area", "lanczos"])
def test_a_large_picture_is_made_smaller_while_it_is_decoded(format: str, resample: str) -> None:
    image = smooth(900, 1203)
    data = file(image, format, quality=95)
    reduced = pixels(data, at_least=100)
    assert 100 <= min(reduced.shape[:2]) < 200
    assert abs(reduced.shape[1] / reduced.shape[0] - 1203 / 900) < 0.02
    picture = prepare(data, Cutting(size=50), "key")
    assert (picture.width, picture.height) == (1203, 900)
    exact = _resized(np.ascontiguousarray(image[:, 151:1051]), 50, 50, resample)
    assert psnr(sample(data, size=50, resample=resample), exact) > 38
    tiles = prepare(data, Cutting("tiles", size=50, tile=(900,), format="png"), "key").pieces
    assert psnr(by_pillow(tiles[0].data), _resized(image[:, :900], 50, 50, "area")) > 40


def test_a_sample_never_has_fewer_pixels_to_come_from_than_twice_its_side() -> None:
    for side in range(64, 700, 31):
        for format in ("JPEG", "PNG"):
            reduced = pixels(file(np.zeros((side, side + 9, 3), np.uint8), format), at_least=64)
            assert min(reduced.shape[:2]) >= 64


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "P", "L", "I;16"])
def test_bands_of_a_large_picture_fit_together(mode: str) -> None:
    gradient = np.linspace(0, 255, 1800).astype(np.uint8)
    image = Image.fromarray(np.ascontiguousarray(np.broadcast_to(gradient[:, None], (1800, 1500))))
    image = (
        Image.fromarray(np.asarray(image).astype(np.uint16) << 8)
        if mode == "I;16"
        else image.convert("RGB").convert(mode)
    )
    data = file(image, "TIFF" if mode == "CMYK" else "PNG")
    expected = gradient[:, None, None]
    if mode == "P":
        expected = np.asarray(image.convert("RGB"))
    assert difference(pixels(data), np.broadcast_to(expected, (1800, 1500, 3))) <= 1
    reduced = pixels(data, at_least=100)
    assert reduced.shape == (120, 100, 3)
    if mode != "P":
        means = gradient.astype(float).reshape(120, 15).mean(1)
        assert np.abs(reduced - means[:, None, None]).max() <= 1.5


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int, *between: bytes) -> bytes:
    """A tiny PNG file that claims to be huge."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(between) + body


def test_a_picture_above_the_pixel_limit_is_refused_at_once(
    recwarn: pytest.WarningsRecorder,
) -> None:
    pixels(file(RGB, "PNG"))  # what is imported once
    started = time.perf_counter()
    with pytest.raises(PhotoError) as caught:
        prepare(bomb(50_000, 50_000), Cutting(), "key")
    assert time.perf_counter() - started < 0.1
    assert str(caught.value) == "it has 50000x50000 pixels, images.max_pixels is 64000000"
    jpeg = bytearray(file(RGB, "JPEG"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 50_000, 60_000)
    with pytest.raises(PhotoError, match="it has 60000x50000 pixels"):
        prepare(bytes(jpeg), Cutting(), "key")
    for format in ALL:
        with pytest.raises(PhotoError, match=r"^it has 60x40 pixels, images\.max_pixels is 2399$"):
            prepare(file(RGB, format), Cutting(max_pixels=2399), "key")
    assert not recwarn.list


@pytest.mark.parametrize("format", [name for name in ALL if name in ("WEBP", "JPEG2000", "AVIF")])
def test_a_format_whose_reader_holds_copies_may_have_fewer_pixels(format: str) -> None:
    data = file(RGB, format)
    with pytest.raises(PhotoError, match=f"^it has 60x40 pixels, the limit for {format} is"):
        prepare(data, Cutting(size=20, max_pixels=2400), "key")
    assert prepare(data, Cutting(size=20, max_pixels=9600), "key").pieces


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(b"\0" * 300_000_000, 9)),
        png_chunk(b"iCCP", b"icc\0\0" + zlib.compress(b"\0" * 300_000_000, 9)),
    ],
    ids=["text", "profile"],
)
def test_a_bomb_in_a_comment_does_no_harm(chunk: bytes) -> None:
    data = file(RGB, "PNG")
    at = data.index(b"IDAT") - 4
    started = time.perf_counter()
    with contextlib.suppress(PhotoError):
        assert (pixels(data[:at] + chunk + data[at:]) == NOISE).all()
    assert time.perf_counter() - started < 1


def test_a_large_picture_with_alpha_needs_no_second_copy_of_itself(tmp_path: Path) -> None:
    side = 4000
    small = Image.fromarray(noise(50, 50, 4))
    path = tmp_path / "large.png"
    small.resize((side, side), Image.Resampling.NEAREST).save(path, compress_level=1)
    code = (
        "import resource, sys\n"
        "import cv2, simplejpeg\n"
        "from PIL import Image, ImageCms\n"
        "from data_prep.pictures.cutting import Cutting\n"
        "from data_prep.pictures.prepare import prepare\n"
        "data = open(sys.argv[1], 'rb').read()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for mode in ('center-crop', 'short-side', 'keep'):\n"
        "    prepare(data, Cutting(mode), 'key')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) * 1024 < 1.6 * 4 * side * side  # in RGBA it takes 1


# What is broken


@pytest.mark.parametrize("format", ALL)
@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("how", [Cutting(size=16), Cutting("keep"), Cutting("tiles", tile=(16,))])
def test_a_truncated_file_is_an_error_and_not_a_gray_half(
    format: str, share: float, how: Cutting
) -> None:
    data = file(RGB, format)
    with pytest.raises(PhotoError, match="it is "):
        prepare(data[: int(len(data) * share)], how, "key")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
@pytest.mark.parametrize("how", [Cutting(size=16), Cutting("keep"), Cutting("tiles", tile=(16,))])
def test_a_truncated_jpeg_is_told_even_where_its_end_was_put_back(
    progressive: bool, mode: str, end: bytes, how: Cutting
) -> None:
    data = file(RGB.convert(mode), "JPEG", progressive=progressive)
    with pytest.raises(PhotoError, match="it is truncated"):
        prepare(data[: len(data) * 3 // 4] + end, how, "key")


def test_a_flipped_bit_in_a_png_is_found() -> None:
    data = bytearray(file(RGB, "PNG", compress_level=0))
    data[len(data) // 2] ^= 1
    with pytest.raises(PhotoError, match="it is broken: a checksum does not fit"):
        pixels(bytes(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"hello, I am a text", "it is not an image, or of an unknown format"),
        (b"\0" * 100, "it is not an image, or of an unknown format"),
        (b"<html>404</html>", "it is not an image, or of an unknown format"),
        (b"\xff\xd8\xff", "it is broken: its header cannot be read"),
        (b"GIF89a", "it is broken: its header cannot be read"),
        (b"\x89PNG\r\n\x1a\n", "it is broken: its header cannot be read"),
    ],
)
def test_what_is_no_image_is_an_error_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(PhotoError) as caught:
        prepare(data, Cutting(), "key")
    assert str(caught.value) == reason


@pytest.mark.parametrize("format", ALL)
def test_random_damage_never_raises_anything_but_a_picture_error(format: str) -> None:
    random = np.random.Generator(np.random.Philox(7))
    whole = np.frombuffer(file(RGB, format), np.uint8)
    how = Cutting(size=16, max_pixels=10_000_000)
    for part in (len(whole), 64):  # anywhere, and in the header
        for _ in range(60):
            data = whole.copy()
            data[random.integers(0, part, 6)] = random.integers(0, 256, 6)
            with contextlib.suppress(PhotoError):
                prepare(data.tobytes(), how, "key")


# Magic bytes


@pytest.mark.parametrize("format", ALL)
def test_an_image_is_known_by_its_first_bytes(format: str) -> None:
    for mode in ("RGB", "L", "1", "P", "RGBA"):
        try:
            data = file(RGB.convert(mode), format)
        except (OSError, ValueError):
            continue  # the format has no such pixels
        assert looks_like_image(data[:32])
    assert not looks_like_image(b"\0" + file(RGB, format)[:31])


@pytest.mark.parametrize(
    "head", [b"", b"BM", b"P6", b"P7 x", b"PK\3\4", b"%PDF-1.7", b"{", b"RIFF....WAVE", b"BMW is a"]
)
def test_what_is_no_image_does_not_look_like_one(head: bytes) -> None:
    assert not looks_like_image(head.ljust(32, b" ") if len(head) > 2 else head)


# Perceptual hash


def photographs() -> list[np.ndarray]:
    paths = sorted(PHOTOS.rglob("*.jpg"))[::43]
    if not paths:
        pytest.skip(f"no photos at {PHOTOS}")
    return [pixels(path.read_bytes()) for path in paths]


def apart(a: np.ndarray, b: np.ndarray) -> int:
    return (phash(a) ^ phash(b)).bit_count()


def test_the_hash_of_a_copy_is_near_and_that_of_another_picture_is_not() -> None:
    photos = photographs()
    assert len(photos) > 90
    for photo in photos:
        again = simplejpeg.encode_jpeg(photo, 70, "RGB", "420")
        half = (photo.shape[1] // 2, photo.shape[0] // 2)
        assert apart(photo, simplejpeg.decode_jpeg(again)) <= 4
        assert apart(photo, cv2.resize(photo, half, interpolation=cv2.INTER_AREA)) <= 4
    hashes = [phash(photo) for photo in photos]
    others = [(a ^ b).bit_count() for i, a in enumerate(hashes) for b in hashes[:i]]
    assert np.mean(np.array(others) > 10) > 0.999


def test_the_hash_is_nearly_the_same_in_every_mode_and_format() -> None:
    for photo in photographs()[::20]:
        hashes = []
        for format in ("JPEG", "PNG", "WEBP"):
            data = file(photo, format, quality=95)
            for how in (Cutting(size=64), Cutting("short-side", size=64), Cutting("keep")):
                hashes.append(prepare(data, how, "key").phash)
        assert all((a ^ b).bit_count() <= 6 for a in hashes for b in hashes)


def test_the_hash_is_of_the_upright_picture() -> None:
    image = Image.fromarray(smooth(300, 400))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = file(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert (
        prepare(turned, Cutting(), "k").phash == prepare(file(image, "PNG"), Cutting(), "k").phash
    )
    assert prepare(turned, Cutting(), "k").phash == phash(np.asarray(image))


def test_the_hash_is_64_bits_that_tell_the_low_frequencies() -> None:
    x = (np.arange(256) + 0.5) / 256
    wave = 128 + 100 * np.cos(3 * np.pi * x)[None, :] + np.zeros((256, 1))
    hashed = phash(np.repeat(wave[..., None], 3, 2).round().astype(np.uint8))
    assert hashed >> 63 == 1  # its mean
    assert hashed >> 60 & 1 == 1  # three half waves across
    assert 0 <= hashed < 2**64


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (7, 3), (40, 2000)])
def test_a_picture_of_one_colour_has_a_hash_without_noise(shape: tuple[int, int]) -> None:
    hashes = {phash(np.full((*shape, 3), value, np.uint8)) for value in (1, 90, 255)}
    assert hashes == {1 << 63}


def test_reading_leaves_nothing_open(recwarn: pytest.WarningsRecorder) -> None:
    for format in ALL:
        prepare(file(RGB, format), Cutting(size=16), "key")
    assert not [w for w in recwarn.list if w.category is ResourceWarning]
