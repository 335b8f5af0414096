"""Training batches from image shards and mask shards, decoded by threads.

`dpnet.loading.order` decides which sample is at which cursor. The threads here only fetch it in
time: some open the next shards, one plans batches, and a pool decodes straight into the memory of
the batches. The order of the samples does not depend on the threads or their number.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import sys
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.core.errors import ItemError, PipelineError
from data_prep.core.text import printable
from data_prep.masks.codec import valid_from_png
from dpnet.loading.batch import Batch
from dpnet.loading.decoding import TooSmallError, decode_image, is_plain_jpeg, reason_of, unusable
from dpnet.loading.lanes import Lanes, Sample
from dpnet.loading.order import Augmentation, ShardOrder, augmentation, rank_cursors
from dpnet.loading.shard_files import ShardFiles, ShardSet

log = logging.getLogger(__name__)

AHEAD = 4  # batches that wait for the consumer, decoded or being decoded
CHUNK = 8  # samples that one thread decodes in one job
FETCHERS = 4  # shards of each dataset that are fetched at the same time

Pixels = NDArray[np.uint8]


class Loader:
    """The batches of one rank.

    Args:
        images: image shards.
        masks: mask shards.
        files: opens shards.
        size: side of a training sample in pixels. Larger images are cropped at random.
        seed: decides on the order and on the augmentation.
        batch: samples in a batch, counted over all ranks.
        lanes: most lanes of a dataset, see `dpnet.loading.order`.
        rank: number of this rank, from 0.
        world: number of ranks.
        threads: number of threads that decode.
        pin: put batches into page-locked memory.
        skip: replace a sample that cannot be used with the next good one of its batch. Without
            it such a sample is an error.

    Attributes:
        waited: seconds that the consumer has waited for batches.
        skipped: number of samples that could not be used.
    """

    def __init__(
        self,
        images: ShardSet,
        masks: ShardSet,
        files: ShardFiles,
        *,
        size: int,
        seed: int,
        batch: int,
        lanes: int,
        rank: int = 0,
        world: int = 1,
        threads: int = 1,
        pin: bool = False,
        skip: bool = False,
    ) -> None:
        self.sets, self.files = (images, masks), files
        self.orders = [
            ShardOrder(s.digest, seed, [shard.samples for shard in s.shards], lanes)
            for s in self.sets
        ]
        self.size, self.seed, self.batch = size, seed, batch
        self.rank, self.world, self.threads, self.pin = rank, world, threads, pin
        self.skip = skip
        self._warned = False
        self._pieces: list[Pixels] = []  # memory of batches, used again
        self.waited, self.skipped = 0.0, 0

    def batches(self, start: int, stop: int) -> Generator[tuple[int, Batch], None, None]:
        """Yield (step, batch) for the steps [start, stop). Close it to stop its threads."""
        if start >= stop:
            return
        ready: queue.Queue[_Filling | BaseException] = queue.Queue(AHEAD)
        stopped = threading.Event()
        # One pool for each dataset: the first mask must not wait for the images of every lane.
        fetchers = [ThreadPoolExecutor(FETCHERS, "dpnet-fetch") for _ in self.sets]
        decoders = ThreadPoolExecutor(self.threads, "dpnet-decode")

        def put(item: _Filling | BaseException) -> None:
            while not stopped.is_set():
                with contextlib.suppress(queue.Full):
                    ready.put(item, timeout=0.2)
                    return

        def plan() -> None:
            try:
                ends = start * self.batch, stop * self.batch
                place = {"rank": self.rank, "world": self.world}
                images, masks = (
                    Lanes(order, shards, self.files, pool, *ends, **place)
                    for order, shards, pool in zip(self.orders, self.sets, fetchers, strict=True)
                )
                for step in range(start, stop):
                    cursors = rank_cursors(step, self.batch, self.rank, self.world)
                    pairs = [(images.at(c), masks.at(c)) for c in cursors]
                    put(self._fill(step, np.asarray(cursors), pairs, decoders))
                    if stopped.is_set():
                        return
            except BaseException as error:  # the consumer raises it
                put(error)

        planner = threading.Thread(target=plan, name="dpnet-plan", daemon=True)
        planner.start()
        try:
            for _ in range(start, stop):
                begun = time.monotonic()
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                batch = self._finished(item)
                self.waited += time.monotonic() - begun
                yield item.step, batch
        finally:
            stopped.set()
            for pool in (*fetchers, decoders):
                pool.shutdown(wait=False, cancel_futures=True)

    def _fill(
        self,
        step: int,
        cursors: NDArray[np.int64],
        pairs: Sequence[tuple[Sample, Sample]],
        decoders: ThreadPoolExecutor,
    ) -> _Filling:
        """Start to decode a batch."""
        batch = self._memory(len(cursors))
        changes = augmentation(self.seed, cursors)
        into = batch.image.numpy(), batch.valid.numpy()
        chunks = [range(at, min(at + CHUNK, len(pairs))) for at in range(0, len(pairs), CHUNK)]
        jobs = [decoders.submit(self._decode, pairs, changes, *into, chunk) for chunk in chunks]
        return _Filling(step, batch, jobs)

    def _memory(self, samples: int) -> Batch:
        """Return a batch of uninitialised memory."""
        shape = (samples, self.size, self.size)
        if self.pin:  # torch uses it again for a later batch, after the copy from it is done
            image = torch.empty((*shape, 3), dtype=torch.uint8, pin_memory=True)
            return Batch(image, torch.empty(shape, dtype=torch.uint8, pin_memory=True))
        # The system sets fresh memory to zero page by page, which costs a tenth of the decoding
        # time. So a piece is used again when only this list and this call refer to it.
        pixels = prod(shape)
        size = 4 * pixels
        for number in range(len(self._pieces)):
            if len(self._pieces[number]) == size and sys.getrefcount(self._pieces[number]) == 2:
                break
        else:
            number = len(self._pieces)
            self._pieces.append(np.empty(size, np.uint8))
        memory = torch.from_numpy(self._pieces[number])
        return Batch(memory[: 3 * pixels].view(*shape, 3), memory[3 * pixels :].view(shape))

    def _decode(
        self,
        pairs: Sequence[tuple[Sample, Sample]],
        changes: Augmentation,
        images: Pixels,
        valids: Pixels,
        chunk: range,
    ) -> dict[int, str]:
        """Decode the samples of a chunk into their places in the batch.

        Args:
            pairs: image and mask of each sample of the batch.
            changes: the augmentation of the batch.
            images: uint8 [N, H, W, 3], to be filled.
            valids: uint8 [N, H, W], to be filled.
            chunk: numbers of the samples to decode.

        Returns:
            The reason for each sample that could not be used.
        """
        bad = {}
        for i in chunk:
            image, mask = pairs[i]
            sample = image
            try:
                self._image(image, changes.flip[i], changes.crop[i], images[i])
                sample = mask
                self._mask(mask, int(changes.turns[i]), bool(changes.mask_flip[i]), valids[i])
            except (OSError, ValueError, ItemError, PipelineError) as error:
                name = printable(sample.shard.name_of(sample.position))
                if not self.skip:
                    raise unusable(name, error, ", or set train.on_bad_sample to skip") from error
                bad[i] = reason_of(error)
                if not self._warned:
                    self._warned = True
                    log.warning(
                        "%s is skipped (%s): the run's log counts skipped samples", name, bad[i]
                    )
        return bad

    def _image(self, sample: Sample, flip: bool, crop: NDArray[np.float64], out: Pixels) -> None:
        data = sample.shard.read(sample.position)
        if is_plain_jpeg(data):
            import simplejpeg

            # simplejpeg refuses an image that is larger than `out`, or that only Pillow reads.
            with contextlib.suppress(ValueError):
                if simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out).shape == out.shape:
                    if flip:
                        cv2.flip(out, 1, dst=out)
                    return
        image = decode_image(data)
        height, width = image.shape[:2]
        if min(height, width) < self.size:
            raise TooSmallError(height, width, self.size)
        top, left = (crop * (height - self.size + 1, width - self.size + 1)).astype(int)
        image = image[top : top + self.size, left : left + self.size]
        out[:] = image[:, ::-1] if flip else image

    def _mask(self, sample: Sample, turns: int, flip: bool, out: Pixels) -> None:
        valid = valid_from_png(sample.shard.read(sample.position))
        if valid.shape != out.shape:
            height, width = valid.shape
            raise ValueError(f"it is {width} x {height} pixels, not {self.size} x {self.size}")
        _turn(valid, turns, flip, out)

    def _finished(self, filling: _Filling) -> Batch:
        """Wait until the batch is decoded, and fill the places of skipped samples."""
        bad = {i: reason for job in filling.jobs for i, reason in job.result().items()}
        batch = filling.batch
        self.skipped += len(bad)
        count = len(batch.image)
        if len(bad) == count:
            raise PipelineError(
                f"no sample of the batch of step {filling.step} can be used ({bad[0]}): run"
                f" `dpnet verify` on {self.files.store.label}."
            )
        for i in bad:
            good = next(k % count for k in range(i + 1, i + count) if k % count not in bad)
            batch.image[i], batch.valid[i] = batch.image[good], batch.valid[good]
        return batch


@dataclass(frozen=True)
class _Filling:
    """A batch that is being decoded."""

    step: int
    batch: Batch
    jobs: Sequence[Future[dict[int, str]]]


def _turn(valid: Pixels, turns: int, flip: bool, out: Pixels) -> None:
    """Write `valid`, rotated by quarters as numpy.rot90 does and then mirrored, to `out`.

    A rotation and a mirroring together are one reflection. So most cases take one call, which
    matters because threads wait for each other at every call.
    """
    if turns % 2 == 0:
        if turns or flip:
            cv2.flip(valid, {(0, True): 1, (2, False): -1, (2, True): 0}[turns, flip], dst=out)
        else:
            out[:] = valid
    elif not flip:
        to = cv2.ROTATE_90_COUNTERCLOCKWISE if turns == 1 else cv2.ROTATE_90_CLOCKWISE
        cv2.rotate(valid, to, dst=out)
    else:
        cv2.transpose(valid, dst=out)
        if turns == 1:
            cv2.flip(out, -1, dst=out)
