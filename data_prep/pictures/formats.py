"""Image formats that the pipeline reads: extensions, first bytes, Pillow's names."""

from __future__ import annotations

import re
from functools import cache

_JPEG = ("jpg", "jpeg", "jpe", "jfif")
_PPM = ("ppm", "pgm", "pbm", "pnm")
_JPEG2000 = ("jp2", "j2k", "jpx", "jpf")
EXTENSIONS = frozenset(
    (*_JPEG, *_PPM, *_JPEG2000, "png", "apng", "webp", "tif", "tiff", "bmp", "gif", "avif")
)  # lower case
# Image files that Pillow cannot read. They count as failed photos, so that people hear of them.
UNREADABLE = frozenset(
    ("heic", "heif", "jxl", "psd", "dng", "cr2", "cr3", "nef", "arw", "orf", "raf", "rw2", "exr")
)
_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "JPEG2000", "AVIF")
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|II[*+]\0|MM\0[*+]"
    rb"|BM............[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0|P[1-6]\s+[0-9#]"
    rb"|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51|....ftypavi[fs]",
    re.DOTALL,
)


def looks_like_image(head: bytes) -> bool:
    """Return whether a file's first bytes (32 or more) are those of a known image format."""
    return _MAGIC.match(head) is not None


def is_picture_name(name: str) -> bool:
    """Return whether a file is an image by the extension of its name, also one we cannot read."""
    extension = name.rpartition(".")[2].lower()
    return extension in EXTENSIONS or extension in UNREADABLE


@cache
def pillow_formats() -> tuple[str, ...]:
    """Return the formats that the installed Pillow can read, under Pillow's names."""
    from PIL import Image

    Image.init()
    # `Limits` replaces Pillow's own limit, which cannot be set per call and does not name the size.
    Image.MAX_IMAGE_PIXELS = None
    return tuple(name for name in _FORMATS if name in Image.OPEN)
