"""The mask that a stroke of the page must give, written a second time and pixel by pixel."""

from __future__ import annotations

from email.parser import BytesParser

import numpy as np

Pixel = tuple[int, int]


def paint_line(mask: np.ndarray, start: Pixel, end: Pixel, diameter: int, value: int = 255) -> None:
    """Set the pixels with centres at most half of a diameter from a line, in whole numbers.

    Args:
        mask: H W, uint8; changed in place.
        start: x and y of the first pixel.
        end: x and y of the last pixel.
        diameter: of the brush.
        value: 255 in the hole, 0 to erase.
    """
    reach = diameter // 2
    left, right = (f(start[0], end[0]) + s * reach for f, s in ((min, -1), (max, 1)))
    top, bottom = (f(start[1], end[1]) + s * reach for f, s in ((min, -1), (max, 1)))
    left, top = max(0, left), max(0, top)
    part = mask[top : max(0, bottom + 1), left : max(0, right + 1)]
    y, x = (np.arange(n, dtype=np.int64) for n in part.shape)
    wx, wy = (x + left - start[0])[None, :], (y + top - start[1])[:, None]
    vx, vy = end[0] - start[0], end[1] - start[1]
    along, square = wx * vx + wy * vy, vx * vx + vy * vy
    near_start = 4 * (wx**2 + wy**2) <= diameter**2
    near_end = 4 * ((wx - vx) ** 2 + (wy - vy) ** 2) <= diameter**2
    near_line = 4 * (wx * vy - wy * vx) ** 2 <= diameter**2 * square
    between = (along > 0) & (along < square)
    part[near_start | near_end | (near_line & between)] = value


def paint_box(mask: np.ndarray, start: Pixel, end: Pixel, value: int = 255) -> None:
    """Set the pixels of a box between two pixels, both included; the mask changes in place."""
    (left, right), (top, bottom) = (sorted(each) for each in zip(start, end, strict=True))
    mask[max(0, top) : max(0, bottom + 1), max(0, left) : max(0, right + 1)] = value


def form_fields(content_type: str, body: bytes) -> dict[str, bytes]:
    """Return the fields of a form that a browser has sent."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode()
    parts = BytesParser().parsebytes(head + body).get_payload()
    return {
        str(part.get_param("name", header="content-disposition")): part.get_payload(decode=True)
        for part in parts
    }
