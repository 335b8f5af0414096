"""The samples of one dataset for one rank, with their shards opened ahead of time."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpnet.loading.order import ShardOrder, Visit
from dpnet.loading.shard_files import OpenShard, ShardFiles, ShardSet


class Sample(NamedTuple):
    """The place of a sample: its shard, and its position in the shard."""

    shard: OpenShard
    position: int


class Lanes:
    """The samples of one dataset for one rank at the cursors [start, stop), in order.

    At first the shards that the rank's lanes need at `start` are opened, and none before them.
    When a lane has read a shard, the next shard that any lane needs before `stop` is opened. So at
    most two shards for each lane are open.

    Args:
        order: the order of the dataset's samples.
        shards: the dataset's shards.
        files: opens shards.
        pool: its threads open the shards.
        start: first cursor, counted over all ranks.
        stop: cursor after the last one.
        rank: number of this rank, from 0.
        world: number of ranks.
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
        # This rank has the cursors that are r modulo the world. A cursor's lane is the cursor
        # modulo the number of lanes. So the rank's lanes are r modulo the common divisor.
        step = gcd(order.lanes, world)
        self.mine = frozenset(range(rank % step, order.lanes, step))
        self._visits = self._needed(start, stop)
        self._waiting: dict[int, deque[tuple[Visit, Future[OpenShard]]]] = {
            lane: deque() for lane in self.mine
        }
        self._now: dict[int, tuple[Visit, OpenShard, NDArray[np.int64]]] = {}
        # In the order in which the first batches need them: the first batch waits for its own
        # lanes only.
        started = list(islice(self._visits, len(self.mine)))
        for visit in sorted(started, key=lambda visit: (visit.lane - start) % order.lanes):
            self._open(visit)

    def at(self, cursor: int) -> Sample:
        """Return the sample at a cursor of this rank. Each call must have a larger cursor."""
        row, lane = divmod(cursor, self.order.lanes)
        if lane not in self._now or row >= self._now[lane][0].stop:
            visit, opening = self._next(row, lane)
            self._now[lane] = visit, opening.result(), self.order.within(visit)
        visit, shard, within = self._now[lane]
        return Sample(shard, int(within[row - visit.start]))

    def _needed(self, start: int, stop: int) -> Iterator[Visit]:
        """Yield the rank's visits that have a cursor in [start, stop)."""
        lanes = self.order.lanes
        for visit in self.order.visits(start // lanes):
            if visit.start * lanes + visit.lane >= stop:  # and so do all later visits
                return
            if visit.lane in self.mine and (visit.stop - 1) * lanes + visit.lane >= start:
                yield visit

    def _next(self, row: int, lane: int) -> tuple[Visit, Future[OpenShard]]:
        """Return the lane's visit at `row`. For each visit that it passes, open another shard."""
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
