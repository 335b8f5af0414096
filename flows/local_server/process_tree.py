"""Processes and their descendants on Linux: who they are, and how none outlives who started it.

Elsewhere nothing is known of descendants, and a process ends its direct children alone.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def adopt_orphans() -> None:
    """Descendants of this process whose parent dies become its children, not init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent() -> None:
    """In a new process: it gets a SIGTERM when its parent dies, even if that is killed."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def outlive_reader() -> None:
    """Let this process go on when who reads its output dies, as a worker that is killed.

    Prefect's console log would end it at its next line. Its log on the server goes on.
    """

    def watch() -> None:
        poll = select.poll()
        for output in (1, 2):
            poll.register(output, 0)  # of an error it tells all the same
        poll.poll()
        nobody = os.open(os.devnull, os.O_WRONLY)
        for output in (1, 2):
            os.dup2(nobody, output)

    threading.Thread(target=watch, daemon=True).start()


def descendants(pid: int) -> list[int]:
    """All processes that descend from `pid`, children first; also those that wait to be reaped."""
    families = _families()
    found = list(families.get(pid, []))
    for each in found:
        found += families.get(each, [])
    return found


def _families() -> dict[int, list[int]]:
    """The children of every process that has some."""
    found: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parent = int(status.read_text("utf-8", "replace").rpartition(")")[2].split()[1])
            found.setdefault(parent, []).append(int(status.parent.name))
    return found


def reap(own: Iterable[int]) -> set[int]:
    """Take note of adopted children's ends; those still alive. `own`: children to leave alone."""
    alive = set()
    for pid in set(descendants(os.getpid())) - set(own):
        try:
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                alive.add(pid)
        except ChildProcessError:  # a child of another
            pass
    return alive


def send(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def stop(process: subprocess.Popen[bytes], seconds: float, *, with_children: bool = False) -> None:
    """End a child: by SIGTERM, and after `seconds` it and all its descendants by SIGKILL.

    `with_children`: its own children get the SIGTERM too, for a process that waits for them.
    """
    if process.poll() is None:
        theirs = _families().get(process.pid, []) if with_children else []
        send([process.pid, *theirs], signal.SIGTERM)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        send([*descendants(process.pid), process.pid], signal.SIGKILL)
        process.wait()
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.close()


def kill_descendants(seconds: float = 2.0) -> None:
    """Kill all that descends from this process; adopted orphans of theirs too."""
    deadline = time.monotonic() + seconds
    while left := descendants(os.getpid()):
        send(left, signal.SIGKILL)
        reap(())
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)
