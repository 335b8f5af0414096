"""Colour profiles (ICC) to sRGB, by Little CMS in Pillow."""

from __future__ import annotations

import io
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BAND = 1 << 20  # pixels converted at a time, so that no second copy of a large picture is made


def colours_of(mode: str) -> str:
    """The colours that a profile for pixels of `mode` is about."""
    if mode in ("1", "L", "LA", "La") or mode.startswith("I"):
        return "L"
    return mode if mode in ("CMYK", "LAB") else "RGB"


@lru_cache(maxsize=16)
def srgb_transform(profile: bytes, colours: str) -> Any:
    """Pillow's transform to sRGB; None where there is none to be done: no profile, a broken one,
    one for other colours, or sRGB itself by whatever name.
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
    """Convert to sRGB in place."""
    import numpy as np
    from PIL import Image, ImageCms

    rows = max(1, BAND // rgb.shape[1])
    for at in range(0, len(rgb), rows):
        band = rgb[at : at + rows]
        image = Image.fromarray(band if colours == "RGB" else np.ascontiguousarray(band[..., 0]))
        band[:] = np.asarray(ImageCms.applyTransform(image, to_srgb))
