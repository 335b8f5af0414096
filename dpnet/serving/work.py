"""The queue of requests and the one thread that computes them.

They are computed one after another, in their order. While a photo of many tiles is filled, those
that need one call only are filled between its tiles, so that nobody waits minutes for a small hole.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from torch import Tensor

from data_prep.core.errors import PipelineError
from dpnet.inpainting.api import Hole
from dpnet.inpainting.tiles import TILE, device_of, fill
from dpnet.model.normalization import own_statistics
from dpnet.serving.batches import MOST, Batches, batch_shape, is_quick, size_of_batch
from dpnet.serving.limits import STOPPED, RequestError, ServeLimits
from dpnet.serving.models import Models, Version
from dpnet.serving.pace import Pace

log = logging.getLogger(__name__)

IDLE_S = 5.0  # without work, the champion is looked at again after this time
_REMEMBERED = 256  # finished jobs whose state is still known
State = Literal["waiting", "running", "done", "failed", "cancelled"]


class CancelledError(Exception):
    """Nobody waits for the result any more."""


class Filled(NamedTuple):
    """The result of a job: the filled colours, and which version made them."""

    colours: Tensor
    version: Version
    seconds: float


@dataclass(eq=False)
class Job:
    """One request from its upload to its answer.

    Attributes:
        id: the id that the client or the server made.
        model: the id of the version, or "".
        hole: what to fill; None until it is read, and again at the end.
        state: where it is.
        done: finished tiles.
        total: all tiles, 0 if not known yet.
        seconds_left: about how many more seconds it is computed, or None if that is not known.
        quick: whether one call fills it; None if nobody has asked yet.
        cancelled: set if nobody waits any more.
        result: gets the filled colours.
    """

    id: str
    model: str = ""
    hole: Hole | None = None
    state: State = "waiting"
    done: int = 0
    total: int = 0
    seconds_left: float | None = None
    quick: bool | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)
    result: Future[Filled] = field(default_factory=Future)

    def finish(self, state: State) -> None:
        """Set the last state; the first one stays. Forget the photo: the state is kept longer."""
        if self.state in ("waiting", "running"):
            self.state = state
        self.seconds_left = None
        self.hole, self.result = None, Future()


class Work:
    """The jobs, the queue and the thread."""

    def __init__(
        self,
        models: Models,
        limits: ServeLimits,
        *,
        batches: bool | None = None,
        tile: int = TILE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare the queue; `start` starts the thread.

        Args:
            models: the models.
            limits: of time.
            batches: fill small images together; None means on a GPU only.
            tile: side of a tile in pixels.
            clock: gives seconds.
        """
        self._models, self._limits, self._clock, self._tile = models, limits, clock, tile
        self._together, self._batches = batches, Batches()
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._queue: deque[Job] = deque()
        self._running: list[Job] = []
        self._changed = threading.Condition()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="dpnet-fill", daemon=True)

    def start(self) -> None:
        """Start the thread, which loads the model first."""
        self._thread.start()

    def end(self) -> None:
        """End every job at once, and take no further one. The thread ends at its next tile."""
        with self._changed:
            self._ended = True
            for job in (*self._queue, *self._running):
                _end(job, _stopped())
            self._queue.clear()
            self._changed.notify()

    def stop(self) -> None:
        """End every job and wait for the thread, which ends after its tile."""
        self.end()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def waiting(self) -> int:
        """Return how many jobs wait."""
        return len(self._queue)

    def begin(self, id: str, model: str) -> Job:
        """Return a new job. Raises RequestError if a job with this id has not ended yet."""
        with self._changed:
            old = self._jobs.get(id)
            if old is not None and old.state in ("waiting", "running"):
                raise RequestError(409, "another request uses this job: choose a new id.")
            self._jobs[id] = job = Job(id, model)
            self._jobs.move_to_end(id)
            ended = [k for k, v in self._jobs.items() if v.state not in ("waiting", "running")]
            for each in ended[: max(0, len(self._jobs) - _REMEMBERED)]:
                del self._jobs[each]
            return job

    def find(self, id: str) -> Job | None:
        """Return the job with this id, or None."""
        return self._jobs.get(id)

    def position(self, job: Job) -> int:
        """Return how many jobs are computed before this one."""
        with self._changed:
            ahead = list(self._queue).index(job) if job in self._queue else 0
            return ahead + len(self._running) if job.state == "waiting" else 0

    def put(self, job: Job, hole: Hole) -> Future[Filled]:
        """Put a job at the end of the queue."""
        with self._changed:
            result = job.result
            if self._ended:
                _end(job, _stopped())
            elif job.cancelled.is_set():
                _end(job, CancelledError())
            else:
                job.hole = hole
                self._queue.append(job)
                self._changed.notify()
            return result

    def cancel(self, job: Job) -> None:
        """Cancel a job: one that waits is dropped, one that runs ends before its next tile."""
        with self._changed:
            job.cancelled.set()
            if job in self._queue:
                self._queue.remove(job)
            if job not in self._running:
                _end(job, CancelledError())

    def _take(self) -> list[Job]:
        """Wait for the next jobs to compute together; [] if none came for some seconds."""
        with self._changed:
            if not self._queue and not self._ended:
                self._changed.wait(IDLE_S)
            if not self._queue or self._ended:
                return []
            return self._take_from(list(itertools.islice(self._queue, MOST)))

    def _take_quick(self) -> list[Job]:
        """Return the next jobs that one call fills, in their order; [] if none waits."""
        with self._changed:
            quick = [job for job in self._queue if self._is_quick(job)]
            return self._take_from(quick[:MOST]) if quick and not self._ended else []

    def _is_quick(self, job: Job) -> bool:
        if job.quick is None:
            job.quick = job.hole is not None and is_quick(job.hole, self._tile)
        return job.quick

    def _take_from(self, jobs: Sequence[Job]) -> list[Job]:
        """Take the first of some waiting jobs, and those that are computed together with it."""
        shapes = [
            batch_shape(job.hole, self._tile) if job.hole and job.model == jobs[0].model else None
            for job in jobs
        ]
        taken = list(jobs[: size_of_batch(shapes) if self._fills_together() else 1])
        for job in taken:
            self._queue.remove(job)
            job.state = "running"
        self._running += taken
        return taken

    def _fills_together(self) -> bool:
        if self._together is not None:
            return self._together
        current = self._models.current
        return current is not None and device_of(current.generator).type == "cuda"

    def _run(self) -> None:
        self._look()
        while not self._ended:
            jobs = self._take()
            if not jobs:
                self._look()
                continue
            self._compute_or_end(jobs)

    def _look(self) -> None:
        """Load the champion before somebody waits for it."""
        try:
            self._models.get()
        except PipelineError as error:
            log.debug("%s", error)
        except Exception:  # the next request gets the error
            log.exception("serve: the model cannot be loaded")

    def _compute_or_end(self, jobs: Sequence[Job]) -> None:
        try:
            self._compute(jobs)
        except Exception as error:
            for job in jobs:
                _end(job, error)
        with self._changed:
            self._running = [job for job in self._running if job not in jobs]

    def _compute(self, jobs: Sequence[Job]) -> None:
        loaded = self._models.get(jobs[0].model)
        pace = Pace(self._limits.seconds, self._clock)
        large = not all(map(self._is_quick, jobs))

        def step(done: int, total: int) -> None:
            if self._ended or all(job.cancelled.is_set() for job in jobs):
                raise CancelledError
            left = pace.check(done, total)
            for job in jobs:
                job.done, job.total, job.seconds_left = done, total, left
            if large and 0 < done < total and (others := self._take_quick()):
                with pace.paused(), own_statistics(loaded.generator):
                    self._compute_or_end(others)

        holes = [job.hole for job in jobs if job.hole is not None]
        filled = self._batches.fill(
            f"{loaded.version.id} {loaded.version.digest}",
            holes,
            lambda colours, valid: fill(loaded.generator, colours, valid, self._tile, step=step),
        )
        seconds = pace.seconds
        for job, colours in zip(jobs, filled, strict=True):
            _end(job, Filled(colours, loaded.version, seconds))


def _stopped() -> RequestError:
    return RequestError(503, STOPPED)


def _end(job: Job, outcome: Filled | Exception) -> None:
    """Give a job its result or its error, once."""
    if isinstance(outcome, Filled) and job.cancelled.is_set():
        outcome = CancelledError()
    result = job.result
    with suppress(InvalidStateError):  # it was given one before, or its request has ended
        if isinstance(outcome, Filled):
            job.hole = None
            result.set_result(outcome)  # the answer sets the state once the file is written
        else:
            job.finish("cancelled" if isinstance(outcome, CancelledError) else "failed")
            result.set_exception(outcome)
