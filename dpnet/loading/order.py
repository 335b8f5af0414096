"""The order of samples: a pure function of (content digest, seed, cursor).

The cursor counts samples since the start of training. The global batch of step t has the samples
at the cursors [t * batch, (t + 1) * batch), whatever the number of workers. Rank r of w takes the
cursors that are r modulo w. So the state of the loader is one integer, a batch can hold samples of
two epochs, and all ranks make the same number of steps.

A dataset is read along *lanes*. Cursor c is in lane c mod L, at row c div L. A lane reads one shard
at a time, all of it and in random order. Then it takes the next shard of the epoch's random
sequence, or the first one of the next epoch. So a batch mixes samples of L shards, one lane reads
each shard once an epoch, and each sample comes once an epoch. Lanes begin an epoch one by one, as
they finish their shards. If L is a multiple of the number of ranks, each lane belongs to one rank,
and so does each shard.
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
    """One reading of a shard by a lane: `size` rows from row `start`."""

    start: int
    lane: int
    epoch: int
    shard: int
    size: int

    @property
    def stop(self) -> int:
        """Return the row after the last one."""
        return self.start + self.size


class ShardOrder:
    """The order of a dataset's samples.

    Args:
        digest: content digest of the dataset.
        seed: another seed gives another order.
        sizes: number of samples of each shard, at least 1. Shards are numbered by their position.
        lanes: most lanes. `self.lanes` is its largest divisor that is at most the number of shards.
    """

    def __init__(self, digest: str, seed: int, sizes: Sequence[int], lanes: int) -> None:
        assert all(size > 0 for size in sizes)
        self.digest, self.seed, self.sizes = digest, seed, list(sizes)
        self.lanes = max(n for n in range(1, lanes + 1) if lanes % n == 0 and n <= len(sizes))
        self.samples = sum(sizes)

    def shards(self, epoch: int) -> list[int]:
        """Return the random sequence of the shards in one epoch."""
        order = generator("shards", self.digest, self.seed, epoch).permutation(len(self.sizes))
        numbers: list[int] = order.tolist()
        return numbers

    def within(self, visit: Visit) -> NDArray[np.int64]:
        """Return the random order of a shard's samples in one visit."""
        return generator("samples", self.digest, self.seed, visit.epoch, visit.shard).permutation(
            visit.size
        )

    def visits(self, row: int = 0) -> Iterator[Visit]:
        """Yield the visits that end after `row`, in the order of their starts, without end.

        Earlier visits are computed too, at a microsecond each.
        """
        free = [(0, lane) for lane in range(self.lanes)]  # heap: the row at which a lane is free
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
        """Return (epoch, shard, position in the shard) for each cursor in [start, stop)."""
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
    """Return the cursors of the samples that a rank trains on at a step.

    Args:
        step: number of the step, from 0.
        batch: samples in a batch, counted over all ranks.
        rank: number of the rank, from 0.
        world: number of ranks.
    """
    first = step * batch
    return range(first + (rank - first) % world, first + batch, world)


class Augmentation(NamedTuple):
    """The random changes to the samples at some cursors, one entry of each array a sample."""

    flip: NDArray[np.bool_]  # mirror the image left to right
    crop: NDArray[np.float64]  # [N, 2] in [0, 1): (down, across) start of a crop, as a share
    turns: NDArray[np.int64]  # in 0..3: rotate the mask by quarters
    mask_flip: NDArray[np.bool_]  # mirror the mask left to right


def augmentation(seed: int, cursors: Cursors) -> Augmentation:
    """Return the augmentation of the samples at `cursors`. Masks are rotated, images are not."""
    draws = [uniform(seed, name, cursors) for name in ("flip", "down", "across", "turn", "mask")]
    flip, down, across, turn, mask = draws
    return Augmentation(
        flip < 0.5, np.stack([down, across], 1), (turn * 4).astype(np.int64), mask < 0.5
    )


def uniform(seed: int, name: str, cursors: Cursors) -> NDArray[np.float64]:
    """Return a random number in [0, 1) for each cursor, independent of the other cursors.

    It is the SplitMix64 generator (Steele, Lea and Flood 2014) in its state after `cursor` steps.
    A generator object for each sample would cost far more.
    """
    mixed = splitmix64(_key(name, seed) + cursors.astype(np.uint64) * np.uint64(GAMMA))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


@lru_cache  # every batch needs it
def _key(name: str, seed: int) -> np.uint64:
    return np.uint64(int(sha256_json([name, seed])[:16], 16))


def generator(*parts: str | int) -> np.random.Generator:
    """Return a random generator that is independent for each tuple of `parts`."""
    return np.random.Generator(np.random.Philox(key=int(sha256_json(parts)[:32], 16)))
