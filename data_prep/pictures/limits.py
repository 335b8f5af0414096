"""Limits of a photo's size, and the error that says why a photo cannot be used."""

from __future__ import annotations

from dataclasses import dataclass

from data_prep.core.errors import ItemError

MAX_PIXELS = 64_000_000  # a worker process needs less than 700 MB for a photo of this size
_SHARES = {"WEBP": 0.5, "JPEG2000": 0.33, "AVIF": 0.75}  # of max_pixels: these readers keep copies


class PhotoError(ItemError):
    """Reason why a photo cannot be used; the message does not name the photo."""


@dataclass(frozen=True)
class Limits:
    """Limits that are checked against a photo's header, before its pixels are decoded.

    Attributes:
        max_pixels: most pixels, width x height.
        min_side: least pixels of the shorter side; 0 for no limit.
    """

    max_pixels: int
    min_side: int = 0

    def check(self, width: int, height: int, format: str) -> None:
        """Check a size in pixels. Raises PhotoError."""
        size = f"it has {width}x{height} pixels"
        if width * height > self.max_pixels:
            raise PhotoError(f"{size}, images.max_pixels is {self.max_pixels}")
        share = _SHARES.get(format, 1.0)
        if width * height > share * self.max_pixels:
            share_of = f"{share:.0%} of images.max_pixels, which is {self.max_pixels}"
            raise PhotoError(f"{size}, the limit for {format} is {share_of}")
        if min(width, height) < max(self.min_side, 1):
            raise PhotoError(f"{size}, its shorter side needs {max(self.min_side, 1)}")
