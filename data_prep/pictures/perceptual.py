"""Perceptual hash: 64 bits that stay nearly the same when a picture is encoded again or resized."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]
    Whole = NDArray[np.float64]

SIDE = 32  # of the gray picture that is transformed
SAMPLED = 4 * SIDE  # of the picture sampled for it


def phash(rgb: Pixels) -> int:
    """The hash of an upright RGB picture, uint8 [height, width, 3]: an unsigned 64-bit number.

    The method is the one of C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash
    Functions" (2010): a gray picture of 32x32 pixels, its discrete cosine transform, one bit for
    each of the lowest 8x8 frequencies: whether it is above their median. As in the ImageHash
    library these include frequency zero. The transform is done in whole numbers (ours), which
    floats of 64 bits hold exactly, so that all machines agree and a picture of one colour has no
    noise for a hash. Bits go from the most significant down, row by row.
    """
    import cv2
    import numpy as np

    # Not by NumPy: the wide instructions of its matrix product, sort and comparison make some
    # processors slow down for longer than all of this takes.
    cosines, gray = _cosines(), _gray(rgb).astype(np.float64)
    half = cv2.gemm(cosines, gray, 1, None, 0)
    low = cv2.gemm(half, cosines, 1, None, 0, flags=cv2.GEMM_2_T).ravel().tolist()
    ordered = sorted(low)
    middle, bits = (ordered[31] + ordered[32]) / 2, 0
    for frequency in low:
        bits = bits << 1 | (frequency > middle)
    return bits


def _gray(rgb: Pixels) -> Pixels:
    """The picture in gray, 32x32.

    Averaging every pixel would take longer than the rest of a small photograph's preparation. So
    four bilinear samples stand for each of 16 parts of a pixel, and only what is so large that
    these would miss most of it is averaged first.
    """
    import cv2

    height, width = rgb.shape[:2]
    if (part := min(height, width) // (2 * SAMPLED)) > 1:
        high, wide = height // part, width // part
        top, left = (height - high * part) // 2, (width - wide * part) // 2
        rgb = rgb[top : top + high * part, left : left + wide * part]
        rgb = cv2.resize(rgb, (wide, high), interpolation=cv2.INTER_AREA)
    sampled = cv2.resize(rgb, (SAMPLED, SAMPLED), interpolation=cv2.INTER_LINEAR)
    gray = cv2.cvtColor(sampled, cv2.COLOR_RGB2GRAY)
    small: Pixels = cv2.resize(gray, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
    return small


@cache
def _cosines() -> Whole:
    """The first 8 rows of the 32-point DCT-II, times 1024, rounded: float64 [8, 32]."""
    import numpy as np

    angles = np.pi / (2 * SIDE) * np.arange(8)[:, None] * (2 * np.arange(SIDE) + 1)
    rows: Whole = np.rint(1024 * np.cos(angles))
    return rows
