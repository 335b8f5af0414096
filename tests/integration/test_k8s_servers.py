"""The servers of infra/k8s run as processes: the commands, the environment and the probes of the
manifests, on a real PostgreSQL.

Only what a cluster gives is replaced: the names of the servers by ports of this machine, the
Secrets by values, /tmp by a folder of the test, and S3 by a folder.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from clusters import end_with_parent, free_port, wait_until
from k8s_manifests import Manifest, named
from postgres_server import postgres

pytestmark = [pytest.mark.integration, pytest.mark.slow]

OVERLAY = "local"
PORTS = {
    "prefect-server": "4200",
    "mlflow": "5000",
    "exporter": "9808",
    "serve": "8400",
}  # in the cluster
PASSWORD = "dpnet:a-long-password"
SERVE = f"{PASSWORD}-or-token"
OWN = re.compile(r"^(PREFECT_|MLFLOW_|DPNET_|AWS_|RAY_)")


@dataclass
class Servers:
    """The processes of the manifests on this machine."""

    top: Path
    database: int
    ports: dict[str, int]
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def secrets(self) -> dict[str, dict[str, str]]:
        """The Secrets that docs/operations.md makes."""
        at = f"dpnet:hunter2@127.0.0.1:{self.database}"
        return {
            "dpnet-prefect": {
                "PREFECT_SERVER_API_AUTH_STRING": PASSWORD,
                "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{at}/prefect",
            },
            "dpnet-mlflow": {
                "DPNET_SERVER_PASSWORD": PASSWORD,
                "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg://{at}/mlflow",
            },
            "dpnet-exporter": {"DPNET_REPORTS_PASSWORD": PASSWORD},
            "dpnet-serve": {"DPNET_SERVE_TOKEN": SERVE.partition(":")[2]},
            "dpnet-storage": {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"},
        }

    def environ(self, container: Mapping[str, Any]) -> dict[str, str]:
        """Return the environment of a container, and nothing of the user's settings."""
        found = {k: v for k, v in os.environ.items() if not OWN.match(k)}
        for each in container.get("envFrom", []):
            if "configMapRef" in each:
                found |= named(OVERLAY, "ConfigMap", each["configMapRef"]["name"])["data"]
            else:
                found |= self.secrets[each["secretRef"]["name"]]
        for each in container.get("env", []):
            if "value" in each:
                found[each["name"]] = each["value"]
            else:
                reference = each["valueFrom"]["secretKeyRef"]
                found[each["name"]] = self.secrets[reference["name"]][reference["key"]]
        found = {name: self._here(value) for name, value in found.items()}
        found["DPNET_ROOT"] = str(self.top / "root")
        found["PATH"] = f"{Path(sys.executable).parent}:/usr/bin:/bin"
        return found

    def _here(self, text: str) -> str:
        for name, port in self.ports.items():
            text = text.replace(f"http://{name}:{PORTS[name]}", f"http://127.0.0.1:{port}")
        return re.sub(r"^/tmp(?=/|$)", str(self.top), text)

    def start(self, container: Mapping[str, Any], name: str = "") -> subprocess.Popen[bytes]:
        """Start a container's command; `name` is the server, if it is one."""
        environ = self.environ(container)
        words = [*container["command"], *container.get("args", [])]
        words = [w.replace("$(DPNET_ROOT)", environ["DPNET_ROOT"]) for w in words]
        if name:
            words = [
                word.replace(PORTS[name], str(self.ports[name])).replace("0.0.0.0", "127.0.0.1")
                for word in words
            ]
        here = Path(sys.executable).parent / words[0]
        program = here if here.exists() else Path("/bin") / words[0]
        log = (self.top / f"{name or 'job'}.log").open("ab")
        process = subprocess.Popen(
            [str(program), *words[1:]],
            env=environ, cwd=self.top, stdout=log, stderr=log, preexec_fn=end_with_parent,
        )  # fmt: skip
        self.running.append(process)
        return process

    def run_job(self, manifest: Manifest, container: str = "containers") -> None:
        """Run a job to its end."""
        (found,) = manifest["spec"]["template"]["spec"][container]
        status = self.start(found).wait(240)
        assert status == 0, (self.top / "job.log").read_text()

    def serve(self, name: str) -> Mapping[str, Any]:
        """Start a server and wait for its startup probe. Return its container."""
        (container,) = named(OVERLAY, "Deployment", name)["spec"]["template"]["spec"]["containers"]
        process = self.start(container, name)

        def started() -> bool:
            assert process.poll() is None, (self.top / f"{name}.log").read_text()
            return self.status(name, container["startupProbe"]["httpGet"]["path"]) == 200

        wait_until(started, f"{name} does not start", 240)
        return dict(container)

    def status(self, name: str, path: str, password: str = "", host: str = "") -> int:
        """Return the status of an answer, 0 without one."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.ports[name]}{path}")
        if password:
            coded = base64.b64encode(password.encode()).decode()
            request.add_header("Authorization", f"Basic {coded}")
        if host:
            request.add_header("Host", host)
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    with postgres("prefect", "mlflow") as database:
        ports = {name: free_port() for name in PORTS}
        found = Servers(tmp_path_factory.mktemp("pods"), database, ports)
        (found.top / "root").mkdir()
        try:
            yield found
        finally:
            for process in found.running:
                process.terminate()
            for process in found.running:
                process.wait(60)


def probes(servers: Servers, name: str, container: Mapping[str, Any]) -> set[int]:
    kinds = ("startupProbe", "readinessProbe", "livenessProbe")
    return {servers.status(name, container[kind]["httpGet"]["path"]) for kind in kinds}


def test_prefects_server_starts_after_the_migration_and_asks_for_its_password(
    servers: Servers,
) -> None:
    servers.run_job(named(OVERLAY, "Job", "prefect-migrate"))
    container = servers.serve("prefect-server")
    assert probes(servers, "prefect-server", container) == {200}
    assert servers.status("prefect-server", "/api/admin/version") == 401
    assert servers.status("prefect-server", "/api/admin/version", PASSWORD) == 200


def test_the_pool_of_the_worker_has_our_template(servers: Servers, tmp_path: Path) -> None:
    job = named(OVERLAY, "Job", "dpnet-deploy")["spec"]["template"]["spec"]
    (pool,) = job["initContainers"]
    template = tmp_path / "base-job-template.json"
    files = named(OVERLAY, "ConfigMap", "dpnet-files")["data"]
    template.write_text(files["base-job-template.json"])
    words = [w.replace("/etc/dpnet/base-job-template.json", str(template)) for w in pool["command"]]
    for _ in range(2):  # it runs again at every install
        assert servers.start({**pool, "command": words}).wait(120) == 0
    request = urllib.request.Request(
        f"http://127.0.0.1:{servers.ports['prefect-server']}/api/work_pools/dpnet",
        headers={"Authorization": f"Basic {base64.b64encode(PASSWORD.encode()).decode()}"},
    )
    with urllib.request.urlopen(request, timeout=20) as answer:
        made = json.load(answer)
    assert made["type"] == "kubernetes"
    assert made["base_job_template"] == json.loads(template.read_text())


def test_the_job_of_an_install_makes_the_deployments(servers: Servers, tmp_path: Path) -> None:
    job = named(OVERLAY, "Job", "dpnet-deploy")["spec"]["template"]["spec"]
    (deploy,) = job["containers"]
    file = tmp_path / "deploy.yaml"
    file.write_text(named(OVERLAY, "ConfigMap", "dpnet-files")["data"]["deploy.yaml"])
    words = [word.replace("/etc/dpnet/deploy.yaml", str(file)) for word in deploy["command"]]
    for _ in range(2):
        status = servers.start({**deploy, "command": words}).wait(240)
        assert status == 0, (servers.top / "job.log").read_text()
    path = "/api/deployments/name/dpnet-pipeline/dpnet-pipeline"
    assert servers.status("prefect-server", path, PASSWORD) == 200


def test_mlflow_makes_its_tables_and_answers_under_the_names_of_its_service_only(
    servers: Servers,
) -> None:
    container = servers.serve("mlflow")
    assert probes(servers, "mlflow", container) == {200}
    page = "/api/2.0/mlflow/experiments/get-by-name?experiment_name=Default"
    port = servers.ports["mlflow"]
    assert servers.status("mlflow", page) == 401
    assert servers.status("mlflow", page, PASSWORD) == 200
    for host in ("mlflow:5000", "mlflow.dpnet.svc:5000", f"10.0.0.7:{port}", f"localhost:{port}"):
        assert servers.status("mlflow", page, PASSWORD, host) == 200, host
    assert servers.status("mlflow", page, PASSWORD, "rebound.example.com:5000") == 403


def test_the_upgrade_of_mlflows_database_runs(servers: Servers) -> None:
    servers.run_job(named(OVERLAY, "Job", "mlflow-upgrade"))


def test_the_exporter_answers_its_probes_without_and_its_metrics_with_the_password(
    servers: Servers,
) -> None:
    container = servers.serve("exporter")
    assert probes(servers, "exporter", container) == {200}
    assert servers.status("exporter", "/metrics") == 401
    assert servers.status("exporter", "/metrics", PASSWORD) == 200


def test_the_page_that_fills_photos_lives_without_a_champion_and_needs_the_token(
    servers: Servers,
) -> None:
    container = servers.serve("serve")
    assert servers.status("serve", container["livenessProbe"]["httpGet"]["path"]) == 200
    assert servers.status("serve", container["startupProbe"]["httpGet"]["path"]) == 200
    assert servers.status("serve", container["readinessProbe"]["httpGet"]["path"]) == 503
    assert servers.status("serve", "/api/models") == 401
    port = servers.ports["serve"]
    for host in ("serve.dpnet.svc:8400", f"10.0.0.7:{port}", f"localhost:{port}"):
        assert servers.status("serve", "/api/models", SERVE, host) == 200, host
    assert servers.status("serve", "/api/models", SERVE, "rebound.example.com:8400") == 403


def test_no_server_shows_a_password_in_its_log_or_its_command(servers: Servers) -> None:
    for process in servers.running:
        command = Path(f"/proc/{process.pid}/cmdline")
        if process.poll() is None:
            assert b"hunter2" not in command.read_bytes()
            assert b"a-long-password" not in command.read_bytes()
    for log in servers.top.glob("*.log"):
        text = log.read_text()
        assert "hunter2" not in text, log.name
        assert "a-long-password" not in text, log.name
