"""Single samples by position, for validation and evaluation: each is one range read through its
shard's index. Training reads whole shards (`dpnet.loading.loader`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data_prep.core.errors import ItemError, PipelineError
from data_prep.core.storage.store import Store
from data_prep.masks.codec import valid_from_png
from data_prep.pictures.decoding import Limits, decode_rgb
from data_prep.shards.shards import read_index, split_shards
from dpnet.loading.pairs import frozen_pairs

_ANY = Limits(max_pixels=1 << 40)  # the images stage has refused what is too large
_HEAD = 4096  # bytes in which a JPEG's tags and profile begin
_MARKS = (b"Exif\0", b"ICC_PROFILE\0", b"Adobe\0")


class Samples:
    """The payloads of one split of a committed images or masks stage, by position.

    Images larger than `size` pixels are cut to the square in their middle.
    """

    def __init__(self, store: Store, folder: str, split: str, size: int | None = None) -> None:
        self.store, self.size = store, size
        self.shards = split_shards(store, folder, split)
        self.rows = [
            {**row, "shard": shard} for shard in self.shards for row in read_index(store, shard)
        ]
        if not self.rows:
            raise PipelineError(
                f"the split {split!r} of {store.uri}/{folder} is empty: build it from more data."
            )

    def __len__(self) -> int:
        return len(self.rows)

    def payload(self, position: int) -> bytes:
        row = self.rows[position]
        try:
            data = self.store.read_range(row["shard"], row["offset"], row["size"])
        except FileNotFoundError:
            raise PipelineError(
                f"{self.store.uri}/{row['shard']} is missing: run `dpnet verify` on the root."
            ) from None
        if len(data) != row["size"]:
            raise PipelineError(
                f"{self.store.uri}/{row['shard']} is shorter than its index says:"
                " run `dpnet verify` on the root."
            )
        return data

    def image(self, position: int) -> NDArray[np.uint8]:
        """H W 3 uint8."""
        try:
            return self._cut(decode_image(self.payload(position)))
        except (OSError, ValueError, ItemError) as error:
            row = self.rows[position]
            raise PipelineError(
                f"sample {row['key']} of {self.store.uri}/{row['shard']} cannot be decoded"
                f" ({error}): run `dpnet verify` on the root."
            ) from error

    def _cut(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self.size is None:
            return image
        height, width = image.shape[:2]
        if min(height, width) < self.size:
            raise ValueError(
                f"it is {width} x {height} pixels, smaller than the masks' {self.size}"
            )
        top, left = (height - self.size) // 2, (width - self.size) // 2
        return image[top : top + self.size, left : left + self.size]

    def valid(self, position: int) -> NDArray[np.uint8]:
        """H W uint8 in {0, 1}, 1 = known."""
        try:
            return valid_from_png(self.payload(position))
        except PipelineError as error:
            row = self.rows[position]
            raise PipelineError(
                f"sample {row['key']} of {self.store.uri}/{row['shard']}: {error}"
            ) from error


def plain_jpeg(data: bytes) -> bool:
    """Whether it is a JPEG whose pixels are what it shows, as those that the images stage encodes:
    neither turned by a tag nor in another colour space than sRGB."""
    # They all come before the scan.
    scan = data.find(b"\xff\xda", 0, _HEAD)
    head = data[: scan if scan > 0 else _HEAD]
    return head[:2] == b"\xff\xd8" and not any(mark in head for mark in _MARKS)


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """H W 3 uint8 of a stored sample, as the images stage sees it. Raises ValueError or ItemError.

    With images.mode `keep` it may be any file that a camera has written.
    """
    if plain_jpeg(data):
        import simplejpeg

        try:
            decoded: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB")
            return decoded
        except ValueError:
            pass  # perhaps of a kind that needs Pillow
    return decode_rgb(data, _ANY).rgb


def validation_pairs(
    images: Samples, masks: Samples, digests: tuple[str, str], *, seed: int, count: int
) -> list[tuple[int, int]]:
    """At most `count` frozen (image, mask) pairs, spread evenly over the ratio bins."""
    pairs = frozen_pairs(*digests, seed, len(images), len(masks))
    if count >= len(pairs):
        return pairs
    return [pairs[i * len(pairs) // count] for i in range(count)]
