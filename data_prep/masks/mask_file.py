"""A mask file: its bytes to a hole mask of the wanted size.

A file is read as black and white; which of the two is the hole is not the business of one file.
"""

from __future__ import annotations

import io
import math
import warnings
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from data_prep.core.errors import ItemError
from data_prep.masks.plan import touches_border
from data_prep.masks.recipes import hole_ratio

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_PIXELS = 89_000_000  # of a mask file; above, Pillow itself warns of a decompression bomb

Polarity = Literal["white-hole", "black-hole"]


@dataclass(frozen=True)
class Making:
    """How a mask is made of a file: side in pixels, and by how many pixels holes grow."""

    size: int
    dilate: int


@dataclass(frozen=True, slots=True)
class Made:
    """A finished mask: hole share, whether it touches the border, and its packed pixels."""

    ratio: float
    touches: bool
    packed: bytes

    @classmethod
    def of(cls, mask: NDArray[np.uint8]) -> Made:
        import numpy as np

        packed = zlib.compress(np.packbits(mask > 0).tobytes(), 1)
        return cls(hole_ratio(mask), touches_border(mask), packed)

    def mask(self, size: int) -> NDArray[np.uint8]:
        """The hole mask, uint8 [size, size] in {0, 255}."""
        import numpy as np

        bits = np.frombuffer(zlib.decompress(self.packed), np.uint8)
        return np.unpackbits(bits, count=size * size).reshape(size, size) * np.uint8(255)


def white_pixels(data: bytes) -> NDArray[np.bool_]:
    """The white pixels of a mask file, bool [H, W].

    White is from 128 of 255 up, or its like in 16 bits; a file of 0 and 1 alone has white at 1.
    Where the alpha channel has values on both sides, white is what is opaque. Raises ItemError.
    """
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a bomb has its own limit here
            with Image.open(io.BytesIO(data)) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise ItemError(f"it has {image.width}x{image.height} pixels")
                if image.has_transparency_data:
                    opaque = np.asarray(image.convert("RGBA"))[..., 3] >= 128
                    if opaque.any() and not opaque.all():
                        return np.asarray(opaque, bool)
                gray = np.asarray(image if image.mode[0] in "IF" else image.convert("L"))
    except ItemError:
        raise
    except UnidentifiedImageError:
        raise ItemError("it is not an image" if data else "it is empty") from None
    except MemoryError:
        raise
    except Exception as error:  # broken data makes Pillow's readers raise nearly anything
        raise ItemError(f"it is broken: {str(error).rstrip('.') or type(error).__name__}") from None
    top = next((t for t in (1, 255) if gray.max() <= t), 65535)
    return np.asarray(gray >= top * 128 / 255, bool)


def hole_mask(white: NDArray[np.bool_], polarity: Polarity, making: Making) -> NDArray[np.uint8]:
    """The hole mask of a file's white pixels, uint8 [size, size] in {0, 255}, 255 = hole."""
    import cv2
    import numpy as np

    hole = (white if polarity == "white-hole" else ~white).astype(np.uint8) * np.uint8(255)
    mask = _resized(hole, making.size)
    if making.dilate:
        disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * making.dilate + 1,) * 2)
        mask = np.asarray(cv2.dilate(mask, disc), np.uint8)
    return mask


def _resized(hole: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Scaled to a square; another aspect is stretched, so that the share of hole stays.

    A pixel is hole if at least half of it was. Strokes thinner than a pixel would be lost by that
    and are kept, a pixel wide.
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
    thin = hole & ~cv2.dilate(wide, np.ones((3, 3), np.uint8))  # no steps of a wide part's edge
    if thin.any():
        # A line one source pixel wide covers 255 / scale of the pixels along it, or half of that
        # where two share it; the rest is for rounding.
        mask |= _cover(thin, size) > 108 / max(down, across)
    return np.asarray(mask, np.uint8) * np.uint8(255)


def _cover(mask: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """How much of each pixel is covered, in [0, 255], when the mask is shrunk to a square."""
    import cv2
    import numpy as np

    fine = max(mask.shape) > 32 * size  # 8 bits, which are faster, would round a thin line away
    source = mask.astype(np.float32) if fine else mask
    covered = cv2.resize(source, (size, size), interpolation=cv2.INTER_AREA)
    return np.asarray(covered, np.float32)


def rim_share(white: NDArray[np.bool_]) -> float:
    """Share of white along the edges, a 32nd of the shorter side deep."""
    deep = max(1, min(white.shape) // 32)
    inner = white[deep:-deep, deep:-deep]
    return (int(white.sum()) - int(inner.sum())) / (white.size - inner.size)
