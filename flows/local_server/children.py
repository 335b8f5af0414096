"""What `dpnet up` starts: the command, the environment and the sign of life of each process.

Every environment begins with the user's own without any Prefect setting, so no profile and no
`PREFECT_…` variable of theirs reaches what runs here. Each process gets the secrets that it needs
and no other: the server the database's URL, the worker (and so the flow runs) the password.
"""

from __future__ import annotations

import base64
import json
import re
import socket
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from data_prep.core.errors import ConfigError
from dpnet.training.ray.start import RayStart
from flows.local_server.server import SETTINGS, server_command

POOL = "dpnet"
DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
PASSWORD, SERVER_PASSWORD = "PREFECT_API_AUTH_STRING", "PREFECT_SERVER_API_AUTH_STRING"
HEARTBEAT_S = 30  # of flow runs, the shortest that Prefect allows
_ANSWER_S = 2.0
_DATABASES = ("postgresql+asyncpg://", "sqlite+aiosqlite:///")
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open  # all is on this machine


@dataclass(frozen=True)
class Child:
    """A process: `ready` is asked whether it does its work by now; it is given `stop_s` to end."""

    name: str
    log: Path
    command: list[str]
    env: dict[str, str]
    ready: Callable[[], bool]
    stop_s: float
    inherits: tuple[int, ...] = ()
    ends_children: bool = False  # of itself it would wait for them


@dataclass(frozen=True)
class Place:
    """Where one `dpnet up` keeps its things, and the user's environment with its secrets."""

    root: str  # as DPNET_ROOT is given to flow runs
    home: Path
    environ: Mapping[str, str]

    @property
    def password(self) -> str:
        """`user:password` of the Prefect API, empty if it has none."""
        return self.environ.get(PASSWORD) or self.environ.get(SERVER_PASSWORD, "")

    @property
    def database(self) -> str:
        """Prefect's database: its file, or its URL with all that is secret in it."""
        return self.environ.get(DATABASE) or str(self.home / "prefect.db")

    def base(self, *without: str) -> dict[str, str]:
        """The user's environment less Prefect's settings and what begins with `without`."""
        env = {k: v for k, v in self.environ.items() if not k.startswith(("PREFECT_", *without))}
        local = ",".join(filter(None, [env.get("NO_PROXY", env.get("no_proxy")), "127.0.0.1"]))
        return {**env, "NO_PROXY": local, "no_proxy": local, "PYTHONUNBUFFERED": "1"}


def check_secrets(place: Place) -> None:
    """Raise ConfigError where the database's URL or the password cannot be one."""
    url = place.environ.get(DATABASE, "")
    if url and not url.startswith(_DATABASES):
        scheme = url.partition("://")[0] if "://" in url else "no scheme"
        raise ConfigError(
            f"the database's URL begins with {scheme[:30]}: write"
            " --database postgresql+asyncpg://USER:PASSWORD@HOST:5432/NAME."
        )
    if place.password and not re.fullmatch(r"[^:\s]+:\S+", place.password):
        raise ConfigError(f"{PASSWORD} is no user:password: set it as user:password, or unset it.")


def server(place: Place, listener: socket.socket) -> Child:
    """Prefect's server with its UI and all services."""
    at = address(listener.getsockname()[1])
    env = {
        **place.base(),
        **SETTINGS,
        "PREFECT_HOME": str(place.home),
        # Else the UI would look for the API at port 4200, whatever the server's is.
        "PREFECT_SERVER_UI_API_URL": f"{at}/api",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(place.home / "ui"),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # In memory, a restart would end every run of a deployment with a concurrency limit.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
            "prefect.server.concurrency.lease_storage.filesystem"
        ),
    }
    if place.environ.get(DATABASE):
        env[DATABASE] = place.environ[DATABASE]
        # What is noted here of one database would be believed of the next of that name.
        env["PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION"] = "false"
    if place.password:
        env[SERVER_PASSWORD] = place.password
    return Child(
        "Prefect's server",
        place.home / "server.log",
        server_command(listener),
        env,
        lambda: answers(f"{at}/api/health"),
        5.0,
        (listener.fileno(),),
    )


def mlflow(place: Place, database: Path, artifacts: str, port: int) -> Child:
    """MLflow's server, which has the UI, over a SQLite file."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{database}", "--workers", "1"]
    command += ["--artifacts-destination", artifacts]
    env = {
        # Not the address of another MLflow; only where S3 is.
        **{k: v for k, v in place.environ.items() if k.startswith("MLFLOW_S3_")},
        **place.base("MLFLOW_"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # nothing here gives it any
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
    }
    return Child(
        "MLflow",
        place.home / "mlflow.log",
        command,
        env,
        lambda: answers(f"{address(port)}/health"),
        3.0,
    )


def ray_head(place: Place, port: int, agent_port: int, start: RayStart) -> Child:
    """A Ray cluster of this machine, whose dashboard takes jobs."""
    env = {
        "RAY_AUTH_MODE": "disabled",
        **start.environment,
        **place.base("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"),
    }
    return Child(
        "Ray",
        place.home / "ray.log",
        start.head_command(port, agent_port),
        _own_python_first(env),
        lambda: answers(f"{address(port)}/api/jobs/"),
        5.0,
    )


def exporter(place: Place, port: int) -> Child:
    """Metrics and reports of the root."""
    command = [sys.executable, "-m", "dpnet.exporter", place.root, "--port", str(port)]
    return Child(
        "the exporter",
        place.home / "exporter.log",
        command,
        place.base("MLFLOW_"),
        lambda: answers(f"{address(port)}/metrics"),
        4.0,
    )


def worker(
    place: Place, api_url: str, mlflow_url: str, reports_url: str, ray_url: str | None
) -> Child:
    """A process worker on the pool `dpnet`, which it makes if there is none."""
    env = place.base("MLFLOW_TRACKING_URI", *(["RAY_ADDRESS"] if ray_url else [])) | {
        "PREFECT_HOME": str(place.home),
        "PREFECT_API_URL": api_url,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "DPNET_ROOT": place.root,
        "MLFLOW_TRACKING_URI": mlflow_url,
        "DPNET_REPORTS_URL": reports_url,
        **({PASSWORD: place.password} if place.password else {}),
        **({"RAY_API_SERVER_ADDRESS": ray_url} if ray_url else {}),
    }
    if ray_url:
        env.setdefault("RAY_AUTH_MODE", "disabled")  # as its head
    name = f"up-{socket.gethostname()}"
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL]
    command += ["--type", "process", "--name", name, "--install-policy", "never"]
    born = datetime.now().astimezone()
    return Child(
        "the worker",
        place.home / "worker.log",
        command,
        _own_python_first(env),
        lambda: _is_online(api_url, name, born, place.password),
        15.0,
        ends_children=True,
    )


def address(port: int) -> str:
    return f"http://127.0.0.1:{port}"


def answers(url: str) -> bool:
    """Whether a server answers there, and well."""
    with suppress(urllib.error.URLError, OSError, ValueError), _open(url, timeout=_ANSWER_S):
        return True
    return False


def _is_online(api_url: str, name: str, since: datetime, password: str) -> bool:
    """Whether the worker `name` has told the server, after `since`, that it is there."""
    headers = {"Content-Type": "application/json"}
    if password:
        headers["Authorization"] = "Basic " + base64.b64encode(password.encode()).decode()
    url = f"{api_url}/work_pools/{POOL}/workers/filter"
    request = urllib.request.Request(url, b"{}", headers)
    with suppress(urllib.error.URLError, OSError, ValueError):
        with _open(request, timeout=_ANSWER_S) as answer:
            workers = json.load(answer)
        beats = [w["last_heartbeat_time"] for w in workers if w["name"] == name]
        return any(datetime.fromisoformat(beat) >= since for beat in beats if beat)
    return False


def _own_python_first(env: dict[str, str]) -> dict[str, str]:
    """`python`, as flow runs and jobs are started, is the one that has this package."""
    own = str(Path(sys.executable).parent)
    return {**env, "PATH": f"{own}:{env.get('PATH', '/usr/bin:/bin')}"}
