"""Pictures: bytes to RGB pixels and back, the same way for every file format.

Pixels are sRGB as the file holds them; colour profiles are not applied. Of an animation or a
multi-page file the first picture counts. Whatever is wrong with a picture is a `PictureError`.
"""

from __future__ import annotations

import io
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageOps, UnidentifiedImageError

_JPEG = ("jpg", "jpeg", "jpe", "jfif")
_PPM = ("ppm", "pgm", "pbm", "pnm")
EXTENSIONS = frozenset((*_JPEG, *_PPM, "png", "webp", "tif", "tiff", "bmp", "gif"))  # lower case
MAX_PIXELS = 89_000_000  # above, Pillow itself warns of a decompression bomb
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 swap width and height

Format = Literal["jpeg", "png", "webp"]
FILE_EXTENSION: dict[Format, str] = {"jpeg": "jpg", "png": "png", "webp": "webp"}


class PictureError(Exception):
    """This picture cannot be used; the message is the reason, without the picture's name."""


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
