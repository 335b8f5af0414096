"""The one rule for masks: what is white in files, Pillow images and arrays."""

from __future__ import annotations

import numpy as np
import photo_files
import pytest
import torch
from PIL import Image

from data_prep.masks.mask_file import white_pixels
from data_prep.pictures.limits import PhotoError
from data_prep.pictures.mask_reader import white_level, white_of_array, white_of_image
from dpnet.inpainting.conversion import valid_pixels

HOLE = np.zeros((16, 20), bool)
HOLE[4:9, 3:15] = True
BLACK_WHITE = np.where(HOLE, 255, 0).astype(np.uint8)


def rgba(colours: object, alpha: object) -> Image.Image:
    """Return an image from colours and alpha, each a number or an array [H, W]."""
    parts = [np.broadcast_to(np.uint8(each), HOLE.shape) for each in (colours, alpha)]  # type: ignore[call-overload]
    return Image.fromarray(np.dstack([parts[0]] * 3 + [parts[1]]))


def voc() -> Image.Image:
    """Return a label map in the colours of Pascal VOC, in which no colour is bright."""
    image = Image.fromarray(np.where(HOLE, 1, 0).astype(np.uint8)).convert("P")
    image.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0])
    return image


def swapped_palette() -> Image.Image:
    """Return a black and white image whose palette begins with white."""
    image = Image.fromarray(np.where(HOLE, 0, 1).astype(np.uint8)).convert("P")
    image.putpalette([255, 255, 255, 0, 0, 0])
    return image


def turned() -> Image.Image:
    """Return the mask as a camera would store it, with a tag that says how to turn it."""
    image = Image.fromarray(np.ascontiguousarray(np.rot90(BLACK_WHITE)))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.info["exif"] = exif.tobytes()
    return image


IMAGES = {
    "grey": Image.fromarray(BLACK_WHITE),
    "one bit": Image.fromarray(BLACK_WHITE).convert("1"),
    "colour": Image.fromarray(BLACK_WHITE).convert("RGB"),
    "0 and 1": Image.fromarray(HOLE.astype(np.uint8)),
    "16 bits": Image.fromarray(HOLE.astype(np.uint16) * 65535),
    "16 bits that hold 8": Image.fromarray(HOLE.astype(np.uint16) * 255),
    "32 bits": Image.fromarray(HOLE.astype(np.int32) * 65535),
    "yellow": Image.fromarray(np.dstack([BLACK_WHITE, BLACK_WHITE, BLACK_WHITE * 0])),
    "labels of Pascal VOC": voc(),
    "white first in the palette": swapped_palette(),
    "white with alpha": rgba(255, BLACK_WHITE),
    "black with alpha": rgba(0, BLACK_WHITE),
    "opaque": rgba(BLACK_WHITE, 255),
    "transparent white outside": rgba(255, BLACK_WHITE),
    "partly transparent": rgba(BLACK_WHITE, np.where(np.arange(20) < 17, 255, 0)),
    "grey and alpha": rgba(255 - BLACK_WHITE, BLACK_WHITE).convert("LA"),
}


def stored(image: Image.Image) -> bytes:
    format = "TIFF" if image.mode in ("F", "I") else "PNG"
    return photo_files.file(image, format)


@pytest.mark.parametrize("name", IMAGES)
def test_a_mask_file_and_a_pillow_image_are_read_by_one_rule(name: str) -> None:
    image = IMAGES[name]
    assert (white_pixels(stored(image)) == HOLE).all()
    assert (white_of_image(image).white == HOLE).all()
    images = torch.zeros(1, 3, *HOLE.shape)
    assert (valid_pixels(image, images, "the mask", print)[0, 0].numpy() == ~HOLE).all()


@pytest.mark.parametrize(
    "name", [n for n in IMAGES if IMAGES[n].mode in ("L", "LA", "RGB", "RGBA")]
)
def test_an_array_is_read_like_the_image(name: str) -> None:
    images = torch.zeros(1, 3, *HOLE.shape)
    values = np.asarray(IMAGES[name])
    values = values if values.ndim == 2 else values[None]
    assert (valid_pixels(values, images, "the mask", print)[0, 0].numpy() == ~HOLE).all()
    whole = values[0] if values.ndim == 4 else values
    assert (white_of_array(whole, white_level(whole)).white == HOLE).all()


def test_floating_point_files_are_masks_from_0_to_1() -> None:
    image = Image.fromarray(HOLE.astype(np.float32))
    assert (white_pixels(stored(image)) == HOLE).all()
    with pytest.raises(PhotoError, match="not numbers"):
        white_of_image(Image.fromarray(np.full((4, 4), np.nan, np.float32)))


def test_a_mask_with_an_orientation_is_turned_upright() -> None:
    image = turned()
    data = photo_files.file(image, "PNG", exif=image.info["exif"])
    assert (white_pixels(data) == HOLE).all()


def test_a_label_map_is_named_and_a_soft_edge_too() -> None:
    said: list[str] = []
    images = torch.zeros(1, 3, *HOLE.shape)
    valid_pixels(voc(), images, "m.png", said.append)
    soft = BLACK_WHITE.copy()
    soft[4, 3:15] = 100
    valid_pixels(Image.fromarray(soft), images, "m.png", said.append)
    assert said == [
        "m.png is a map of labels: every label but 0 is the hole.",
        "m.png is not pure black and white (3.8% of it is grey): pixels of 128 and more are the"
        " hole.",
    ]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16"])
def test_a_photo_is_no_mask(mode: str) -> None:
    grey = photo_files.smooth(64, 64)[..., 0]
    photo = Image.fromarray(np.clip(grey, 60, 200).astype(np.uint8))
    deep = Image.fromarray(np.asarray(photo).astype(np.uint16) * 257)
    with pytest.raises(PhotoError, match=r"it is mostly grey \(\d+% of it\), so it is not a mask"):
        white_of_image(deep if mode == "I;16" else photo.convert(mode))


@pytest.mark.parametrize("values", [127, 128, 140])
def test_a_picture_of_one_grey_is_no_mask(values: int) -> None:
    with pytest.raises(PhotoError, match="mostly grey"):
        white_pixels(stored(Image.new("L", (20, 20), values)))


@pytest.mark.parametrize("values", [127, 128])
def test_half_of_white_is_white(values: int) -> None:
    edge = np.where(HOLE, 255, 0).astype(np.uint8)
    edge[0] = values
    assert white_of_array(edge, 255).white[0].all() == (values == 128)
    deep = edge.astype(np.uint16) * 257
    deep[0] = 32767 + (values == 128)
    assert white_of_array(deep, white_level(deep)).white[0].all() == (values == 128)
