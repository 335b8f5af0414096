"""Convert pixels with a colour profile (ICC) to sRGB, with Little CMS in Pillow."""

from __future__ import annotations

import io
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BAND = 1 << 20  # pixels converted at a time, so that a large image needs no second copy


def colours_of(mode: str) -> str:
    """Return the colour space that a profile for pixels of Pillow's `mode` must describe."""
    if mode in ("1", "L", "LA", "La") or mode.startswith("I"):
        return "L"
    return mode if mode in ("CMYK", "LAB") else "RGB"


@lru_cache(maxsize=16)
def srgb_transform(profile: bytes, colours: str) -> Any:
    """Return Pillow's transform from a profile to sRGB, or None if there is nothing to convert.

    There is nothing to convert without a profile. The same is true for a profile that is broken,
    describes other colours, or is sRGB under any name.
    """
    import numpy as np
    from PIL import Image, ImageCms

    if not profile and colours != "LAB":
        return None
    try:
        source: Any = (
            ImageCms.createProfile("LAB")
            if colours == "LAB"
            else ImageCms.ImageCmsProfile(io.BytesIO(profile))
        )
        transform = ImageCms.buildTransform(source, _srgb(), colours, "RGB")
        if colours == "RGB":
            # A profile that moves no colour of an 18 x 18 x 18 lattice by more than 2 is sRGB.
            lattice = np.indices((18, 18, 18)).reshape(3, 18 * 18, 18).transpose(1, 2, 0) * 15
            sample = Image.fromarray(lattice.astype(np.uint8))
            changed = np.asarray(ImageCms.applyTransform(sample, transform))
            if np.abs(changed - lattice).max() <= 2:
                return None
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError):
        return None
    return transform


@cache
def _srgb() -> Any:
    from PIL import ImageCms

    return ImageCms.createProfile("sRGB")


def convert(rgb: NDArray[np.uint8], colours: str, to_srgb: Any) -> None:
    """Convert pixels uint8 [H, W, 3] to sRGB in place; gray ones have three equal channels."""
    import numpy as np
    from PIL import Image, ImageCms

    rows = max(1, BAND // rgb.shape[1])
    for at in range(0, len(rgb), rows):
        band = rgb[at : at + rows]
        image = Image.fromarray(band if colours == "RGB" else np.ascontiguousarray(band[..., 0]))
        band[:] = np.asarray(ImageCms.applyTransform(image, to_srgb))
