"""Colour profiles: pixels become sRGB."""

from __future__ import annotations

import io
import struct

import pytest
from photo_files import (
    RGB,
    difference,
    file,
    pixels,
)
from PIL import Image, ImageCms

from data_prep.pictures.cutting import Cutting
from data_prep.pictures.prepare import prepare


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
# A profile that exchanges red and blue.
TURNED = SRGB.replace(b"rXYZ", b"....").replace(b"bXYZ", b"rXYZ").replace(b"....", b"bXYZ")
LINEAR_GRAY = profile(b"GRAY", kTRC=b"curv\0\0\0\0\0\0\0\0")
# L* is 100 without ink, 0 with black, and 50 with any other ink: the gray 119 of sRGB.
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


def test_a_profile_is_used_with_alpha_and_with_a_palette() -> None:
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
    long = TURNED + b"\0" * 70_000  # bytes after the last tag are ignored
    out = pixels(file(Image.new("RGB", (32, 32), (220, 20, 20)), "JPEG", icc_profile=long))
    assert difference(out, (20, 20, 220)) <= 12


def test_samples_contain_no_profile_and_no_comment() -> None:
    data = file(RGB, "PNG", icc_profile=TURNED)
    for format in ("jpeg", "png", "webp"):
        (piece,) = prepare(data, Cutting(size=40, format=format), "key").pieces  # type: ignore[arg-type]
        assert set(Image.open(io.BytesIO(piece.data)).info) <= {
            *("jfif", "jfif_version", "jfif_unit", "jfif_density"),
            *("loop", "background", "timestamp", "duration"),
        }
