"""Pictures: every kind of file becomes upright RGB, and what is broken is told."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep import pictures
from data_prep.pictures import PictureError, center_crop, cut, decode, encode, inspect


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.Generator(np.random.Philox(seed)).integers(0, 256, shape, dtype=np.uint8)


def file(image: Image.Image, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode(data)
    assert image.mode == "RGB"
    return np.asarray(image)


RGB = Image.fromarray(noise(40, 60))


def test_rgb_comes_as_it_is() -> None:
    assert (pixels(file(RGB, "PNG")) == np.asarray(RGB)).all()


def test_gray_becomes_three_equal_channels() -> None:
    gray = noise(20, 30, 1)
    out = pixels(file(Image.fromarray(gray), "PNG"))
    assert (out == gray[..., None]).all()


def test_sixteen_bits_become_the_upper_eight() -> None:
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for format in ("PNG", "TIFF"):
        out = pixels(file(Image.fromarray(deep), format))
        assert (out == (deep >> 8)[..., None]).all()


def test_a_palette_becomes_its_colours() -> None:
    palette = RGB.quantize(8)
    assert (pixels(file(palette, "PNG")) == np.asarray(palette.convert("RGB"))).all()


def test_one_bit_becomes_black_and_white() -> None:
    assert set(np.unique(pixels(file(RGB.convert("1"), "PNG")))) == {0, 255}


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_laid_over_white(mode: str) -> None:
    image = Image.new(mode, (8, 8), 0)
    assert (pixels(file(image, "PNG")) == 255).all()


def test_a_transparent_palette_colour_is_laid_over_white() -> None:
    image = Image.new("P", (8, 8), 0)
    image.putpalette([0, 0, 0, 9, 9, 9])
    assert (pixels(file(image, "PNG", transparency=0)) == 255).all()


def test_cmyk_becomes_rgb() -> None:
    red = Image.new("RGB", (32, 32), (200, 30, 40)).convert("CMYK")
    out = pixels(file(red, "JPEG", quality=95)).reshape(-1, 3).mean(0)
    assert np.abs(out - (200, 30, 40)).max() < 6


def test_an_animation_gives_its_first_picture() -> None:
    first, second = Image.new("RGB", (8, 8), (255, 0, 0)), Image.new("RGB", (8, 8), (0, 0, 255))
    out = pixels(file(first, "GIF", save_all=True, append_images=[second]))
    assert (out == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_and_the_inspected_size_is_the_upright_one(
    orientation: int,
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = file(RGB, "JPEG", exif=exif)
    facts, image = inspect(data), decode(data)
    assert (facts.width, facts.height) == image.size
    assert image.size == ((60, 40) if orientation < 5 else (40, 60))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"])
def test_every_format_is_inspected_without_being_changed(format: str) -> None:
    facts = inspect(file(RGB, format))
    assert (facts.width, facts.height, facts.format, facts.whole) == (60, 40, format, True)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM"])
@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("reader", [inspect, decode])
def test_a_truncated_file_is_an_error_and_not_a_gray_half(
    format: str, share: float, reader: object
) -> None:
    data = file(RGB, format)
    assert callable(reader)
    with pytest.raises(PictureError):
        reader(data[: int(len(data) * share)])


@pytest.mark.parametrize("data", [b"", b"hello, I am a text", b"\xff\xd8\xff", b"GIF89a"])
def test_what_is_no_image_is_an_error_with_a_reason(data: bytes) -> None:
    with pytest.raises(PictureError, match="it is"):
        inspect(data)


def test_random_damage_never_raises_anything_but_a_picture_error() -> None:
    random = np.random.Generator(np.random.Philox(7))
    for format in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"):
        whole = np.frombuffer(file(RGB, format), np.uint8)
        for _ in range(40):
            data = whole.copy()
            data[random.integers(0, len(data), 12)] = random.integers(0, 256, 12)
            try:
                decode(data.tobytes(), max_pixels=10_000_000)
            except PictureError:
                continue


def bomb(width: int, height: int) -> bytes:
    """A tiny PNG file that claims to be huge."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def test_a_picture_above_the_pixel_limit_is_not_decoded() -> None:
    facts = inspect(bomb(10_000, 9_000))
    assert (facts.width, facts.height, facts.whole) == (10_000, 9_000, False)
    with pytest.raises(PictureError, match="10000x9000 pixels, max is 89000000"):
        decode(bomb(10_000, 9_000))


def test_a_decompression_bomb_is_an_error_without_a_warning(recwarn: object) -> None:
    with pytest.raises(PictureError, match="too many pixels"):
        inspect(bomb(100_000, 100_000))
    assert isinstance(recwarn, pytest.WarningsRecorder)
    assert not recwarn.list


def test_a_large_jpeg_is_decoded_at_a_fraction_that_still_has_the_pixels_asked_for() -> None:
    data = file(Image.new("RGB", (800, 640)), "JPEG")
    assert decode(data, at_least=150).size == (200, 160)
    assert decode(data, at_least=600).size == (800, 640)


def test_a_tile_is_the_pixels_of_its_square() -> None:
    tile = np.asarray(cut(RGB, 7, 5, 16, 16))
    assert (tile == np.asarray(RGB)[5:21, 7:23]).all()


def test_the_center_crop_is_centred() -> None:
    assert (np.asarray(center_crop(RGB, 40)) == np.asarray(RGB)[:, 10:50]).all()


def test_resizing_is_antialiased_and_sees_only_its_square() -> None:
    stripes = np.zeros((64, 128, 3), np.uint8)
    stripes[:, 0:64:2] = 255  # finest stripes left, and beyond x = 64 white
    stripes[:, 64:] = 255
    tile = np.asarray(cut(Image.fromarray(stripes), 0, 0, 64, 16)).astype(int)
    assert np.abs(tile[:, 2:-2] - 128).max() < 8
    assert tile[:, -1].max() < 200


@pytest.mark.parametrize("format", ["jpeg", "png", "webp"])
def test_encoding_gives_the_same_bytes_each_time_and_no_metadata(
    format: pictures.Format,
) -> None:
    profile = b"a profile that must not travel along" * 9
    smooth = Image.linear_gradient("L").convert("RGB")
    image = decode(file(smooth, "PNG", icc_profile=profile))
    data = encode(image, format, 90)
    assert encode(image, format, 90) == data
    assert profile not in data
    error = np.abs(pixels(data).astype(int) - np.asarray(smooth))
    assert error.max() <= (0 if format == "png" else 8)


def test_quality_counts() -> None:
    assert len(encode(RGB, "jpeg", 95)) > len(encode(RGB, "jpeg", 50))


def test_decoded_pictures_are_held_up_to_their_bytes() -> None:
    held = pictures.DecodedPictures(max_bytes=2 * 3 * 60 * 40)
    calls: list[str] = []

    def decoded(name: str) -> Image.Image:
        calls.append(name)
        return RGB.copy()

    for name in ("a", "b", "a", "c", "a", "b"):
        held.get(name, lambda name=name: decoded(name))  # type: ignore[misc]
    assert calls == ["a", "b", "c", "b"]
    assert "a" in held
    held.clear()
    assert "a" not in held
