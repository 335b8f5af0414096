"""A real `dpnet up` for tests, and its Prefect API, used like the UI uses it."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from clusters import alive, command_of, end_with_parent, family, send, wait_until

from flows.local_server.up import Running

ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
RETRY = {"type": "SCHEDULED", "name": "AwaitingRetry"}
HIDDEN = ("PREFECT_", "RAY_", "DPNET_", "AWS_", "MLFLOW_")
WAIT_S = 240.0


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the user's environment without settings of ours, and with `more`."""
    return {k: v for k, v in os.environ.items() if not k.startswith(HIDDEN)} | dict(more or {})


@dataclass
class Platform:
    """A running `dpnet up`: its process and its addresses."""

    process: subprocess.Popen[bytes]
    running: Running
    out: Path  # the file with its output
    root: Path
    password: str  # user:password of all its servers
    login_url: str  # the address that logs a browser in
    serve_login_url: str | None = None  # the same for the page that fills photos

    @property
    def home(self) -> Path:
        return self.root / "up"

    def dpnet(self, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a `dpnet` command that uses the addresses of this platform."""
        user, _, password = self.password.partition(":")
        settings = {
            "PREFECT_API_URL": self.running.api_url,
            "PREFECT_HOME": str(self.root / "user"),
            "PREFECT_API_AUTH_STRING": self.password,
            "MLFLOW_TRACKING_USERNAME": user,
            "MLFLOW_TRACKING_PASSWORD": password,
        }
        return subprocess.run(
            [sys.executable, "-m", "dpnet", *words],
            env=environment(settings | more),
            capture_output=True,
            text=True,
            timeout=WAIT_S,
        )

    def deploy(self, *sets: str, **more: str) -> None:
        words = [word for each in sets for word in ("--set", each)]
        done = self.dpnet("deploy", *words, **more)
        assert done.returncode == 0, done.stderr

    def ask(self, path: str, body: Any = None, method: str | None = None) -> Any:
        """Send a request to the Prefect API, and return the answer."""
        encoded = base64.b64encode(self.password.encode()).decode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {encoded}"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self.running.api_url}{path}", data, headers, method=method
        )
        deadline = time.monotonic() + WAIT_S
        while True:
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    text = answer.read()
                return json.loads(text) if text else None
            except urllib.error.HTTPError as error:
                if error.code != 503 or time.monotonic() > deadline:  # a busy database
                    raise
            time.sleep(0.5)

    def run(self, flow: str, parameters: Mapping[str, Any]) -> str:
        """Start a run of a deployment, and return its id."""
        deployment = self.ask(f"/deployments/name/{flow}/{flow}")["id"]
        body = {"parameters": dict(parameters), "state": {"type": "SCHEDULED"}}
        run = self.ask(f"/deployments/{deployment}/create_flow_run", body)
        return str(run["id"])

    def set_state(self, run: str, **state: str) -> None:
        done = self.ask(f"/flow_runs/{run}/set_state", {"state": state})
        assert done["status"] == "ACCEPT", done

    def retry(self, run: str) -> None:
        """Retry a run, like the button of the UI."""
        self.set_state(run, **RETRY)

    def end(self, run: str, number: int) -> None:
        """Send the run's process a signal that ends it, and wait until the server knows of that.

        After a SIGTERM the process reports its end itself. After a SIGKILL two parts of Prefect's
        worker report it, some seconds apart. The second report would end a run that was retried
        before it.
        """
        log, report = self.home / "worker.log", "prefect.flow_runs.worker - Check whether"
        before = log.read_text().count(report)
        process = self.flow_process(run)
        send(process, number)
        self.wait_for(run, "CRASHED")
        if number != signal.SIGKILL:
            wait_until(lambda: not alive(process), "the process does not end")
            return
        wait_until(lambda: log.read_text().count(report) > before, "the worker does not report it")

    def state(self, run: str) -> dict[str, Any]:
        return dict(self.ask(f"/flow_runs/{run}")["state"])

    def states(self, run: str) -> list[str]:
        """Return all states that the run was in."""
        return [each["type"] for each in self.ask(f"/flow_run_states/?flow_run_id={run}")]

    def wait_for(self, run: str, *kinds: str, seconds: float = WAIT_S) -> dict[str, Any]:
        """Wait until the run's state is one of `kinds`; fail if it ends in another state."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                state = self.state(run)
            except (OSError, ValueError):  # the server does not answer
                state = {"type": "UNKNOWN", "name": "", "message": ""}
            if state["type"] in kinds:
                return state
            failure = f"{state['type']}: {state['message']}"
            assert state["type"] not in ENDED, f"{failure}\n{self.log_of(run)}"
            assert time.monotonic() < deadline, f"{failure}\n{self.log_of(run)}"
            time.sleep(0.2)

    def tasks(self, run: str) -> dict[str, str]:
        """Return the name of the state of each task's newest run."""
        body = {"flow_runs": {"id": {"any_": [run]}}, "sort": "EXPECTED_START_TIME_ASC"}
        found = self.ask("/task_runs/filter", body)
        return {each["name"].rpartition("-")[0]: each["state"]["name"] for each in found}

    def log_of(self, run: str) -> str:
        """Return the messages of the run's log."""
        body = {"logs": {"flow_run_id": {"any_": [run]}}, "sort": "TIMESTAMP_ASC", "limit": 200}
        return "\n".join(each["message"] for each in self.ask("/logs/filter", body))

    def child(self, text: str) -> int:
        """Wait for one process with `text` in its command line, and return its pid."""
        found: list[int] = []

        def one() -> bool:
            found[:] = [pid for pid in family(self.process.pid) if text in command_of(pid)]
            return len(found) == 1

        wait_until(one, f"no {text}")
        return found[0]

    def processes_of(self, run: str) -> list[int]:
        """Return the processes of a flow run. The first is the flow's own process."""
        mark = f"PREFECT__FLOW_RUN_ID={run}".encode()
        return [pid for pid in family(self.process.pid) if mark in _environment_of(pid)]

    def flow_process(self, run: str) -> int:
        wait_until(lambda: self.processes_of(run), "the run has no process")
        return self.processes_of(run)[0]


def _environment_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:  # the process has ended
        return b""


def up_command(root: Path, *options: str) -> list[str]:
    """Return the command line of `dpnet up`."""
    return [sys.executable, "-m", "dpnet", "up", "--root", str(root), *options]


@contextmanager
def platform(root: Path, *options: str, **more: str) -> Iterator[Platform]:
    """Run `dpnet up` of a root, with `more` in its environment, until the block ends."""
    out = root.with_suffix(".out")
    with out.open("wb") as log:
        process = subprocess.Popen(
            up_command(root, "--json", *options),
            env=environment(more),
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )

    def ready() -> bool:
        assert process.poll() is None, out.read_text()
        return '"ok": true' in out.read_text()

    try:
        wait_until(ready, f"`dpnet up` does not start: {out}", 300)
        answer = json.loads(out.read_text().strip().splitlines()[-1])
        assert (answer.pop("ok"), answer.pop("attached")) == (True, False)
        login, serve_login = answer.pop("login_url"), answer.pop("serve_login_url")
        running = Running(**answer)
        kept = unquote(login.removeprefix(f"{running.ui_url}/login#"))
        password = more.get("PREFECT_API_AUTH_STRING") or kept
        yield Platform(process, running, out, root, password, login, serve_login)
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(60)
