"""Decoding: every kind of file becomes upright sRGB pixels."""

from __future__ import annotations

import io
import struct

import cv2
import numpy as np
import pytest
from photo_files import (
    AS_IT_IS,
    FORMATS,
    NOISE,
    RGB,
    by_pillow,
    difference,
    file,
    noise,
    pixels,
    sample,
    smooth,
)
from PIL import Image, ImageCms, ImageOps

from data_prep.pictures.decoding import decode_rgb
from data_prep.pictures.limits import PhotoError


def test_rgb_pixels_are_unchanged() -> None:
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
def test_cmyk_becomes_rgb_and_adobe_inversion_is_undone(format: str) -> None:
    data = file(Image.new("RGB", (32, 32), RED).convert("CMYK"), format)
    assert (b"Adobe" in data) == (format == "JPEG")
    photo = decode_rgb(data, AS_IT_IS)
    assert difference(photo.rgb, RED) < 6
    assert photo.mode == "CMYK"


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
def test_the_first_of_several_images_in_a_file_is_used(format: str) -> None:
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    data = file(first, format, save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(data)).n_frames == 2  # type: ignore[attr-defined]
    photo = decode_rgb(data, AS_IT_IS)
    assert difference(photo.rgb, (255, 0, 0)) <= 3
    assert photo.format == {"MPO": "JPEG"}.get(format, format)


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_is_decoded_and_named(format: str) -> None:
    data = file(smooth(40, 60), format)
    photo = decode_rgb(data, AS_IT_IS)
    assert (photo.width, photo.height, photo.format) == (60, 40, format)
    assert difference(photo.rgb, by_pillow(data)) <= 4


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_is_decoded_exactly(subsampling: str, progressive: bool) -> None:
    data = file(NOISE, "JPEG", quality=90, subsampling=subsampling, progressive=progressive)
    assert difference(pixels(data), by_pillow(data)) <= 1  # two versions of libjpeg-turbo


def test_a_jpeg_with_extra_bytes_is_decoded() -> None:
    data = file(smooth(40, 60), "JPEG")
    assert (pixels(data[:-2] + b"needless" + data[-2:]) == pixels(data)).all()
    assert (pixels(data + b"the camera's own notes") == pixels(data)).all()
    filled = data[:2] + b"\xff\xff" + data[2:]  # fill bytes before a marker
    assert difference(pixels(filled), pixels(data)) <= 1


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation: int, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file(smooth(40, 60), format, exif=exif)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    photo = decode_rgb(data, AS_IT_IS)
    assert (photo.width, photo.height) == ((60, 40) if orientation < 5 else (40, 60))
    assert difference(photo.rgb, upright) <= 1
    assert difference(sample(data, size=20), sample(file(upright, "PNG"), size=20)) <= 1


def test_a_photo_of_a_camera_held_upright_is_turned_upright() -> None:
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:, :32] = 255  # the left side of the file is the top of the photo (orientation 6)
    exif = Image.Exif()
    exif[0x0112] = 6
    out = pixels(file(stored, "JPEG", exif=exif))
    assert out.shape == (64, 32, 3)
    assert out[:30].min() > 250
    assert out[-30:].max() < 5


@pytest.mark.parametrize("value", [0, 9])
def test_an_undefined_orientation_is_ignored(value: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = value
    assert pixels(file(RGB, "JPEG", exif=exif)).shape == (40, 60, 3)


def test_a_photo_with_broken_exif_is_accepted() -> None:
    data = file(smooth(40, 60), "JPEG")
    broken = b"Exif\0\0II*\0\xff\xff\xff\xff"
    segment = b"\xff\xe1" + struct.pack(">H", len(broken) + 2) + broken
    assert (pixels(data[:2] + segment + data[2:]) == pixels(data)).all()
