"""The process behind `dpnet up`: starts everything, starts again what dies, stops everything.

It is apart from the command, in a session of its own, for two reasons: a terminal's Ctrl-C must not
reach the worker and the server at once, and a `kill -9` of the command must leave nothing behind.
It works until its standard input ends, which a killed command's does too. All that descends from it
stays its own (Linux gives it the orphans), so it ends also the flow run of a worker that died.

It answers on standard output with one JSON object a line: {"ready": {...}}, {"error": "..."} or
{"busy": true} where another holds the home.
"""

from __future__ import annotations

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from data_prep.core.errors import PipelineError, storage_error
from data_prep.core.paths import MLFLOW_ARTIFACTS, MLFLOW_DATABASE
from data_prep.core.progress import say
from data_prep.core.storage.open import open_store
from dpnet.training.ray.start import prepare_start
from flows.local_server import children
from flows.local_server import process_tree as processes
from flows.local_server.children import Child, Place
from flows.local_server.server import keep_database, not_started, remove_half_made
from flows.local_server.up import LOCK, STATE, Plan, Running, bind, free_port

START_TIMEOUT_S = 180.0  # a busy machine is slow
POLL_S = 0.3
STEADY_S = 60.0  # who has lived that long has started well
DEATHS = 5  # without that, after which it is given up


class Stopped(Exception):
    """Standard input has ended: the command wants the end, or is gone."""


@dataclass
class Kept:
    """A child, the process that it is now, and how often it has died of late."""

    child: Child
    process: subprocess.Popen[bytes]
    born: float
    deaths: int = 0
    again_at: float | None = None  # when it is started again


class Supervisor:
    def __init__(self, place: Place) -> None:
        self.place = place
        self.kept: list[Kept] = []

    def start(self, child: Child) -> None:
        _tell(f"starting {child.name}")
        self.kept.append(Kept(child, _spawn(child, "wb"), time.monotonic()))

    def wait_until_ready(self) -> None:
        """Until all do their work. Raises PipelineError where one does not start."""
        deadline = time.monotonic() + START_TIMEOUT_S
        waiting = list(self.kept)
        while waiting:
            self.wait()
            for kept in waiting:
                if kept.process.poll() is not None or time.monotonic() > deadline:
                    raise self._failed(kept.child)
            waiting = [kept for kept in waiting if not kept.child.ready()]

    def watch(self) -> NoReturn:
        """Start again what dies, for ever. Raises Stopped, or PipelineError where it is no use."""
        while True:
            self.wait()
            for kept in self.kept:
                self.look_after(kept, time.monotonic())
            processes.reap(each.process.pid for each in self.kept)

    def wait(self) -> None:
        if select.select([sys.stdin], [], [], POLL_S)[0] and not os.read(0, 1024):
            raise Stopped

    def look_after(self, kept: Kept, now: float) -> None:
        """Start it again at its time if it is dead. Raises PipelineError where it is no use."""
        if kept.again_at is not None:
            if now >= kept.again_at:
                kept.process, kept.born, kept.again_at = _spawn(kept.child, "ab"), now, None
            return
        if kept.process.poll() is None:
            return
        kept.deaths = 1 if now - kept.born > STEADY_S else kept.deaths + 1
        child = kept.child
        if kept.deaths >= DEATHS:
            raise PipelineError(
                f"{child.name} died {kept.deaths} times in a row: {child.log} tells why; mend that"
                " and run `dpnet up` again."
            )
        kept.again_at = now + kept.deaths - 1
        _tell(f"warning: {child.name} has died ({child.log} may tell why): it is started again")

    def _failed(self, child: Child) -> PipelineError:
        if child.log.name == "server.log":
            return not_started(child.log, self.place.database)
        return PipelineError(f"{child.name} did not start: see {child.log} for the reason.")

    def stop(self) -> None:
        """End all children, the last started first, and then what they have left."""
        own = [each.process.pid for each in self.kept]
        # Flow runs of a worker that died have no other who would stop them.
        processes.send(processes.reap(own), signal.SIGTERM)
        for kept in reversed(self.kept):
            processes.stop(kept.process, kept.child.stop_s, with_children=kept.child.ends_children)
        processes.kill_descendants()


def _spawn(child: Child, mode: str) -> subprocess.Popen[bytes]:
    with child.log.open(mode) as log:
        return subprocess.Popen(
            child.command,
            env=child.env,
            cwd=child.log.parent,  # no .env or prefect.toml of the user's folder
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            pass_fds=child.inherits,
            preexec_fn=processes.end_with_parent,
        )


def supervise(plan: Plan) -> None:
    """Do all of it. Raises PipelineError, or Stopped at the end."""
    store = open_store(plan.root)
    home = Path(plan.home)
    place = Place(plan.root, home, os.environ)
    supervisor = Supervisor(place)
    with ExitStack() as stack:
        listener = stack.enter_context(bind(plan.port))
        ray = stack.enter_context(prepare_start("up-")) if plan.ray else None
        stack.callback(supervisor.stop)
        stack.callback((home / STATE).unlink, missing_ok=True)
        api_url = f"{children.address(listener.getsockname()[1])}/api"
        if not os.environ.get(children.DATABASE):
            remove_half_made(home)
        supervisor.start(children.server(place, listener))
        mlflow_port = free_port(5000)
        mlflow_url = children.address(mlflow_port)
        database = (store.local_folder or home) / MLFLOW_DATABASE
        artifacts = f"{(store.local_folder or home).as_uri()}/{MLFLOW_ARTIFACTS}"
        _create_mlflow_database(database)
        supervisor.start(children.mlflow(place, database, artifacts, mlflow_port))
        ray_url = None
        if ray is not None:
            ray_port = free_port(8265)
            ray_url = children.address(ray_port)
            supervisor.start(children.ray_head(place, ray_port, free_port(), ray))
        exporter_port = free_port(9808)
        reports_url = children.address(exporter_port)
        supervisor.start(children.exporter(place, exporter_port))
        supervisor.wait_until_ready()
        keep_database(home)
        supervisor.start(children.worker(place, api_url, mlflow_url, reports_url, ray_url))
        supervisor.wait_until_ready()
        ui_url = api_url.removesuffix("/api")
        metrics_url = f"{reports_url}/metrics"
        running = Running(plan.pid, plan.root, api_url, ui_url, mlflow_url, metrics_url, ray_url)
        _write(home / STATE, running.to_json())
        _answer({"ready": running.to_json()})
        supervisor.watch()


def _create_mlflow_database(path: Path) -> None:
    """In a process of its own, as it imports MLflow, which takes much memory."""
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
        preexec_fn=processes.end_with_parent,
    )
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        why = lines[-1][:300] if lines else f"exit status {done.returncode}"
        raise PipelineError(f"MLflow's database {path} cannot be made ({why}).")


def _write(path: Path, value: Any) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value, indent=1) + "\n")
    new.replace(path)


def _answer(message: dict[str, Any]) -> None:
    with suppress(OSError):  # the command is gone
        print(json.dumps(message), flush=True)


def _tell(line: str) -> None:
    with suppress(OSError):
        say(line)


def _lock(lock: BinaryIO) -> bool:
    """Hold the home alone; False where another does. Who only looks holds it for a moment."""
    for _ in range(20):
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.05)
    return False


def main() -> None:
    # The command alone decides about the end; a second signal to the group changes nothing.
    for each in (signal.SIGINT, signal.SIGHUP):
        signal.signal(each, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop_at_once)
    processes.adopt_orphans()
    plan = Plan(**json.loads(sys.argv[1]))
    home = Path(plan.home)
    try:
        home.mkdir(parents=True, exist_ok=True)
        with (home / LOCK).open("ab") as lock:
            if not _lock(lock):
                _answer({"busy": True})
                return
            (home / STATE).unlink(missing_ok=True)
            supervise(plan)
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
