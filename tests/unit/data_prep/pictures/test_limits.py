"""Large photos: limits, memory, and reduction during decoding."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from memory import growth
from photo_files import (
    FORMATS,
    NOISE,
    REPOSITORY,
    RGB,
    bomb,
    by_pillow,
    difference,
    file,
    noise,
    pixels,
    png_chunk,
    psnr,
    sample,
    smooth,
)
from PIL import Image

from data_prep.pictures.cutting import Cutting
from data_prep.pictures.limits import PhotoError
from data_prep.pictures.prepare import _resized, prepare


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("resample", ["area", "lanczos"])
def test_a_large_photo_is_reduced_during_decoding(format: str, resample: str) -> None:
    image = smooth(900, 1203)
    data = file(image, format, quality=95)
    reduced = pixels(data, at_least=100)
    assert 100 <= min(reduced.shape[:2]) < 200
    assert abs(reduced.shape[1] / reduced.shape[0] - 1203 / 900) < 0.02
    photo = prepare(data, Cutting(size=50), "key")
    assert (photo.width, photo.height) == (1203, 900)
    exact = _resized(np.ascontiguousarray(image[:, 151:1051]), 50, 50, resample)
    assert psnr(sample(data, size=50, resample=resample), exact) > 38
    tiles = prepare(data, Cutting("tiles", size=50, tile=(900,), format="png"), "key").pieces
    assert psnr(by_pillow(tiles[0].data), _resized(image[:, :900], 50, 50, "area")) > 40


def test_a_reduced_photo_has_at_least_the_requested_pixels() -> None:
    for side in range(64, 700, 31):
        for format in ("JPEG", "PNG"):
            reduced = pixels(file(np.zeros((side, side + 9, 3), np.uint8), format), at_least=64)
            assert min(reduced.shape[:2]) >= 64


@pytest.mark.parametrize("mode", ["CMYK", "RGBA", "P", "L", "I;16"])
def test_bands_of_a_large_photo_fit_together(mode: str) -> None:
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


def test_a_photo_above_the_pixel_limit_is_refused_without_decoding(
    recwarn: pytest.WarningsRecorder,
) -> None:
    pixels(file(RGB, "PNG"))  # imports the libraries
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
    for format in FORMATS:
        with pytest.raises(PhotoError, match=r"^it has 60x40 pixels, images\.max_pixels is 2399$"):
            prepare(file(RGB, format), Cutting(max_pixels=2399), "key")
    assert not recwarn.list


@pytest.mark.parametrize("format", sorted({"WEBP", "JPEG2000", "AVIF"} & set(FORMATS)))
def test_formats_with_readers_that_keep_copies_have_a_lower_pixel_limit(format: str) -> None:
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
def test_a_bomb_in_a_comment_is_harmless(chunk: bytes) -> None:
    data = file(RGB, "PNG")
    at = data.index(b"IDAT") - 4
    started = time.perf_counter()
    with contextlib.suppress(PhotoError):
        assert (pixels(data[:at] + chunk + data[at:]) == NOISE).all()
    assert time.perf_counter() - started < 1


def test_a_large_photo_with_alpha_needs_no_second_copy_in_memory(tmp_path: Path) -> None:
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
    assert int(done.stdout) * 1024 < 1.6 * 4 * side * side  # the RGBA pixels need 1


@pytest.mark.parametrize("kind", [b"iCCP", b"zTXt", b"iTXt"])
def test_compressed_texts_and_profiles_of_a_png_take_little_memory(
    kind: bytes, tmp_path: Path
) -> None:
    packed = zlib.compress(bytes(300 << 20), 1)
    before = {b"iCCP": b"p\0\0", b"zTXt": b"t\0\0", b"iTXt": b"t\0\1\0\0\0"}[kind]
    whole = file(np.zeros((64, 64, 3), np.uint8), "PNG")
    at = whole.index(b"IDAT") - 4
    path = tmp_path / "a.png"
    path.write_bytes(whole[:at] + png_chunk(kind, before + packed) + whole[at:])
    megabytes, printed = growth(
        "from data_prep.core.errors import ItemError\n"
        "from data_prep.pictures.cutting import Cutting\n"
        "from data_prep.pictures.prepare import prepare\n"
        f"data = open({str(path)!r}, 'rb').read()",
        "try:\n    print(len(prepare(data, Cutting(size=32), 'key').pieces))\n"
        "except ItemError as error:\n    print(error)",
    )
    assert printed == "1" or "broken" in printed
    assert megabytes < 200
