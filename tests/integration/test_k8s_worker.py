"""Prefect's real Kubernetes worker with the rights of infra/k8s, on a real API server.

The worker makes the job of a flow run, and lists jobs and pods. The server records every request.
It has no nodes, so no pod runs.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kube_server as kube
import pytest
import yaml
from clusters import end_with_parent, free_port, wait_until
from k8s_manifests import named

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ACCOUNT = "prefect-worker"
PASSWORD = "dpnet:a-long-password"
# Rights that were not seen here, but are in the source of prefect_kubernetes (worker.py,
# observer.py): for a pod that crashes, a job that ends, a run that is cancelled before its pod
# starts, and the watches of its observer.
UNUSED = {
    ("", "pods/log", "get"), ("", "pods", "watch"), ("batch", "jobs", "get"),
    ("batch", "jobs", "delete"), ("batch", "jobs", "watch"),
}  # fmt: skip


@pytest.fixture
def server() -> Iterator[Any]:
    from kubernetes import client

    with kube.kube_server() as started:
        api = started.client()
        core, rbac = client.CoreV1Api(api), client.RbacAuthorizationV1Api(api)
        core.create_namespace({"metadata": {"name": "dpnet"}})
        for account in (ACCOUNT, "flows"):
            core.create_namespaced_service_account("dpnet", named("gpu", "ServiceAccount", account))
        rbac.create_namespaced_role("dpnet", named("gpu", "Role", ACCOUNT))
        rbac.create_namespaced_role_binding("dpnet", named("gpu", "RoleBinding", ACCOUNT))
        yield started


def kubeconfig(server: Any, file: Path) -> Path:
    """Write a kubeconfig with a token of the worker's account."""
    from kubernetes import client

    answer = client.CoreV1Api(server.client()).create_namespaced_service_account_token(
        ACCOUNT, "dpnet", {"spec": {"audiences": [], "expirationSeconds": 3600}}
    )
    authority = base64.b64encode((server.folder / "pki/ca.crt").read_bytes()).decode()
    cluster = {"server": server.url, "certificate-authority-data": authority}
    context = {"cluster": "c", "user": "u", "namespace": "dpnet"}
    record = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "c", "cluster": cluster}],
        "users": [{"name": "u", "user": {"token": answer.status.token}}],
        "contexts": [{"name": "c", "context": context}],
        "current-context": "c",
    }
    file.write_text(yaml.safe_dump(record))
    return file


def recorded(server: Any) -> list[tuple[tuple[str, str, str], int]]:
    """Return group, resource and verb of each request of the worker, with the answer's status."""
    found = []
    for line in (server.folder / "audit.log").read_text().splitlines():
        event = json.loads(line)
        if event["user"]["username"] != f"system:serviceaccount:dpnet:{ACCOUNT}":
            continue
        about = event.get("objectRef") or {}
        resource = "/".join(filter(None, [about.get("resource"), about.get("subresource")]))
        status = (event.get("responseStatus") or {}).get("code", 0)
        if resource:
            found.append(((about.get("apiGroup", ""), resource, event["verb"]), status))
    return found


class Processes:
    """Prefect's server and worker."""

    def __init__(self, top: Path) -> None:
        self.top, self.port = top, free_port()
        self.running: list[subprocess.Popen[bytes]] = []
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "KUBE"))}
        self.env = {
            **kept,
            "PREFECT_HOME": str(top / "home"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.port}/api",
            "PREFECT_API_AUTH_STRING": PASSWORD,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
        }

    def start(self, name: str, *words: str, **more: str) -> subprocess.Popen[bytes]:
        log = (self.top / f"{name}.log").open("wb")
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", *words],
            env={**self.env, **more}, stdout=log, stderr=log, preexec_fn=end_with_parent,
        )  # fmt: skip
        self.running.append(process)
        return process

    def log(self, name: str) -> str:
        return (self.top / f"{name}.log").read_text("utf-8", "replace")


@pytest.fixture
def prefect(tmp_path: Path) -> Iterator[Processes]:
    from flows.local_server.children import answers

    made = Processes(tmp_path)
    try:
        words = ("server", "start", "--host", "127.0.0.1", "--port", str(made.port))
        made.start("server", *words, PREFECT_SERVER_API_AUTH_STRING=PASSWORD)
        wait_until(
            lambda: answers(f"http://127.0.0.1:{made.port}/api/ready"), "no Prefect server", 240
        )
        yield made
    finally:
        for process in made.running:
            process.terminate()
        for process in made.running:
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:  # the worker waits for its watch of the job
                process.kill()
                process.wait(60)


def in_prefect(prefect: Processes, code: str) -> str:
    """Run code with a client of the server in a process of its own; return what it prints."""
    program = (
        "import asyncio\n"
        "from prefect.client.orchestration import get_client\n"
        "async def main():\n"
        "    async with get_client() as client:\n"
        + "".join(f"        {line}\n" for line in code.splitlines())
        + "asyncio.run(main())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=prefect.env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


START = """
flow = await client.create_flow_from_name("register")
deployment = await client.create_deployment(
    flow, "register", work_pool_name="dpnet", entrypoint="flows.pipeline.register_model",
    job_variables={"env": {"A": "b"}}, enforce_parameter_schema=False)
run = await client.create_flow_run_from_deployment(deployment)
print(run.id)
""".strip()


def test_the_workers_rights_are_those_that_it_uses(
    server: Any, prefect: Processes, tmp_path: Path
) -> None:
    from kubernetes import client

    template = tmp_path / "template.json"
    files = named("gpu", "ConfigMap", "dpnet-files")["data"]
    template.write_text(files["base-job-template.json"])
    create = ("work-pool", "create", "dpnet", "--type", "kubernetes", "--base-job-template")
    assert prefect.start("pool", *create, str(template)).wait(120) == 0, prefect.log("pool")
    spec = named("gpu", "Deployment", ACCOUNT)["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    env = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    env |= {
        "PREFECT_WORKER_WEBSERVER_PORT": str(free_port()),
        "PREFECT_WORKER_WEBSERVER_HOST": "127.0.0.1",
        "KUBECONFIG": str(kubeconfig(server, tmp_path / "kubeconfig")),
    }
    assert container["command"][0] == "prefect"
    worker = prefect.start("worker", *container["command"][1:], **env)
    in_prefect(prefect, START)
    jobs = client.BatchV1Api(server.client())

    def job() -> Any:
        assert worker.poll() is None, prefect.log("worker")
        items = jobs.list_namespaced_job("dpnet").items
        return items[0] if items else None

    wait_until(job, f"no job, see {prefect.top}/worker.log", 240)
    made = jobs.api_client.sanitize_for_serialization(job())
    pod = made["spec"]["template"]["spec"]
    variables = {each["name"]: each for each in pod["containers"][0]["env"]}
    reference = {"name": "dpnet-prefect", "key": "PREFECT_SERVER_API_AUTH_STRING"}
    assert variables["PREFECT_API_AUTH_STRING"]["valueFrom"]["secretKeyRef"] == reference
    assert PASSWORD not in json.dumps(made)
    assert pod["serviceAccountName"] == "flows"
    assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True
    time.sleep(20)  # the observer starts after the worker; a request that is refused would be seen
    requests = recorded(server)
    assert {status for _, status in requests if status >= 400} <= {404, 410}
    rights = {
        (group, resource, verb)
        for rule in named("gpu", "Role", ACCOUNT)["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    used = {request for request, _ in requests}
    assert used <= rights
    assert rights - used <= UNUSED
