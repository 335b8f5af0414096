"""Limits of a photo's size, and the error that says why a photo cannot be used."""

from __future__ import annotations

from dataclasses import dataclass

from data_prep.core.errors import ItemError

MAX_PIXELS = 64_000_000  # a worker process needs less than 700 MB for a photo of this size
MOST_PIXELS = 178_000_000  # of any image, whatever the config says
TOO_SMALL = "its shorter side needs"  # in the reason of a photo with too few pixels
_SHARES = {"WEBP": 0.5, "JPEG2000": 0.33, "AVIF": 0.75}  # of max_pixels: these readers keep copies


class PhotoError(ItemError):
    """Reason why a photo cannot be used; the message does not name the photo."""


class HeicError(PhotoError):
    """Photo in the format HEIC, which cannot be read."""


class PhotoSizeError(PhotoError):
    """Photo with too many or too few pixels."""


@dataclass(frozen=True)
class Limits:
    """Limits that are checked against a photo's header, before its pixels are decoded.

    Attributes:
        max_pixels: most pixels, width x height.
        min_side: least pixels of the shorter side; 0 for no limit.
        option: the name of `max_pixels` in messages.
    """

    max_pixels: int
    min_side: int = 0
    option: str = "images.max_pixels"

    def check(self, width: int, height: int, format: str) -> None:
        """Check a size in pixels. Raises PhotoSizeError."""
        size = f"it has {width}x{height} pixels"
        if width * height > self.max_pixels:
            raise PhotoSizeError(f"{size}, {self.option} is {self.max_pixels}")
        share = _SHARES.get(format, 1.0)
        if width * height > share * self.max_pixels:
            share_of = f"{share:.0%} of {self.option}, which is {self.max_pixels}"
            raise PhotoSizeError(f"{size}, the limit for {format} is {share_of}")
        if min(width, height) < max(self.min_side, 1):
            raise PhotoSizeError(f"{size}, {TOO_SMALL} {max(self.min_side, 1)}")


STORED = Limits(MOST_PIXELS, option="the limit")  # for images that a root contains
