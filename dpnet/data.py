"""Training batches from image shards and mask shards.

Every sample is one range read through its shard's index. A thread reads and decodes ahead of the
training step.
"""

from __future__ import annotations

import io
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import PipelineError
from data_prep.masks import valid_from_png
from data_prep.shards import read_index, split_shards
from data_prep.storage import Store
from dpnet.order import generator, rank_cursors, sample_at
from dpnet.pairs import frozen_pairs

AHEAD = 4  # batches that wait decoded


@dataclass(frozen=True)
class Batch:
    """`image` N H W 3 uint8; `valid` N H W uint8 in {0, 1}, 1 = known pixel."""

    image: NDArray[np.uint8]
    valid: NDArray[np.uint8]


class Samples:
    """The payloads of one split of a committed images or masks stage, by position."""

    def __init__(self, store: Store, folder: str, split: str) -> None:
        self.store = store
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
            return decode_image(self.payload(position))
        except (OSError, ValueError) as error:
            row = self.rows[position]
            raise PipelineError(
                f"sample {row['key']} of {self.store.uri}/{row['shard']} cannot be decoded"
                f" ({error}): run `dpnet verify` on the root."
            ) from error

    def valid(self, position: int) -> NDArray[np.uint8]:
        """H W uint8 in {0, 1}, 1 = known."""
        return valid_from_png(self.payload(position))


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """H W 3 uint8 of a stored sample: JPEG by libjpeg-turbo, the others by Pillow."""
    if data[:2] == b"\xff\xd8":
        import simplejpeg

        decoded: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, colorspace="RGB")
        return decoded
    from PIL import Image

    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGB"))


class TrainingBatches:
    """The batches of one rank, a pure function of the step.

    Images and masks are paired by two independent orders. Images are flipped left to right; masks
    are also turned by quarters, which photographs must not be.
    """

    def __init__(
        self,
        images: Samples,
        masks: Samples,
        digests: tuple[str, str],
        *,
        seed: int,
        batch: int,
        rank: int,
        world: int,
    ) -> None:
        self.images, self.masks, self.digests = images, masks, digests
        self.seed, self.batch, self.rank, self.world = seed, batch, rank, world

    def at(self, step: int) -> Batch:
        pairs = [self._pair(c) for c in rank_cursors(step, self.batch, self.rank, self.world)]
        return Batch(np.stack([image for image, _ in pairs]), np.stack([v for _, v in pairs]))

    def _pair(self, cursor: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        images_digest, masks_digest = self.digests
        image = self.images.image(sample_at(images_digest, self.seed, cursor, len(self.images)))
        valid = self.masks.valid(sample_at(masks_digest, self.seed, cursor, len(self.masks)))
        random = generator("augment", self.seed, cursor)
        if random.integers(2):
            image = image[:, ::-1]
        valid = np.rot90(valid, int(random.integers(4)))
        if random.integers(2):
            valid = valid[:, ::-1]
        return image, valid

    def ahead(self, start: int, stop: int) -> Iterator[tuple[int, Batch]]:
        """(step, batch) for steps [start, stop), read and decoded by a thread in advance."""
        ready: queue.Queue[tuple[int, Batch] | BaseException] = queue.Queue(AHEAD)
        stopped = threading.Event()

        def put(item: tuple[int, Batch] | BaseException) -> None:
            while not stopped.is_set():
                try:
                    ready.put(item, timeout=0.2)
                    return
                except queue.Full:
                    continue

        def work() -> None:
            try:
                for step in range(start, stop):
                    if stopped.is_set():
                        return
                    put((step, self.at(step)))
            except BaseException as error:  # handed to the consumer, which raises it
                put(error)

        threading.Thread(target=work, daemon=True).start()
        try:
            for _ in range(start, stop):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()


def validation_pairs(
    images: Samples, masks: Samples, digests: tuple[str, str], *, seed: int, count: int
) -> list[tuple[int, int]]:
    """At most `count` frozen (image, mask) pairs, spread evenly over the ratio bins."""
    pairs = frozen_pairs(*digests, seed, len(images), len(masks))
    if count >= len(pairs):
        return pairs
    return [pairs[i * len(pairs) // count] for i in range(count)]
