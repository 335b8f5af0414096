"""Start Ray on this machine: its scratch folder, lock, environment and arguments.

Ray keeps sockets and logs in a scratch folder under /tmp. The process that starts Ray holds a lock
in that folder. A folder with a free lock belongs to a process that was killed, so the next start
removes it. This module is cheap to import: it imports Ray only when Ray starts.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

SCRATCH = Path("/tmp")  # the path of a socket in a deeper folder may exceed Linux's 107 bytes
PREFIX, LOCK = "dpnet-ray-", ".lock"
REMOVE_S = 5.0  # how long to try to remove a scratch folder
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@dataclass(frozen=True)
class RayStart:
    """How to start Ray on this machine: in this process, or as a process of its own."""

    folder: Path  # for what Ray writes
    environment: Mapping[str, str] = field(default_factory=lambda: dict(ENVIRONMENT))

    def init_options(self, cpus: int, gpus: int | None = None) -> dict[str, Any]:
        """Return the arguments of `ray.init`. With `gpus` None, Ray counts the GPUs itself."""
        return {
            "address": "local",
            "num_cpus": cpus,
            "num_gpus": gpus,
            "include_dashboard": False,
            "object_store_memory": 128 << 20,  # nothing large passes through it
            "_temp_dir": str(self.folder),
        }

    def head_command(self, port: int, agent_port: int) -> list[str]:
        """Return the command that runs the head of a cluster of this machine.

        Args:
            port: Port of the dashboard, which takes jobs.
            agent_port: Port of the dashboard's agent.
        """
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += ["--node-ip-address=127.0.0.1", "--port=0", f"--temp-dir={self.folder}"]
        command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1"]
        command += [f"--dashboard-port={port}", f"--dashboard-agent-listen-port={agent_port}"]
        return command


@contextmanager
def prepare_start(purpose: str = "") -> Iterator[RayStart]:
    """Prepare a start of Ray on this machine. At the end, remove its scratch folder."""
    with scratch_folder(purpose) as folder:
        yield RayStart(folder)


@contextmanager
def scratch_folder(purpose: str = "") -> Iterator[Path]:
    """Make a locked scratch folder, after removing those of killed processes.

    Args:
        purpose: Part of the folder's name, such as "up-".
    """
    sweep(SCRATCH)
    folder, lock = _locked_folder(purpose)
    with lock:
        try:
            yield folder
        finally:
            _remove(folder)


def _locked_folder(purpose: str) -> tuple[Path, BinaryIO]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{purpose}", dir=SCRATCH))
        with suppress(FileNotFoundError):
            lock = (folder / LOCK).open("wb")
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (folder / LOCK).exists():  # not swept before the lock was taken
                return folder, lock
            lock.close()


def sweep(top: Path) -> None:
    """Remove the scratch folders of processes that were killed: their locks are free."""
    for folder in top.glob(f"{PREFIX}*"):
        with suppress(OSError), (folder / LOCK).open("rb") as lock:  # in use, or another user's
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


def connect(**options: Any) -> None:
    """Call `ray.init` without Ray's own output, and keep this process's signal handlers."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    if threading.current_thread() is threading.main_thread():
        for each, handler in handlers.items():  # Ray's own handler of SIGTERM aborts the process
            signal.signal(each, handler)
