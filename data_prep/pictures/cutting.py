"""Description of the samples that are cut from a photo, and of the format that they are stored in.

`prepare.py` does the cutting. This file needs no library, so settings may import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from data_prep.pictures.limits import MAX_PIXELS

Format = Literal["jpeg", "png", "webp"]
FILE_EXTENSION: dict[Format, str] = {"jpeg": "jpg", "png": "png", "webp": "webp"}
LONGEST: dict[Format, int] = {"jpeg": 65_500, "png": 2**31 - 1, "webp": 16_383}  # pixels of a side


@dataclass(frozen=True)
class Cutting:
    """The way in which samples are cut from a photo and stored.

    Modes: `center-crop` takes the largest centred square and resizes it to `size` x `size`.
    `short-side` takes the whole photo and resizes its shorter side to `size`. `keep` stores the
    original bytes. `tiles` takes squares and resizes them to `size` x `size`.

    Attributes:
        size: side of a stored sample, in pixels.
        quality: of jpeg and webp, 1 to 100.
        resample: `area` takes the mean of the pixels that a new one covers, and bicubic
            interpolation to enlarge.
        max_pixels: most pixels of the photo.
        min_side: least pixels of the photo's shorter side; 0 for no limit.
        tile: sides of the tiles, in pixels of the photo.
        tile_stride: distance of neighbouring tiles, as a share of their side.
        max_tiles: most tiles of one photo; 0 for all.
    """

    mode: Literal["center-crop", "short-side", "keep", "tiles"] = "center-crop"
    size: int = 256
    format: Format = "jpeg"
    quality: int = 95
    resample: Literal["area", "lanczos"] = "area"
    max_pixels: int = MAX_PIXELS
    min_side: int = 0
    tile: tuple[int, ...] = (256,)
    tile_stride: float = 1.0
    max_tiles: int = 0
