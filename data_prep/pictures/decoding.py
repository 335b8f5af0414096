"""Encoded pictures to pixels: upright sRGB, uint8 [height, width, 3], whatever the file's format.

A JPEG goes through libjpeg-turbo, told to stop at the first warning; what that refuses, and every
other format, goes through Pillow. Large pictures are made smaller while they are decoded, so that
a picture of 64 million pixels takes less than 700 MB.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep.core.errors import ItemError
from data_prep.pictures.colour import BAND, colours_of, convert, srgb_transform

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    Pixels = NDArray[np.uint8]
from data_prep.pictures.formats import _formats, looks_like_image

_ORIENTATION = 0x0112  # EXIF tag; values 5 to 8 swap width and height
_SHARES = {"WEBP": 0.5, "JPEG2000": 0.33, "AVIF": 0.75}  # of max_pixels: their readers hold copies
_FRACTIONS = (8, 4, 2)  # in which libjpeg decodes at the speed of what comes out


class PictureError(ItemError):
    """This picture cannot be used; the message is the reason, without the picture's name."""


@dataclass(frozen=True)
class Limits:
    """What a picture may be; told from its header, before anything is decoded."""

    max_pixels: int
    min_side: int = 0

    def check(self, width: int, height: int, format: str) -> None:
        """Raises PictureError."""
        size = f"it has {width}x{height} pixels"
        if width * height > self.max_pixels:
            raise PictureError(f"{size}, images.max_pixels is {self.max_pixels}")
        share = _SHARES.get(format, 1.0)
        if width * height > share * self.max_pixels:
            share_of = f"{share:.0%} of images.max_pixels, which is {self.max_pixels}"
            raise PictureError(f"{size}, for {format} the most is {share_of}")
        if min(width, height) < max(self.min_side, 1):
            raise PictureError(f"{size}, its shorter side needs {max(self.min_side, 1)}")


@dataclass(frozen=True)
class Decoded:
    """A picture. Width and height are its own, upright; `rgb` may have fewer pixels."""

    rgb: Pixels
    width: int
    height: int
    format: str  # one of Pillow's names: JPEG, PNG, ...
    mode: str  # of the file's pixels, Pillow's name: RGB, L, CMYK, P, ...


def decode_rgb(data: bytes, limits: Limits, at_least: int | None = None) -> Decoded:
    """The picture, decoded to its end.

    Alpha is laid over white, gray becomes three equal channels, 16 bits become 8 (the upper ones),
    colour profiles are converted to sRGB, of an animation the first picture counts. With
    `at_least` it may come smaller by a whole factor, as long as its shorter side has that many
    pixels. Raises PictureError.
    """
    header = _jpeg_header(data) if data[:3] == b"\xff\xd8\xff" else None
    if header is not None:
        limits.check(header.width, header.height, "JPEG")
        rgb = _decode_jpeg(data, header, at_least)
        if rgb is not None:
            mode = "RGB" if header.components == 3 else "L"
            if header.profile and (to_srgb := srgb_transform(header.profile, mode)):
                convert(rgb, mode, to_srgb)
            return _decoded(rgb, header.width, header.height, header.orientation(), "JPEG", mode)
    return _decode_with_pillow(data, limits, at_least)


# JPEG


@dataclass(frozen=True)
class _JpegHeader:
    width: int  # as stored
    height: int
    components: int
    exif: bytes
    profile: bytes

    def orientation(self) -> int:
        from PIL import Image

        if not self.exif:
            return 1
        exif = Image.Exif()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                exif.load(self.exif)
                return _valid_orientation(exif.get(_ORIENTATION))
        except Exception:  # a broken tag is no reason to refuse a picture
            return 1


def _jpeg_header(data: bytes) -> _JpegHeader | None:
    """What the segments before the first scan say; None where Pillow has to look at it.

    Pillow's own reader takes ten times as long, which is felt with small photographs.
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
                return None  # it counts where EXIF is silent
            elif marker == 0xE2 and data.startswith(b"ICC_PROFILE\0", body):
                profile.append(data[body + 12 : at + 2 + length])
            at += 2 + length
    except (IndexError, struct.error):
        return None
    if frame is None:
        return None
    height, width, components = frame
    return _JpegHeader(width, height, components, exif, b"".join(p[2:] for p in sorted(profile)))


def _decode_jpeg(data: bytes, header: _JpegHeader, at_least: int | None) -> Pixels | None:
    """Pixels as stored; None where Pillow has to decode it. Raises PictureError if it is damaged.

    The exact transform and the smooth upsampling of colours: the fast ones lose 1 to 10 dB and
    0.2 dB. In CMYK it is decoded for its warnings alone, as Pillow fills what is missing.
    """
    import simplejpeg

    width, height, is_cmyk = header.width, header.height, header.components == 4
    fraction = _FRACTIONS[0] if is_cmyk else _jpeg_fraction(width, height, at_least)
    try:
        pixels: Pixels = simplejpeg.decode_jpeg(
            data,
            "CMYK" if is_cmyk else "RGB",
            min_width=-(-width // fraction),
            min_height=-(-height // fraction),
        )
    except ValueError as error:
        told = str(error).lower().removeprefix("corrupt jpeg data: ")
        if told.startswith("premature end"):
            raise PictureError("it is truncated") from None
        if told.startswith(("bad huffman code", "found marker")):
            raise PictureError(f"it is broken: {told}") from None
        return None
    return pixels if header.components in (1, 3) else None


def _jpeg_fraction(width: int, height: int, at_least: int | None) -> int:
    """By what the sides may be divided in decoding."""
    if at_least is None:
        return 1
    return next((part for part in _FRACTIONS if min(width, height) // part >= at_least), 1)


# Everything else


def _decode_with_pillow(data: bytes, limits: Limits, at_least: int | None) -> Decoded:
    with _opened(data) as image:
        width, height = image.size
        mode, format = image.mode, image.format or ""
        limits.check(width, height, format)
        if mode == "F":
            raise PictureError("its pixels are floating-point numbers")
        if format == "PNG":
            _check_png(data)
        fraction = _jpeg_fraction(width, height, at_least)
        image.draft(None, (width // fraction, height // fraction))
        image.load()
        orientation = _valid_orientation(image.getexif().get(_ORIENTATION))
        part = 1 if at_least is None else max(1, min(image.size) // at_least)
        rgb = _rgb(image, part)
        image.close()  # frees its pixels before more are made
    # A second picture in the same file makes it an MPO.
    return _decoded(rgb, width, height, orientation, "JPEG" if format == "MPO" else format, mode)


@contextmanager
def _opened(data: bytes) -> Iterator[Image.Image]:
    """The picture, its header read. Whatever goes wrong inside is a PictureError."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd tag is no news
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                yield image
    except (PictureError, MemoryError):
        raise
    except UnidentifiedImageError:
        if not data:
            raise PictureError("it is empty") from None
        if looks_like_image(data[:32]):
            raise PictureError("it is broken: its header cannot be read") from None
        raise PictureError("it is not an image, or of an unknown format") from None
    except Exception as error:  # broken data makes Pillow's readers raise nearly anything
        told = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        is_short = "truncated" in told.lower() or isinstance(error, EOFError)
        raise PictureError("it is truncated" if is_short else f"it is broken: {told}") from None


def _check_png(data: bytes) -> None:
    """Raises PictureError when a chunk is damaged, which Pillow does not look at in pixels."""
    at = 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        kind = data[at + 4 : at + 8]
        crc = int.from_bytes(data[end : end + 4], "big")
        needed = not kind[0] & 0x20  # by its name a small letter tells what may be left out
        if needed and zlib.crc32(memoryview(data)[at + 4 : end]) != crc:
            raise PictureError("it is broken: a checksum does not fit")
        if kind == b"IEND":
            return
        at = end + 4
    raise PictureError("it is truncated")


def _rgb(image: Image.Image, part: int) -> Pixels:
    """The loaded picture's pixels, each the mean of `part` x `part` of them.

    Bands are converted one after another, so that beside the decoded picture only what comes out
    is held. What remains at the edges is cut off.
    """
    import cv2
    import numpy as np

    width, height = image.width // part, image.height // part
    left, top = (image.width - width * part) // 2, (image.height - height * part) // 2
    deep = image.mode.startswith("I;16") or (image.mode == "I" and _most(image) > 255)
    colours = colours_of(image.mode)
    to_srgb = srgb_transform(image.info.get("icc_profile") or b"", colours)
    out = np.empty((height, width, 3), np.uint8)
    rows = max(1, BAND // (width * part * part))
    for at in range(0, height, rows):
        stop = min(at + rows, height)
        box = (left, top + at * part, left + width * part, top + stop * part)
        band = np.asarray(_rgb_of_band(image.crop(box), colours, deep, to_srgb))
        if part > 1:
            band = cv2.resize(band, (width, stop - at), interpolation=cv2.INTER_AREA)
        out[at:stop] = band
    return out


def _rgb_of_band(band: Image.Image, colours: str, deep: bool, to_srgb: Any) -> Image.Image:
    import numpy as np
    from PIL import Image, ImageCms

    alpha = None
    if band.mode.startswith("I"):  # 16 bits, or 32 that hold 16 or 8
        gray = np.asarray(band).astype(np.int32)
        band = Image.fromarray(((gray >> 8) if deep else gray).clip(0, 255).astype(np.uint8))
    elif band.has_transparency_data:
        band = band.convert("RGBA")
        alpha = band.getchannel("A")
        band = band.getchannel("R") if colours == "L" else band.convert("RGB")
    band = band if band.mode == colours else band.convert(colours)
    if to_srgb is not None:
        band = ImageCms.applyTransform(band, to_srgb) or band
    band = band if band.mode == "RGB" else band.convert("RGB")
    if alpha is not None:
        band = Image.composite(band, Image.new("RGB", band.size, "white"), alpha)
    return band


def _most(image: Image.Image) -> float:
    most = image.getextrema()[1]
    assert not isinstance(most, tuple), "a picture of one channel"
    return most


# Orientation


def _valid_orientation(value: Any) -> int:
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _decoded(
    rgb: Pixels, width: int, height: int, orientation: int, format: str, mode: str
) -> Decoded:
    """The picture turned upright; `width` and `height` are as stored."""
    if orientation >= 5:
        width, height = height, width
    return Decoded(_upright(rgb, orientation), width, height, format, mode)


def _upright(rgb: Pixels, orientation: int) -> Pixels:
    """EXIF's orientation undone: what stands first in the file is at the ... of the picture."""
    import cv2

    if orientation == 2:  # top, right
        rgb = cv2.flip(rgb, 1)
    elif orientation == 3:  # bottom, right
        rgb = cv2.rotate(rgb, cv2.ROTATE_180)
    elif orientation == 4:  # bottom, left
        rgb = cv2.flip(rgb, 0)
    elif orientation == 5:  # left, top
        rgb = cv2.transpose(rgb)
    elif orientation == 6:  # right, top
        rgb = cv2.rotate(rgb, cv2.ROTATE_90_CLOCKWISE)
    elif orientation == 7:  # right, bottom
        rgb = cv2.flip(cv2.transpose(rgb), -1)
    elif orientation == 8:  # left, bottom
        rgb = cv2.rotate(rgb, cv2.ROTATE_90_COUNTERCLOCKWISE)
    return rgb
