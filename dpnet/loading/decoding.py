"""Decode stored images, and explain why a sample cannot be used."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from data_prep.core.errors import PipelineError
from data_prep.pictures.decoding import decode_rgb
from data_prep.pictures.limits import STORED

_HEAD = 4096  # bytes; the tags and the profile of a JPEG begin inside of them
_MARKS = (b"Exif\0", b"ICC_PROFILE\0", b"Adobe\0")


class TooSmallError(ValueError):
    """An image is smaller than the masks."""

    def __init__(self, height: int, width: int, size: int) -> None:
        super().__init__(f"it is {width} x {height} pixels, smaller than the masks' {size}")
        self.size = size


def is_plain_jpeg(data: bytes) -> bool:
    """Return whether `data` is a JPEG that needs no rotation by a tag and no colour conversion.

    The images stage encodes such JPEGs. A fast decoder reads them correctly.
    """
    # All marks come before the scan.
    scan = data.find(b"\xff\xda", 0, _HEAD)
    head = data[: scan if scan > 0 else _HEAD]
    return head[:2] == b"\xff\xd8" and not any(mark in head for mark in _MARKS)


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Decode a stored image to RGB, uint8 [H, W, 3], as the images stage does.

    With images.mode `keep` a stored image can be any file that a camera writes.

    Raises:
        ValueError, OSError, ItemError: `data` is not a readable image.
    """
    if is_plain_jpeg(data):
        import simplejpeg

        try:
            height, width, *_ = simplejpeg.decode_jpeg_header(data)
            STORED.check(width, height, "JPEG")
            decoded: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB")
            return decoded
        except ValueError:
            pass  # only Pillow reads some kinds of JPEG
    return decode_rgb(data, STORED).rgb


def reason_of(error: Exception) -> str:
    """Return the message of a decoder's error in one line.

    Pillow's messages can hold the address of an object, which is removed.
    """
    text = re.sub(r" <.*>", "", str(error)).strip() or "unreadable"
    return text.splitlines()[0].rstrip(".")


def unusable(sample: str, error: Exception, choice: str = "") -> PipelineError:
    """Return the error for a sample that cannot be used.

    Args:
        sample: the sample and its shard, see `OpenShard.name_of`.
        error: why it cannot be used.
        choice: a further way out, to be added to the advice.
    """
    advice = "run `dpnet verify` on the root"
    if isinstance(error, TooSmallError):
        advice = f"build images of at least {error.size} pixels, or smaller masks"
    return PipelineError(f"{sample} cannot be used ({reason_of(error)}): {advice}{choice}.")
