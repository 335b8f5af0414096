"""Image formats: files are recognised by their first bytes."""

from __future__ import annotations

import pytest
from photo_files import (
    FORMATS,
    RGB,
    file,
)

from data_prep.pictures.formats import looks_like_image


@pytest.mark.parametrize("format", FORMATS)
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
def test_other_files_do_not_look_like_images(head: bytes) -> None:
    assert not looks_like_image(head.ljust(32, b" ") if len(head) > 2 else head)
