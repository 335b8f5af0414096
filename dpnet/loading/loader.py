"""Training batches from image shards and mask shards, read whole and decoded by threads.

`dpnet.loading.order` says which sample stands at which cursor; everything here only fetches it in
time. A
thread opens the shards that come next, another plans batches, a pool decodes straight into their
memory. The order of samples does not depend on any of it, nor on the number of threads.
"""

from __future__ import annotations

import contextlib
import queue
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from math import gcd, prod
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.core.errors import ItemError, PipelineError
from data_prep.core.progress import say
from data_prep.masks.codec import valid_from_png
from dpnet.loading.order import Augmentation, ShardOrder, Visit, augmentation, rank_cursors
from dpnet.loading.samples import decode_image, plain_jpeg
from dpnet.loading.shard_files import OpenShard, ShardFiles, ShardSet

AHEAD = 4  # batches that are decoded or being decoded
CHUNK = 8  # samples that a thread decodes at a time
FETCHERS = 4  # shards of each dataset that are fetched at a time

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Batch:
    """`image` N H W 3 uint8; `valid` N H W uint8 in {0, 1}, 1 = known pixel."""

    image: torch.Tensor
    valid: torch.Tensor


class Sample(NamedTuple):
    """Where a sample lies."""

    shard: OpenShard
    position: int


class _SmallError(ValueError):
    """An image is smaller than the masks."""


class Lanes:
    """The samples of one dataset for one rank at the cursors [start, stop), one after the other.

    The shards that the rank's lanes are in at `start` are opened at once, no earlier ones, and
    whenever a lane is done with one, the next of all that `stop` leaves. So at most two for each
    lane are open.
    """

    def __init__(
        self,
        order: ShardOrder,
        shards: ShardSet,
        files: ShardFiles,
        pool: ThreadPoolExecutor,
        start: int,
        stop: int,
        *,
        rank: int,
        world: int,
    ) -> None:
        self.order, self.shards, self.files, self.pool = order, shards, files, pool
        # Cursors are r modulo the world, lanes are cursors modulo their number.
        step = gcd(order.lanes, world)
        self.mine = frozenset(range(rank % step, order.lanes, step))
        self._visits = self._needed(start, stop)
        self._waiting: dict[int, deque[tuple[Visit, Future[OpenShard]]]] = {
            lane: deque() for lane in self.mine
        }
        self._now: dict[int, tuple[Visit, OpenShard, NDArray[np.int64]]] = {}
        # In the order in which the first batches need them, so that these need not wait for all.
        started = list(islice(self._visits, len(self.mine)))
        for visit in sorted(started, key=lambda visit: (visit.lane - start) % order.lanes):
            self._open(visit)

    def at(self, cursor: int) -> Sample:
        """The sample at a cursor of this rank; cursors only grow."""
        row, lane = divmod(cursor, self.order.lanes)
        if lane not in self._now or row >= self._now[lane][0].stop:
            visit, opening = self._next(row, lane)
            self._now[lane] = visit, opening.result(), self.order.within(visit)
        visit, shard, within = self._now[lane]
        return Sample(shard, int(within[row - visit.start]))

    def _needed(self, start: int, stop: int) -> Iterator[Visit]:
        """The rank's visits with a cursor in [start, stop)."""
        lanes = self.order.lanes
        for visit in self.order.visits(start // lanes):
            if visit.start * lanes + visit.lane >= stop:  # and so do all that begin later
                return
            if visit.lane in self.mine and (visit.stop - 1) * lanes + visit.lane >= start:
                yield visit

    def _next(self, row: int, lane: int) -> tuple[Visit, Future[OpenShard]]:
        """The lane's visit at `row`; each that is left behind makes room for another."""
        while True:
            while not self._waiting[lane]:
                self._open(next(self._visits))
            visit, opening = self._waiting[lane].popleft()
            if (following := next(self._visits, None)) is not None:
                self._open(following)
            if row < visit.stop:
                return visit, opening

    def _open(self, visit: Visit) -> None:
        opening = self.pool.submit(self.files.open, self.shards.shards[visit.shard])
        self._waiting[visit.lane].append((visit, opening))


class Loader:
    """The batches of one rank.

    Args:
        size: side of a training sample in pixels; larger images are cropped at random.
        threads: that decode. pin: whether batches lie in page-locked memory.

    Attributes:
        waited: seconds that the consumer has waited for a batch.
        skipped: samples that could not be used; with `skip` their places are taken by the next
            sample of the batch, otherwise the first one is an error.
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
        self._told = False
        self._pieces: list[Pixels] = []  # memory of batches
        self.waited, self.skipped = 0.0, 0

    def batches(self, start: int, stop: int) -> Generator[tuple[int, Batch], None, None]:
        """(step, batch) for steps [start, stop). Close it to stop the threads."""
        if start >= stop:
            return
        ready: queue.Queue[_Filling | BaseException] = queue.Queue(AHEAD)
        stopped = threading.Event()
        # Of each dataset its own, so that the first mask need not wait for every lane's images.
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
                whose = {"rank": self.rank, "world": self.world}
                images, masks = (
                    Lanes(order, shards, self.files, pool, *ends, **whose)
                    for order, shards, pool in zip(self.orders, self.sets, fetchers, strict=True)
                )
                for step in range(start, stop):
                    cursors = rank_cursors(step, self.batch, self.rank, self.world)
                    pairs = [(images.at(c), masks.at(c)) for c in cursors]
                    put(self._fill(step, np.asarray(cursors), pairs, decoders))
                    if stopped.is_set():
                        return
            except BaseException as error:  # handed to the consumer, which raises it
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
        """A batch that threads are decoding into."""
        batch = self._memory(len(cursors))
        changes = augmentation(self.seed, cursors)
        into = batch.image.numpy(), batch.valid.numpy()
        chunks = [range(at, min(at + CHUNK, len(pairs))) for at in range(0, len(pairs), CHUNK)]
        jobs = [decoders.submit(self._decode, pairs, changes, *into, chunk) for chunk in chunks]
        return _Filling(step, batch, jobs)

    def _memory(self, samples: int) -> Batch:
        """A batch of whatever its memory holds."""
        shape = (samples, self.size, self.size)
        if self.pin:  # torch keeps it for the next batch, once the copy from it is done
            image = torch.empty((*shape, 3), dtype=torch.uint8, pin_memory=True)
            return Batch(image, torch.empty(shape, dtype=torch.uint8, pin_memory=True))
        # Fresh memory comes zeroed, page by page, which takes a tenth of the time that it takes to
        # decode into it. So a piece is used again once nothing else refers to it: two references
        # are then left, that of the list and that of the call.
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
        """Decode the samples of `chunk` into their places; which could not be used, and why."""
        bad = {}
        for i in chunk:
            image, mask = pairs[i]
            sample = image
            try:
                self._image(image, changes.flip[i], changes.crop[i], images[i])
                sample = mask
                self._mask(mask, int(changes.turns[i]), bool(changes.mask_flip[i]), valids[i])
            except (OSError, ValueError, ItemError, PipelineError) as error:
                # In one line, without the address of an object, which Pillow's sentences may hold.
                text = re.sub(r" <.*>", "", str(error)).strip() or "unreadable"
                reason = text.splitlines()[0].rstrip(".")
                if not self.skip:
                    raise self._unusable(sample, reason, error) from error
                bad[i] = reason
                if not self._told:
                    self._told = True
                    where = f"{self.files.store.uri}/{sample.shard.shard.key}"
                    say(
                        f"warning: sample {sample.shard.keys[sample.position]} of {where} is"
                        f" skipped ({reason}); how many are is counted in the run's log"
                    )
        return bad

    def _image(self, sample: Sample, flip: bool, crop: NDArray[np.float64], out: Pixels) -> None:
        data = sample.shard.read(sample.position)
        if plain_jpeg(data):
            import simplejpeg

            # Refused where it is larger than its place, or of a kind that needs Pillow.
            with contextlib.suppress(ValueError):
                if simplejpeg.decode_jpeg(data, colorspace="RGB", buffer=out).shape == out.shape:
                    if flip:
                        cv2.flip(out, 1, dst=out)
                    return
        picture = decode_image(data)
        height, width = picture.shape[:2]
        if min(height, width) < self.size:
            raise _SmallError(
                f"it is {width} x {height} pixels, smaller than the masks' {self.size}"
            )
        top, left = (crop * (height - self.size + 1, width - self.size + 1)).astype(int)
        picture = picture[top : top + self.size, left : left + self.size]
        out[:] = picture[:, ::-1] if flip else picture

    def _mask(self, sample: Sample, turns: int, flip: bool, out: Pixels) -> None:
        valid = valid_from_png(sample.shard.read(sample.position))
        if valid.shape != out.shape:
            height, width = valid.shape
            raise ValueError(f"it is {width} x {height} pixels, not {self.size} x {self.size}")
        _turned(valid, turns, flip, out)

    def _unusable(self, sample: Sample, reason: str, error: Exception) -> PipelineError:
        shard = sample.shard
        advice = "run `dpnet verify` on the root"
        if isinstance(error, _SmallError):
            advice = f"build images of at least {self.size} pixels, or smaller masks"
        return PipelineError(
            f"sample {shard.keys[sample.position]} of {self.files.store.uri}/{shard.shard.key}"
            f" cannot be used ({reason}): {advice}, or set train.on_bad_sample to skip."
        )

    def _finished(self, filling: _Filling) -> Batch:
        """The batch once it is decoded, with the places of skipped samples filled."""
        bad = {i: reason for job in filling.jobs for i, reason in job.result().items()}
        batch = filling.batch
        self.skipped += len(bad)
        count = len(batch.image)
        if len(bad) == count:
            raise PipelineError(
                f"no sample of the batch of step {filling.step} can be used ({bad[0]}): run"
                f" `dpnet verify` on {self.files.store.uri}."
            )
        for i in bad:
            good = next(k % count for k in range(i + 1, i + count) if k % count not in bad)
            batch.image[i], batch.valid[i] = batch.image[good], batch.valid[good]
        return batch


@dataclass(frozen=True)
class _Filling:
    step: int
    batch: Batch
    jobs: Sequence[Future[dict[int, str]]]


def _turned(valid: Pixels, turns: int, flip: bool, out: Pixels) -> None:
    """`out` = `valid` turned counterclockwise by quarters, as numpy.rot90 does, then mirrored.

    In one pass, as threads wait for each other at every call: a turn and a mirroring make a
    reflection.
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
