"""Pictures: the bytes of one photograph to the encoded samples that are cut from it.

`prepare` reads a photograph once for all that is asked of it: the limits, the perceptual hash, the
samples. The same bytes give the same samples, on every machine and in every process.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from PIL import Image, ImageOps, UnidentifiedImageError

from data_prep.decoding import Decoded, Limits, decode_rgb
from data_prep.decoding import PictureError as PictureError
from data_prep.decoding import looks_like_image as looks_like_image
from data_prep.image_plan import Box, draw_boxes, tile_boxes
from data_prep.perceptual import SAMPLED, phash

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

_JPEG = ("jpg", "jpeg", "jpe", "jfif")
_PPM = ("ppm", "pgm", "pbm", "pnm")
_JPEG2000 = ("jp2", "j2k", "jpx", "jpf")
EXTENSIONS = frozenset(
    (*_JPEG, *_PPM, *_JPEG2000, "png", "apng", "webp", "tif", "tiff", "bmp", "gif", "avif")
)  # lower case
MAX_PIXELS = 64_000_000  # a worker stays below 700 MB with it

Format = Literal["jpeg", "png", "webp"]
FILE_EXTENSION: dict[Format, str] = {"jpeg": "jpg", "png": "png", "webp": "webp"}
_LONGEST: dict[Format, int] = {"jpeg": 65_500, "png": 2**31 - 1, "webp": 16_383}
_KEPT = {"JPEG": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}  # else the format's name
_WHOLE = 1 << 20  # pixels of a picture of which a copy in floats does no harm


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
    phash: int  # see data_prep.perceptual; 64 bits, unsigned
    pieces: list[Piece]


def prepare(data: bytes, how: Cutting, key: str) -> Prepared:
    """The samples of an encoded photograph. `key` is the item's: max_tiles are drawn by it.

    A large photograph is decoded at a fraction of its size, with at least twice the pixels of
    `size`; its perceptual hash may differ by a bit or two from that of the whole. Raises
    PictureError.
    """
    at_least = {"keep": SAMPLED, "tiles": None}.get(how.mode, 2 * how.size)
    picture = decode_rgb(data, Limits(how.max_pixels, how.min_side), at_least)
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
    hashed = phash(picture.rgb)
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

    high, wide = rgb.shape[:2]
    if (wide, high) == (width, height):
        return rgb
    if resample == "lanczos":
        whole = Image.fromarray(np.ascontiguousarray(rgb))
        return np.asarray(whole.resize((width, height), Image.Resampling.LANCZOS))
    if width > wide or height > high:
        enlarged: Pixels = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_CUBIC)
        return enlarged
    whole_factors = wide % width == 0 and high % height == 0
    if whole_factors or wide * high > _WHOLE:
        small: Pixels = cv2.resize(rgb, (width, height), interpolation=cv2.INTER_AREA)
        return small
    # OpenCV adds up in floats anyway, and is a fifth quicker when it is given some.
    floats = cv2.resize(rgb.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA)
    rounded: Pixels = cv2.convertScaleAbs(floats)
    return rounded


def _encoded(rgb: Pixels, format: Format, quality: int) -> bytes:
    """The picture's file, the same bytes each time. `quality` 1-100 is for jpeg and webp."""
    import numpy as np
    import simplejpeg

    if format == "jpeg":
        data: bytes = simplejpeg.encode_jpeg(np.ascontiguousarray(rgb), quality, "RGB", "420")
        return data
    return encode(Image.fromarray(np.ascontiguousarray(rgb)), format, quality)


# What follows is the former way, used by data_prep/images.py until it is replaced.

_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 swap width and height


@dataclass(frozen=True)
class Facts:
    """What inspecting a picture told. Width and height are in pixels, upright where `whole`."""

    width: int
    height: int
    format: str
    mode: str
    whole: bool  # it was decoded to its end; False: it has too many pixels to try


def inspect(data: bytes, max_pixels: int = MAX_PIXELS) -> Facts:
    """Size and kind of an encoded picture, decoded to its end to find what is broken.

    A JPEG is decoded at an eighth of its size for that, which reads all of its data at half the
    cost. A picture of more than `max_pixels` is not decoded. Raises PictureError.
    """
    with _opened(data) as image:
        width, height = image.size
        mode, whole = image.mode, width * height <= max_pixels
        if whole:  # only then ask for EXIF: a PNG is decoded for it
            if image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8):
                width, height = height, width
            image.draft(None, (1, 1))
            image.load()
        return Facts(width, height, image.format or "", mode, whole)


def decode(data: bytes, max_pixels: int = MAX_PIXELS, at_least: int | None = None) -> Image.Image:
    """RGB picture, turned upright by its EXIF orientation.

    Alpha is laid over white, gray becomes three equal channels, 16 bits become 8 (the upper ones).
    With `at_least` a JPEG may come smaller, by 2, 4 or 8, as long as its shorter side has
    `at_least` pixels. Raises PictureError, also above `max_pixels`.
    """
    with _opened(data) as image:
        if image.width * image.height > max_pixels:
            raise PictureError(f"it has {image.width}x{image.height} pixels, max is {max_pixels}")
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        rgb = _to_rgb(ImageOps.exif_transpose(image))
        rgb.info.clear()  # Pillow would copy profiles and comments into what is saved
        return rgb


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The largest centred square, resized to `size` x `size` with antialiasing."""
    side = min(image.size)
    return cut(image, (image.width - side) // 2, (image.height - side) // 2, side, size)


def cut(image: Image.Image, left: int, top: int, side: int, size: int) -> Image.Image:
    """The square at (left, top), resized to `size` x `size`; only pixels inside it count."""
    square = image.crop((left, top, left + side, top + side))
    if side == size:
        return square
    return square.resize((size, size), Image.Resampling.LANCZOS)


def encode(image: Image.Image, format: Format, quality: int) -> bytes:
    """The picture's file, the same bytes each time. `quality` 1-100 is for jpeg and webp."""
    file = io.BytesIO()
    if format == "jpeg":
        image.save(file, "JPEG", quality=quality, subsampling="4:2:0")
    elif format == "webp":
        image.save(file, "WEBP", quality=quality, method=4)
    else:
        image.save(file, "PNG", compress_level=6)
    return file.getvalue()


def _to_rgb(image: Image.Image) -> Image.Image:
    import numpy as np

    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits, or 32 that hold 16
        gray = np.asarray(image).astype(np.int64)
        if image.mode.startswith("I;16") or gray.max() > 255:
            gray >>= 8
        return Image.fromarray(gray.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise PictureError("its pixels are floating-point numbers")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd tag is no news; a bomb has its own limit here
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                yield image
    except (PictureError, MemoryError):
        raise
    except UnidentifiedImageError:
        kind = "it is empty" if not data else "it is not an image, or of an unknown format"
        raise PictureError(kind) from None
    except Image.DecompressionBombError:
        raise PictureError("it has too many pixels to be a photograph") from None
    except Exception as error:  # broken data makes Pillow's readers raise nearly anything
        raise PictureError(
            f"it is broken: {str(error).rstrip('.') or type(error).__name__}"
        ) from error


class DecodedPictures:
    """The pictures decoded last, by sha256, up to `max_bytes` of pixels."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._images: dict[str, Image.Image] = {}
        self._lock = threading.Lock()

    def __contains__(self, sha256: str) -> bool:
        return sha256 in self._images

    def get(self, sha256: str, decoded: Callable[[], Image.Image]) -> Image.Image:
        """The picture, decoded now unless it is held; the oldest make room for it."""
        with self._lock:
            image = self._images.pop(sha256, None) or decoded()
            self._images[sha256] = image
            while len(self._images) > 1 and self._bytes() > self.max_bytes:
                del self._images[next(iter(self._images))]
            return image

    def clear(self) -> None:
        with self._lock:
            self._images.clear()

    def _bytes(self) -> int:
        return sum(3 * image.width * image.height for image in self._images.values())
