"""The process behind `dpnet up`: it starts everything, restarts dead children, stops everything.

It is a separate process in a session of its own, for two reasons. A terminal's Ctrl-C must not
reach the worker and the server at the same time. A `kill -9` of the command must leave no process
behind. The supervisor runs until its standard input ends, which also happens when the command is
killed. Linux makes it the parent of its orphaned descendants, so it can also end the flow runs of a
worker that died.

It answers the command on standard output, with one JSON object a line: {"ready": {...}},
{"error": "..."}, or {"busy": true} if another supervisor holds the lock. It logs to standard error.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from data_prep.core.errors import PipelineError, storage_error
from data_prep.core.logs import start_logging
from data_prep.core.paths import MLFLOW_ARTIFACTS, MLFLOW_DATABASE
from data_prep.core.private_files import UMASK, make_private, private_folder, private_opener
from data_prep.core.standard_streams import prepare_streams
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from dpnet.tracking.mlflow_database import mlflow_database
from dpnet.training.ray.start import prepare_start
from flows.local_server import children, process_tree
from flows.local_server.children import Child, LocalSetup
from flows.local_server.server import (
    STORAGE,
    mark_database_created,
    remove_unfinished_database,
    start_error,
)
from flows.local_server.up import (
    LOCK,
    STATE,
    Running,
    SupervisorArguments,
    free_listener,
    free_port,
    listen,
)

START_TIMEOUT_S = 180.0  # a busy machine is slow
POLL_S = 0.3
STABLE_S = 60.0  # a child that has run for so long has started well
SERVE_PORT = 8400  # tried first, as `dpnet serve` does
MAX_DEATHS = 5  # in a row, each before STABLE_S

log = logging.getLogger("flows.local_server.supervisor")  # __name__ is "__main__" here


class Stopped(Exception):
    """Standard input has ended: the command stops everything, or was killed."""


@dataclass
class Supervised:
    """A child, its current process, and its recent deaths."""

    child: Child
    process: subprocess.Popen[bytes]
    started: float
    deaths: int = 0
    restart_at: float | None = None  # only while it is dead


class Supervisor:
    """The children of one `dpnet up`, in the order of their start."""

    def __init__(self, setup: LocalSetup) -> None:
        self.setup = setup
        self.supervised: list[Supervised] = []

    def start(self, child: Child) -> None:
        """Start a child, with a new log."""
        log.info("starting %s", child.name)
        self.supervised.append(Supervised(child, _spawn(child, "wb"), time.monotonic()))

    def wait_until_ready(self) -> None:
        """Wait until all children serve requests. Raises PipelineError if one does not start."""
        deadline = time.monotonic() + START_TIMEOUT_S
        waiting = list(self.supervised)
        while waiting:
            self.wait()
            for each in waiting:
                if each.process.poll() is not None or time.monotonic() > deadline:
                    raise self._start_error(each.child)
            waiting = [each for each in waiting if not each.child.is_ready()]

    def watch(self) -> NoReturn:
        """Restart dead children until stopped. Raises PipelineError if one keeps dying."""
        while True:
            self.wait()
            for each in self.supervised:
                self.restart_if_dead(each, time.monotonic())
            process_tree.reap(each.process.pid for each in self.supervised)

    def wait(self) -> None:
        """Wait for a moment. Raises Stopped if standard input ends."""
        if select.select([sys.stdin], [], [], POLL_S)[0] and not os.read(0, 1024):
            raise Stopped

    def restart_if_dead(self, each: Supervised, now: float) -> None:
        """Restart a dead child when its time comes. Raises PipelineError if it keeps dying."""
        if each.restart_at is not None:
            if now >= each.restart_at:
                each.process, each.started, each.restart_at = _spawn(each.child, "ab"), now, None
            return
        if each.process.poll() is None:
            return
        each.deaths = 1 if now - each.started > STABLE_S else each.deaths + 1
        child = each.child
        if each.deaths >= MAX_DEATHS:
            raise PipelineError(
                f"{child.name} died {each.deaths} times in a row. See {child.log} for the reason,"
                " correct it, and run `dpnet up` again."
            )
        each.restart_at = now + each.deaths - 1
        log.warning("%s died and is restarted: see %s for the reason", child.name, child.log)

    def _start_error(self, child: Child) -> PipelineError:
        if child.log.name == "server.log":
            return start_error(child.log, self.setup.database)
        return PipelineError(f"{child.name} did not start. See {child.log} for the reason.")

    def stop(self) -> None:
        """End all children, the last one first, and then all their descendants."""
        own = [each.process.pid for each in self.supervised]
        # No other process would stop the flow runs of a worker that died.
        process_tree.send_signal(process_tree.reap(own), signal.SIGTERM)
        for each in reversed(self.supervised):
            child = each.child
            process_tree.stop(each.process, child.stop_s, with_children=child.signal_children)
        process_tree.kill_descendants()


def _spawn(child: Child, mode: str) -> subprocess.Popen[bytes]:
    with open(child.log, mode, opener=private_opener) as output:
        return subprocess.Popen(
            child.command,
            env=child.env,
            cwd=child.log.parent,  # so that no .env or prefect.toml of the user is read
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=child.inherited_fds,
            preexec_fn=process_tree.end_with_parent,
            umask=UMASK if child.private else -1,
        )


def supervise(arguments: SupervisorArguments) -> None:
    """Start and watch everything. Raises PipelineError, or Stopped at the end."""
    store = open_store(arguments.root)
    home = Path(arguments.home)
    setup = LocalSetup(arguments.root, home, children.with_password(os.environ, home))
    children.check_secrets(setup)
    supervisor = Supervisor(setup)
    with ExitStack() as stack:
        listener = stack.enter_context(listen(arguments.port))
        ray = stack.enter_context(prepare_start("up-")) if arguments.ray else None
        stack.callback(supervisor.stop)
        stack.callback((home / STATE).unlink, missing_ok=True)
        ui_url = children.address(listener.getsockname()[1])
        api_url = f"{ui_url}/api"
        if not os.environ.get(children.DATABASE):
            remove_unfinished_database(home)
        supervisor.start(children.server(setup, listener))
        mlflow_listener = stack.enter_context(free_listener(5000))
        mlflow_url = _start_mlflow(supervisor, store, mlflow_listener)
        ray_url = None
        if ray is not None:
            ray_port = free_port(8265)
            ray_url = children.address(ray_port)
            supervisor.start(children.ray_head(setup, ray_port, free_port(), ray))
        exporter_listener = stack.enter_context(free_listener(9808))
        reports_url = children.address(exporter_listener.getsockname()[1])
        supervisor.start(children.exporter(setup, exporter_listener))
        serve_url = None
        if arguments.serve:
            serve_listener = stack.enter_context(free_listener(SERVE_PORT))
            serve_url = children.address(serve_listener.getsockname()[1])
            supervisor.start(children.serve(setup, serve_listener))
        supervisor.wait_until_ready()
        mark_database_created(home)
        supervisor.start(
            children.worker(setup, api_url, mlflow_url, reports_url, ray_url, ray, serve_url)
        )
        supervisor.wait_until_ready()
        metrics_url = f"{reports_url}/metrics"
        running = Running(
            arguments.pid,
            arguments.root,
            api_url,
            ui_url,
            mlflow_url,
            metrics_url,
            ray_url,
            str(ray.token_file) if ray is not None else None,
            serve_url,
        )
        _write_json(home / STATE, running.to_json())
        _answer({"ready": running.to_json()})
        supervisor.watch()


def _start_mlflow(supervisor: Supervisor, store: Store, listener: socket.socket) -> str:
    """Start MLflow and return its address. Its files are in the root, or in the home for S3."""
    setup = supervisor.setup
    database = mlflow_database(store) or setup.home / MLFLOW_DATABASE
    artifacts = store.uri if store.local_folder is not None else setup.home.as_uri()
    _create_mlflow_database(database)
    make_private(database)
    artifacts = f"{artifacts}/{MLFLOW_ARTIFACTS}"
    supervisor.start(children.mlflow(setup, database, artifacts, listener))
    return children.address(listener.getsockname()[1])


def _create_mlflow_database(path: Path) -> None:
    """Create the database in another process, because MLflow uses much memory."""
    code = (
        "import sys; from dpnet.tracking.mlflow_client import new_client; new_client(sys.argv[1])"
    )
    if path.exists():
        return
    done = subprocess.run(
        [sys.executable, "-c", code, f"sqlite:///{path}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=process_tree.end_with_parent,
        umask=UMASK,
    )
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        why = lines[-1][:300] if lines else f"exit status {done.returncode}"
        raise PipelineError(f"MLflow's database {path} cannot be created: {why}.")


def _write_json(path: Path, value: Any) -> None:
    new = path.with_suffix(".new")
    with open(new, "w", opener=private_opener) as file:
        file.write(json.dumps(value, indent=1) + "\n")
    new.replace(path)


def _answer(message: dict[str, Any]) -> None:
    with suppress(OSError):  # the command was killed
        print(json.dumps(message), flush=True)


def _lock(lock: BinaryIO) -> bool:
    """Lock the home, or return False if another process has the lock.

    A command that only looks holds the lock for a moment, so this tries for a second.
    """
    for _ in range(20):
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.05)
    return False


def main() -> None:
    """Run a supervisor with the arguments of the command line."""
    # Only the command decides when to stop. A signal to the process group changes nothing.
    for each in (signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop_at_once)
    prepare_streams()
    start_logging()
    process_tree.adopt_orphans()
    arguments = SupervisorArguments(**json.loads(sys.argv[1]))
    home = Path(arguments.home)
    try:
        private_folder(home)
        private_folder(home / STORAGE)
        with open(home / LOCK, "ab", opener=private_opener) as lock:
            if not _lock(lock):
                _answer({"busy": True})
                return
            (home / STATE).unlink(missing_ok=True)
            supervise(arguments)
    except Stopped:
        pass
    except PipelineError as error:
        _answer({"error": str(error)})
    except OSError as error:
        _answer({"error": str(storage_error(error, str(error.filename or home)))})


def _stop_at_once(number: int, frame: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped


if __name__ == "__main__":
    main()
