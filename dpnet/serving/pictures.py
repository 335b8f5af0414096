"""The photo and the mask of a request: decoded and checked, and the filled photo as a file.

Another process imports this module to decode, so it imports no model.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from PIL import Image

from data_prep.core.errors import PipelineError
from data_prep.pictures.limits import Limits
from data_prep.pictures.open_image import opened
from data_prep.pictures.orientation import ORIENTATION, upright_image
from dpnet.inpainting.read_file import explained

PHOTO, MASK = "the photo", "the mask"  # their names in messages
_ANIMATED = ("GIF", "PNG", "WEBP", "AVIF", "TIFF")  # further images of an MPO belong to the first
# The extension whose way of saving is used, and the media type, by Pillow's name of the format.
_WRITTEN = {
    "JPEG": (".jpg", "image/jpeg"),
    "PNG": (".png", "image/png"),
    "WEBP": (".webp", "image/webp"),
    "TIFF": (".tif", "image/tiff"),
}
_WITH_EXIF = ("JPEG", "PNG", "WEBP")
_HEADER = b"Exif\0\0"


class Photo(NamedTuple):
    """A decoded, upright photo.

    Attributes:
        image: its pixels and its colour profile.
        format: Pillow's name of the file's format.
        exif: its EXIF tags without orientation and thumbnail, or b"".
    """

    image: Image.Image
    format: str
    exif: bytes


class File(NamedTuple):
    """A picture as a file."""

    data: bytes
    media_type: str
    extension: str


def decode(image: bytes, mask: bytes, max_pixels: int) -> tuple[Photo, Image.Image]:
    """Decode a photo and its mask, both upright.

    Args:
        image: the bytes of the photo's file.
        mask: the bytes of the mask's file.
        max_pixels: most pixels of each.

    Raises:
        PipelineError: one of them cannot be used.
    """
    limits = Limits(max_pixels, option="the limit of this server")
    with _opened(image, PHOTO, limits, _why_not_filled) as found:
        exif = exif_to_keep(found.info.get("exif", b""))
        format = "JPEG" if found.format == "MPO" else found.format or ""
        photo = Photo(upright_image(found), format, exif)
    with _opened(mask, MASK, limits, _why_animated) as found:
        return photo, upright_image(found)


@contextmanager
def _opened(
    data: bytes, name: str, limits: Limits, why_not: Callable[[Image.Image], str]
) -> Iterator[Image.Image]:
    """Open a picture. Raises PipelineError if it cannot be read, or `why_not` has a reason."""
    with explained(name):
        with opened(data, limits) as found:
            reason = why_not(found)
            if not reason:
                yield found
        if reason:  # inside of `opened` it would count as damage
            raise PipelineError(f"{name} {reason}")


def _why_not_filled(image: Image.Image) -> str:
    """Return why an undamaged photo cannot be filled, or ""."""
    deep = "has more than 8 bits a channel: convert it to 8 bits first."
    return _why_animated(image) or (deep if _is_deep(image) else "")


def _why_animated(image: Image.Image) -> str:
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format in _ANIMATED:
        return f"has {frames} pages or moments: send a picture that is not animated."
    return ""


def _is_deep(image: Image.Image) -> bool:
    """Return whether a picture has more than 8 bits a channel, which Pillow would cut off."""
    if image.mode[0] in "IF":
        return True
    parts = [part for tile in getattr(image, "tile", ()) for part in _words(tile[3])]
    deep_names = any(isinstance(part, str) and ";16" in part for part in parts)
    deep_values = image.format == "PPM" and any(isinstance(p, int) and p > 255 for p in parts)
    return deep_names or deep_values


def _words(arguments: object) -> tuple[object, ...]:
    return arguments if isinstance(arguments, tuple) else (arguments,)


def exif_to_keep(exif: bytes) -> bytes:
    """Return EXIF tags for the filled photo, or b"" if they cannot be read.

    The orientation becomes upright, as the pixels are. The thumbnail is removed: it shows what the
    hole has hidden. All other bytes stay, because Pillow's writer fails for many cameras' tags.
    """
    start = len(_HEADER) if exif.startswith(_HEADER) else 0
    data = bytearray(exif[start:])
    try:
        order = {b"II": "<", b"MM": ">"}[bytes(data[:2])]
        (first,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, first)
        for at in range(first + 2, first + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", data, at)
            if tag == ORIENTATION and kind == 3:
                struct.pack_into(f"{order}H", data, at + 8, 1)
        link = first + 2 + 12 * count
        (second,) = struct.unpack_from(f"{order}I", data, link)
        if second:
            _remove_thumbnail(data, order, second)
            struct.pack_into(f"{order}I", data, link, 0)
    except (KeyError, struct.error):
        return b""
    return exif[:start] + bytes(data)


def _remove_thumbnail(data: bytearray, order: str, folder: int) -> None:
    """Overwrite the thumbnail that the second folder of tags names."""
    (count,) = struct.unpack_from(f"{order}H", data, folder)
    values = {}
    for at in range(folder + 2, folder + 2 + 12 * count, 12):
        tag, value = struct.unpack_from(f"{order}H6xI", data, at)
        values[tag] = value
    offset, length = values.get(0x0201, 0), values.get(0x0202, 0)  # of the JPEG file
    if 0 < offset < len(data):
        end = min(offset + length, len(data))
        data[offset:end] = bytes(end - offset)


def check_format(photo: Photo) -> None:
    """Raise PipelineError if the photo's own format cannot be written."""
    if photo.format not in _WRITTEN:
        raise PipelineError(
            f"{PHOTO}'s format {photo.format} cannot be written: ask for the format png."
        )


def encode(image: Image.Image, photo: Photo, *, same: bool) -> File:
    """Write a filled photo as a file in memory.

    Args:
        image: the filled photo, with its colour profile.
        photo: the photo that was sent.
        same: in the photo's own format and with its EXIF tags; otherwise PNG.
    """
    from dpnet.inpainting.files import SAVE

    format = photo.format if same else "PNG"
    extension, media_type = _WRITTEN[format]
    options = dict(SAVE[extension])
    if same and photo.exif and format in _WITH_EXIF:
        options["exif"] = photo.exif
    if format == "JPEG":
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    file = io.BytesIO()
    image.save(file, format, icc_profile=photo.image.info.get("icc_profile"), **options)
    return File(file.getvalue(), media_type, extension)
