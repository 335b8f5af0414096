"""Decode a photo of any format to upright sRGB, uint8 [height, width, 3].

libjpeg-turbo decodes JPEG files and stops at the first warning. Pillow decodes the files that it
refuses, and all other formats. Large photos are reduced during decoding, so that a photo of 64
million pixels needs less than 700 MB.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_prep.pictures.colour import convert, srgb_transform
from data_prep.pictures.jpeg import decode_jpeg, read_jpeg_header
from data_prep.pictures.limits import Limits
from data_prep.pictures.orientation import SWAPPED, upright
from data_prep.pictures.pillow_reader import decode_with_pillow

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Decoded:
    """A decoded photo.

    `width` and `height` are those of the whole upright photo; `rgb` may have fewer pixels.
    """

    rgb: Pixels
    width: int
    height: int
    format: str  # Pillow's name: JPEG, PNG, ...
    mode: str  # Pillow's name of the file's kind of pixels: RGB, L, CMYK, P, ...


def decode_rgb(data: bytes, limits: Limits, at_least: int | None = None) -> Decoded:
    """Decode a photo to its end.

    Alpha is laid over white. Gray becomes three equal channels. 16 bits become the upper 8. Colour
    profiles are converted to sRGB. Of an animation the first image is used.

    Args:
        data: the file's bytes.
        limits: checked before the pixels are decoded.
        at_least: pixels. If given, the result may be smaller by a whole factor, as long as its
            shorter side has this many pixels.

    Raises:
        PhotoError: the photo is too large, too small, damaged or not an image.
    """
    header = read_jpeg_header(data) if data[:3] == b"\xff\xd8\xff" else None
    if header is not None:
        limits.check(header.width, header.height, "JPEG")
        rgb = decode_jpeg(data, header, at_least)
        if rgb is not None:
            mode = "RGB" if header.components == 3 else "L"
            if header.profile and (to_srgb := srgb_transform(header.profile, mode)):
                convert(rgb, mode, to_srgb)
            size = (header.width, header.height)
            return _decoded(rgb, size, header.orientation(), "JPEG", mode)
    return _decoded(*decode_with_pillow(data, limits, at_least))


def _decoded(
    rgb: Pixels, size: tuple[int, int], orientation: int, format: str, mode: str
) -> Decoded:
    """Turn the pixels upright; `size` is the stored (width, height)."""
    width, height = reversed(size) if orientation in SWAPPED else size
    return Decoded(upright(rgb, orientation), width, height, format, mode)
