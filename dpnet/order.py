"""The order of samples: a pure function of (content digest, seed, cursor).

The cursor counts samples since the start of training. The global batch of step t is the samples at
cursors [t * batch, (t + 1) * batch), whatever the number of workers; rank r of w takes every w-th
of them. Batches run on across the end of an epoch, so nothing is dropped, and to resume at any step
nothing is replayed.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data_prep.digest import sha256_json


def generator(*parts: str | int) -> np.random.Generator:
    """An independent random stream for each tuple of `parts`."""
    return np.random.Generator(np.random.Philox(key=int(sha256_json(parts)[:32], 16)))


@lru_cache(maxsize=4)
def epoch_order(digest: str, seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    """The permutation of `count` samples in one epoch."""
    return generator("order", digest, seed, epoch).permutation(count)


def sample_at(digest: str, seed: int, cursor: int, count: int) -> int:
    """Which of `count` samples stands at `cursor`."""
    epoch, position = divmod(cursor, count)
    return int(epoch_order(digest, seed, epoch, count)[position])


def rank_cursors(step: int, batch: int, rank: int, world: int) -> range:
    """Cursors of the samples that `rank` of `world` trains on at `step` (from 0)."""
    return range(step * batch + rank, (step + 1) * batch, world)
