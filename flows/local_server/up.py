"""`dpnet up`: what is local of the platform, in the foreground of a terminal, until Ctrl-C.

The command shows what its supervisor (`flows/local_server/supervisor.py`) does and passes the end
on to it. One
is at work for a root at a time, and holds `lock` in the root's `up` folder (for a root on S3: in
`~/.cache/dpnet`) while it is; a second one tells the addresses of the first.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
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
from data_prep.core.paths import cache_folder
from data_prep.core.progress import say
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from dpnet.pipeline.demo import UP_HOME
from flows.local_server import process_tree as processes

HOME, LOCK, STATE = UP_HOME, "lock", "up.json"
STOP_S = 35.0  # the supervisor needs less
PREFECT_PORT = 4200
_WAIT_S = 240.0  # for another that starts or ends now


@dataclass(frozen=True)
class Running:
    """A `dpnet up` at work."""

    pid: int
    root: str
    api_url: str
    ui_url: str
    mlflow_url: str
    metrics_url: str
    ray_url: str | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Plan:
    """What a supervisor is told; nothing secret, as it is an argument of its process."""

    root: str
    home: str
    port: int | None
    ray: bool
    pid: int  # the command's


def running(root: str) -> Running | None:
    """The `dpnet up` that is at work for `root` and has started, if any."""
    home = home_of(open_store(root))
    if _is_free(home):
        return None
    try:
        return Running(**json.loads((home / STATE).read_text()))
    except (OSError, ValueError, TypeError):  # it starts or stops just now
        return None


def home_of(store: Store) -> Path:
    """Where the `dpnet up` of a root keeps its database, logs and state."""
    if store.local_folder is not None:
        return store.local_folder / HOME
    name = f"{HOME}-{hashlib.sha256(store.uri.encode()).hexdigest()[:12]}"
    return cache_folder() / name


def up(store: Store, port: int | None, ray: bool, announce: Callable[[Running], None]) -> Running:
    """Run everything until Ctrl-C, which is raised; or what is found running.

    `announce` is called once all is ready. Raises PipelineError where something does not start, or
    dies again and again.
    """
    root = store.label
    home = home_of(store)
    waiting = False
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        if found := running(root):
            _check_like(found, port, ray)
            return found
        if _is_free(home):
            _run(Plan(root, str(home), port, ray, os.getpid()), announce)
        if not waiting:
            waiting = True
            say("another `dpnet up` of this root starts or stops just now: waiting for it")
        time.sleep(0.5)
    raise PipelineError(
        f"another `dpnet up` of {root} has been starting or stopping for {_WAIT_S:.0f} s: stop it,"
        " then run this again."
    )


def _check_like(found: Running, port: int | None, ray: bool) -> None:
    other = f"`dpnet up` runs already (process {found.pid})"
    again = "stop it and start it again for that."
    if ray and found.ray_url is None:
        raise PipelineError(f"{other}, without Ray: {again}")
    if port is not None and not found.ui_url.endswith(f":{port}"):
        raise PipelineError(f"{other}, at {found.ui_url}: {again}")


def _run(plan: Plan, announce: Callable[[Running], None]) -> None:
    """Run a supervisor to its end. Returns where another was faster."""
    processes.adopt_orphans()  # of a supervisor that is killed
    supervisor = subprocess.Popen(
        [sys.executable, "-m", "flows.local_server.supervisor", json.dumps(asdict(plan))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    try:
        for line in supervisor.stdout:
            match json.loads(line):
                case {"ready": state}:
                    announce(Running(**state))
                case {"error": sentence}:
                    _end(supervisor)
                    raise PipelineError(sentence)
                case {"busy": True}:
                    supervisor.wait()
                    return
        _died(supervisor, plan)
    except KeyboardInterrupt:
        say("stopping everything")
        _end(supervisor)
        raise


def _end(supervisor: subprocess.Popen[bytes]) -> None:
    """Let the supervisor stop all, and wait for that."""
    assert supervisor.stdin is not None
    with suppress(OSError):
        supervisor.stdin.close()
    try:
        supervisor.wait(STOP_S)
    except subprocess.TimeoutExpired:
        supervisor.kill()
    processes.kill_descendants()


def _died(supervisor: subprocess.Popen[bytes], plan: Plan) -> NoReturn:
    """Its end without a word: it was stopped by someone else, or killed."""
    status = supervisor.wait()
    for pid in processes.reap(()):  # what it has left
        processes.send([pid], signal.SIGTERM)
    time.sleep(2)
    processes.kill_descendants()
    raise PipelineError(
        f"the process that watches over everything has ended (status {status}), and all with it:"
        f" run `dpnet up` again; logs are in {plan.home}."
    )


def _is_free(home: Path) -> bool:
    with suppress(FileNotFoundError), (home / LOCK).open("rb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def bind(port: int | None) -> socket.socket:
    """A socket that listens on `port`; without one on Prefect's own, or else on any free one."""
    try:
        return socket.create_server(("127.0.0.1", PREFECT_PORT if port is None else port))
    except OSError as error:
        if port is None:
            return socket.create_server(("127.0.0.1", 0))
        taken = error.errno == errno.EADDRINUSE
        raise PipelineError(
            f"port {port} {'is taken' if taken else f'cannot be used ({error.strerror})'}: choose"
            " another --port, or leave it out for any free one."
        ) from error


def free_port(wanted: int = 0) -> int:
    """`wanted` if nobody listens there, else any free port."""
    for port in (wanted, 0):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)) as probe:
            return int(probe.getsockname()[1])
    raise PipelineError("this machine has no free port left: end some programs.")
