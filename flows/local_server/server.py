"""Prefect's server as a child process that ends with its parent.

`embedded_server` runs the parts of a server that one flow run needs. `dpnet up` runs a full server,
with the UI and every service (`flows/local_server/supervisor.py`).

* It has a password, and `Guard` refuses requests of other pages.
* The parent binds the socket and passes it on, so the port cannot be taken by another program.
* The database and the log `server.log` are in the folder `home`.
* Ctrl-C in a terminal does not reach the server, so it still stores the last states of a stopped
  flow.
* The server ends with its parent. Its standard input is a pipe that only the parent holds, and
  `kill -9` closes it too.
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
from data_prep.core.password_file import new_password
from data_prep.core.private_files import UMASK, private_folder, private_opener
from flows.local_server.password import LOGIN, SERVER_PASSWORD
from flows.local_server.server_log import explain_failure

START_TIMEOUT_S = 120.0
STORAGE = "storage"  # where Prefect keeps results; the command's process writes there too
_MIN_FREE_BYTES = 4 << 20  # a new database needs more than 1 MiB, and SQLite needs a journal
SETTINGS = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_SERVER_LEVEL": "WARNING",
    "DO_NOT_TRACK": "1",
    "PREFECT__SERVER_FINAL": "1",
}
# One flow run needs no UI, scheduler or other services.
EMBEDDED = {"PREFECT_SERVER_UI_ENABLED": "false", "PREFECT__SERVER_EPHEMERAL": "1"}


@contextmanager
def embedded_server(
    home: Path, env: Mapping[str, str], while_starting: Callable[[Path, str, str], None]
) -> Iterator[bool]:
    """Run a server with its database in `home`, inside the block.

    Args:
        home: The folder of the database, the log and the lock.
        env: The environment of the server.
        while_starting: Called while the server starts, with `home`, the address of the API and its
            `user:password`. The password is random and known to nobody else.

    Yields:
        Whether no other command uses `home`. If so, a run in the state running was killed.
    """
    private_folder(home)
    private_folder(home / STORAGE)
    password = new_password()
    with open(home / "lock", "ab", opener=private_opener) as lock:
        exclusive = _lock_exclusively(lock.fileno())
        if exclusive:
            remove_unfinished_database(home)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
            process = _start(home, {**env, SERVER_PASSWORD: password}, listener)
        try:
            while_starting(home, url, password)
            _wait_until_healthy(url, process, home / "server.log")
            mark_database_created(home)
            # Other commands may start now. They waited while the database was created.
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield exclusive
        finally:
            _stop(process)


def _lock_exclusively(lock: int) -> bool:
    """Lock the file exclusively and return True; share the lock if another process has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(lock, fcntl.LOCK_SH)
        return False
    return True


def remove_unfinished_database(home: Path) -> None:
    """Remove a database that a server was killed in creating: no server can use it."""
    if not (home / "created").exists():
        for path in home.glob("prefect.db*"):
            path.unlink()
    if not (home / "prefect.db").exists():
        (home / "created").unlink(missing_ok=True)
        # It records that the old database has all block types.
        (home / "memo_store.toml").unlink(missing_ok=True)


def mark_database_created(home: Path) -> None:
    """Record that a server has started with the database, so that the next start keeps it."""
    (home / "created").touch(0o600)


def server_command(listener: socket.socket) -> list[str]:
    """Return the command of a server that inherits `listener` and ends with its input."""
    return [sys.executable, "-m", "flows.local_server.server", str(listener.fileno())]


def _start(home: Path, env: Mapping[str, str], listener: socket.socket) -> subprocess.Popen[bytes]:
    with open(home / "server.log", "wb", opener=private_opener) as log:
        return subprocess.Popen(
            server_command(listener),
            env={**env, **SETTINGS, **EMBEDDED, "PREFECT_HOME": str(home)},
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
            start_new_session=True,
            umask=UMASK,
        )


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            # The socket listens already, so the answer comes as soon as the server is ready.
            with urllib.request.urlopen(f"{url}/health", timeout=START_TIMEOUT_S):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    raise start_error(log, str(log.parent / "prefect.db"))


def start_error(log: Path, database: str) -> PipelineError:
    """Return an error that says why the server did not start.

    Args:
        log: The log of the server.
        database: The file or the URL of its database.
    """
    if shutil.disk_usage(log.parent).free < _MIN_FREE_BYTES:
        return storage_error(OSError(errno.ENOSPC, ""), str(log.parent))
    known = explain_failure(log.read_text("utf-8", "replace"), database)
    return PipelineError(known or f"Prefect's server did not start. See {log} for the reason.")


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
    from prefect.server.api.server import create_app

    from data_prep.core.asgi_guard import Guard
    from flows.local_server.login_page import LOGIN_PAGE

    with socket.socket(fileno=os.dup(listener)) as own:
        port = own.getsockname()[1]
    uvicorn.run(
        Guard(create_app(), port, pages={LOGIN: LOGIN_PAGE}),
        fd=listener,
        log_level="error",
        timeout_graceful_shutdown=3,  # an open page of the UI would keep the server running
    )


def _exit_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
