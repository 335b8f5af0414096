"""Worker processes for many independent tasks.

Processes, because Pillow's encoders hold the interpreter's lock; started afresh (spawn), because a
fork of a process with threads can hang.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import types
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from queue import SimpleQueue
from typing import Any, TypeVar, cast

from data_prep.errors import PipelineError

T = TypeVar("T")
R = TypeVar("R")
_Result = tuple[R | None, BaseException | None] | None


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[[T], R], tasks: Sequence[T], workers: int
) -> Generator[R, None, None]:
    """Results of `function` in the order of `tasks`, at most 2 tasks per worker under way.

    With one worker or one task all happens in this process. `function` is defined at the top of a
    module; it, the tasks and the results can be pickled. Use it with `contextlib.closing`, so that
    an error in the loop's body ends the workers. Raises what `function` raises.
    """
    workers = min(workers, len(tasks))
    if workers <= 1:
        yield from map(function, tasks)
        return
    # A thread of ours drives the pool, and this one meets it at two queues alone: a Ctrl-C inside
    # one of the pool's locks would leave it locked, and the pool waiting for it for ever.
    results: SimpleQueue[_Result[R]] = SimpleQueue()
    tickets: SimpleQueue[bool] = SimpleQueue()
    for _ in range(2 * workers):
        tickets.put(True)
    ends, alive = multiprocessing.Pipe(duplex=False)
    driver = threading.Thread(
        target=_drive, args=(function, tasks, workers, ends, tickets, results), daemon=True
    )
    driver.start()
    try:
        while (result := results.get()) is not None:
            value, error = result
            if error is not None:
                raise error
            tickets.put(True)
            yield cast(R, value)
    except BrokenProcessPool:
        raise PipelineError(
            "a worker process was ended from outside, perhaps for want of memory:"
            " run the same command again with fewer workers, it resumes."
        ) from None
    finally:
        alive.close()  # workers still at work end at once
        tickets.put(False)
        driver.join()
        ends.close()


def _drive(
    function: Callable[[T], R],
    tasks: Sequence[T],
    workers: int,
    ends: Connection,
    tickets: SimpleQueue[bool],
    results: SimpleQueue[_Result[R]],
) -> None:
    """Hand out a task for each ticket; put each result or the error, None after the last."""
    # Workers inherit this, so that a Ctrl-C cannot hit one that is not yet ready to ignore it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    pool = ProcessPoolExecutor(workers, _Context(), _start_worker, (ends,))
    pending: deque[Future[R]] = deque()
    try:
        for task in tasks:
            if len(pending) == 2 * workers:
                results.put((pending.popleft().result(), None))
            if not tickets.get():
                return
            pending.append(pool.submit(function, task))
        while pending:
            results.put((pending.popleft().result(), None))
        results.put(None)
    except BaseException as error:  # raised where the results are taken
        results.put((None, error))
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(ends: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, args=(ends,), daemon=True).start()


def _end_with_parent(ends: Connection) -> None:
    """End this process when the pipe's other end is closed, by the parent or by its death.

    The pool's own queues do not tell: each worker holds both of their ends.
    """
    try:
        ends.recv_bytes()
    except EOFError:
        pass
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


class _Context(SpawnContext):
    Process = _Process
