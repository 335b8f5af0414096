"""Image files of every format, and measures of their pixels, for the tests of photos."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, features

from data_prep.pictures.cutting import Cutting
from data_prep.pictures.decoding import decode_rgb
from data_prep.pictures.limits import MAX_PIXELS, Limits
from data_prep.pictures.prepare import prepare

REPOSITORY = Path(__file__).parents[2]
PHOTOS = REPOSITORY.parent / "shared" / "data" / "photos"
AS_IT_IS = Limits(MAX_PIXELS)
FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM"]
FORMATS += [
    name
    for name, feature in (("JPEG2000", "jpg_2000"), ("AVIF", "avif"))
    if features.check(feature)
]


def noise(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.Generator(np.random.Philox(seed)).integers(0, 256, shape, dtype=np.uint8)


def smooth(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Make an image with large shapes, like a photo."""
    coarse = Image.fromarray(noise(4, 5, 3, seed))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def file(image: Image.Image | np.ndarray, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(out, format, **options)
    return out.getvalue()


def pixels(data: bytes, at_least: int | None = None) -> np.ndarray:
    rgb = decode_rgb(data, AS_IT_IS, at_least).rgb
    assert rgb.dtype == np.uint8
    assert rgb.shape[2] == 3
    return rgb


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def sample(data: bytes, **how: object) -> np.ndarray:
    (piece,) = prepare(data, Cutting(format="png", **how), "key").pieces  # type: ignore[arg-type]
    stored = by_pillow(piece.data)
    assert stored.shape == (piece.height, piece.width, 3)
    return stored


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(1e-9, np.mean((a.astype(float) - b) ** 2))))


def difference(a: np.ndarray, b: np.ndarray | tuple[int, ...]) -> int:
    return int(np.abs(a.astype(int) - np.asarray(b).astype(int)).max())


NOISE = noise(40, 60)
RGB = Image.fromarray(NOISE)


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int, *between: bytes) -> bytes:
    """Make a tiny PNG file that claims to be huge."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(between) + body
