"""Prefect's real Kubernetes worker with the rights of infra/k8s, on a real API server.

The worker makes the jobs of flow runs and follows them: one is cancelled before its pod starts, the
pod of one crashes, and the job of one is deleted. The server records every request. It has no nodes
and no controllers, so the test writes what they would.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
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
# Seconds after which Prefect's server lets the worker delete the job of a run that does not react.
# By default they are 300.
CANCEL_AFTER = "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_CANCELLING_TIMEOUT_SECONDS"


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
        made.start("server", *words, PREFECT_SERVER_API_AUTH_STRING=PASSWORD, **{CANCEL_AFTER: "5"})
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


DEPLOY = """
flow = await client.create_flow_from_name("register")
deployment = await client.create_deployment(
    flow, "register", work_pool_name="dpnet", entrypoint="flows.pipeline.register_model",
    job_variables={"env": {"A": "b"}}, enforce_parameter_schema=False)
print(deployment)
""".strip()
START = """
run = await client.create_flow_run_from_deployment("DEPLOYMENT")
print(run.id)
""".strip()
CANCEL = """
from prefect.states import Cancelling
answer = await client.set_flow_run_state("RUN", Cancelling())
print(answer.status.value)
""".strip()
STATE = """
run = await client.read_flow_run("RUN")
print(run.state.type.value, run.state.message)
""".strip()


@pytest.fixture
def worker(server: Any, prefect: Processes, tmp_path: Path) -> subprocess.Popen[bytes]:
    """Start the worker with the command and the environment of its Deployment."""
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
    return prefect.start("worker", *container["command"][1:], **env)


@dataclass
class Cluster:
    """The jobs of the namespace, seen and changed by an administrator."""

    server: Any
    prefect: Processes
    deployment: str

    @property
    def jobs(self) -> Any:
        from kubernetes import client

        return client.BatchV1Api(self.server.client())

    @property
    def core(self) -> Any:
        from kubernetes import client

        return client.CoreV1Api(self.server.client())

    def start(self) -> tuple[str, Any]:
        """Start a flow run, and return its id and its job."""
        run = in_prefect(self.prefect, START.replace("DEPLOYMENT", self.deployment))
        wait_until(lambda: self.job_of(run), f"no job, see {self.prefect.top}/worker.log", 240)
        return run, self.job_of(run)

    def job_of(self, run: str) -> Any:
        labels = f"prefect.io/flow-run-id={run}"
        found = self.jobs.list_namespaced_job("dpnet", label_selector=labels).items
        return found[0] if found else None

    def wait_for(self, run: str, state: str) -> None:
        def reached() -> bool:
            return state in in_prefect(self.prefect, STATE.replace("RUN", run))

        wait_until(reached, f"no {state}, see {self.prefect.top}/worker.log", 240)


def make_pod(cluster: Cluster, job: Any) -> None:
    """Make a job's pod, whose container has failed, and let the job fail."""
    made = cluster.jobs.api_client.sanitize_for_serialization(job)
    template, name = made["spec"]["template"], job.metadata.name
    labels = {**template["metadata"]["labels"], "job-name": name}
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": name, "uid": job.metadata.uid}
    about = {"name": f"{name}-x", "labels": labels, "ownerReferences": [owner]}
    spec = {**template["spec"], "automountServiceAccountToken": False, "nodeName": "gone"}
    cluster.core.create_namespaced_pod("dpnet", {"metadata": about, "spec": spec})
    cluster.core.patch_namespaced_pod_status(f"{name}-x", "dpnet", {"status": {"phase": "Failed"}})
    failed = {"failed": job.spec.backoff_limit + 1}
    cluster.jobs.patch_namespaced_job_status(name, "dpnet", {"status": failed})


def check_job(job: dict[str, Any]) -> None:
    """Check the job of a flow run: references to secrets, the account, a read-only root."""
    pod = job["spec"]["template"]["spec"]
    variables = {each["name"]: each for each in pod["containers"][0]["env"]}
    reference = {"name": "dpnet-prefect", "key": "PREFECT_SERVER_API_AUTH_STRING"}
    assert variables["PREFECT_API_AUTH_STRING"]["valueFrom"]["secretKeyRef"] == reference
    assert PASSWORD not in json.dumps(job)
    assert pod["serviceAccountName"] == "flows"
    assert pod["containers"][0]["securityContext"]["readOnlyRootFilesystem"] is True


def test_the_workers_rights_are_exactly_those_that_it_uses(
    server: Any, prefect: Processes, worker: subprocess.Popen[bytes]
) -> None:
    cluster = Cluster(server, prefect, in_prefect(prefect, DEPLOY))
    cancelled, job = cluster.start()
    check_job(cluster.jobs.api_client.sanitize_for_serialization(job))
    assert in_prefect(prefect, CANCEL.replace("RUN", cancelled)) == "ACCEPT"
    cluster.wait_for(cancelled, "CANCELLED")  # its pod has not started
    # A controller would remove the pods first.
    wait_until(
        lambda: (left := cluster.job_of(cancelled)) is None or left.metadata.deletion_timestamp,
        "the job stays",
    )
    crashed, job = cluster.start()
    make_pod(cluster, job)
    cluster.wait_for(crashed, "CRASHED No active or succeeded pods")
    deleted, job = cluster.start()
    cluster.jobs.delete_namespaced_job(job.metadata.name, "dpnet", propagation_policy="Background")
    cluster.wait_for(deleted, "CRASHED Kubernetes job was deleted")
    assert worker.poll() is None, prefect.log("worker")
    worker.kill()  # the server records a watch when it ends
    worker.wait(60)
    rights = {
        (group, resource, verb)
        for rule in named("gpu", "Role", ACCOUNT)["rules"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for verb in rule["verbs"]
    }
    watches = {right for right in rights if right[2] == "watch"}
    wait_until(lambda: watches <= {request for request, _ in recorded(server)}, "no watch")
    requests = recorded(server)
    assert {request for request, _ in requests} == rights
    assert 403 not in {status for _, status in requests}
