"""The work of an evaluation as tasks, and the place where they run.

A place is a function that opens workers: `here` uses the threads of this machine, and
`dpnet.pipeline.ray_data` the machines of a cluster. A worker holds the networks. The results do not
depend on the place. Only the process that evaluates writes to storage.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from data_prep.core.manifest import StageRef
from data_prep.core.storage.store import Store
from dpnet.evaluation.pairs import FrozenPairs, Pair, open_pairs
from dpnet.evaluation.parts import Part
from dpnet.evaluation.peers import Peer
from dpnet.evaluation.protocol import OURS, Rows
from dpnet.evaluation.settings import EvaluateSettings
from dpnet.evaluation.weights import Weights

if TYPE_CHECKING:
    from dpnet.evaluation.bench import Bench, Measured
    from dpnet.evaluation.examples import Example

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)

Tick = Callable[[int], None]  # takes the number of pairs that were measured since the last call


@dataclass(frozen=True)
class Plan:
    """Everything that a worker needs to measure pairs, on any machine: it can be pickled."""

    store: Store
    settings: EvaluateSettings
    images: StageRef
    masks: StageRef
    run: StageRef
    peers: Sequence[Peer]
    weights: Weights  # of the networks that are used
    frozen: FrozenPairs | None = None  # opened in this process

    def __getstate__(self) -> dict[str, Any]:
        """Return the fields without the opened pairs, which another process opens itself."""
        return {**self.__dict__, "frozen": None}

    @contextmanager
    def open(self, threads: int) -> Iterator[Bench]:
        """Load the networks, on a GPU if there is one, and start the threads.

        Raises:
            PipelineError: the data, the model or the weights cannot be used.
        """
        from dpnet.evaluation.bench import Bench
        from dpnet.evaluation.exact import one_thread_per_call
        from dpnet.evaluation.inception import load_inception
        from dpnet.evaluation.lpips import load_lpips
        from dpnet.inpainting.tiles import device_of, on_fastest_device
        from dpnet.model_store.weights import load_generator

        frozen = self.frozen or open_pairs(self.store, self.settings, self.images, self.masks)
        generator = on_fastest_device(load_generator(self.store, self.run.folder))
        device = device_of(generator)
        of_lpips, of_inception = self.weights
        lpips = None if of_lpips is None else load_lpips(of_lpips).to(device)
        inception = None if of_inception is None else load_inception(of_inception).to(device)
        for peer in self.peers:
            peer.load()
        with one_thread_per_call(), ThreadPoolExecutor(threads) as pool:
            on_cpu = device.type == "cpu"
            yield Bench(frozen, generator, self.peers, lpips, inception, pool, threads, on_cpu)


class Task(Protocol[R_co]):
    """A piece of work for one worker; it and its result can be pickled."""

    @property
    def name(self) -> str:
        """Return a name for messages."""

    @property
    def size(self) -> int:
        """Return the number of pairs for the progress."""

    def run(self, bench: Bench, tick: Tick) -> R_co:
        """Do the work, and call `tick` after some pairs."""


class Place(Protocol):
    """A place where tasks run."""

    def __call__(self, plan: Plan, /) -> AbstractContextManager[RunTasks]: ...


class RunTasks(Protocol):
    """Runs tasks, and yields each task's number with its result, in any order.

    `tick` is called in this process, for all pairs of the tasks. While it waits it checks the
    leases.
    """

    def __call__(self, tasks: Sequence[Task[R]], tick: Tick, /) -> Iterator[tuple[int, R]]: ...


def here(threads: int) -> Place:
    """Return this machine as a place.

    Args:
        threads: number of threads; 0 for one a core.
    """

    @contextmanager
    def opened(plan: Plan) -> Iterator[RunTasks]:
        with plan.open(threads or os.cpu_count() or 1) as bench:

            def run(tasks: Sequence[Task[R]], tick: Tick) -> Iterator[tuple[int, R]]:
                for number, task in enumerate(tasks):
                    yield number, task.run(bench, tick)

            yield run

    return opened


@dataclass(frozen=True)
class MeasurePart:
    """Measure the pairs of a part with every method."""

    part: Part

    @property
    def name(self) -> str:
        return f"the pairs of {self.part.name}"

    @property
    def size(self) -> int:
        return len(self.part.pairs)

    def run(self, bench: Bench, tick: Tick) -> Measured:
        """Return the rows of all pairs, and their features."""
        import numpy as np

        from dpnet.evaluation.bench import Measured

        rows: Rows = []
        features = []
        for some in bench.measure(self.part.pairs):
            rows += some.rows
            if some.features is not None:
                features.append(some.features)
            tick(sum(row["method"] == OURS for row in some.rows))
        return Measured(rows, np.concatenate(features, axis=1) if features else None)


@dataclass(frozen=True)
class DrawExamples:
    """Draw the pairs that the report shows.

    Attributes:
        pairs: the pairs.
        marks: the mark of each.
        rows: the rows of each.
    """

    pairs: Sequence[Pair]
    marks: Sequence[str]
    rows: Sequence[Rows]

    @property
    def name(self) -> str:
        return "the example images"

    @property
    def size(self) -> int:
        return len(self.pairs)

    def run(self, bench: Bench, tick: Tick) -> list[Example]:
        """Return the examples in the order of the pairs."""
        from dpnet.evaluation.examples import draw_example

        made = []
        given = zip(bench.fill(self.pairs), self.marks, self.rows, strict=True)
        for (_, truth, valid, methods), mark, rows in given:
            tick(1)
            made.append(draw_example(truth, valid, methods, rows, mark))
        return made
