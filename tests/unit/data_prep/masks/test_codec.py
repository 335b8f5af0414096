"""Masks as PNG files."""

import io
import itertools
import struct
import subprocess
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from data_prep.core.errors import PipelineError
from data_prep.masks.codec import _decode_own_png, encode_png, valid_from_png
from data_prep.masks.recipes import RECIPES, draw


def test_a_mask_is_stored_with_white_holes_and_read_with_1_for_known() -> None:
    hole = np.zeros((17, 17), np.uint8)
    hole[2:5, 3:11] = 255
    png = encode_png(hole)
    image = Image.open(io.BytesIO(png))
    assert image.mode == "1"
    assert (np.asarray(image.convert("L")) == hole).all()
    valid = valid_from_png(png)
    assert valid.dtype == np.uint8
    assert (valid == (hole == 0)).all()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


ADAM7 = [
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
]


def png_of(
    hole: np.ndarray, *, filtered: bool = False, interlaced: bool = False, parts: int = 1
) -> bytes:
    """Encode a 1-bit PNG as another program may write it."""
    lines = b""
    for top, left, down, right in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        part = hole[top::down, left::right]
        for row in np.packbits(part > 0, axis=1) if part.size else []:
            if filtered:  # filter "Sub": each byte minus the previous one
                row = np.diff(row, prepend=np.uint8(0))
            lines += bytes([filtered]) + row.tobytes()
    packed = zlib.compress(lines)
    header = struct.pack(">IIBBBBB", hole.shape[1], hole.shape[0], 1, 0, 0, 0, interlaced)
    cuts = [len(packed) * number // parts for number in range(parts + 1)]
    pixels = b"".join(chunk(b"IDAT", packed[a:b]) for a, b in itertools.pairwise(cuts))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def with_pillow(data: bytes) -> np.ndarray:
    return (np.asarray(Image.open(io.BytesIO(data)).convert("L")) < 128).astype(np.uint8)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_fast_decoder_agrees_with_a_general_one_on_our_masks(recipe: str) -> None:
    for index, size in enumerate([*range(16, 34), 63, 64, 65, 100, 256]):
        hole = draw(recipe, 0, index, size)
        png = encode_png(hole)
        unpacked = _decode_own_png(png)
        assert unpacked is not None
        assert unpacked.dtype == np.uint8
        assert (unpacked == (hole == 0)).all()
        assert (unpacked == with_pillow(png)).all()
        assert (valid_from_png(png) == unpacked).all()


@pytest.mark.parametrize(
    ("how", "fast"),
    [
        ({}, True),
        ({"filtered": True}, False),
        ({"interlaced": True}, False),
        ({"parts": 2}, False),
        ({"parts": 5}, False),
    ],
)
@pytest.mark.parametrize("size", [17, 64])
def test_png_files_of_other_programs_are_read(how: dict, fast: bool, size: int) -> None:
    hole = draw("free-form", 1, 2, size)
    png = png_of(hole, **how)
    assert (_decode_own_png(png) is not None) == fast
    assert (valid_from_png(png) == (hole == 0)).all()
    assert (with_pillow(png) == (hole == 0)).all()


def test_gray_values_from_128_up_are_holes() -> None:
    gray = np.arange(256, dtype=np.uint8).reshape(16, 16)
    file = io.BytesIO()
    Image.fromarray(gray).save(file, "PNG")
    assert (valid_from_png(file.getvalue()) == (gray < 128)).all()


def test_a_mask_with_any_bit_flipped_is_the_same_mask_or_an_error() -> None:
    hole = draw("strokes", 0, 0, 32)
    png = encode_png(hole)
    refused = 0
    for at in range(8 * len(png)):
        if at // 8 in (33, 34):
            continue  # a length of gigabytes: the general decoder would be slow
        altered = bytearray(png)
        altered[at // 8] ^= 1 << at % 8
        try:
            valid = valid_from_png(bytes(altered))
        except PipelineError:
            refused += 1
        else:
            assert (valid == (hole == 0)).all()
    assert refused > 8 * (len(png) - 30)  # except checksums and the end chunk


def test_a_truncated_mask_is_an_error() -> None:
    png = encode_png(draw("strokes", 0, 0, 32))
    for length in range(len(png) - 12):  # the end chunk is not needed
        with pytest.raises(PipelineError, match="not a readable PNG"):
            valid_from_png(png[:length])
    short = png_of(np.zeros((15, 16), np.uint8))
    longer = short.replace(struct.pack(">II", 16, 15), struct.pack(">II", 16, 16))
    assert _decode_own_png(longer) is None  # it has fewer pixels than its header says


@pytest.mark.parametrize("format", ["TIFF", "BMP", "JPEG", "WEBP", "PPM"])
def test_a_mask_in_another_format_is_an_error(format: str) -> None:
    file = io.BytesIO()
    Image.fromarray(draw("strokes", 0, 0, 32)).save(file, format)
    with pytest.raises(PipelineError, match="not a readable PNG"):
        valid_from_png(file.getvalue())


def test_a_mask_with_too_many_pixels_is_an_error() -> None:
    huge = png_of(np.zeros((1 << 13, 1 << 14), np.uint8))
    assert len(huge) < 100_000
    with pytest.raises(PipelineError, match="not a readable PNG"):
        valid_from_png(huge)


def test_a_mask_that_expands_to_more_than_its_pixels_is_not_expanded() -> None:
    png = png_of(np.zeros((16, 16), np.uint8))
    start, end = png.index(b"IDAT") - 4, png.index(b"IEND") - 4
    bomb = png[:start] + chunk(b"IDAT", zlib.compress(bytes(100 << 20), 9)) + png[end:]
    tracemalloc.start()
    assert _decode_own_png(bomb) is None
    assert tracemalloc.get_traced_memory()[1] < 2 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("data", [b"", b"not an image", b"\x89PNG\r\n\x1a\n"])
def test_bytes_that_are_not_an_image_are_an_error(data: bytes) -> None:
    with pytest.raises(PipelineError, match="not a readable PNG"):
        valid_from_png(data)


@pytest.mark.parametrize("module", ["data_prep.masks.codec", "dpnet.loading.loader"])
def test_reading_masks_imports_no_settings_no_stage_and_no_process_pool(module: str) -> None:
    found = subprocess.run(
        [sys.executable, "-c", f"import sys, {module}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(found.stdout.split())
    assert module in loaded
    assert not loaded & {"pydantic", "data_prep.core.pool"}
    ours = {name for name in loaded if name.startswith("data_prep.masks.")}
    assert ours == {"data_prep.masks.codec"}


def test_a_mask_with_an_altered_header_is_an_error() -> None:
    png = bytearray(encode_png(draw("strokes", 0, 0, 30)))
    assert png[16:20] == (30).to_bytes(4, "big")
    png[19] = 31  # the lines have as many bytes, so only the checksum shows it
    with pytest.raises(PipelineError, match="not a readable PNG"):
        valid_from_png(bytes(png))
