"""The manifests of infra/k8s on a real Kubernetes API server: accepted, and with the right rights.

The server is of version 1.20 for built-in kinds, so it does not know policy/v1, and it has
autoscaling/v2 by its older name. KubeRay's kinds are served by version 1.36 with full validation.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kube_server as kube
import pytest
import yaml
from k8s_manifests import OVERLAYS, Manifest, flow_job, named, of_kind, ray_job, rendered

pytestmark = [pytest.mark.integration, pytest.mark.slow]

UNKNOWN = {"PodDisruptionBudget"}  # to this server
OLD_NAMES = {"autoscaling/v2": "autoscaling/v2beta2"}  # the same fields
PLURALS = {"NetworkPolicy": "networkpolicies"}


@pytest.fixture(scope="module")
def server() -> Iterator[Any]:
    with kube.kube_server() as started:
        create(started, named("gpu", "Namespace", "dpnet"), dry=False)
        for kind in ("ServiceAccount", "Role", "RoleBinding"):
            for manifest in of_kind("gpu", kind):
                create(started, manifest, dry=False)
        yield started


def create(server: Any, manifest: Manifest, *, dry: bool = True) -> Any:
    """Create an object, or only ask the server whether it would."""
    group, _, version = manifest["apiVersion"].rpartition("/")
    kind = manifest["kind"]
    plural = PLURALS.get(kind, f"{kind.lower()}s")
    path = f"/apis/{group}/{version}" if group else f"/api/{version}"
    if kind != "Namespace":
        path += "/namespaces/dpnet"
    query = [("fieldValidation", "Strict"), *([("dryRun", "All")] if dry else [])]
    return server.client().call_api(
        f"{path}/{plural}",
        "POST",
        query_params=query,
        header_params={"Content-Type": "application/json"},
        body=manifest,
        auth_settings=["BearerToken"],
        response_types_map={200: "object", 201: "object"},
        _return_http_data_only=True,
    )


def known(overlay: str) -> list[Manifest]:
    """Return the objects of an overlay that the server knows, by the names that it knows."""
    found = [m for m in rendered(overlay) if m["kind"] not in UNKNOWN]
    return [{**m, "apiVersion": OLD_NAMES.get(m["apiVersion"], m["apiVersion"])} for m in found]


def launched(overlay: str) -> Manifest:
    """Return the RayJob that the launcher makes of an overlay's template."""
    from dpnet.training.ray.rayjob import Attempt, render_rayjob
    from dpnet.training.settings import LaunchSettings, TrainSettings

    template = ray_job(overlay)
    del template["metadata"], template["spec"]["entrypoint"]
    attempt = Attempt("run-0123456789ab", 1, "word", "0" * 64, "s3://dpnet/root", "runs/a")
    image = f"registry.example.com/dpnet:0.2.0-{'cpu' if overlay == 'local' else 'cuda'}"
    launch = LaunchSettings(launcher="kuberay", image=image, secrets=("dpnet-storage",))
    fewest = 2 if overlay == "spot" else None
    train = TrainSettings(workers=4, min_workers=fewest, gpus=overlay != "local")
    return render_rayjob(template, attempt, launch, train, "2.60.0", "python -m dpnet.ray_driver")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_server_accepts_every_object_of_an_overlay(overlay: str, server: Any) -> None:
    there = {"Namespace", "ServiceAccount", "Role", "RoleBinding"}
    asked = [m for m in known(overlay) if m["kind"] not in there]
    for manifest in [*asked, flow_job(overlay), launched(overlay)]:
        made = create(server, manifest)
        assert made["metadata"]["uid"], manifest["kind"]
    kinds = {"RayCluster", "Deployment", "NetworkPolicy", "HorizontalPodAutoscaler"}
    assert kinds <= {m["kind"] for m in asked}


@pytest.mark.parametrize("forced", [False, True])
def test_an_overlay_is_applied_again_after_its_replicas_were_set_by_hand(
    forced: bool, server: Any, tmp_path: Path
) -> None:
    """`kubectl scale` takes the replicas from the manifests; here `kubectl patch` does."""
    kubectl = ["kubectl", f"--kubeconfig={server.folder / 'admin.kubeconfig'}", "-n", "dpnet"]
    file = tmp_path / "all.yaml"
    file.write_text(yaml.safe_dump_all(known("gpu")))
    apply = [*kubectl, "apply", "--server-side", f"--filename={file}"]

    def done(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, capture_output=True, text=True)

    first = done([*apply, "--force-conflicts"])
    assert first.returncode == 0, first.stderr
    down = '{"spec": {"replicas": 0}}'
    for name in ("prefect-worker", "prefect-server", "mlflow"):
        assert done([*kubectl, "patch", "deployment", name, "-p", down]).returncode == 0
    again = done([*apply, "--force-conflicts"] if forced else apply)
    found = done(
        [*kubectl, "get", "deployment", "prefect-worker", "-o", "jsonpath={.spec.replicas}"]
    )
    if forced:  # as docs/operations.md says
        assert again.returncode == 0, again.stderr
        assert found.stdout == "2"
    else:
        assert "conflict" in again.stderr
        assert found.stdout == "0"


def test_the_server_refuses_an_unknown_field_of_a_rayjob(server: Any) -> None:
    from kubernetes.client import ApiException

    job = launched("gpu")
    job["spec"]["subissionMode"] = "HTTPMode"
    with pytest.raises(ApiException) as caught:
        create(server, job)
    assert "unknown field" in str(caught.value.body)
    assert "spec.subissionMode" in str(caught.value.body)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_the_launcher_adds_keeps_the_pods_of_the_template(overlay: str) -> None:
    cluster = launched(overlay)["spec"]["rayClusterSpec"]
    assert cluster.get("enableInTreeAutoscaling", False) == (overlay == "spot")
    template = ray_job(overlay)["spec"]["rayClusterSpec"]
    for group in ("headGroupSpec", "workerGroupSpecs"):
        made, given = cluster[group], template[group]
        made, given = (made, given) if group == "headGroupSpec" else (made[0], given[0])
        for field in ("securityContext", "serviceAccountName", "volumes", "nodeSelector"):
            spec, wanted = made["template"]["spec"], given["template"]["spec"]
            assert spec.get(field) == wanted.get(field)
        (container,) = made["template"]["spec"]["containers"]
        assert {"secretRef": {"name": "dpnet-storage"}} in container["envFrom"]
        assert re.search(r":0\.2\.0-", container["image"])


def test_the_role_of_flow_runs_has_the_rights_that_the_launcher_names() -> None:
    from dpnet.training.ray.kube_client import role

    def rights(manifest: Manifest) -> set[tuple[str, str, str]]:
        return {
            (group, resource, verb)
            for rule in manifest["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }

    assert rights(named("gpu", "Role", "flows")) == rights(role("dpnet"))


@pytest.mark.parametrize(
    ("account", "verb", "group", "resource", "allowed"),
    [
        ("flows", "create", "ray.io", "rayjobs", True),
        ("flows", "list", "", "events", True),
        ("flows", "patch", "ray.io", "rayjobs", False),
        ("flows", "create", "batch", "jobs", False),
        ("flows", "get", "", "secrets", False),
        ("prefect-worker", "create", "batch", "jobs", True),
        ("prefect-worker", "watch", "", "pods", True),
        ("prefect-worker", "create", "ray.io", "rayjobs", False),
        ("prefect-worker", "get", "", "secrets", False),
        ("ray", "get", "", "pods", False),
        ("servers", "list", "", "pods", False),
    ],
)
def test_accounts_may_do_what_they_need_and_nothing_else(
    account: str, verb: str, group: str, resource: str, allowed: bool, server: Any
) -> None:
    from kubernetes import client

    for namespace, expected in (("dpnet", allowed), ("default", False)):
        attributes = {
            "verb": verb, "group": group, "resource": resource, "namespace": namespace
        }  # fmt: skip
        review = client.AuthorizationV1Api(server.client()).create_subject_access_review(
            {
                "spec": {
                    "user": f"system:serviceaccount:dpnet:{account}",
                    "groups": ["system:serviceaccounts", "system:authenticated"],
                    "resourceAttributes": attributes,
                }
            }
        )
        assert review.status.allowed is expected, namespace
