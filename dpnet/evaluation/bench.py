"""Measure the generator, other models and methods without learning on pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NamedTuple, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from dpnet.evaluation.baselines import mean_fill, navier_stokes, smooth_fill, telea
from dpnet.evaluation.exact import fill_batch
from dpnet.evaluation.inception import Inception
from dpnet.evaluation.lpips import Lpips
from dpnet.evaluation.metrics import evaluate_pair
from dpnet.evaluation.pairs import FrozenPairs, Pair
from dpnet.evaluation.peers import Peer
from dpnet.evaluation.protocol import OURS, Rows
from dpnet.model import Generator

P = ParamSpec("P")
R = TypeVar("R")
Array = NDArray[np.uint8]
Features = NDArray[np.float32]  # [1 + methods, pairs, features], the truth first

BATCH = 16  # fixed: on a GPU another size can round values in another way


class Filled(NamedTuple):
    """A pair: truth [H, W, 3], valid [H, W] (1 = known), and each method's composite."""

    pair: Pair
    truth: Array
    valid: Array
    methods: Mapping[str, Array]


class Measured(NamedTuple):
    """The rows of metrics.parquet of some pairs, and their Inception features, if wanted."""

    rows: Rows
    features: Features | None


@dataclass(frozen=True)
class Bench:
    """The data, the networks and the threads that measure pairs.

    Attributes:
        frozen: the pairs.
        generator: in eval mode.
        peers: other models.
        lpips: the network of LPIPS, or None.
        inception: the network of FID, P-IDS and U-IDS, or None.
        pool: threads.
        threads: their number.
        on_cpu: whether the networks are on the CPU. Then the threads run them.
    """

    frozen: FrozenPairs
    generator: Generator
    peers: Sequence[Peer]
    lpips: Lpips | None
    inception: Inception | None
    pool: Executor
    threads: int = 1
    on_cpu: bool = True

    def measure(self, pairs: Sequence[Pair]) -> Iterator[Measured]:
        """Yield the measurements of some pairs at a time."""
        some = max(BATCH, self.threads) if self.on_cpu else BATCH
        for start in range(0, len(pairs), some):
            waiting = []
            for each in self.fill(pairs[start : start + some]):
                pictures, count = list(each.methods.values()), len(each.methods)
                # The threads measure while this one runs the networks on a GPU.
                measured = self.pool.map(
                    evaluate_pair, pictures, [each.truth] * count, [each.valid] * count
                )
                distances = self._network(self._distances, each.truth, pictures)
                features = self._network(self._features, each.truth, pictures)
                waiting.append((each, measured, distances, features))
            rows: Rows = []
            found = []
            for each, measured, distances, features in waiting:
                keys = self.frozen.keys(each.pair)
                rows += [
                    {**keys, "method": method, **values, "lpips": distance}
                    for method, values, distance in zip(
                        each.methods, measured, distances(), strict=True
                    )
                ]
                found.append(features())
            known = [each for each in found if each is not None]
            yield Measured(rows, np.stack(known, axis=1) if known else None)

    def fill(self, pairs: Sequence[Pair]) -> Iterator[Filled]:
        """Yield each of `pairs` with the composite of every method."""
        for start in range(0, len(pairs), BATCH):
            batch = pairs[start : start + BATCH]
            truths = np.stack(list(self.pool.map(self.frozen.images.image, [i for i, _ in batch])))
            valid = np.stack(list(self.pool.map(self.frozen.masks.valid, [m for _, m in batch])))
            names = [self.frozen.name(pair) for pair in batch]
            ours = {OURS: fill_batch(self.generator, truths, valid, self.pool)}
            ours |= {
                peer.name: peer.composites(names, truths, valid, self.pool) for peer in self.peers
            }
            simple = self.pool.map(_simple_methods, truths, valid)
            for number, others in enumerate(simple):
                methods = {name: found[number] for name, found in ours.items()} | others
                yield Filled(batch[number], truths[number], valid[number], methods)

    def _network(
        self, function: Callable[P, R], *given: P.args, **named: P.kwargs
    ) -> Callable[[], R]:
        """Call a function that runs a network, on a CPU in a thread. Return what waits for it."""
        if self.on_cpu:
            return self.pool.submit(function, *given, **named).result
        found = function(*given, **named)
        return lambda: found

    def _distances(self, truth: Array, others: Sequence[Array]) -> Sequence[float | None]:
        if self.lpips is None:
            return [None] * len(others)
        return self.lpips.distances(truth, others)

    def _features(self, truth: Array, others: Sequence[Array]) -> NDArray[np.float32] | None:
        return None if self.inception is None else self.inception.features([truth, *others])


def _simple_methods(truth: Array, valid: Array) -> dict[str, Array]:
    """Return the composites of the methods without learning, in the order of METHODS."""
    return {
        "smooth_fill": smooth_fill(truth, valid),
        "telea": telea(truth, valid),
        "navier_stokes": navier_stokes(truth, valid),
        "mean_fill": mean_fill(truth, valid),
    }
