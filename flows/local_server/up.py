"""`dpnet up`: the local part of the platform, in the foreground of a terminal until Ctrl-C.

The command shows the progress of its supervisor (`flows/local_server/supervisor.py`), and stops it
at the end. Only one `dpnet up` runs for a root. It holds the file `lock` in the root's `up` folder,
or in `~/.cache/dpnet` for a root on S3. A second `dpnet up` prints the addresses of the first.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from data_prep.core.errors import PipelineError
from data_prep.core.network_disk import database_cache, local_top
from data_prep.core.paths import UP
from data_prep.core.record import known_fields, parse_json
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from flows.local_server import process_tree

LOCK, STATE = "lock", "up.json"
STOP_S = 35.0  # the supervisor needs less
PREFECT_PORT = 4200
_START_S = 60.0  # for a `dpnet up` that a command needs
_WAIT_S = 240.0  # for another `dpnet up` that starts or stops

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Running:
    """The process and the addresses of a running `dpnet up`."""

    pid: int
    root: str
    api_url: str
    ui_url: str
    mlflow_url: str
    metrics_url: str
    ray_url: str | None
    ray_token: str | None = None  # the file of the token that Ray asks for
    serve_url: str | None = None  # the page that fills photos

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class SupervisorArguments:
    """The arguments of a supervisor. They hold no secrets: every user can read them."""

    root: str
    home: str
    port: int | None
    ray: bool
    pid: int  # of the command
    serve: bool = False


def find_running(root: str) -> Running | None:
    """Return the `dpnet up` that has started for `root`, or None."""
    home = home_of(open_store(root))
    if _is_unlocked(home):
        return None
    try:
        running = Running(**known_fields(Running, parse_json((home / STATE).read_text())))
    except (OSError, ValueError, TypeError):  # it is starting or stopping
        return None
    urls = [running.api_url, running.ui_url, running.mlflow_url, running.metrics_url]
    urls += [running.ray_url or "", running.serve_url or ""]
    paths = [running.root, running.ray_token or ""]
    damaged = not all(isinstance(each, str) for each in [*urls, *paths])
    damaged = damaged or not all(url.isprintable() for url in urls)
    return None if damaged or type(running.pid) is not int else running


def wait_for_running(root: str, longest_s: float | None = None) -> Running | None:
    """Return the `dpnet up` of `root`, and wait for one that is starting; None if there is none.

    Args:
        root: path or URI of the root.
        longest_s: how long to wait, in seconds; None: a minute.

    Raises:
        PipelineError: it has not started by then.
    """
    home, waiting = home_of(open_store(root)), False
    longest_s = _START_S if longest_s is None else longest_s
    deadline = time.monotonic() + longest_s
    while not (found := find_running(root)):
        if _is_unlocked(home):
            return None
        if time.monotonic() >= deadline:
            raise PipelineError(
                f"`dpnet up` of {root} has been starting or stopping for {longest_s:.0f} s: wait"
                " until it prints its addresses or ends, then run the same command again."
            )
        if not waiting:
            waiting = True
            log.info("the `dpnet up` of this root is starting or stopping: waiting for it")
        time.sleep(0.5)
    return found


def home_of(store: Store) -> Path:
    """Return the folder where the `dpnet up` of a root keeps its database, logs and state."""
    if top := local_top(store):
        return top / UP
    return database_cache() / f"{UP}-{hashlib.sha256(store.uri.encode()).hexdigest()[:12]}"


def up(
    store: Store,
    port: int | None,
    ray: bool,
    announce: Callable[[Running], None],
    *,
    serve: bool = False,
) -> Running:
    """Run everything until Ctrl-C, or return the `dpnet up` that already runs.

    Args:
        store: The root.
        port: The port of Prefect's UI, 1 to 65535; None for 4200 or else any free port.
        ray: Start a Ray cluster on this machine.
        announce: Called once everything is ready.
        serve: Start the page that fills photos.

    Raises:
        PipelineError: A process does not start, or keeps dying.
        KeyboardInterrupt: Ctrl-C was pressed. Everything is stopped then.
    """
    root = store.label
    home = home_of(store)
    waiting = False
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        if found := find_running(root):
            _check_same_options(found, port, ray, serve)
            return found
        if _is_unlocked(home):
            arguments = SupervisorArguments(root, str(home), port, ray, os.getpid(), serve)
            _run_supervisor(arguments, announce)
        if not waiting:
            waiting = True
            log.info("another `dpnet up` of this root is starting or stopping: waiting for it")
        time.sleep(0.5)
    raise PipelineError(
        f"`dpnet up` of {root} cannot start: another one has been starting or stopping for"
        f" {_WAIT_S:.0f} s. Stop it, then run this again."
    )


def _check_same_options(found: Running, port: int | None, ray: bool, serve: bool) -> None:
    other = f"`dpnet up` is already running (process {found.pid})"
    remedy = "Stop it and start it again with this option."
    if ray and found.ray_url is None:
        raise PipelineError(f"--ray cannot be used: {other} without Ray. {remedy}")
    if serve and found.serve_url is None:
        raise PipelineError(
            f"--serve cannot be used: {other} without the page that fills photos. {remedy}"
        )
    if port is not None and not found.ui_url.endswith(f":{port}"):
        raise PipelineError(f"--port {port} cannot be used: {other} at {found.ui_url}. {remedy}")


def _run_supervisor(arguments: SupervisorArguments, announce: Callable[[Running], None]) -> None:
    """Run a supervisor until it ends. Return only if another `dpnet up` took the lock first."""
    process_tree.adopt_orphans()  # of a supervisor that is killed
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "flows.local_server.supervisor", json.dumps(asdict(arguments))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    try:
        for line in supervisor.stdout:
            match parse_json(line):
                case {"ready": state}:
                    announce(Running(**state))
                case {"error": sentence}:
                    _stop_supervisor(supervisor)
                    raise PipelineError(sentence)
                case {"busy": True}:
                    supervisor.wait()
                    return
        _raise_supervisor_died(supervisor, arguments.home)
    except KeyboardInterrupt:
        log.info("stopping everything")
        _stop_supervisor(supervisor)
        raise


def _stop_supervisor(supervisor: subprocess.Popen[bytes]) -> None:
    """Let the supervisor stop everything, and wait for that."""
    assert supervisor.stdin is not None
    with suppress(OSError):
        supervisor.stdin.close()
    try:
        supervisor.wait(STOP_S)
    except subprocess.TimeoutExpired:
        supervisor.kill()
    process_tree.kill_descendants()


def _raise_supervisor_died(supervisor: subprocess.Popen[bytes], home: str) -> NoReturn:
    """End the orphans of a supervisor that was killed or stopped by another process."""
    status = supervisor.wait()
    for pid in process_tree.reap(()):
        process_tree.send_signal([pid], signal.SIGTERM)
    time.sleep(2)
    process_tree.kill_descendants()
    raise PipelineError(
        f"the supervisor of `dpnet up` died with status {status}, and everything was stopped."
        f" Run `dpnet up` again. The logs are in {home}."
    )


def _is_unlocked(home: Path) -> bool:
    with suppress(FileNotFoundError), (home / LOCK).open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def listen(port: int | None) -> socket.socket:
    """Return a socket that listens on `port`; for None on port 4200 or else on any free port."""
    try:
        return socket.create_server(("127.0.0.1", PREFECT_PORT if port is None else port))
    except OSError as error:
        if port is None:
            return socket.create_server(("127.0.0.1", 0))
        used = error.errno == errno.EADDRINUSE
        raise PipelineError(
            f"--port {port} cannot be used: {'it is in use' if used else error.strerror}. Choose"
            " another --port, or leave the option out to use any free port."
        ) from error


def free_port(preferred: int = 0) -> int:
    """Return `preferred` if no process listens on that port, else any free port."""
    with free_listener(preferred) as probe:
        return int(probe.getsockname()[1])


def free_listener(preferred: int = 0) -> socket.socket:
    """Return a socket that listens on `preferred` if that port is free, else on any free port."""
    for port in (preferred, 0):
        with suppress(OSError):
            return socket.create_server(("127.0.0.1", port))
    raise PipelineError("no port can be opened: this machine has no free port. End some programs.")
