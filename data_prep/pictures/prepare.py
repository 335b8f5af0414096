"""Turn the bytes of one photo into encoded samples.

`prepare` reads a photo once and does everything with it: it checks the limits, computes the
perceptual hash and cuts the samples. The same bytes always give the same samples, in any process or
thread.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_prep.pictures.cutting import FILE_EXTENSION, LONGEST, Cutting, Format
from data_prep.pictures.decoding import Decoded, decode_rgb
from data_prep.pictures.limits import Limits, PhotoError
from data_prep.pictures.perceptual import SAMPLED, phash
from data_prep.pictures.tiling import Box, choose_tiles, square_tiles

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

_MOST_POINTS = 1 << 24  # pixels of an intermediate image, which bounds the memory
_KEPT = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}  # extensions that are not the format


@dataclass(frozen=True)
class Piece:
    """One sample: an encoded upright image of `width` x `height` pixels."""

    box: Box | None  # the tile in the upright photo
    data: bytes
    extension: str
    width: int
    height: int


@dataclass(frozen=True)
class Prepared:
    """A photo and its samples; `width` and `height` are those of the upright photo."""

    width: int
    height: int
    format: str  # Pillow's name: JPEG, PNG, ...
    mode: str  # Pillow's name of its kind of pixels: RGB, L, CMYK, P, ...
    phash: int  # 64 bits, unsigned: see data_prep.pictures.perceptual
    pieces: list[Piece]


def prepare(data: bytes, how: Cutting, key: str) -> Prepared:
    """Cut the samples from an encoded photo.

    A large photo is decoded at a fraction of its size, with at least twice the pixels of `size`.
    Its perceptual hash may then differ by one or two bits from that of the whole photo.

    Args:
        data: the file's bytes.
        how: the samples to cut.
        key: the item's key, which decides which `max_tiles` tiles are chosen.

    Raises:
        PhotoError: the photo cannot be used.
    """
    at_least = {"keep": SAMPLED, "tiles": None}.get(how.mode, 2 * how.size)
    photo = decode_rgb(data, Limits(how.max_pixels, how.min_side), at_least)
    hashed = phash(photo.rgb)  # first, while the pixels are in the processor's cache
    if how.mode == "keep":
        extension = _KEPT.get(photo.format, photo.format.lower())
        pieces = [Piece(None, data, extension, photo.width, photo.height)]
    elif how.mode == "tiles":
        pieces = _tiles(photo, how, key)
    elif how.mode == "short-side":
        pieces = [_piece(photo.rgb, *_short_side(photo, how), how)]
    else:
        pieces = [_piece(_centre(photo.rgb), how.size, how.size, how)]
    return Prepared(photo.width, photo.height, photo.format, photo.mode, hashed, pieces)


def _tiles(photo: Decoded, how: Cutting, key: str) -> list[Piece]:
    """Cut the tiles of a photo. Raises PhotoError if no tile fits."""
    boxes = square_tiles(photo.width, photo.height, sorted(set(how.tile)), how.tile_stride)
    if not boxes:
        size = f"it has {photo.width}x{photo.height} pixels"
        raise PhotoError(f"{size}, its shorter side needs {min(how.tile)}")
    pieces = []
    for left, top, side in choose_tiles(key, boxes, how.max_tiles) if how.max_tiles else boxes:
        square = photo.rgb[top : top + side, left : left + side]
        pieces.append(_piece(square, how.size, how.size, how, (left, top, side)))
    return pieces


def _short_side(photo: Decoded, how: Cutting) -> tuple[int, int]:
    """Return the width and height of the whole photo when its shorter side is `size`."""
    short = min(photo.width, photo.height)
    width, height = (
        max(how.size, round(side * how.size / short)) for side in (photo.width, photo.height)
    )
    if width * height > how.max_pixels or max(width, height) > LONGEST[how.format]:
        raise PhotoError(
            f"it has {photo.width}x{photo.height} pixels, too long and narrow:"
            f" the sample would have {width}x{height}"
        )
    return width, height


def _centre(rgb: Pixels) -> Pixels:
    """Return the largest centred square."""
    height, width = rgb.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return rgb[top : top + side, left : left + side]


def _piece(rgb: Pixels, width: int, height: int, how: Cutting, box: Box | None = None) -> Piece:
    data = _encoded(_resized(rgb, width, height, how.resample), how.format, how.quality)
    return Piece(box, data, FILE_EXTENSION[how.format], width, height)


def _resized(rgb: Pixels, width: int, height: int, resample: str) -> Pixels:
    """Resize an image with antialiasing."""
    import cv2
    import numpy as np
    from PIL import Image

    high, wide = rgb.shape[:2]
    if (wide, high) == (width, height):
        return rgb
    if resample == "lanczos":
        whole = Image.fromarray(np.ascontiguousarray(rgb))
        return np.asarray(whole.resize((width, height), Image.Resampling.LANCZOS))
    if width > wide or height > high:
        enlarged: Pixels = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_CUBIC)
        return enlarged
    # OpenCV's exact mean is slow when the ratio is not a whole number. So first sample k x k evenly
    # spaced points of each result pixel, at most one original pixel apart, then take their exact
    # mean (our method). A test checks that the difference is above 45 dB.
    points = (width * -(-wide // width), height * -(-high // height))
    if points != (wide, high) and points[0] * points[1] <= _MOST_POINTS:
        rgb = cv2.resize(rgb, points, interpolation=cv2.INTER_LINEAR)
    small: Pixels = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)
    return small


def _encoded(rgb: Pixels, format: Format, quality: int) -> bytes:
    """Encode an image, with the same bytes every time; `quality` is for jpeg and webp."""
    import numpy as np
    import simplejpeg
    from PIL import Image

    rgb = np.ascontiguousarray(rgb)
    if format == "jpeg":
        data: bytes = simplejpeg.encode_jpeg(rgb, quality, "RGB", "420")
        return data
    file = io.BytesIO()
    if format == "webp":
        Image.fromarray(rgb).save(file, "WEBP", quality=quality, method=4)
    else:
        Image.fromarray(rgb).save(file, "PNG", compress_level=6)
    return file.getvalue()
