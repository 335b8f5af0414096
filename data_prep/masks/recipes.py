"""Mask recipes: pure functions that draw.

A recipe draws a hole mask, uint8 [size, size] in {0, 255}, 255 = hole. The same (recipe, seed,
index, size) always gives the same mask. Lengths are given for a 256 x 256 image and scale with the
side. The stroke recipes have the parameters of the published code that they are named after;
`free-form-box`, `box-random` and `half` are ours.
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
RECIPES_VERSION = 1  # raise it when a recipe changes, so that stored sets are not reused
EXTERNAL = "external"  # the recipe that takes masks from files; it is not in RECIPES
REFERENCE_SIDE = 256  # the lengths below are pixels of an image with this side
LAMA_MAX_RATIO = 0.5  # LaMa's generator discards a mask with a larger hole ratio


def draw(recipe: str, seed: int, index: int, size: int) -> Mask:
    """Draw mask number `index` of a recipe: uint8 [size, size] in {0, 255}, 255 = hole.

    Args:
        recipe: a key of RECIPES.
        seed: of the stream, 0 to 2^64 - 1.
        index: in the stream, 0 to 2^64 - 1.
        size: side in pixels.

    Raises:
        KeyError: the recipe is unknown.
    """
    return RECIPES[recipe](generator(f"mask/{recipe}/{seed}", index), size)


def generator(stream: str, index: int) -> np.random.Generator:
    """Return a generator that depends only on the name of a stream and an index in it."""
    import numpy as np

    key = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    return np.random.Generator(np.random.Philox(key=np.array([key, index], dtype=np.uint64)))


def _free_form(rng: np.random.Generator, size: int) -> Mask:
    """Draw zigzag brush strokes as DeepFill v2 (Yu et al., ICCV 2019, `brush_stroke_mask`).

    Strokes lean to one side. The authors meant to flip the mask at random, but their code discards
    the flipped image. We do flip.
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
        # OpenCV rounds the ends and joints of thick lines; the authors draw discs there.
        cv2.polylines(mask, [np.array(points, np.int32)], False, HOLE, width)
    flips = rng.integers(0, 2, 2)
    if flips[0]:
        mask = mask[:, ::-1]
    if flips[1]:
        mask = mask[::-1]
    return np.ascontiguousarray(mask)


def _free_form_box(rng: np.random.Generator, size: int) -> Mask:
    """Draw `free-form` and a box with sides of 16 to 128."""
    mask = _free_form(rng, size)
    _add_box(mask, rng, _scaled(16, size), _scaled(128, size))
    return mask


def _strokes(rng: np.random.Generator, size: int) -> Mask:
    """Draw irregular strokes as RFR and DSNet do (`generate_stroke_mask`).

    They imitate the masks of partial convolution: each segment has its own direction, length and
    width.
    """
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
    """Return the recipe of LaMa's masks at 256 (Suvorov et al., WACV 2022, `MixedMaskGenerator`).

    Masks with more than half hole are drawn again.

    Args:
        strokes: least and greatest number of strokes.
        width: of a stroke is 5 + U(0, `width`).
        length: of a segment is 10 + U(0, `length`).
        boxes: most boxes, shortest side, longest side. Boxes replace the strokes with weight 0.3,
            compared with the weight 1 of strokes.
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
    """Draw the centred square of half the side (128 x 128 at 256): half of the paper's masks."""
    mask = _empty(size)
    margin = (size - size // 2) // 2
    mask[margin : margin + size // 2, margin : margin + size // 2] = HOLE
    return mask


def _box_random(rng: np.random.Generator, size: int) -> Mask:
    """Draw one box anywhere, with sides of one eighth to three quarters of the image's."""
    mask = _empty(size)
    _add_box(mask, rng, _scaled(32, size), _scaled(192, size))
    return mask


def _half(rng: np.random.Generator, size: int) -> Mask:
    """Draw the left, right, upper or lower half."""
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
    """Draw strips at the sides, each with probability 1/2 and at least one, 4 to 25 % deep.

    LaMa draws its masks for outpainting so.
    """
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
    """Scale a length of the 256 image to an image of side `size`, to at least 1 pixel."""
    return max(1, round(length * size / REFERENCE_SIDE))


def _brush(
    mask: Mask,
    rng: np.random.Generator,
    segments: NDArray[np.int64],
    angles: NDArray[np.floating],
    lengths: NDArray[np.number],
    widths: NDArray[np.int64],
) -> None:
    """Draw strokes that start at random points.

    Args:
        mask: drawn on.
        rng: gives the starting points.
        segments: number of segments of each stroke, [strokes].
        angles: from the y axis in radians, [strokes, most segments].
        lengths: pixels of the 256 image, of the same shape as `angles`.
        widths: pixels of the 256 image, of the same shape as `angles`.
    """
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
    """Return the points (x, y) from `start`, step by step, clipped to the image."""
    x, y = float(start[0]), float(start[1])
    points = [(int(x), int(y))]
    end = size - 1.0
    for step_x, step_y in zip(dx.tolist(), dy.tolist(), strict=True):
        x += step_x  # comparisons are faster than min and max, and a mask has a thousand of them
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
    """Draw a box with sides of `short` to `long` pixels anywhere inside."""
    size = mask.shape[0]
    height, width = (int(v) for v in rng.integers(short, long + 1, 2))
    y, x = int(rng.integers(0, size - height + 1)), int(rng.integers(0, size - width + 1))
    mask[y : y + height, x : x + width] = HOLE


def hole_ratio(mask: Mask) -> float:
    """Return the share of hole pixels, in [0, 1]."""
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
