"""Worker processes for many independent tasks.

Processes are used because Pillow's encoders hold the interpreter's lock. They are spawned because
a fork of a process with threads can hang. Each worker has its own connection, so the parent knows
which task a dead worker was running. The pools of the standard library break as a whole or hang.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
import types
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from queue import Empty, Queue, SimpleQueue
from typing import Any, Protocol, TypeVar

from data_prep.core.apart import may_die
from data_prep.core.errors import PipelineError, portable
from data_prep.core.lease import check_leases
from data_prep.core.logs import has_started, start_logging

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

CHECK_S = 1.0  # between two looks at the leases while a worker runs
DEATHS = 3  # after so many dead workers, the task counts as failed


class Map(Protocol):
    """A way to run tasks: `run_tasks` on this machine, `dpnet.pipeline.ray_map` on a cluster.

    It calls `function` on every task and yields each result once, in the order of the tasks.
    `tasks` may be endless, because they are taken only as results are. `function` is defined at the
    top of a module. It, the tasks and the results can be pickled. Messages use the attribute `name`
    of a task, if it has one. Use the map with `contextlib.closing`, so that an error in the loop's
    body ends the running tasks.

    An error of `function` passes through. After a task ended its worker process, the result of its
    method `after_death` runs, if it has that method and the result is not None. A task that ends
    its worker process several times raises PipelineError.
    """

    def __call__(
        self, function: Callable[[T], R], tasks: Iterable[T], workers: int, /
    ) -> Generator[R, None, None]: ...


def cores() -> int:
    """Return the number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def task_name(task: Any) -> str:
    """Return the name of a task for messages."""
    return str(getattr(task, "name", "a task"))


def after_death(task: Any) -> Any:
    """Return the task to run after this one ended its worker process; None for the same one."""
    careful = getattr(task, "after_death", None)
    return None if careful is None else careful()


def died_again(task: Any, times: int) -> PipelineError:
    """Return the error of a task that ended its worker process several times."""
    return PipelineError(
        f"{task_name(task)} ended its worker process {times} times (perhaps because memory is"
        " short). Run the same command again with fewer workers. It resumes."
    )


def run_tasks(
    function: Callable[[T], R], tasks: Iterable[T], workers: int
) -> Generator[R, None, None]:
    """Yield the results of `function` in the order of `tasks`, as a `Map` does.

    One worker or one task runs in this process. For more, see `run_apart`.
    """
    rest = iter(tasks)
    first = list(islice(rest, 2))
    rest = chain(first, rest)
    if workers <= 1 or len(first) <= 1:
        for each in rest:
            check_leases()
            yield function(each)
    else:
        yield from run_apart(function, rest, workers)


def run_apart(
    function: Callable[[T], R], tasks: Iterable[T], workers: int
) -> Generator[R, None, None]:
    """Yield the results of `function` in the order of `tasks`, as a `Map` does.

    All tasks run in worker processes, even a single one. So a task that crashes does not end this
    process. At most two tasks per worker are running or waiting. If a worker dies, its task runs
    again without others, so that it has all the memory. It runs at most three times.
    """
    rest = iter(tasks)
    workers = max(1, workers)
    # A thread drives the workers, so that they have work while the caller uses results. This thread
    # shares only queues with it, so a Ctrl-C here leaves nothing half done that it waits for.
    submitted: deque[_Task] = deque()
    # A byte for each submitted task. It is closed at the end.
    incoming, outgoing = multiprocessing.Pipe(duplex=False)
    results: Queue[_Result] = Queue()
    driver = threading.Thread(
        target=_drive, args=(function, workers, submitted, incoming, results), daemon=True
    )
    running: deque[T] = deque()
    early: dict[int, _Result] = {}
    done = 0

    def submit(most: int) -> None:
        for task in islice(rest, most):
            submitted.append(_Task(done + len(running), pickle.dumps(task), task_name(task)))
            running.append(task)
            outgoing.send_bytes(b".")

    driver.start()
    try:
        submit(2 * workers)
        while running:
            while done not in early:
                result = _next_result(results)
                if isinstance(result.outcome, BaseException):  # of the driver
                    raise result.outcome
                early[result.number] = result
            outcome = early.pop(done).outcome
            task = running.popleft()
            done += 1
            if outcome is None:
                raise died_again(task, DEATHS)
            assert isinstance(outcome, bytes)
            value, error, trace = pickle.loads(outcome)
            if error is not None:
                error.add_note(f"In a worker process:\n{trace}")
                raise error
            yield value
            submit(1)
    finally:
        outgoing.close()  # running workers end at once
        driver.join()
        incoming.close()


def _next_result(results: Queue[_Result]) -> _Result:
    """Wait for a result. Raises LeaseLostError if a lease around this call is lost meanwhile."""
    while True:
        check_leases()
        try:
            return results.get(timeout=CHECK_S)
        except Empty:
            continue


@dataclass
class _Task:
    number: int
    data: bytes
    name: str
    deaths: int = 0


@dataclass(frozen=True)
class _Result:
    """`outcome`: the worker's answer, None if it died of the task, or an error of the driver."""

    number: int
    outcome: bytes | BaseException | None


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    task: _Task | None = None  # the running one


def _drive(
    function: Callable[[Any], Any],
    workers: int,
    submitted: deque[_Task],
    incoming: Connection,
    results: Queue[_Result],
) -> None:
    """Run the tasks roughly in order until the other end of `incoming` is closed.

    Args:
        function: the function to call on each task.
        workers: the largest number of worker processes.
        submitted: the tasks, one for each byte of `incoming`.
        incoming: announces new tasks.
        results: takes the results in any order.
    """
    team: list[_Worker] = []
    todo: deque[_Task] = deque()
    again: deque[_Task] = deque()  # tasks whose worker died
    try:
        while True:
            while task := _next(todo, again, team):
                idle = [worker for worker in team if worker.task is None]
                if not idle and len(team) == workers:
                    break
                worker = idle[0] if idle else _start_worker(function, team)
                queue = again if task.deaths else todo
                worker.task = queue.popleft()
                try:
                    worker.connection.send_bytes(task.data)
                except OSError:  # it died while it was idle; the loop below notices
                    pass
            for ready in wait([incoming, *(worker.connection for worker in team)]):
                if ready is incoming:
                    try:
                        incoming.recv_bytes()
                    except EOFError:
                        return
                    todo.append(submitted.popleft())
                    continue
                worker = next(worker for worker in team if worker.connection is ready)
                try:
                    data = worker.connection.recv_bytes()
                except (EOFError, OSError):
                    team.remove(worker)
                    if dead := _died(worker):
                        if dead.deaths < DEATHS:
                            again.append(dead)
                        else:
                            results.put(_Result(dead.number, None))
                else:
                    assert worker.task is not None
                    results.put(_Result(worker.task.number, data))
                    worker.task = None
    except BaseException as error:  # raised again in the thread of `run_tasks`
        results.put(_Result(-1, error))
    finally:
        _dismiss(team)


def _next(todo: Sequence[_Task], again: Sequence[_Task], team: Sequence[_Worker]) -> _Task | None:
    """Return the task to run now. A task that ended a worker runs only without others."""
    running = [worker.task for worker in team if worker.task is not None]
    if again:
        return None if running else again[0]
    if any(task.deaths for task in running):
        return None
    return todo[0] if todo else None


def _start_worker(function: Callable[[Any], Any], team: list[_Worker]) -> _Worker:
    """Start a worker process and add it to the team."""
    # Workers inherit the mask, so a Ctrl-C cannot end a worker before it ignores the signal.
    # The start of the tracker removes SIGINT from the mask of this thread, so it comes first.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    ours, theirs = multiprocessing.Pipe()
    process = _Process(target=_work, args=(function, theirs, has_started()), daemon=True)
    try:
        process.start()
    except OSError as error:
        raise PipelineError(
            f"cannot start worker process {len(team) + 1} ({error.strerror}). Run the same command"
            " again with fewer workers. It resumes."
        ) from error
    finally:
        theirs.close()
    team.append(worker := _Worker(process, ours))
    return worker


def _died(worker: _Worker) -> _Task | None:
    """Return the task of a dead worker with its deaths counted; None if the worker was idle."""
    worker.connection.close()
    worker.process.join()
    if (task := worker.task) is not None:
        task.deaths += 1
        if task.deaths < DEATHS:
            code = worker.process.exitcode or 0
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            how = "it reached a time limit" if code == -signal.SIGALRM else how
            if (careful := after_death(pickle.loads(task.data))) is not None:
                task.data = pickle.dumps(careful)
            log.warning(
                "a worker process died (%s) while it ran %s: this task runs again, without others",
                how,
                task.name,
            )
    return task


def _dismiss(team: Iterable[_Worker]) -> None:
    """End the workers: running ones at once, idle ones after they have closed down."""
    for worker in team:
        if worker.task is None:
            try:
                worker.connection.send_bytes(b"")
            except OSError:
                pass
        worker.connection.close()
    for worker in team:
        worker.process.join()


def _work(function: Callable[[Any], Any], connection: Connection, logs: bool) -> None:
    """Run a worker process: answer each task with a pickled (value, error, traceback)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    may_die()
    if logs:
        start_logging()
    tasks: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    while data := tasks.get():
        try:
            answer = pickle.dumps((function(pickle.loads(data)), None, ""))
        except BaseException as error:
            answer = pickle.dumps((None, portable(error), traceback.format_exc()))
        connection.send_bytes(answer)


def _receive(connection: Connection, tasks: SimpleQueue[bytes]) -> None:
    """Pass tasks on until an empty one; end this process if the parent closes or dies."""
    try:
        while data := connection.recv_bytes():
            tasks.put(data)
        tasks.put(b"")
    except (EOFError, OSError):
        os._exit(1)


class _Process(SpawnProcess):
    """A process that does not import the caller's `__main__` module again.

    A script without an `if __name__ == "__main__"` guard would run a second time in each worker,
    and a main module that is heavy to import would cost seconds.
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            return SpawnProcess._Popen(process_obj)
        finally:
            sys.modules["__main__"] = main
