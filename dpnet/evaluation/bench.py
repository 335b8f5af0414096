"""Measure the generator, other models and methods without learning on pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dpnet.evaluation.baselines import mean_fill, navier_stokes, smooth_fill, telea
from dpnet.evaluation.lpips import Lpips
from dpnet.evaluation.metrics import evaluate_pair
from dpnet.evaluation.pairs import FrozenPairs, Pair
from dpnet.evaluation.peers import Peer
from dpnet.evaluation.protocol import OURS, Rows
from dpnet.model import Generator

Array = NDArray[np.uint8]

BATCH = 16  # fixed: another size can round values in another way


class Filled(NamedTuple):
    """A pair: truth [H, W, 3], valid [H, W] (1 = known), and each method's composite."""

    pair: Pair
    truth: Array
    valid: Array
    methods: Mapping[str, Array]


@dataclass(frozen=True)
class Bench:
    """The data, the networks and the threads that measure pairs."""

    frozen: FrozenPairs
    generator: Generator
    peers: Sequence[Peer]
    lpips: Lpips | None
    pool: Executor

    def measure(self, pairs: Sequence[Pair]) -> Iterator[Rows]:
        """Yield rows of metrics.parquet, batch by batch."""
        for start in range(0, len(pairs), BATCH):
            rows: Rows = []
            for pair, truth, valid, methods in self.fill(pairs[start : start + BATCH]):
                keys, count = self.frozen.keys(pair), len(methods)
                # The threads measure while this one computes LPIPS.
                measured = self.pool.map(
                    evaluate_pair, methods.values(), [truth] * count, [valid] * count
                )
                distances = self._distances(truth, methods)
                rows += [
                    {**keys, "method": method, **values, "lpips": distance}
                    for method, values, distance in zip(methods, measured, distances, strict=True)
                ]
            yield rows

    def fill(self, pairs: Sequence[Pair]) -> Iterator[Filled]:
        """Yield each of `pairs` with the composite of every method."""
        from dpnet.inpainting.tiles import inpaint_arrays

        for start in range(0, len(pairs), BATCH):
            batch = pairs[start : start + BATCH]
            truths = np.stack(list(self.pool.map(self.frozen.images.image, [i for i, _ in batch])))
            valid = np.stack(list(self.pool.map(self.frozen.masks.valid, [m for _, m in batch])))
            names = [self.frozen.name(pair) for pair in batch]
            ours = {OURS: inpaint_arrays(self.generator, truths, valid)}
            ours |= {
                peer.name: peer.composites(names, truths, valid, self.pool) for peer in self.peers
            }
            simple = self.pool.map(_simple_methods, truths, valid)
            for number, others in enumerate(simple):
                methods = {name: found[number] for name, found in ours.items()} | others
                yield Filled(batch[number], truths[number], valid[number], methods)

    def _distances(self, truth: Array, methods: Mapping[str, Array]) -> Sequence[float | None]:
        if self.lpips is None:
            return [None] * len(methods)
        return self.lpips.distances(truth, list(methods.values()))


def _simple_methods(truth: Array, valid: Array) -> dict[str, Array]:
    """Return the composites of the methods without learning, in the order of METHODS."""
    return {
        "smooth_fill": smooth_fill(truth, valid),
        "telea": telea(truth, valid),
        "navier_stokes": navier_stokes(truth, valid),
        "mean_fill": mean_fill(truth, valid),
    }
