"""The EXIF orientation of a photo, and turning its pixels upright.

The tag is only read. Pillow's own function also writes the other tags again, and raises an error
for many that cameras write.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

ORIENTATION = 0x0112  # the EXIF tag
SWAPPED = range(5, 9)  # the orientations that exchange width and height


def valid_orientation(value: Any) -> int:
    """Return the orientation, 1 to 8; values that EXIF does not define count as 1 (upright)."""
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def upright(rgb: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Turn or mirror pixels uint8 [H, W, 3] so that the image is upright.

    Each comment names two sides of the upright image: the side of the first stored row, and the
    side of the first stored column (EXIF 2.3, tag Orientation).
    """
    import cv2

    if orientation == 2:  # top, right
        rgb = cv2.flip(rgb, 1)
    elif orientation == 3:  # bottom, right
        rgb = cv2.rotate(rgb, cv2.ROTATE_180)
    elif orientation == 4:  # bottom, left
        rgb = cv2.flip(rgb, 0)
    elif orientation == 5:  # left, top
        rgb = cv2.transpose(rgb)
    elif orientation == 6:  # right, top
        rgb = cv2.rotate(rgb, cv2.ROTATE_90_CLOCKWISE)
    elif orientation == 7:  # right, bottom
        rgb = cv2.flip(cv2.transpose(rgb), -1)
    elif orientation == 8:  # left, bottom
        rgb = cv2.rotate(rgb, cv2.ROTATE_90_COUNTERCLOCKWISE)
    return rgb


def upright_image(image: Image.Image) -> Image.Image:
    """Return a decoded copy of a Pillow image that is upright, without its EXIF tags."""
    from PIL import Image

    try:
        orientation = valid_orientation(image.getexif().get(ORIENTATION))
    except Exception:  # with broken tags Pillow's reader raises nearly anything
        orientation = 1
    image.load()
    if orientation == 1:
        turned = image.copy()
    else:
        flip = Image.Transpose
        how = {
            2: flip.FLIP_LEFT_RIGHT, 3: flip.ROTATE_180, 4: flip.FLIP_TOP_BOTTOM,
            5: flip.TRANSPOSE, 6: flip.ROTATE_270, 7: flip.TRANSVERSE, 8: flip.ROTATE_90,
        }  # fmt: skip
        turned = image.transpose(how[orientation])
    kept = ("icc_profile", "transparency")
    turned.info = {name: value for name, value in turned.info.items() if name in kept}
    return turned
