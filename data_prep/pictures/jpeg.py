"""JPEG files: read the header and decode the pixels with libjpeg-turbo.

Both functions return None where Pillow has to read the file instead.
"""

from __future__ import annotations

import struct
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_prep.pictures.limits import PhotoError
from data_prep.pictures.orientation import ORIENTATION, valid_orientation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

_FRACTIONS = (8, 4, 2)  # divisors at which libjpeg decodes faster, because it computes less


@dataclass(frozen=True)
class JpegHeader:
    """The facts that the segments before the first scan state."""

    width: int  # as stored, before the orientation is applied
    height: int
    components: int
    exif: bytes
    profile: bytes

    def orientation(self) -> int:
        """Return the EXIF orientation, 1 to 8."""
        from PIL import Image

        if not self.exif:
            return 1
        exif = Image.Exif()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exif.load(self.exif)
                return valid_orientation(exif.get(ORIENTATION))
        except Exception:  # the photo is usable although its tag is broken
            return 1


def read_jpeg_header(data: bytes) -> JpegHeader | None:
    """Read the segments before the first scan.

    Pillow's own reader takes ten times as long, which matters for small photos.
    """
    at, frame, exif = 2, None, b""
    profile = list[bytes]()
    try:
        while True:
            if data[at] != 0xFF:
                return None
            marker, length = data[at + 1], (data[at + 2] << 8) | data[at + 3]
            if marker == 0xDA:  # start of scan
                break
            body = at + 4
            if marker == 0xFF or length < 2:
                return None
            if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
                frame = struct.unpack_from(">HHB", data, body + 1)
            elif marker == 0xE1 and data.startswith(b"Exif\0\0", body):
                exif = exif or data[body : at + 2 + length]
            elif marker == 0xE1 and data.find(b"tiff:Orientation", body, at + length) > 0:
                return None  # XMP gives the orientation when EXIF does not; Pillow reads XMP
            elif marker == 0xE2 and data.startswith(b"ICC_PROFILE\0", body):
                profile.append(data[body + 12 : at + 2 + length])
            at += 2 + length
    except (IndexError, struct.error):
        return None
    if frame is None:
        return None
    height, width, components = frame
    return JpegHeader(width, height, components, exif, b"".join(p[2:] for p in sorted(profile)))


def decode_jpeg(data: bytes, header: JpegHeader, at_least: int | None) -> Pixels | None:
    """Decode the pixels as stored, uint8 [H, W, 3], perhaps at a fraction of the size.

    Uses the exact transform and the smooth upsampling of colours: the fast ones lose 1 to 10 dB and
    0.2 dB. A CMYK file is decoded only to find damage, because Pillow silently fills missing data.
    Raises PhotoError if the file is damaged.
    """
    import simplejpeg

    width, height, is_cmyk = header.width, header.height, header.components == 4
    fraction = _FRACTIONS[0] if is_cmyk else decoding_fraction(width, height, at_least)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            data,
            "CMYK" if is_cmyk else "RGB",
            min_width=-(-width // fraction),
            min_height=-(-height // fraction),
        )
    except ValueError as error:
        message = str(error).lower().removeprefix("corrupt jpeg data: ")
        if message.startswith("premature end"):
            raise PhotoError("it is truncated") from None
        if message.startswith(("bad huffman code", "found marker")):
            raise PhotoError(f"it is broken: {message}") from None
        return None
    return pixels if header.components in (1, 3) else None


def decoding_fraction(width: int, height: int, at_least: int | None) -> int:
    """Return the divisor of both sides (1, 2, 4 or 8) that leaves `at_least` pixels of a side."""
    if at_least is None:
        return 1
    return next((part for part in _FRACTIONS if min(width, height) // part >= at_least), 1)
