"""Worker processes for many independent tasks.

Processes, because Pillow's encoders hold the interpreter's lock; started afresh (spawn), because a
fork of a process with threads can hang. Each has a connection of its own, so that it is known which
task a worker died of: the standard library's pools break as a whole, or wait for ever.
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
from queue import SimpleQueue
from typing import Any, Protocol, TypeVar

from data_prep.core.errors import PipelineError
from data_prep.core.logs import has_started, start_logging

log = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

DEATHS = 3  # of the worker processes of one task, before it is given up


class Map(Protocol):
    """A way to run tasks: `run_tasks` on this machine, `dpnet.pipeline.ray_map` on a cluster.

    It calls `function` on every task and gives the results in the order of the tasks, each once.
    `tasks` may be endless: they are taken as results are. `function` is defined at the top of a
    module; it, the tasks and the results can be pickled. Use it with `contextlib.closing`, so that
    an error in the loop's body ends the work under way. Raises what `function` raises, and
    PipelineError when a task ends its worker process again and again; a task with an attribute
    `name` is called by it.
    """

    def __call__(
        self, function: Callable[[T], R], tasks: Iterable[T], workers: int, /
    ) -> Generator[R, None, None]: ...


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def called(task: Any) -> str:
    """What to call a task in a sentence."""
    return str(getattr(task, "name", "a task"))


def died_again(task: Any, times: int) -> PipelineError:
    """The error of a task whose worker processes did not survive it."""
    return PipelineError(
        f"{called(task)} ended its worker process {times} times (perhaps for want of memory):"
        " run the same command again with fewer workers, it resumes."
    )


def run_tasks(
    function: Callable[[T], R], tasks: Iterable[T], workers: int
) -> Generator[R, None, None]:
    """Results of `function` in the order of `tasks`, at most 2 tasks per worker under way.

    A `Map`. With one worker or one task all happens in this process. When a worker dies, its task
    is tried again, alone so that it has all the memory, up to three times.
    """
    rest = iter(tasks)
    first = list(islice(rest, 2))
    rest = chain(first, rest)
    if workers <= 1 or len(first) <= 1:
        yield from map(function, rest)
        return
    # A thread drives the workers, so that they have work while the results are used. This one
    # meets it at queues alone: a Ctrl-C here finds nothing half done that the thread waits for.
    given: deque[_Task] = deque()
    taken, give = multiprocessing.Pipe(duplex=False)  # a byte for each task given; closed: the end
    results: SimpleQueue[_Result] = SimpleQueue()
    driver = threading.Thread(
        target=_drive, args=(function, workers, given, taken, results), daemon=True
    )
    under_way: deque[T] = deque()
    early: dict[int, _Result] = {}
    done = 0

    def hand_out(most: int) -> None:
        for task in islice(rest, most):
            given.append(_Task(done + len(under_way), pickle.dumps(task), called(task)))
            under_way.append(task)
            give.send_bytes(b".")

    driver.start()
    try:
        hand_out(2 * workers)
        while under_way:
            while done not in early:
                result = results.get()
                if isinstance(result.outcome, BaseException):  # the driver's own
                    raise result.outcome
                early[result.number] = result
            outcome = early.pop(done).outcome
            task = under_way.popleft()
            done += 1
            if outcome is None:
                raise died_again(task, DEATHS)
            assert isinstance(outcome, bytes)
            value, error, trace = pickle.loads(outcome)
            if error is not None:
                error.add_note(f"In a worker process:\n{trace}")
                raise error
            yield value
            hand_out(1)
    finally:
        give.close()  # workers still at work end at once
        driver.join()
        taken.close()


@dataclass
class _Task:
    number: int
    data: bytes
    name: str
    deaths: int = 0


@dataclass(frozen=True)
class _Result:
    """`outcome`: what the worker sent, None when it died of the task, an error of the driver."""

    number: int
    outcome: bytes | BaseException | None


@dataclass
class _Worker:
    process: SpawnProcess
    connection: Connection
    task: _Task | None = None  # that it is at work on


def _drive(
    function: Callable[[Any], Any],
    workers: int,
    given: deque[_Task],
    taken: Connection,
    results: SimpleQueue[_Result],
) -> None:
    """Have the tasks done, in about their order, until `taken` is closed at its other end."""
    team: list[_Worker] = []
    todo: deque[_Task] = deque()
    again: deque[_Task] = deque()  # tasks whose worker died
    try:
        while True:
            while task := _next(todo, again, team):
                idle = [worker for worker in team if worker.task is None]
                if not idle and len(team) == workers:
                    break
                worker = idle[0] if idle else _started(function, team)
                queue = again if task.deaths else todo
                worker.task = queue.popleft()
                try:
                    worker.connection.send_bytes(task.data)
                except OSError:  # it died while it had nothing to do; told below
                    pass
            for ready in wait([taken, *(worker.connection for worker in team)]):
                if ready is taken:
                    try:
                        taken.recv_bytes()
                    except EOFError:
                        return
                    todo.append(given.popleft())
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
    except BaseException as error:  # raised where the results are taken
        results.put(_Result(-1, error))
    finally:
        _dismiss(team)


def _next(todo: Sequence[_Task], again: Sequence[_Task], team: Sequence[_Worker]) -> _Task | None:
    """The task to hand out now. One that a worker died of runs while no other does."""
    running = [worker.task for worker in team if worker.task is not None]
    if again:
        return None if running else again[0]
    if any(task.deaths for task in running):
        return None
    return todo[0] if todo else None


def _started(function: Callable[[Any], Any], team: list[_Worker]) -> _Worker:
    # Workers inherit the mask, so that a Ctrl-C cannot hit one that is not yet ready to ignore it.
    # The tracker, when it is started, takes SIGINT off the mask of this thread: so it goes first.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    ours, theirs = multiprocessing.Pipe()
    process = _Process(target=_work, args=(function, theirs, has_started()), daemon=True)
    try:
        process.start()
    except OSError as error:
        raise PipelineError(
            f"cannot start worker process {len(team) + 1} ({error.strerror}): run the same command"
            " again with fewer workers, it resumes."
        ) from error
    finally:
        theirs.close()
    team.append(worker := _Worker(process, ours))
    return worker


def _died(worker: _Worker) -> _Task | None:
    """The task that a dead worker was at work on, one death older."""
    worker.connection.close()
    worker.process.join()
    if (task := worker.task) is not None:
        task.deaths += 1
        if task.deaths < DEATHS:
            code = worker.process.exitcode or 0
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            log.warning(
                "a worker process died (%s) while it ran %s: this task runs again, without others",
                how,
                task.name,
            )
    return task


def _dismiss(team: Iterable[_Worker]) -> None:
    """End the workers: those at work at once, idle ones in good order."""
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
    """A worker process: answer each task with (value, error, traceback), pickled."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if logs:
        start_logging()
    tasks: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_receive, args=(connection, tasks), daemon=True).start()
    while data := tasks.get():
        try:
            answer = pickle.dumps((function(pickle.loads(data)), None, ""))
        except BaseException as error:
            answer = _failure(error)
        connection.send_bytes(answer)


def _receive(connection: Connection, tasks: SimpleQueue[bytes]) -> None:
    """Pass tasks on, until an empty one; end this process when the parent closes or dies."""
    try:
        while data := connection.recv_bytes():
            tasks.put(data)
        tasks.put(b"")
    except (EOFError, OSError):
        os._exit(1)


def _failure(error: BaseException) -> bytes:
    trace = traceback.format_exc()
    try:
        answer = pickle.dumps((None, error, trace))
        pickle.loads(answer)  # some errors cannot be made again from their arguments
        return answer
    except Exception:
        return pickle.dumps((None, RuntimeError(f"{type(error).__name__}: {error}"), trace))


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
