"""Read a mask: which of its pixels are white. The one rule for files, Pillow images and arrays.

* White is half of the largest value of the mask's kind and above: 128 of 255, 32768 of 65535, 0.5
  of floating point. Integers of 0 and 1 only are black and white.
* Colours count as their mean. In a palette of colours whose entry 0 is black, as in the label maps
  of Pascal VOC, every label but 0 is white.
* Where the alpha channel varies, transparent pixels are black. If the opaque pixels have one
  colour, be it black or white, the alpha channel is the drawing: opaque is white.
* A mask that is mostly grey is a photo or another picture, and is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep.pictures.limits import PhotoError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

MOST_GREY = 0.5  # share of grey pixels above which a picture is not a mask; ours


@dataclass(frozen=True)
class WhitePixels:
    """The white pixels of a mask.

    Attributes:
        white: bool [H, W].
        half: the least value that is white.
        impure: share of the pixels that are neither black nor white, even a little.
        labels: whether the mask is a label map.
    """

    white: NDArray[np.bool_]
    half: float = 1
    impure: float = 0.0
    labels: bool = False


def white_of_image(image: Image.Image) -> WhitePixels:
    """Read a mask from a Pillow image. Raises PhotoError if it is not a mask."""
    import numpy as np

    if image.mode == "P" and not image.has_transparency_data:
        palette = np.asarray(image.getpalette("RGB") or [], np.int16).reshape(-1, 3)
        indices = np.asarray(image)
        used = palette[[i for i in np.unique(indices) if i < len(palette)]]
        coloured = bool((np.ptp(used, axis=1) > 0).any()) if len(used) else False
        if coloured and not palette[0].any():
            return WhitePixels(indices != 0, labels=True)
    if image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode[0] not in "IF":
        image = image.convert("L" if image.mode in ("1", "L") else "RGB")
    values = np.asarray(image)
    return white_of_array(values, white_level(values))


def white_level(values: NDArray[Any]) -> float:
    """Return the value of white for the kind of these values: 1, 255 or 65535.

    Raises:
        PhotoError: a value is not a number, or infinite.
    """
    import numpy as np

    highest = values.max()
    if not np.isfinite(highest) or not np.isfinite(values.min()):
        raise PhotoError("it has pixels that are not numbers")
    return next((top for top in (1, 255) if highest <= top), 65535)


def white_of_array(values: NDArray[Any], top: float) -> WhitePixels:
    """Read a mask from an array.

    Args:
        values: [H, W], or [H, W, C] with 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGB, alpha)
            channels; integers or floating point.
        top: the value of white.

    Raises:
        PhotoError: it is mostly grey.
    """
    import numpy as np

    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    if values.ndim == 2:
        values = values[..., None]
    alpha = values[..., -1] if values.shape[-1] in (2, 4) else None
    colours = values if alpha is None else values[..., :-1]
    count = colours.shape[-1]
    level, white = colours[..., 0], top
    if count > 1:
        wide = np.float64 if values.dtype.kind == "f" else np.uint16 if top <= 255 else np.uint32
        level, white = colours.sum(axis=-1, dtype=wide), count * top
    bright = _at_least(level, white / 2)
    if alpha is not None:
        opaque = _at_least(alpha, top / 2)
        if opaque.any() and not opaque.all():
            inside = bright[opaque]
            if inside.all() or not inside.any():
                level, white, bright = alpha, top, opaque
            else:
                level, bright = np.where(opaque, level, 0), bright & opaque
    grey = _between(level, white / 8, white - white / 8)
    if grey > MOST_GREY:
        raise PhotoError(f"it is mostly grey ({grey:.0%} of it), so it is not a mask")
    half = top / 2 if values.dtype.kind == "f" else (top + 1) // 2
    return WhitePixels(bright, half, _between(level, 0, white))


def _at_least(level: NDArray[Any], bound: float) -> NDArray[np.bool_]:
    """Compare without a copy in floating point: integers with the next integer."""
    import numpy as np

    return np.asarray(level >= (bound if level.dtype.kind == "f" else int(np.ceil(bound))))


def _between(level: NDArray[Any], low: float, high: float) -> float:
    """Return the share of the values that are above `low` and below `high`."""
    import numpy as np

    if level.dtype.kind != "f":
        low, high = int(np.floor(low)), int(np.ceil(high))
    return float(((level > low) & (level < high)).mean())
