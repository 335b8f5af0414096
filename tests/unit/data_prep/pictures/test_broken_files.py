"""Broken files: each is refused with a reason."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from photo_files import (
    FORMATS,
    RGB,
    file,
    pixels,
)

from data_prep.pictures.cutting import Cutting
from data_prep.pictures.limits import PhotoError
from data_prep.pictures.prepare import prepare


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("how", [Cutting(size=16), Cutting("keep"), Cutting("tiles", tile=(16,))])
def test_a_truncated_file_is_an_error_and_not_a_half_gray_image(
    format: str, share: float, how: Cutting
) -> None:
    data = file(RGB, format)
    with pytest.raises(PhotoError, match="it is "):
        prepare(data[: int(len(data) * share)], how, "key")


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("end", [b"", b"\xff\xd9"])
@pytest.mark.parametrize("how", [Cutting(size=16), Cutting("keep"), Cutting("tiles", tile=(16,))])
def test_a_truncated_jpeg_is_found_even_with_an_end_marker_added(
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
def test_a_file_that_is_not_an_image_is_an_error_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(PhotoError) as caught:
        prepare(data, Cutting(), "key")
    assert str(caught.value) == reason


@pytest.mark.parametrize("format", FORMATS)
def test_random_damage_raises_only_photo_errors(format: str) -> None:
    random = np.random.Generator(np.random.Philox(7))
    whole = np.frombuffer(file(RGB, format), np.uint8)
    how = Cutting(size=16, max_pixels=10_000_000)
    for part in (len(whole), 64):  # anywhere, or only in the header
        for _ in range(60):
            data = whole.copy()
            data[random.integers(0, part, 6)] = random.integers(0, 256, 6)
            with contextlib.suppress(PhotoError):
                prepare(data.tobytes(), how, "key")
