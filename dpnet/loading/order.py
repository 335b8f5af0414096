"""The order of samples: a pure function of (content digest, seed, cursor).

The cursor counts samples since the start of training: the global batch of step t is the samples at
cursors [t * batch, (t + 1) * batch), whatever the number of workers, and rank r of w takes those
that are r modulo w. So the state of the loader is one integer, batches run on across the end of an
epoch, and every rank makes the same number of steps.

A dataset is read along *lanes*: cursor c stands in lane c mod L at row c div L. A lane goes through
one shard at a time, whole and in random order, and then takes the next shard of the epoch's random
sequence; where that is used up, the first of the next epoch's. So a batch mixes samples of L
shards, each shard is visited once an epoch by one lane, and every sample comes once an epoch,
though lanes begin an epoch one after the other, as they become free. With L a multiple of the
number of ranks a lane belongs to one rank, and so does each shard.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.core.digest import sha256_json
from data_prep.core.hashing import GAMMA, splitmix64

Cursors = NDArray[np.int64]


class Visit(NamedTuple):
    """A lane's way through one shard, which begins at row `start` and takes `size` rows."""

    start: int
    lane: int
    epoch: int
    shard: int
    size: int

    @property
    def stop(self) -> int:
        return self.start + self.size


class ShardOrder:
    """In which order the samples of a dataset come.

    Args:
        digest: content digest of the dataset.
        sizes: samples of each shard, none empty. The position in it is the shard's number.
        lanes: most lanes; `self.lanes` is the largest divisor of it with a shard for each lane.
    """

    def __init__(self, digest: str, seed: int, sizes: Sequence[int], lanes: int) -> None:
        assert all(size > 0 for size in sizes)
        self.digest, self.seed, self.sizes = digest, seed, list(sizes)
        self.lanes = max(n for n in range(1, lanes + 1) if lanes % n == 0 and n <= len(sizes))
        self.samples = sum(sizes)

    def shards(self, epoch: int) -> list[int]:
        """The random sequence of the shards in one epoch."""
        order = generator("shards", self.digest, self.seed, epoch).permutation(len(self.sizes))
        numbers: list[int] = order.tolist()
        return numbers

    def within(self, visit: Visit) -> NDArray[np.int64]:
        """The random order of a shard's samples in one visit."""
        return generator("samples", self.digest, self.seed, visit.epoch, visit.shard).permutation(
            visit.size
        )

    def visits(self, row: int = 0) -> Iterator[Visit]:
        """The visits that go on at `row` or begin later, in the order in which they begin.

        Without end. The ones before `row` are gone through too: a microsecond each.
        """
        free = [(0, lane) for lane in range(self.lanes)]  # when each lane becomes free: a heap
        epoch = 0
        while True:
            for shard in self.shards(epoch):
                start, lane = free[0]
                size = self.sizes[shard]
                heapq.heapreplace(free, (start + size, lane))
                if start + size > row:
                    yield Visit(start, lane, epoch, shard, size)
            epoch += 1

    def samples_at(self, start: int, stop: int) -> NDArray[np.int64]:
        """(epoch, shard, position in the shard) at the cursors [start, stop), one row each."""
        found = np.full((stop - start, 3), -1, np.int64)
        if start == stop:
            return found
        last = (stop - 1) // self.lanes
        for visit in self.visits(start // self.lanes):
            if visit.start > last:
                return found
            rows = np.arange(max(visit.start, start // self.lanes), min(visit.stop, last + 1))
            at = rows * self.lanes + visit.lane - start
            inside = (at >= 0) & (at < len(found))
            rows, at = rows[inside], at[inside]
            found[at, :2] = visit.epoch, visit.shard
            found[at, 2] = self.within(visit)[rows - visit.start]
        raise AssertionError("visits() has no end")


def rank_cursors(step: int, batch: int, rank: int, world: int) -> range:
    """Cursors of the samples that `rank` of `world` trains on at `step` (from 0)."""
    first = step * batch
    return range(first + (rank - first) % world, first + batch, world)


class Augmentation(NamedTuple):
    """What is done to the samples at some cursors, each an array with one entry a sample."""

    flip: NDArray[np.bool_]  # the image, left to right
    crop: NDArray[np.float64]  # N 2, in [0, 1): where a crop begins (down, across), as a share
    turns: NDArray[np.int64]  # of the mask, by quarters
    mask_flip: NDArray[np.bool_]


def augmentation(seed: int, cursors: Cursors) -> Augmentation:
    """The augmentation of the samples at `cursors`: photographs are not turned, masks are."""
    draws = [uniform(seed, name, cursors) for name in ("flip", "down", "across", "turn", "mask")]
    flip, down, across, turn, mask = draws
    return Augmentation(
        flip < 0.5, np.stack([down, across], 1), (turn * 4).astype(np.int64), mask < 0.5
    )


def uniform(seed: int, name: str, cursors: Cursors) -> NDArray[np.float64]:
    """Numbers in [0, 1), one for each cursor and independent of all others.

    The splitmix64 generator (Steele, Lea and Flood 2014) at the state that it has after `cursor`
    steps: unlike a generator object for each sample it costs next to nothing.
    """
    mixed = splitmix64(_key(name, seed) + cursors.astype(np.uint64) * np.uint64(GAMMA))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


@lru_cache  # it is asked for at every batch
def _key(name: str, seed: int) -> np.uint64:
    return np.uint64(int(sha256_json([name, seed])[:16], 16))


def generator(*parts: str | int) -> np.random.Generator:
    """An independent random stream for each tuple of `parts`."""
    return np.random.Generator(np.random.Philox(key=int(sha256_json(parts)[:32], 16)))
