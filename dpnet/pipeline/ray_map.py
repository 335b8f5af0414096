"""Run the tasks of `data_prep.core.pool.run_tasks` on a Ray cluster.

It uses plain Ray tasks, because the output of a task must depend only on the task. Ray Data would
cut the work into blocks of its own choice. Ray sets OMP_NUM_THREADS to 1, the cores of one task.
"""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from data_prep.core.apart import may_die
from data_prep.core.errors import PipelineError
from data_prep.core.lease import check_leases
from data_prep.core.logs import start_logging
from data_prep.core.pool import CHECK_S, Map, after_death, cores, died_again, task_name
from dpnet.training.ray.deaths import death_reason
from dpnet.training.ray.start import connect, prepare_start

T = TypeVar("T")
R = TypeVar("R")

log = logging.getLogger(__name__)

RETRIES = 3  # of a task after its worker or node died
SILENCE_S = 60.0  # after the loss of a node, for the tasks that it may have run


class _WorkerDiedError(Exception):
    """A task that was lost with its worker process or node; the message says how."""


def ray_map(address: str = "auto") -> Map:
    """Return a `Map` that runs its tasks on the Ray cluster at `address`.

    If this process is already connected to Ray, that connection is used. Paths in tasks must mean
    the same on all machines: use absolute paths on a shared disk, or object storage. The argument
    `workers` of the `Map` is the number of tasks to run at the same time; 0 keeps all cores busy.
    The `Map` raises PipelineError if it cannot reach a cluster, or if a task fails four times.

    Args:
        address: HOST:PORT of the cluster; "auto" for the cluster of this machine; "local" to start
            one on this machine for the duration of a call.
    """

    def run_on_ray(
        function: Callable[[T], R], tasks: Iterable[T], workers: int, /
    ) -> Generator[R, None, None]:
        with connected(address, workers) as ray:
            yield from _run(ray, function, tasks, workers)

    return run_on_ray


def _run(
    ray: Any, function: Callable[[T], R], tasks: Iterable[T], workers: int
) -> Generator[R, None, None]:
    # No retry after an error of the function: it would fail again.
    remote = ray.remote(num_cpus=1, max_retries=RETRIES, retry_exceptions=False)(_call)
    once = remote.options(max_retries=0)

    def start(task: T) -> Any:
        # A task with a careful form runs once as it is. Repeating it would take as long.
        submit = remote if after_death(task) is None else once
        return submit.remote(function, task)

    lost = _LostNodes(ray)
    rest = iter(tasks)
    window: deque[tuple[Any, T]] = deque()  # in order, with results that wait for their turn
    running: list[Any] = []
    try:
        while True:
            # Read each time, because the cluster may grow. Twice its cores, so that each node has
            # its next task ready.
            most = workers or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
            room = min(most - len(running), 2 * most - len(window))
            for task in islice(rest, max(0, room)):
                reference = start(task)
                window.append((reference, task))
                running.append(reference)
            if not window:
                return
            if window[0][0] in running:
                check_leases()
                _, running = ray.wait(running, num_returns=1, timeout=CHECK_S)
                for silent in lost.among(running):
                    place = next(i for i, (each, _) in enumerate(window) if each == silent)
                    task = window[place][1]
                    log.warning("a machine is gone: %s starts again", task_name(task))
                    ray.cancel(silent, force=True)
                    reference = start(task)
                    window[place] = (reference, task)
                    running[running.index(silent)] = reference
                continue
            reference, task = window.popleft()
            try:
                result = _result(ray, reference, task)
            except _WorkerDiedError as error:
                if (careful := after_death(task)) is None:
                    raise died_again(task, 1 + RETRIES) from None
                log.warning("%s while it ran %s: it runs again with care", error, task_name(task))
                reference = remote.remote(function, careful)
                window.appendleft((reference, careful))
                running.append(reference)
                continue
            yield result
            if running:  # others may have ended while the caller used this result
                _, running = ray.wait(running, num_returns=len(running), timeout=0)
    finally:
        for reference in running:
            ray.cancel(reference, force=True)


class _LostNodes:
    """Finds tasks that never end because their machine was cut off.

    Ray notices the loss of a machine, but waits for the answer of its task as long as the
    connection seems to live: seven minutes (seen with 2.60). Which tasks ran there is not known
    here. So each task that was running when a machine was lost, and still is after SILENCE_S, is
    such a task. If it runs elsewhere after all, two of it write the same bytes.
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._alive = self._nodes()
        self._until: dict[Any, float] = {}

    def among(self, running: Sequence[Any]) -> list[Any]:
        """Return the references that are given up."""
        alive, now = self._nodes(), time.monotonic()
        if self._alive - alive:
            self._until |= {each: now + SILENCE_S for each in running if each not in self._until}
        self._alive = alive
        return [each for each in running if self._until.get(each, now) < now]

    def _nodes(self) -> set[str]:
        return {node["NodeID"] for node in self._ray.nodes() if node["Alive"]}


def _call(function: Callable[[T], R], task: T) -> R:
    start_logging()  # to Ray's log of this worker
    may_die()
    return function(task)


def _result(ray: Any, reference: Any, task: Any) -> Any:
    """Return the result of a finished task.

    Raises the function's own error, _WorkerDiedError or PipelineError.
    """
    lost: str
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, Exception):
            raise error.cause from error
        raise
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
        raise _WorkerDiedError("a worker process died") from None
    except ray.exceptions.RayError as error:
        lost = death_reason(error) or str(error).strip().split("\n")[0].rstrip(".")
        if after_death(task) is not None:
            raise _WorkerDiedError(lost) from None
    raise PipelineError(
        f"Ray lost {task_name(task)} ({lost}): run the same command again, it resumes."
    )


def _find(address: str) -> None:
    """Raise OSError if nothing listens at the address. Ray would try for ten minutes."""
    if address == "auto":
        latest = Path(
            os.environ.get("RAY_TMPDIR") or tempfile.gettempdir(), "ray/ray_current_cluster"
        )
        address = os.environ.get("RAY_ADDRESS", "")
        if not address and latest.exists():  # the cluster may have ended
            address = latest.read_text("utf-8", "replace").strip()
    url = urlsplit(address if "://" in address else f"//{address}")
    if url.hostname and url.port:
        socket.create_connection((url.hostname, url.port), timeout=10).close()


@contextmanager
def connected(address: str, workers: int) -> Iterator[Any]:
    """Connect this process to the cluster at `address` while in the block."""
    # By default Ray retries a task that wants more memory than there is without end.
    os.environ.setdefault("RAY_task_oom_retries", str(RETRIES))
    if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ.setdefault("RAY_AUTH_MODE", "token")  # else Ray does not send the token
    import ray

    if ray.is_initialized():
        yield ray
        return
    with ExitStack() as stack:
        options: dict[str, Any] = {"address": address}
        if address == "local":
            start = stack.enter_context(prepare_start())
            stack.enter_context(start.in_this_process())
            options = start.init_options(workers or cores())
        stack.callback(ray.shutdown)
        try:
            _find(address)
            connect(**options)
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error).strip().split(". ")[0]
            raise PipelineError(
                f"cannot reach a Ray cluster at {address!r} ({reason}): start one, or give its"
                ' address, or "local" for this machine only.'
            ) from error
        yield ray
