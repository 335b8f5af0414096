"""The perceptual hash."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import simplejpeg
from photo_files import (
    FORMATS,
    PHOTOS,
    RGB,
    file,
    pixels,
    smooth,
)
from PIL import Image

from data_prep.pictures.cutting import Cutting
from data_prep.pictures.perceptual import phash
from data_prep.pictures.prepare import prepare


def real_photos() -> list[np.ndarray]:
    paths = sorted(PHOTOS.rglob("*.jpg"))[::43]
    if not paths:
        pytest.skip(f"no photos at {PHOTOS}")
    return [pixels(path.read_bytes()) for path in paths]


def apart(a: np.ndarray, b: np.ndarray) -> int:
    return (phash(a) ^ phash(b)).bit_count()


def test_the_hash_of_a_copy_is_near_and_the_hash_of_another_photo_is_not() -> None:
    photos = real_photos()
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
    for photo in real_photos()[::20]:
        hashes = []
        for format in ("JPEG", "PNG", "WEBP"):
            data = file(photo, format, quality=95)
            for how in (Cutting(size=64), Cutting("short-side", size=64), Cutting("keep")):
                hashes.append(prepare(data, how, "key").phash)
        assert all((a ^ b).bit_count() <= 6 for a in hashes for b in hashes)


def test_the_hash_is_computed_from_the_upright_photo() -> None:
    image = Image.fromarray(smooth(300, 400))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = file(image.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    assert (
        prepare(turned, Cutting(), "k").phash == prepare(file(image, "PNG"), Cutting(), "k").phash
    )
    assert prepare(turned, Cutting(), "k").phash == phash(np.asarray(image))


def test_the_hash_has_64_bits_for_the_low_frequencies() -> None:
    x = (np.arange(256) + 0.5) / 256
    wave = 128 + 100 * np.cos(3 * np.pi * x)[None, :] + np.zeros((256, 1))
    hashed = phash(np.repeat(wave[..., None], 3, 2).round().astype(np.uint8))
    assert hashed >> 63 == 1  # its mean
    assert hashed >> 60 & 1 == 1  # three half waves across
    assert 0 <= hashed < 2**64


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (7, 3), (40, 2000)])
def test_an_image_of_one_colour_has_a_hash_without_noise(shape: tuple[int, int]) -> None:
    hashes = {phash(np.full((*shape, 3), value, np.uint8)) for value in (1, 90, 255)}
    assert hashes == {1 << 63}


def test_reading_leaves_no_file_open(recwarn: pytest.WarningsRecorder) -> None:
    for format in FORMATS:
        prepare(file(RGB, format), Cutting(size=16), "key")
    assert not [w for w in recwarn.list if w.category is ResourceWarning]
