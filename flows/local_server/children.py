"""The processes of `dpnet up`: the command, the environment and the readiness check of each.

Every environment is the user's without Prefect settings, so no profile and no variable `PREFECT_…`
of the user reaches these processes. Each process gets only the secrets that it needs: Prefect's
server gets the database's URL. All servers have the same password, and the worker (with its flow
runs) gets it.
"""

from __future__ import annotations

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
from data_prep.core.network_disk import refuse_network_disk
from data_prep.core.password_file import keep_password
from data_prep.core.web_guard import REPORTS_PASSWORD, basic_auth
from dpnet.serving.login import TOKEN as SERVE_TOKEN
from dpnet.training.ray.start import RayStart
from flows.local_server.mlflow_server import PASSWORD_VARIABLE as MLFLOW_PASSWORD
from flows.local_server.password import PASSWORD, SERVER_PASSWORD, users_own
from flows.local_server.server import SETTINGS, server_command

POOL = "dpnet"
DATABASE = "PREFECT_SERVER_DATABASE_CONNECTION_URL"
HEARTBEAT_S = 30  # between heartbeats of a flow run; the shortest interval that Prefect allows
_TIMEOUT_S = 2.0
_DATABASES = ("postgresql+asyncpg://", "sqlite+aiosqlite:///")
# Every server here runs on this machine, so no proxy is used.
_open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open


@dataclass(frozen=True)
class Child:
    """A process to start.

    Attributes:
        name: Its name in messages.
        log: The file that gets its output.
        command: The words of its command line.
        env: Its whole environment.
        is_ready: Returns whether it serves requests.
        stop_s: How many seconds it has to end after a SIGTERM.
        inherited_fds: File descriptors that it inherits.
        signal_children: Send the SIGTERM to its children too, because it waits for them.
        private: Only this user may read the files that it creates, whatever the umask is.
    """

    name: str
    log: Path
    command: list[str]
    env: dict[str, str]
    is_ready: Callable[[], bool]
    stop_s: float
    inherited_fds: tuple[int, ...] = ()
    signal_children: bool = False
    private: bool = False


@dataclass(frozen=True)
class LocalSetup:
    """The root and the home of one `dpnet up`, and the user's environment with its secrets."""

    root: str  # DPNET_ROOT of the flow runs
    home: Path
    environ: Mapping[str, str]

    @property
    def password(self) -> str:
        """Return `user:password` of the Prefect API, or an empty string if it has none."""
        return users_own(self.environ)

    @property
    def database(self) -> str:
        """Return Prefect's database: its file, or its URL with its secrets."""
        return self.environ.get(DATABASE) or str(self.home / "prefect.db")

    def clean_environ(self, *without: str) -> dict[str, str]:
        """Return the user's environment without Prefect's settings and the prefixes `without`."""
        env = {k: v for k, v in self.environ.items() if not k.startswith(("PREFECT_", *without))}
        local = ",".join(filter(None, [env.get("NO_PROXY", env.get("no_proxy")), "127.0.0.1"]))
        return {**env, "NO_PROXY": local, "no_proxy": local, "PYTHONUNBUFFERED": "1"}


def with_password(environ: Mapping[str, str], home: Path) -> Mapping[str, str]:
    """Return the environment with the password that is kept in `home`, or with the user's own."""
    return environ if users_own(environ) else {**environ, PASSWORD: keep_password(home)}


def check_secrets(setup: LocalSetup) -> None:
    """Raise ConfigError if the database's URL or the password has a wrong form."""
    url = setup.environ.get(DATABASE, "")
    if url and not url.startswith(_DATABASES):
        scheme = url.partition("://")[0] if "://" in url else "no scheme"
        raise ConfigError(
            f"--database cannot be used: its URL begins with {scheme[:30]}. Write"
            " --database postgresql+asyncpg://USER:PASSWORD@HOST:5432/NAME."
        )
    advice = "Give --database a PostgreSQL URL or a file on a disk of this machine"
    if url:
        refuse_network_disk(url, "Prefect's database", advice)
    else:
        refuse_network_disk(setup.home, "the folder of Prefect's database")
    if setup.password and not re.fullmatch(r"[^:\s]+:\S+", setup.password):
        raise ConfigError(f"{PASSWORD} is not user:password. Set it as user:password, or unset it.")


def server(setup: LocalSetup, listener: socket.socket) -> Child:
    """Return Prefect's server with its UI and all services."""
    url = address(listener.getsockname()[1])
    env = {
        **setup.clean_environ(),
        **SETTINGS,
        "PREFECT_HOME": str(setup.home),
        # By default the UI looks for the API at port 4200.
        "PREFECT_SERVER_UI_API_URL": f"{url}/api",
        "PREFECT_SERVER_UI_STATIC_DIRECTORY": str(setup.home / "ui"),
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # With leases in memory, a restart ends every run of a deployment with a concurrency limit.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": (
            "prefect.server.concurrency.lease_storage.filesystem"
        ),
    }
    if setup.environ.get(DATABASE):
        env[DATABASE] = setup.environ[DATABASE]
        # The memo in `home` does not know which database it describes.
        env["PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION"] = "false"
    if setup.password:
        env[SERVER_PASSWORD] = setup.password
    return Child(
        "Prefect's server",
        setup.home / "server.log",
        server_command(listener),
        env,
        lambda: answers(f"{url}/api/health"),
        5.0,
        (listener.fileno(),),
        private=True,
    )


def mlflow(setup: LocalSetup, database: Path, artifacts: str, listener: socket.socket) -> Child:
    """Return MLflow's server with its UI.

    Args:
        setup: The root, the home and the environment.
        database: The SQLite file of the runs and the registry.
        artifacts: The URI of the folder of the artifacts.
        listener: The socket to listen on.
    """
    command = [sys.executable, "-m", "flows.local_server.mlflow_server"]
    command += [f"sqlite:///{database}", artifacts, str(listener.fileno())]
    url = address(listener.getsockname()[1])
    env = {
        # Keep only the settings of S3 and of webhooks, not the address of another MLflow.
        **{
            k: v
            for k, v in setup.environ.items()
            if k.startswith(("MLFLOW_S3_", "MLFLOW_WEBHOOK_"))
        },
        **setup.clean_environ("MLFLOW_"),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # nothing here submits jobs
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_RESPONSE_CHECKSUM_VALIDATION": "when_required",
        MLFLOW_PASSWORD: setup.password,
    }
    return Child(
        "MLflow",
        setup.home / "mlflow.log",
        command,
        env,
        lambda: answers(f"{url}/health"),
        3.0,
        (listener.fileno(),),
        private=True,
    )


def ray_head(setup: LocalSetup, port: int, agent_port: int, start: RayStart) -> Child:
    """Return a Ray cluster on this machine with a dashboard that accepts jobs.

    Args:
        setup: The root, the home and the environment.
        port: The port of the dashboard.
        agent_port: The port of the dashboard's agent.
        start: The private folder, the token and the environment of Ray.
    """
    return Child(
        "Ray",
        setup.home / "ray.log",
        start.head_command(port, agent_port),
        _own_python_first(start.environ(setup.clean_environ())),
        lambda: _accepts_jobs(address(port), start.token_file),
        5.0,
    )


def _accepts_jobs(url: str, token_file: Path) -> bool:
    """Return whether a Ray cluster accepts jobs at `url` with the token in `token_file`."""
    headers = {"Authorization": f"Bearer {token_file.read_text()}"}
    request = urllib.request.Request(f"{url}/api/jobs/", headers=headers)
    with suppress(urllib.error.URLError, OSError, ValueError), _open(request, timeout=_TIMEOUT_S):
        return True
    return False


def exporter(setup: LocalSetup, listener: socket.socket) -> Child:
    """Return the exporter of the root's metrics and reports, which listens on `listener`."""
    command = [sys.executable, "-m", "dpnet.exporter", setup.root]
    command += ["--listener", str(listener.fileno())]
    port = listener.getsockname()[1]
    return Child(
        "the exporter",
        setup.home / "exporter.log",
        command,
        {**setup.clean_environ("MLFLOW_"), REPORTS_PASSWORD: setup.password},
        lambda: answers(f"{address(port)}/metrics", setup.password),
        4.0,
        (listener.fileno(),),
        private=True,
    )


def serve(setup: LocalSetup, listener: socket.socket) -> Child:
    """Return the page and API that fill photos, which listen on `listener`."""
    command = [sys.executable, "-m", "dpnet", "serve", "--root", setup.root]
    command += ["--listener", str(listener.fileno())]
    url = address(listener.getsockname()[1])
    return Child(
        "the page that fills photos",
        setup.home / "serve.log",
        command,
        {**setup.clean_environ("MLFLOW_"), SERVE_TOKEN: setup.password.partition(":")[2]},
        lambda: answers(f"{url}/livez"),
        6.0,
        (listener.fileno(),),
        private=True,
    )


def worker(
    setup: LocalSetup,
    api_url: str,
    mlflow_url: str,
    reports_url: str,
    ray_url: str | None = None,
    ray: RayStart | None = None,
    serve_url: str | None = None,
) -> Child:
    """Return a process worker on the pool `dpnet`, which it creates if it is missing.

    Args:
        setup: The root, the home and the environment.
        api_url: The address of the Prefect API.
        mlflow_url: The address of MLflow.
        reports_url: The address that serves the reports.
        ray_url: The address of this machine's Ray dashboard, or None without Ray.
        ray: The start of that Ray, with its token.
        serve_url: The address of the page that fills photos, or None without it.
    """
    user, _, password = setup.password.partition(":")
    env = setup.clean_environ("MLFLOW_TRACKING_", *(["RAY_ADDRESS"] if ray_url else [])) | {
        "PREFECT_HOME": str(setup.home),
        "PREFECT_API_URL": api_url,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "DPNET_ROOT": setup.root,
        "MLFLOW_TRACKING_URI": mlflow_url,
        "MLFLOW_TRACKING_USERNAME": user,
        "MLFLOW_TRACKING_PASSWORD": password,
        "DPNET_REPORTS_URL": reports_url,
        PASSWORD: setup.password,
        **({"RAY_API_SERVER_ADDRESS": ray_url} if ray_url else {}),
        **({"DPNET_SERVE_URL": serve_url} if serve_url else {}),
    }
    if ray is not None:
        env.pop("RAY_AUTH_TOKEN", None)  # of another cluster
        env |= ray.credentials
    name = f"up-{socket.gethostname()}"
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", POOL]
    command += ["--type", "process", "--name", name, "--install-policy", "never"]
    started = datetime.now().astimezone()
    return Child(
        "the worker",
        setup.home / "worker.log",
        command,
        _own_python_first(env),
        lambda: _is_online(api_url, name, started, setup.password),
        15.0,
        signal_children=True,
    )


def address(port: int) -> str:
    """Return the URL of a port of this machine."""
    return f"http://127.0.0.1:{port}"


def answers(url: str, password: str = "") -> bool:
    """Return whether a server answers at `url` without an error status.

    Args:
        url: The address of a page or an API.
        password: `user:password`; empty for a page that needs none.
    """
    request = urllib.request.Request(url, headers=_authorization(password))
    with suppress(urllib.error.URLError, OSError, ValueError), _open(request, timeout=_TIMEOUT_S):
        return True
    return False


def _authorization(password: str) -> dict[str, str]:
    return {"Authorization": basic_auth(password)} if password else {}


def _is_online(api_url: str, name: str, since: datetime, password: str) -> bool:
    """Return whether the server has a heartbeat of the worker `name` after `since`."""
    headers = {"Content-Type": "application/json", **_authorization(password)}
    url = f"{api_url}/work_pools/{POOL}/workers/filter"
    request = urllib.request.Request(url, b"{}", headers)
    with suppress(urllib.error.URLError, OSError, ValueError):
        with _open(request, timeout=_TIMEOUT_S) as answer:
            workers = json.load(answer)
        beats = [w["last_heartbeat_time"] for w in workers if w["name"] == name]
        return any(datetime.fromisoformat(beat) >= since for beat in beats if beat)
    return False


def _own_python_first(env: dict[str, str]) -> dict[str, str]:
    """Return `env` with this Python first in PATH: flow runs and jobs call `python`."""
    folder = str(Path(sys.executable).parent)
    return {**env, "PATH": f"{folder}:{env.get('PATH', '/usr/bin:/bin')}"}
