"""The example pairs of a report: which pairs, and their images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dpnet.evaluation.protocol import OURS, Rows, columns_of, pairs_by_bin

if TYPE_CHECKING:
    import pyarrow as pa

    from dpnet.evaluation.pairs import Pair

Array = NDArray[np.uint8]

TRUTH, MASKED, ERROR = "truth", "masked", "error"
ERROR_FULL = 64  # levels of mean difference that an error map shows as white
_SHARP = 96  # pixels a side, up to which the page has lossless images
_QUALITY = 90


@dataclass(frozen=True)
class Example:
    """One evaluated pair with its images and values.

    Attributes:
        strip: PNG of all images in a row; content of the evaluation.
        images: encoded images for the page, by name: TRUTH, MASKED, each method, ERROR.
        image: key of the image.
        mask: key of the mask.
        ratio_bin: name of the ratio bin.
        hole_ratio: share of hole pixels.
        values: by method, the metrics of the pair; None if there is no value.
        mark: "best", "median" or "worst", or "" for an example of a bin.
    """

    strip: bytes
    images: Mapping[str, bytes]
    image: str
    mask: str
    ratio_bin: str
    hole_ratio: float
    values: Mapping[str, Mapping[str, float | None]]
    mark: str = ""

    @property
    def name(self) -> str:
        """Return the name of the strip's file."""
        return f"{self.ratio_bin}-{self.mask}"

    @property
    def gain(self) -> float | None:
        """Return DPNet's hole PSNR minus the smooth fill's, in dB; None for an empty hole."""
        ours, smooth = (self.values[name]["hole_psnr"] for name in (OURS, "smooth_fill"))
        return None if ours is None or smooth is None else ours - smooth


def choose_examples(pairs: Sequence[Pair], table: pa.Table, count: int) -> dict[Pair, str]:
    """Return the pairs to show with their marks, in the order of the page.

    The best, median and worst pairs are those by DPNet's gain over the smooth fill in hole PSNR:
    its hole PSNR alone would only find the smallest and the largest holes. Then come the first
    pairs of each bin.

    Args:
        pairs: all pairs.
        table: the rows of all pairs and methods, in the order of the pairs.
        count: pairs of each mark and of each bin.
    """
    columns = columns_of(table)
    gains = columns[OURS]["hole_psnr"] - columns["smooth_fill"]["hole_psnr"]
    ranked = np.argsort(gains, kind="stable")[: len(gains) - int(np.isnan(gains).sum())]
    middle = max(0, (len(ranked) - count) // 2)
    chosen: dict[int, str] = {}
    for mark, some in (
        ("best", ranked[::-1][:count]),
        ("worst", ranked[:count]),
        ("median", ranked[middle : middle + count]),
        ("", [n for at in pairs_by_bin(table).values() for n in at[:count]]),
    ):
        for number in some:
            chosen.setdefault(int(number), mark)
    order = ("best", "median", "worst", "")
    return {
        pairs[number]: mark
        for number, mark in sorted(chosen.items(), key=lambda each: order.index(each[1]))
    }


def draw_example(
    truth: Array, valid: Array, methods: Mapping[str, Array], rows: Rows, mark: str
) -> Example:
    """Draw the images of a pair.

    Args:
        truth: uint8 [H, W, 3].
        valid: uint8 [H, W], 1 = known.
        methods: the composite of each method, uint8 [H, W, 3].
        rows: the rows of the pair, one for each method.
        mark: mark of the pair.
    """
    pictures = {
        TRUTH: truth,
        MASKED: np.where(valid[..., None] > 0, truth, np.uint8(255)),
        **methods,
        ERROR: error_map(methods[OURS], truth),
    }
    keys = {name: rows[0][name] for name in ("image", "mask", "ratio_bin", "hole_ratio")}
    return Example(
        strip=draw_strip(list(pictures.values())),
        images={name: _encoded(pixels) for name, pixels in pictures.items()},
        values={row["method"]: {k: row[k] for k in row if k not in keys} for row in rows},
        mark=mark,
        **keys,
    )


def error_map(composite: Array, truth: Array) -> Array:
    """Return the absolute difference (mean of the channels) from black over red to white.

    White is ERROR_FULL levels or more, so maps of different pairs can be compared.
    """
    difference = np.abs(composite.astype(np.float64) - truth).mean(axis=2)
    heat: NDArray[np.float64] = np.minimum(difference / ERROR_FULL, 1)[..., None] * 3 - np.array(
        [0, 1, 2]
    )
    levels: Array = np.rint(np.clip(heat, 0, 1) * 255).astype(np.uint8)
    return levels


def draw_strip(pictures: Sequence[Array]) -> bytes:
    """Return a PNG of images of one size in a row, with transparent gaps between them."""
    height, width = pictures[0].shape[:2]
    step = width + max(2, width // 32)
    sheet = Image.new("RGBA", (step * len(pictures) - (step - width), height), (0, 0, 0, 0))
    for number, pixels in enumerate(pictures):
        sheet.paste(Image.fromarray(pixels), (step * number, 0))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _encoded(pixels: Array) -> bytes:
    """Encode an image for the page: small ones without loss, so that it stays below some MB."""
    file = io.BytesIO()
    options: dict[str, Any] = {"lossless": True} if len(pixels) <= _SHARP else {"quality": _QUALITY}
    Image.fromarray(pixels).save(file, "WEBP", **options)
    return file.getvalue()
