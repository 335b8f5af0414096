"""Pictures: the bytes of one photograph to the encoded samples that are cut from it.

`prepare` reads a photograph once for all that is asked of it: the limits, the perceptual hash, the
samples. The same bytes give the same samples each time, in whatever process or thread.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from data_prep.pictures.decoding import Decoded, Limits, decode_rgb
from data_prep.pictures.decoding import PictureError as PictureError
from data_prep.pictures.formats import looks_like_image as looks_like_image
from data_prep.pictures.perceptual import SAMPLED, phash
from data_prep.pictures.tiling import Box, draw_boxes, tile_boxes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    Pixels = NDArray[np.uint8]

_MOST_POINTS = 1 << 24  # of a picture in between, so that it stays small
MAX_PIXELS = 64_000_000  # a worker stays below 700 MB with it

Format = Literal["jpeg", "png", "webp"]
FILE_EXTENSION: dict[Format, str] = {"jpeg": "jpg", "png": "png", "webp": "webp"}
_LONGEST: dict[Format, int] = {"jpeg": 65_500, "png": 2**31 - 1, "webp": 16_383}
_KEPT = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}  # else the format's name


@dataclass(frozen=True)
class Cutting:
    """Which samples are cut from a photograph, and how they are stored.

    `center-crop`: the largest centred square, resized to `size` x `size`. `short-side`: all of it,
    its shorter side resized to `size`. `keep`: the original bytes. `tiles`: squares of the sides
    `tile`, `tile_stride` x side apart, resized to `size` x `size`; at most `max_tiles`, 0: all.
    `area` takes the mean of the pixels that a new one covers, and bicubic where it enlarges.
    """

    mode: Literal["center-crop", "short-side", "keep", "tiles"] = "center-crop"
    size: int = 256
    format: Format = "jpeg"
    quality: int = 95  # of jpeg and webp, 1 to 100
    resample: Literal["area", "lanczos"] = "area"
    max_pixels: int = MAX_PIXELS
    min_side: int = 0  # least pixels of the shorter side; 0: any
    tile: tuple[int, ...] = (256,)
    tile_stride: float = 1.0
    max_tiles: int = 0


@dataclass(frozen=True)
class Piece:
    """One sample: an encoded picture of `width` x `height` pixels, upright."""

    box: Box | None  # the tile in the upright photograph
    data: bytes
    extension: str
    width: int
    height: int


@dataclass(frozen=True)
class Prepared:
    """A photograph and its samples; width and height are its own, upright."""

    width: int
    height: int
    format: str  # Pillow's name: JPEG, PNG, ...
    mode: str  # of its pixels, Pillow's name: RGB, L, CMYK, P, ...
    phash: int  # see data_prep.pictures.perceptual; 64 bits, unsigned
    pieces: list[Piece]


def prepare(data: bytes, how: Cutting, key: str) -> Prepared:
    """The samples of an encoded photograph. `key` is the item's: max_tiles are drawn by it.

    A large photograph is decoded at a fraction of its size, with at least twice the pixels of
    `size`; its perceptual hash may differ by a bit or two from that of the whole. Raises
    PictureError.
    """
    at_least = {"keep": SAMPLED, "tiles": None}.get(how.mode, 2 * how.size)
    picture = decode_rgb(data, Limits(how.max_pixels, how.min_side), at_least)
    hashed = phash(picture.rgb)  # first, while the pixels are in the processor's cache
    if how.mode == "keep":
        extension = _KEPT.get(picture.format, picture.format.lower())
        pieces = [Piece(None, data, extension, picture.width, picture.height)]
    elif how.mode == "tiles":
        pieces = _tiles(picture, how, key)
    elif how.mode == "short-side":
        pieces = [_piece(picture.rgb, *_short_side(picture, how), how)]
    else:
        pieces = [_piece(_centre(picture.rgb), how.size, how.size, how)]
    width, height = picture.width, picture.height
    return Prepared(width, height, picture.format, picture.mode, hashed, pieces)


def _tiles(picture: Decoded, how: Cutting, key: str) -> list[Piece]:
    boxes = tile_boxes(picture.width, picture.height, sorted(set(how.tile)), how.tile_stride)
    if not boxes:
        size = f"it has {picture.width}x{picture.height} pixels"
        raise PictureError(f"{size}, its shorter side needs {min(how.tile)}")
    pieces = []
    for left, top, side in draw_boxes(key, boxes, how.max_tiles) if how.max_tiles else boxes:
        square = picture.rgb[top : top + side, left : left + side]
        pieces.append(_piece(square, how.size, how.size, how, (left, top, side)))
    return pieces


def _short_side(picture: Decoded, how: Cutting) -> tuple[int, int]:
    """Width and height of the whole picture with the shorter side `size`."""
    short = min(picture.width, picture.height)
    width, height = (
        max(how.size, round(side * how.size / short)) for side in (picture.width, picture.height)
    )
    if width * height > how.max_pixels or max(width, height) > _LONGEST[how.format]:
        raise PictureError(
            f"it has {picture.width}x{picture.height} pixels, too long and narrow:"
            f" it would be stored with {width}x{height}"
        )
    return width, height


def _centre(rgb: Pixels) -> Pixels:
    """The largest centred square."""
    height, width = rgb.shape[:2]
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    return rgb[top : top + side, left : left + side]


def _piece(rgb: Pixels, width: int, height: int, how: Cutting, box: Box | None = None) -> Piece:
    data = _encoded(_resized(rgb, width, height, how.resample), how.format, how.quality)
    return Piece(box, data, FILE_EXTENSION[how.format], width, height)


def _resized(rgb: Pixels, width: int, height: int, resample: str) -> Pixels:
    """The whole of `rgb` at another size, antialiased."""
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
    # The mean over the area of each pixel, taken at k x k evenly spaced points of it that are at
    # most one original pixel apart (ours). OpenCV's exact mean is slow at fractions; a
    # test holds the two within 45 dB of each other.
    points = (width * -(-wide // width), height * -(-high // height))
    if points != (wide, high) and points[0] * points[1] <= _MOST_POINTS:
        rgb = cv2.resize(rgb, points, interpolation=cv2.INTER_LINEAR)
    small: Pixels = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)
    return small


def _encoded(rgb: Pixels, format: Format, quality: int) -> bytes:
    """The picture's file, the same bytes each time. `quality` 1-100 is for jpeg and webp."""
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


def decode(data: bytes) -> Image.Image:
    """A whole picture as Pillow's, upright RGB. Raises PictureError."""
    from PIL import Image

    return Image.fromarray(decode_rgb(data, Limits(MAX_PIXELS)).rgb)
