"""Decode all other formats with Pillow, and the JPEG files that libjpeg-turbo refuses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from data_prep.pictures.colour import BAND, colours_of, srgb_transform
from data_prep.pictures.jpeg import decoding_fraction
from data_prep.pictures.limits import Limits, PhotoError
from data_prep.pictures.open_image import opened
from data_prep.pictures.orientation import ORIENTATION, valid_orientation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    Pixels = NDArray[np.uint8]


def decode_with_pillow(
    data: bytes, limits: Limits, at_least: int | None
) -> tuple[Pixels, tuple[int, int], int, str, str]:
    """Decode an image to its end.

    Returns:
        pixels uint8 [H, W, 3] as stored, the stored (width, height), the orientation (1 to 8), and
        Pillow's names of the format and of the mode.
    """
    with opened(data, limits) as image:
        width, height = image.size
        mode, format = image.mode, image.format or ""
        if mode == "F":
            raise PhotoError("its pixels are floating-point numbers")
        fraction = decoding_fraction(width, height, at_least)
        image.draft(None, (width // fraction, height // fraction))
        image.load()
        orientation = valid_orientation(image.getexif().get(ORIENTATION))
        part = 1 if at_least is None else max(1, min(image.size) // at_least)
        rgb = _rgb(image, part)
        image.close()  # frees its pixels before the caller makes more
    # Pillow calls a JPEG file MPO if a second image follows in the same file.
    return rgb, (width, height), orientation, "JPEG" if format == "MPO" else format, mode


def _rgb(image: Image.Image, part: int) -> Pixels:
    """Return the loaded pixels as sRGB, each the mean of `part` x `part` stored ones.

    Converts one band of rows after another: only the decoded image and the result are in memory.
    Rows and columns that do not fill a whole `part` are cut off evenly at the edges.
    """
    import cv2
    import numpy as np

    width, height = image.width // part, image.height // part
    left, top = (image.width - width * part) // 2, (image.height - height * part) // 2
    deep = image.mode.startswith("I;16") or (image.mode == "I" and _highest(image) > 255)
    colours = colours_of(image.mode)
    to_srgb = srgb_transform(image.info.get("icc_profile") or b"", colours)
    out = np.empty((height, width, 3), np.uint8)
    rows = max(1, BAND // (width * part * part))
    for at in range(0, height, rows):
        stop = min(at + rows, height)
        box = (left, top + at * part, left + width * part, top + stop * part)
        band = np.asarray(_rgb_of_band(image.crop(box), colours, deep, to_srgb))
        if part > 1:
            band = cv2.resize(band, (width, stop - at), interpolation=cv2.INTER_AREA)
        out[at:stop] = band
    return out


def _rgb_of_band(band: Image.Image, colours: str, deep: bool, to_srgb: Any) -> Image.Image:
    """Convert a band to RGB: 16 bits to 8, the colour profile to sRGB, alpha onto white."""
    import numpy as np
    from PIL import Image, ImageCms

    alpha = None
    if band.mode.startswith("I"):  # 16 bits, or 32 bits that hold 16 or 8
        gray = np.asarray(band).astype(np.int32)
        band = Image.fromarray(((gray >> 8) if deep else gray).clip(0, 255).astype(np.uint8))
    elif band.has_transparency_data:
        band = band.convert("RGBA")
        alpha = band.getchannel("A")
        band = band.getchannel("R") if colours == "L" else band.convert("RGB")
    band = band if band.mode == colours else band.convert(colours)
    if to_srgb is not None:
        band = ImageCms.applyTransform(band, to_srgb) or band
    band = band if band.mode == "RGB" else band.convert("RGB")
    if alpha is not None:
        band = Image.composite(band, Image.new("RGB", band.size, "white"), alpha)
    return band


def _highest(image: Image.Image) -> float:
    highest = image.getextrema()[1]
    assert not isinstance(highest, tuple), "an image of one channel"
    return highest
