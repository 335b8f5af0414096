"""Prefect's server as a process of a command: started for it, gone with it.

`embedded_server` is the one that a single flow run needs; `dpnet up` starts a whole one, with the
UI and every service (`flows/local_server/supervisor.py`). Its port is free by construction (the
socket is bound by the parent and handed over), its database lies in `home`, and its noise goes to
`home/server.log`. It is out of reach of a terminal's Ctrl-C, so that the last states of a stopped
flow still reach it, and it ends when its parent does: its standard input is a pipe that only the
parent holds, and a `kill -9` closes it too.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from data_prep.core.errors import PipelineError, storage_error
from flows.local_server.server_log import explain

START_TIMEOUT_S = 120.0
_LEAST_FREE = 4 << 20  # bytes; a new database takes more than one megabyte, and SQLite a journal
SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
    "DO_NOT_TRACK": "1",
    "PREFECT__SERVER_FINAL": "1",
}
# Only what one flow run needs is started; the rest (scheduler, late runs, …) has no work here.
EMBEDDED = {"PREFECT_SERVER_UI_ENABLED": "false", "PREFECT__SERVER_EPHEMERAL": "1"}


@contextmanager
def embedded_server(
    home: Path, env: Mapping[str, str], meanwhile: Callable[[Path, str], None]
) -> Iterator[bool]:
    """Run a server with its database in `home` while in the block.

    `meanwhile(home, API address)` is called while it starts. Yields whether no other command uses
    `home` now: then a flow run that the database calls running is one that was killed.
    """
    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("ab") as lock:
        alone = _lock_alone(lock.fileno())
        if alone:
            remove_half_made(home)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            process = _start(home, env, listener)
        try:
            meanwhile(home, url)
            _wait_until_healthy(url, process, home / "server.log")
            keep_database(home)
            # Others may start now; while one was creating the database they had to wait.
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield alone
        finally:
            _stop(process)


def _lock_alone(lock: int) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(lock, fcntl.LOCK_SH)
        return False
    return True


def remove_half_made(home: Path) -> None:
    """A server that was killed while it created its database left one that no other can use."""
    if not (home / "created").exists():
        for path in home.glob("prefect.db*"):
            path.unlink()
    if not (home / "prefect.db").exists():
        (home / "created").unlink(missing_ok=True)
        # It says of the old one that all types of blocks are in it.
        (home / "memo_store.toml").unlink(missing_ok=True)


def keep_database(home: Path) -> None:
    """From now on the database counts: a server has started with it."""
    (home / "created").touch()


def server_command(listener: socket.socket) -> list[str]:
    """Of a process that serves on `listener`, which it must inherit, until its input ends."""
    return [sys.executable, "-m", "flows.local_server.server", str(listener.fileno())]


def _start(home: Path, env: Mapping[str, str], listener: socket.socket) -> subprocess.Popen[bytes]:
    with (home / "server.log").open("wb") as log:
        return subprocess.Popen(
            server_command(listener),
            env={**env, **SETTINGS, **EMBEDDED, "PREFECT_HOME": str(home)},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
            start_new_session=True,
        )


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            # The socket listens already: the answer comes as soon as the server is up.
            with urllib.request.urlopen(f"{url}/health", timeout=START_TIMEOUT_S):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise not_started(log, str(log.parent / "prefect.db"))


def not_started(log: Path, database: str) -> PipelineError:
    """Why a server with that log did not start. `database` is its file or its URL."""
    if shutil.disk_usage(log.parent).free < _LEAST_FREE:
        return storage_error(OSError(errno.ENOSPC, ""), str(log.parent))
    known = explain(log.read_text("utf-8", "replace"), database)
    return PipelineError(known or f"Prefect's server did not start: see {log} for the reason.")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdin is not None
    process.stdin.close()


def _serve(listener: int) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    import uvicorn

    uvicorn.run(
        "prefect.server.api.server:create_app",
        factory=True,
        fd=listener,
        log_level="error",
        timeout_graceful_shutdown=3,  # an open page of the UI would hold it for ever
    )


def _exit_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
