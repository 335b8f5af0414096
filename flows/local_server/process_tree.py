"""Find and end the descendants of a process, so that none outlives it.

This needs Linux. On other systems a process can end only its direct children.
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
    """Make this process the new parent of its orphaned descendants, instead of init."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def end_with_parent() -> None:
    """Ask for a SIGTERM when the parent of this process dies, for any reason.

    To be called in a new process.
    """
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    with suppress(AttributeError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def survive_closed_output() -> None:
    """Keep this process running when the reader of its output dies, such as a killed worker.

    Otherwise the next line of Prefect's console log would end the process. The run's log on the
    server is not affected.
    """

    def watch() -> None:
        poll = select.poll()
        for output in (1, 2):
            poll.register(output, 0)  # poll always reports errors
        poll.poll()
        null = os.open(os.devnull, os.O_WRONLY)
        for output in (1, 2):
            os.dup2(null, output)

    threading.Thread(target=watch, daemon=True).start()


def descendants(pid: int) -> list[int]:
    """Return all descendants of `pid`, including zombies. A parent comes before its children."""
    children = _children_by_parent()
    found = list(children.get(pid, []))
    for each in found:
        found += children.get(each, [])
    return found


def _children_by_parent() -> dict[int, list[int]]:
    """Return the children of every process that has children."""
    found: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # the process has ended
            parent = int(status.read_text("utf-8", "replace").rpartition(")")[2].split()[1])
            found.setdefault(parent, []).append(int(status.parent.name))
    return found


def reap(own: Iterable[int]) -> set[int]:
    """Reap dead adopted children, and return the living ones. Leave the children `own` out."""
    alive = set()
    for pid in set(descendants(os.getpid())) - set(own):
        try:
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                alive.add(pid)
        except ChildProcessError:  # another process is its parent
            pass
    return alive


def send_signal(pids: Iterable[int], number: int) -> None:
    """Send a signal to each process that still exists and belongs to this user."""
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def stop(process: subprocess.Popen[bytes], seconds: float, *, with_children: bool = False) -> None:
    """End a child by SIGTERM. After `seconds`, kill it and all its descendants.

    Args:
        process: The child.
        seconds: How long to wait after the SIGTERM.
        with_children: Also send the SIGTERM to the children of the child. A process that waits for
            its children needs this.
    """
    if process.poll() is None:
        children = _children_by_parent().get(process.pid, []) if with_children else []
        send_signal([process.pid, *children], signal.SIGTERM)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        send_signal([*descendants(process.pid), process.pid], signal.SIGKILL)
        process.wait()
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.close()


def kill_descendants(seconds: float = 2.0) -> None:
    """Kill all descendants of this process, adopted orphans too, for at most `seconds`."""
    deadline = time.monotonic() + seconds
    while remaining := descendants(os.getpid()):
        send_signal(remaining, signal.SIGKILL)
        reap(())
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)
