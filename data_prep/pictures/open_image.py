"""Open an image of unknown origin: the only place that calls Pillow's `Image.open`.

Pillow has readers for some forty formats. Some start other programs, and many are tested little. So
only the formats of `data_prep.pictures.formats` are read, whatever the file is called.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from data_prep.pictures.formats import LOOK, is_heic, looks_like_image, pillow_formats
from data_prep.pictures.limits import HeicError, Limits, PhotoError

if TYPE_CHECKING:
    from PIL import Image


@contextmanager
def opened(data: bytes, limits: Limits) -> Iterator[Image.Image]:
    """Open an image: read its header, check its size, and find a PNG file that is cut off.

    Pillow decodes the pixels when they are used, inside the `with` block. Every failure there
    becomes a PhotoError too.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of unusual tags
            with Image.open(io.BytesIO(data), formats=pillow_formats()) as image:
                limits.check(*image.size, image.format or "")
                if image.format == "PNG":
                    _check_png(data)
                yield image
    except (PhotoError, MemoryError):
        raise
    except UnidentifiedImageError:
        if not data:
            raise PhotoError("it is empty") from None
        if looks_like_image(data[:32]):
            raise PhotoError("it is broken: its header cannot be read") from None
        # Both have one message: tables of datasets keep it, and their digests must not change.
        kind = HeicError if is_heic(data[:LOOK]) else PhotoError
        raise kind("it is not an image, or of an unknown format") from None
    except Exception as error:  # with broken data Pillow's readers raise nearly anything
        message = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        is_short = "truncated" in message.lower() or isinstance(error, EOFError)
        raise PhotoError("it is truncated" if is_short else f"it is broken: {message}") from None


def _check_png(data: bytes) -> None:
    """Check the checksums, which Pillow ignores for pixel data. Raises PhotoError."""
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        kind = data[at + 4 : at + 8]
        crc = int.from_bytes(data[end : end + 4], "big")
        needed = not kind[0] & 0x20  # a small first letter marks an optional chunk
        if needed and zlib.crc32(memoryview(data)[at + 4 : end]) != crc:
            raise PhotoError("it is broken: a checksum does not fit")
        if kind == b"IEND":
            return
        at = end + 4
    raise PhotoError("it is truncated")
