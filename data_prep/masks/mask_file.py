"""Convert the bytes of one mask file to a hole mask of the requested size.

A file is read as black and white. Which of the two is the hole is decided for the whole set.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_prep.masks.plan import touches_border
from data_prep.masks.recipes import hole_ratio
from data_prep.pictures.limits import Limits
from data_prep.pictures.mask_reader import white_of_image
from data_prep.pictures.open_image import opened
from data_prep.pictures.orientation import upright_image

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from data_prep.masks.settings import Polarity

MAX_FILE_PIXELS = 89_000_000  # above, Pillow itself warns of a decompression bomb


@dataclass(frozen=True)
class Conversion:
    """The way from a file to a mask: the mask's side, and how far holes grow, both in pixels."""

    size: int
    dilate: int


@dataclass(frozen=True, slots=True)
class PackedMask:
    """A finished mask: its hole ratio, whether it touches the border, and its packed pixels."""

    ratio: float
    touches: bool
    packed: bytes

    @classmethod
    def of(cls, mask: NDArray[np.uint8]) -> PackedMask:
        """Pack a hole mask, uint8 [size, size] in {0, 255}."""
        import numpy as np

        packed = zlib.compress(np.packbits(mask > 0).tobytes(), 1)
        return cls(hole_ratio(mask), touches_border(mask), packed)

    def mask(self, size: int) -> NDArray[np.uint8]:
        """Unpack the hole mask, uint8 [size, size] in {0, 255}."""
        import numpy as np

        bits = np.frombuffer(zlib.decompress(self.packed), np.uint8)
        return np.unpackbits(bits, count=size * size).reshape(size, size) * np.uint8(255)


def white_pixels(data: bytes) -> NDArray[np.bool_]:
    """Return the white pixels of a mask file, upright, bool [H, W].

    `data_prep.pictures.mask_reader` has the rule.

    Raises:
        PhotoError: the file is empty, broken, too large, not an image, or mostly grey.
    """
    with opened(data, Limits(MAX_FILE_PIXELS, option="the limit")) as image:
        return white_of_image(upright_image(image)).white


def hole_mask(
    white: NDArray[np.bool_], polarity: Polarity, conversion: Conversion
) -> NDArray[np.uint8]:
    """Return the hole mask of a file's white pixels, uint8 [size, size] in {0, 255}, 255 = hole."""
    import cv2
    import numpy as np

    hole = (white if polarity == "white-hole" else ~white).astype(np.uint8) * np.uint8(255)
    mask = _resized(hole, conversion.size)
    if conversion.dilate:
        side = 2 * conversion.dilate + 1
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (side, side))
        mask = np.asarray(cv2.dilate(mask, disc), np.uint8)
    return mask


def rim_share(white: NDArray[np.bool_]) -> float:
    """Return the share of white in the rim, a 32nd of the shorter side wide."""
    deep = max(1, min(white.shape) // 32)
    inner = white[deep:-deep, deep:-deep]
    return (int(white.sum()) - int(inner.sum())) / (white.size - inner.size)


def _resized(hole: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Scale a mask to a square; another aspect is stretched, so that the hole ratio stays.

    A result pixel is a hole if at least half of its area was. Strokes thinner than a result pixel
    would then vanish, so they are kept, one pixel wide.
    """
    import cv2
    import numpy as np

    height, width = hole.shape
    if (height, width) == (size, size):
        return hole
    down, across = height / size, width / size
    if max(down, across) <= 1:
        enlarged = cv2.resize(hole, (size, size), interpolation=cv2.INTER_NEAREST)
        return np.asarray(enlarged, np.uint8)
    mask = _cover(hole, size) > 127
    pixel = np.ones((max(1, math.ceil(down)), max(1, math.ceil(across))), np.uint8)
    wide = cv2.morphologyEx(hole, cv2.MORPH_OPEN, pixel)
    # Without the dilation, the steps at the edge of a wide part would count as thin.
    thin = hole & ~cv2.dilate(wide, np.ones((3, 3), np.uint8))
    if thin.any():
        # A line one source pixel wide covers 255 / scale of a result pixel, or half of that if two
        # result pixels share it. The factor 108 instead of 127 allows for rounding.
        mask |= _cover(thin, size) > 108 / max(down, across)
    return np.asarray(mask, np.uint8) * np.uint8(255)


def _cover(mask: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """Return how much of each pixel is hole when the mask shrinks to a square, in [0, 255]."""
    import cv2
    import numpy as np

    fine = max(mask.shape) > 32 * size  # then 8 bits, though faster, would round thin lines away
    source = mask.astype(np.float32) if fine else mask
    covered = cv2.resize(source, (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(covered, np.float32)
