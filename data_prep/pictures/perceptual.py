"""Perceptual hash: 64 bits that change little when an image is encoded again or resized."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]
    Floats = NDArray[np.float64]

SIDE = 32  # pixels of the gray image that is transformed
SAMPLED = 4 * SIDE  # pixels of the image that is sampled to make the gray one


def phash(rgb: Pixels) -> int:
    """Return the hash of an upright image, uint8 [H, W, 3], as an unsigned 64-bit number.

    The method is from C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash
    Functions" (2010). A gray image of 32 x 32 pixels goes through a discrete cosine transform. Each
    of the lowest 8 x 8 frequencies gives one bit: whether it is above their median. As in the
    library ImageHash these include frequency zero. Bits go from the most significant down, row by
    row.

    Our change: the transform uses whole numbers, which 64-bit floats hold exactly. So all machines
    agree, and an image of one colour has a hash without noise.
    """
    import cv2
    import numpy as np

    # OpenCV and lists instead of NumPy: the wide instructions of NumPy's matrix product, sort and
    # comparison slow some processors down for longer than this whole function takes.
    cosines, gray = _cosines(), _gray(rgb).astype(np.float64)
    half = cv2.gemm(cosines, gray, 1, None, 0)
    low = cv2.gemm(half, cosines, 1, None, 0, flags=cv2.GEMM_2_T).ravel().tolist()
    ordered = sorted(low)
    median, bits = (ordered[31] + ordered[32]) / 2, 0
    for frequency in low:
        bits = bits << 1 | (frequency > median)
    return bits


def _gray(rgb: Pixels) -> Pixels:
    """Reduce an image to gray, uint8 [32, 32].

    Averaging every pixel would take longer than the rest of a small photo's preparation. So four
    bilinear samples stand for each of 16 parts of a result pixel. A large image is averaged
    first, because they would miss most of its pixels.
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
def _cosines() -> Floats:
    """Return the first 8 rows of the 32-point DCT-II, times 1024, rounded: float64 [8, 32]."""
    import numpy as np

    angles = np.pi / (2 * SIDE) * np.arange(8)[:, None] * (2 * np.arange(SIDE) + 1)
    rows: Floats = np.rint(1024 * np.cos(angles))
    return rows
