"""Scratch folders of this machine: private, locked while in use, and swept after a kill.

The process that makes a folder holds a lock in it. A folder with a free lock belongs to a process
that was killed, so the next start removes it. Folders and links of other users are left alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

SCRATCH = Path("/tmp")  # the path of a socket in a deeper folder may exceed Linux's 107 bytes
PREFIX, LOCK = "dpnet-", ".dpnet-scratch-lock"  # a name that no folder of a user contains
REMOVE_S = 5.0  # how long to try to remove a scratch folder


@contextmanager
def scratch_folder(purpose: str, top: Path | None = None) -> Iterator[Path]:
    """Make a locked scratch folder that others cannot read, and remove it at the end.

    Before that, remove the scratch folders of killed processes.

    Args:
        purpose: Part of the folder's name, such as "ray-up-".
        top: The folder to make it in. None is SCRATCH.
    """
    top = top or SCRATCH
    sweep(top)
    folder, lock = _locked_folder(purpose, top)
    with lock:
        try:
            yield folder
        finally:
            _remove(folder)


def _locked_folder(purpose: str, top: Path) -> tuple[Path, BinaryIO]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}", dir=top))
        try:
            lock = (folder / LOCK).open("wb")
        except OSError:  # the disk is full
            folder.rmdir()
            raise
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / LOCK).exists():  # not swept before the lock was taken
            return folder, lock
        lock.close()


def sweep(top: Path) -> None:
    """Remove the scratch folders of processes that were killed: their locks are free."""
    for folder in top.glob(f"{PREFIX}*"):
        with suppress(OSError):  # in use, or removed since
            if folder.lstat().st_uid != os.geteuid():
                continue  # its lock could be a pipe that never answers
            with (folder / LOCK).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a scratch folder, and first end the processes that still write there.

    If Ray is stopped during its start, its agents run for another minute and write files.
    """
    deadline = time.monotonic() + REMOVE_S
    while time.monotonic() < deadline:
        writers = _writers(folder)
        for pid in writers:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        if not writers and not folder.exists():
            return
        time.sleep(0.05)


def _writers(folder: Path) -> list[int]:
    """Return the processes with a standard output in `folder`; none on systems without /proc."""
    found = []
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        with suppress(OSError):  # another user's process, or it has ended
            if os.readlink(output).startswith(f"{folder}/"):
                found.append(int(output.parts[2]))
    return found
