"""Mask recipes: pure drawing functions.

A recipe draws a hole mask, uint8 of size x size in {0, 255}, 255 = hole. The same (recipe, seed,
index, size) always gives the same mask. Lengths are those of a 256 x 256 picture and scale with
the side. The parameters of the stroke recipes are those of the published code they are named
after; `free-form-box`, `box-random` and `half` are ours.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Mask = NDArray[np.uint8]

HOLE = 255
RECIPES_VERSION = 1  # raise it when a recipe draws otherwise, so that stored sets are not reused
REFERENCE_SIDE = 256  # the lengths below are pixels of a picture of this side
LAMA_MAX_RATIO = 0.5  # LaMa's generator throws away a mask with more hole than this


def draw(recipe: str, seed: int, index: int, size: int) -> Mask:
    """Mask number `index` of a recipe: uint8 [size, size] in {0, 255}, 255 = hole.

    `seed` and `index` are non-negative and below 2^64. Raises KeyError on an unknown recipe.
    """
    return RECIPES[recipe](generator(f"mask/{recipe}/{seed}", index), size)


def generator(stream: str, index: int) -> np.random.Generator:
    """Random numbers that depend on the name of a stream and an index in it, nothing else."""
    import numpy as np

    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=np.array([key, index], dtype=np.uint64)))


def _free_form(rng: np.random.Generator, size: int) -> Mask:
    """Zigzag brush strokes of DeepFill v2 (Yu et al., ICCV 2019, `brush_stroke_mask`).

    Strokes lean to one side, so the authors meant to flip the mask at random (their code drops the
    flipped picture); we do flip.
    """
    import cv2
    import numpy as np

    mask = _empty(size)
    radius = math.hypot(size, size) / 8
    for _ in range(int(rng.integers(1, 4))):
        vertices = int(rng.integers(4, 12))
        mean, spread = 2 * math.pi / 5, 2 * math.pi / 15
        low, high = mean - rng.uniform(0, spread), mean + rng.uniform(0, spread)
        angles = rng.uniform(low, high, vertices)
        angles[::2] *= -1
        lengths = np.clip(rng.normal(radius, radius / 2, vertices), 0, 2 * radius)
        dx, dy = lengths * np.cos(angles), lengths * np.sin(angles)
        points = _walk(rng.integers(0, size, 2), dx, dy, size)
        width = _scaled(rng.uniform(12, 40), size)
        # OpenCV rounds the ends and joints of thick lines, which the authors draw as discs.
        cv2.polylines(mask, [np.array(points, np.int32)], False, HOLE, width)
    flips = rng.integers(0, 2, 2)
    if flips[0]:
        mask = mask[:, ::-1]
    if flips[1]:
        mask = mask[::-1]
    return np.ascontiguousarray(mask)


def _free_form_box(rng: np.random.Generator, size: int) -> Mask:
    """`free-form` and a box with sides of 16 to 128."""
    mask = _free_form(rng, size)
    _add_box(mask, rng, _scaled(16, size), _scaled(128, size))
    return mask


def _strokes(rng: np.random.Generator, size: int) -> Mask:
    """Irregular strokes as RFR and DSNet draw them (`generate_stroke_mask`), after the style of
    partial convolution's masks: every segment has its own direction, length and width."""
    mask = _empty(size)
    parts = int(rng.integers(1, 15))
    segments = rng.integers(0, 26, parts)
    angles = rng.uniform(0, 2 * math.pi, (parts, 25))
    lengths = rng.uniform(0, 100, (parts, 25))
    widths = rng.integers(5, 13, (parts, 25)) * 2
    _brush(mask, rng, segments, angles, lengths, widths)
    return mask


def _lama(
    strokes: tuple[int, int], width: int, length: int, boxes: tuple[int, int, int] | None
) -> Callable[[np.random.Generator, int], Mask]:
    """LaMa's random masks at 256 (Suvorov et al., WACV 2022, `MixedMaskGenerator`).

    `strokes` are the fewest and most; a width is 5 + U(0, `width`), a length 10 + U(0, `length`).
    `boxes` = (most, shortest side, longest side): boxes *instead of* strokes, with weight 0.3
    beside the strokes' 1. Masks with more than half hole are drawn again.
    """

    def draw_once(rng: np.random.Generator, size: int) -> Mask:
        mask = _empty(size)
        if boxes is not None and rng.random() < 0.3 / 1.3:
            most, short, long = boxes
            for _ in range(int(rng.integers(1, most + 1))):
                _add_box(mask, rng, _scaled(short, size), _scaled(long, size))
            return mask
        number = int(rng.integers(strokes[0], strokes[1] + 1))
        segments = rng.integers(1, 6, number)
        angles = 0.01 + rng.integers(0, 4, (number, 5))  # its `max_angle` 4: 0 to 3 whole radians
        angles[::2] *= -1
        lengths = 10 + rng.integers(0, length, (number, 5))
        widths = 5 + rng.integers(0, width, (number, 5))
        _brush(mask, rng, segments, angles, lengths, widths)
        return mask

    def draw_checked(rng: np.random.Generator, size: int) -> Mask:
        mask = draw_once(rng, size)
        while hole_ratio(mask) > LAMA_MAX_RATIO:
            mask = draw_once(rng, size)
        return mask

    return draw_checked


def _box(rng: np.random.Generator, size: int) -> Mask:
    """The centred square of half the side (128 x 128 at 256), half of the paper's masks."""
    mask = _empty(size)
    margin = (size - size // 2) // 2
    mask[margin : margin + size // 2, margin : margin + size // 2] = HOLE
    return mask


def _box_random(rng: np.random.Generator, size: int) -> Mask:
    """One box anywhere, its sides between an eighth and three quarters of the picture's."""
    mask = _empty(size)
    _add_box(mask, rng, _scaled(32, size), _scaled(192, size))
    return mask


def _half(rng: np.random.Generator, size: int) -> Mask:
    """The left, right, upper or lower half."""
    mask = _empty(size)
    half = size // 2
    side = int(rng.integers(0, 4))
    part = slice(0, half) if side % 2 == 0 else slice(size - half, size)
    if side < 2:
        mask[:, part] = HOLE
    else:
        mask[part] = HOLE
    return mask


def _outpaint(rng: np.random.Generator, size: int) -> Mask:
    """Each side is missing with p 1/2 (at least one), 4 to 25 % deep, as LaMa draws outpainting."""
    mask = _empty(size)
    missing = rng.random(4) < 0.5
    if not missing.any():
        missing[rng.integers(0, 4)] = True
    depths = [max(1, round(d * size)) for d in rng.uniform(0.04, 0.25, 4).tolist()]
    left, right, top, bottom = (d if m else 0 for d, m in zip(depths, missing, strict=True))
    mask[:] = HOLE
    mask[top : size - bottom, left : size - right] = 0
    return mask


def _empty(size: int) -> Mask:
    import numpy as np

    return np.zeros((size, size), np.uint8)


def _scaled(length: float, size: int) -> int:
    """A length of the 256 picture in pixels of one of side `size`, at least 1."""
    return max(1, round(length * size / REFERENCE_SIDE))


def _brush(
    mask: Mask,
    rng: np.random.Generator,
    segments: NDArray[np.int64],
    angles: NDArray[np.floating],
    lengths: NDArray[np.number],
    widths: NDArray[np.int64],
) -> None:
    """Strokes from random points. Stroke i has its first `segments[i]` columns of the other three;
    lengths and widths are those of the 256 picture, angles are turned from the y axis."""
    import cv2
    import numpy as np

    size = mask.shape[0]
    scale = size / REFERENCE_SIDE
    starts = rng.integers(0, size, (len(segments), 2))
    dx, dy = lengths * np.sin(angles) * scale, lengths * np.cos(angles) * scale
    pixels = np.maximum(np.rint(widths * scale), 1).astype(int).tolist()
    for i, count in enumerate(segments.tolist()):
        points = _walk(starts[i], dx[i, :count], dy[i, :count], size)
        for start, end, width in zip(points, points[1:], pixels[i], strict=False):
            cv2.line(mask, start, end, HOLE, width)


def _walk(
    start: NDArray[np.int64], dx: NDArray[np.float64], dy: NDArray[np.float64], size: int
) -> list[tuple[int, int]]:
    """Points (x, y) from `start`, step by step, held inside the picture."""
    x, y = float(start[0]), float(start[1])
    points = [(int(x), int(y))]
    end = size - 1.0
    for step_x, step_y in zip(dx.tolist(), dy.tolist(), strict=True):
        x += step_x  # comparisons rather than min and max: a mask has a thousand of these
        if x < 0:
            x = 0.0
        elif x > end:
            x = end
        y += step_y
        if y < 0:
            y = 0.0
        elif y > end:
            y = end
        points.append((int(x), int(y)))
    return points


def _add_box(mask: Mask, rng: np.random.Generator, short: int, long: int) -> None:
    """A box with sides of `short` to `long` pixels anywhere inside."""
    size = mask.shape[0]
    height, width = (int(v) for v in rng.integers(short, long + 1, 2))
    y, x = int(rng.integers(0, size - height + 1)), int(rng.integers(0, size - width + 1))
    mask[y : y + height, x : x + width] = HOLE


def hole_ratio(mask: Mask) -> float:
    """Share of hole pixels, in [0, 1]."""
    import cv2

    return float(cv2.countNonZero(mask)) / mask.size


RECIPES: dict[str, Callable[[np.random.Generator, int], Mask]] = {
    "free-form": _free_form,
    "free-form-box": _free_form_box,
    "strokes": _strokes,
    "lama-thin": _lama((4, 50), 10, 40, None),
    "lama-medium": _lama((4, 5), 50, 100, (5, 10, 50)),
    "lama-thick": _lama((1, 5), 100, 200, (3, 30, 150)),
    "box": _box,
    "box-random": _box_random,
    "half": _half,
    "outpaint": _outpaint,
}
