"""Call a function in a process of its own, so that a crash or a hang ends only that call.

Decoders of pictures are C code. A damaged file can make one crash, or run without end. Worker
processes decode without this protection, because it takes time. If one of them dies, its task runs
again with an `Apart`, which finds the files that are to blame.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Generic, ParamSpec, TypeVar

from data_prep.core.errors import ItemError, PipelineError, portable

P = ParamSpec("P")
R = TypeVar("R")

DECODE_S = 300.0  # for one file; the largest photo takes some seconds. Ours
KILLS = 3  # so often a call may be killed from outside before that is an error
_MAIN = "from data_prep.core.apart import serve; serve()"

_expendable = False


class DeathError(ItemError):
    """A call that ended its process; the message is the reason."""


def may_die() -> None:
    """Say that this is a worker process: `time_limit` may end it, because its task runs again."""
    global _expendable
    _expendable = True
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End this process if the block lasts longer, if this is a worker process.

    The signal ends it even in C code that never returns to Python.
    """
    if not _expendable:
        yield
        return
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def guarded(function: Callable[P, R], limit_s: float, *, apart: bool) -> Iterator[Callable[P, R]]:
    """Return a function with a time limit for each call.

    Args:
        function: see `Apart`.
        limit_s: the most seconds of one call.
        apart: call it in a process of its own. Otherwise a crash or a hang ends this process, if it
            is a worker process.
    """
    if apart:
        with Apart(function, limit_s) as calls:
            yield calls
        return

    def limited(*args: P.args, **kwargs: P.kwargs) -> R:
        with time_limit(limit_s):
            return function(*args, **kwargs)

    yield limited


class Apart(Generic[P, R]):
    """A function whose calls run in another process, one at a time, each with a time limit.

    The process starts with the first call, and again after a call that ended it. Use it in a `with`
    block.

    Args:
        function: defined at the top of a module; arguments and results can be pickled.
        limit_s: the most seconds of one call.
    """

    def __init__(self, function: Callable[P, R], limit_s: float) -> None:
        self._function, self._limit_s = function, limit_s
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Apart[P, R]:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process is not None:
            self._process.kill()
            self._end()

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function.

        Raises:
            DeathError: it crashed, ended its process, or took too long.
            PipelineError: its process was killed several times, perhaps because memory is short.
            Exception: what the function raised.
        """
        call = pickle.dumps((self._function, args, kwargs, self._limit_s))
        for _ in range(KILLS):
            process = self._process = self._process or _start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                _send(process.stdin, call)
                answer = _receive(process.stdout)
            except OSError:  # it died before it read the call
                answer = None
            if answer is not None:
                value, error = pickle.loads(answer)
                if error is not None:
                    raise error
                return value  # type: ignore[no-any-return]
            status = self._end()
            if status != -signal.SIGKILL:
                raise DeathError(self._reason(status))
        raise PipelineError(
            f"a process that decodes one file was killed {KILLS} times (perhaps because memory is"
            " short). Run the same command again with fewer workers. It resumes."
        )

    def _end(self) -> int:
        """Wait for the process; return its exit status."""
        process, self._process = self._process, None
        assert process is not None
        with process:  # closes the pipes
            pass
        return process.returncode

    def _reason(self, status: int) -> str:
        if status == -signal.SIGALRM:
            return f"its decoder did not finish within {self._limit_s:g} s"
        if status < 0:
            return f"its decoder crashed ({signal.Signals(-status).name})"
        return f"its decoder ended the process (exit status {status})"


def _start() -> subprocess.Popen[bytes]:
    code = f"import sys; sys.path[:] = {sys.path!r}; {_MAIN}"
    return subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def serve() -> None:
    """Answer calls from standard input until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the command handles Ctrl-C
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # keep prints of the function out of the answers
    while (call := _receive(sys.stdin.buffer)) is not None:
        function, args, kwargs, limit_s = pickle.loads(call)
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        try:
            answer = pickle.dumps((function(*args, **kwargs), None))
        except Exception as error:
            answer = pickle.dumps((None, portable(error)))
        signal.setitimer(signal.ITIMER_REAL, 0)
        _send(answers, answer)


def _send(file: Any, data: bytes) -> None:
    file.write(len(data).to_bytes(8, "big"))
    file.write(data)
    file.flush()


def _receive(file: Any) -> bytes | None:
    """Return the next message; None if the other end was closed."""
    head = file.read(8)
    data: bytes = file.read(int.from_bytes(head, "big")) if len(head) == 8 else b""
    return data if len(head) == 8 and len(data) == int.from_bytes(head, "big") else None
