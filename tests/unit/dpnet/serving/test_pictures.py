"""Photos and masks of requests: which are refused, and the file that is sent back."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_prep.core.errors import PipelineError
from dpnet.inpainting.read_file import TooLargeError
from dpnet.serving.pictures import check_format, decode, encode, exif_to_keep

SIZE = (48, 32)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
THUMBNAIL = b"\xff\xd8 what the hole hides \xff\xd9"


def picture(mode: str = "RGB", size: tuple[int, int] = SIZE) -> Image.Image:
    """Return a picture with random colours."""
    made = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 4), np.uint8)
    return Image.fromarray(made, "RGBA").convert(mode)


def saved(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    """Return a picture as a file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


MASK = saved(Image.new("L", SIZE, 255))


def exif_with(orientation: int, order: str = ">") -> bytes:
    """Return EXIF tags: the orientation, the camera's name, a thumbnail."""
    first, second, name, thumbnail = 8, 50, 80, 100
    data = bytearray(thumbnail + len(THUMBNAIL))
    data[:4] = b"II*\0" if order == "<" else b"MM\0*"
    struct.pack_into(f"{order}IH", data, 4, first, 2)
    struct.pack_into(f"{order}HHIHxx", data, first + 2, 0x0112, 3, 1, orientation)
    struct.pack_into(f"{order}HHII", data, first + 14, 0x010F, 2, 8, name)
    struct.pack_into(f"{order}I", data, first + 26, second)
    struct.pack_into(f"{order}H", data, second, 2)
    struct.pack_into(f"{order}HHII", data, second + 2, 0x0201, 4, 1, thumbnail)
    struct.pack_into(f"{order}HHII", data, second + 14, 0x0202, 4, 1, len(THUMBNAIL))
    data[name : name + 8] = b"Camera!\0"
    data[thumbnail:] = THUMBNAIL
    return b"Exif\0\0" + bytes(data)


def test_a_photo_and_its_mask_are_turned_upright() -> None:
    image = saved(picture(), "JPEG", exif=exif_with(6), quality=95)
    photo, mask = decode(image, saved(Image.new("L", (32, 48))), 10_000)
    assert photo.image.size == (32, 48) == mask.size
    assert photo.format == "JPEG"


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_tags_that_are_kept_are_upright_and_have_no_thumbnail(order: str) -> None:
    kept = exif_to_keep(exif_with(8, order))
    tags = Image.Exif()
    tags.load(kept)
    assert (tags[0x0112], tags[0x010F]) == (1, "Camera!")
    assert b"what the hole hides" not in kept
    assert len(kept) == len(exif_with(8, order))


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"nothing"])
def test_tags_that_cannot_be_read_are_dropped(exif: bytes) -> None:
    assert exif_to_keep(exif) == b""


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF", "JPEG"])
def test_the_own_format_keeps_profile_tags_and_in_lossless_formats_every_pixel(format: str) -> None:
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    exif = exif_with(1)
    data = saved(picture(), format, icc_profile=PROFILE, exif=exif, **options)
    photo, _ = decode(data, MASK, 10_000)
    written = encode(photo.image, photo, same=True)
    with Image.open(io.BytesIO(written.data)) as again:
        assert again.format == format
        assert written.media_type == Image.MIME[format]
        assert again.info["icc_profile"] == PROFILE
        if format != "TIFF":
            assert again.getexif()[0x010F] == "Camera!"
        if format != "JPEG":
            assert again.convert("RGB").tobytes() == photo.image.tobytes()


def test_png_has_the_profile_and_no_tags() -> None:
    photo, _ = decode(saved(picture(), "JPEG", icc_profile=PROFILE, exif=exif_with(1)), MASK, 9999)
    with Image.open(io.BytesIO(encode(photo.image, photo, same=False).data)) as again:
        assert (again.format, again.info["icc_profile"]) == ("PNG", PROFILE)
        assert not again.getexif()


def test_a_format_that_cannot_be_written_is_named() -> None:
    photo, _ = decode(saved(picture("P"), "GIF"), MASK, 10_000)
    with pytest.raises(PipelineError, match="format GIF cannot be written: ask for the format png"):
        check_format(photo)


def deep_png() -> bytes:
    """Return a PNG of 16 bits a channel in RGB."""
    import cv2

    done, data = cv2.imencode(".png", np.zeros((*SIZE[::-1], 3), np.uint16))
    assert done
    return data.tobytes()


MOVING = [picture(), Image.new("RGB", SIZE)]


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (b"", "the photo cannot be decoded: it is empty"),
        (b"<svg/>", "it is not an image"),
        (saved(picture())[:-40], "it is truncated"),
        (saved(picture(), "JPEG")[:-400], "it is truncated"),
        (saved(MOVING[0], "GIF", save_all=True, append_images=MOVING[1:]), "2 pages or moments"),
        (saved(MOVING[0], "PNG", save_all=True, append_images=MOVING[1:]), "2 pages or moments"),
        (saved(MOVING[0], "WEBP", save_all=True, append_images=MOVING[1:]), "2 pages or moments"),
        (saved(MOVING[0], "TIFF", save_all=True, append_images=MOVING[1:]), "2 pages or moments"),
        (saved(picture("L").convert("I;16")), "more than 8 bits"),
        (deep_png(), "more than 8 bits"),
        (b"P6 2 1 65535\n" + b"\1\2" * 6, "more than 8 bits"),
        (saved(picture("L").convert("F"), "TIFF"), "more than 8 bits"),
    ],
)  # fmt: skip
def test_a_photo_that_cannot_be_used_is_refused_with_the_reason(image: bytes, said: str) -> None:
    with pytest.raises(PipelineError, match=said):
        decode(image, MASK, 10_000)


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (
            saved(MOVING[0], "GIF", save_all=True, append_images=MOVING[1:]),
            "the photo has 2 pages or moments: send a picture that is not animated.",
        ),
        (
            saved(picture("L").convert("I;16")),
            "the photo has more than 8 bits a channel: convert it to 8 bits first.",
        ),
        (
            b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(60),
            "the photo is HEIC, the format of iPhones, which cannot be read: export it as JPEG.",
        ),
        (
            b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(60),
            "the photo is HEIC, the format of iPhones, which cannot be read: export it as JPEG.",
        ),
    ],
)
def test_an_undamaged_photo_of_another_kind_is_not_called_broken(
    image: bytes, sentence: str
) -> None:
    with pytest.raises(PipelineError) as error:
        decode(image, MASK, 10_000)
    assert str(error.value) == sentence


def test_an_animated_mask_is_not_called_broken() -> None:
    mask = saved(MOVING[0], "GIF", save_all=True, append_images=MOVING[1:])
    with pytest.raises(PipelineError, match=r"^the mask has 2 pages or moments"):
        decode(saved(picture()), mask, 10_000)


def test_a_photo_of_two_exposures_is_no_animation() -> None:
    second = Image.new("RGB", SIZE)
    photo, _ = decode(saved(picture(), "MPO", save_all=True, append_images=[second]), MASK, 10_000)
    assert photo.format == "JPEG"


def test_too_many_pixels_are_refused_before_they_are_decoded() -> None:
    with pytest.raises(TooLargeError, match="the limit of this server is 1535"):
        decode(saved(picture()), MASK, 1535)
    with pytest.raises(TooLargeError, match="the mask"):
        decode(saved(picture()), saved(Image.new("L", (100, 100))), 1536)


def test_a_damaged_mask_is_named() -> None:
    with pytest.raises(PipelineError, match="the mask cannot be decoded"):
        decode(saved(picture()), MASK[:-30], 10_000)
