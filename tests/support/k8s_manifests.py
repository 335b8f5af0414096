"""The manifests of infra/k8s as kustomize renders them, and what the tests ask about them."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

REPOSITORY = Path(__file__).parents[2]
K8S = REPOSITORY / "infra" / "k8s"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
CUSTOM = ("RayCluster", "RayJob", "ResourceFlavor", "ClusterQueue", "LocalQueue")
_SHARED_CRDS = REPOSITORY.parent / "shared" / "schemas" / "kuberay"
CRDS = Path(os.environ.get("DPNET_KUBERAY_CRDS") or _SHARED_CRDS)

Manifest = dict[str, Any]


class PodSpec(NamedTuple):
    """A pod's spec with its labels, and the name of the object that it is in."""

    name: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def kustomize(folder: Path) -> str:
    """Render a folder. Skip the test where kustomize is not installed."""
    if shutil.which("kubectl"):
        command = ["kubectl", "kustomize"]
    elif shutil.which("kustomize"):
        command = ["kustomize", "build"]
    else:
        pytest.skip("neither kubectl nor kustomize is installed")
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def rendered(overlay: str) -> list[Manifest]:
    """Return the objects of an overlay, and of the job that is applied apart."""
    texts = [kustomize(K8S / "overlays" / overlay), kustomize(K8S / "jobs" / "mlflow-upgrade")]
    return [each for text in texts for each in yaml.safe_load_all(text)]


def of_kind(overlay: str, *kinds: str) -> list[Manifest]:
    return [each for each in rendered(overlay) if each["kind"] in kinds]


def named(overlay: str, kind: str, name: str) -> Manifest:
    (found,) = [each for each in of_kind(overlay, kind) if each["metadata"]["name"] == name]
    return found


def ray_job(overlay: str) -> Manifest:
    """Return a new copy of an overlay's RayJob, with what every launcher must fill in."""
    text = named(overlay, "ConfigMap", "dpnet-files")["data"]["rayjob.yaml"]
    job: Manifest = yaml.safe_load(text)
    job["metadata"] = {**job.get("metadata", {}), "name": "run-1", "namespace": "dpnet"}
    job["spec"]["entrypoint"] = "python -m dpnet.ray_driver"
    for template in ray_templates(job["spec"]["rayClusterSpec"]):
        template["spec"]["containers"][0].setdefault("image", "dpnet:0")
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        group |= {"replicas": 1, "minReplicas": 1, "maxReplicas": 1}
    return job


@functools.cache
def flow_job(overlay: str) -> Manifest:
    """Return the Job of a flow run, as Prefect's worker makes it from the pool's template."""
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    text = named(overlay, "ConfigMap", "dpnet-files")["data"]["base-job-template.json"]
    template = json.loads(text)
    values = {"env": {"A": "b"}, "labels": {"c": "d"}, "name": "run", "command": "prefect"}
    declared = set(template["variables"]["properties"])
    used = set(re.findall(r"{{ (\w+) }}", json.dumps(template["job_configuration"])))
    assert used <= declared, "Prefect's server refuses a pool with undeclared variables"
    made = KubernetesWorkerJobConfiguration
    configuration = made.model_validate(
        _filled(template["job_configuration"], _defaults(template) | values)
    )
    configuration.prepare_for_flow_run(_flow_run())
    job: Manifest = configuration.job_manifest
    # Prefect demands these two in the wrong place, and the API server drops them.
    for field in ("parallelism", "completions"):
        assert job["spec"]["template"]["spec"].pop(field) == 1
    return job


def _flow_run() -> Any:
    import uuid

    from prefect.client.schemas.objects import FlowRun

    return FlowRun(id=uuid.uuid4(), flow_id=uuid.uuid4(), name="brave-owl")


def _defaults(template: Mapping[str, Any]) -> dict[str, Any]:
    properties = template["variables"]["properties"]
    return {name: each["default"] for name, each in properties.items() if "default" in each}


def _filled(value: Any, values: Mapping[str, Any]) -> Any:
    """Fill the placeholders as Prefect does: with `apply_values`."""
    from prefect.utilities.templating import apply_values

    return apply_values(value, values, remove_notset=True)


def ray_templates(cluster: Mapping[str, Any]) -> list[Manifest]:
    """Return the pod templates of a RayCluster's spec."""
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"] for group in groups]


@functools.cache
def pod_specs(overlay: str) -> list[PodSpec]:
    """Return every pod that the overlay can start: servers, jobs, Ray nodes, flow runs."""
    return list(_pod_specs(overlay))


def _pod_specs(overlay: str) -> Iterator[PodSpec]:
    everything = [*rendered(overlay), ray_job(overlay), flow_job(overlay)]
    for each in everything:
        name = f"{each['kind']} {each['metadata'].get('name', 'flow-run')}"
        spec = each.get("spec", {})
        templates = {
            "Deployment": lambda s: [s["template"]],
            "StatefulSet": lambda s: [s["template"]],
            "Job": lambda s: [s["template"]],
            "RayCluster": ray_templates,
            "RayJob": lambda s: ray_templates(s["rayClusterSpec"]),
        }.get(each["kind"], lambda s: [])(spec)
        for number, template in enumerate(templates):
            labels = template.get("metadata", {}).get("labels", {})
            if each["kind"].startswith("Ray"):  # the operator adds these
                labels = {**labels, "ray.io/is-ray-node": "yes"}
            yield PodSpec(f"{name} {number}", labels, template["spec"])


@functools.cache
def crd_schema(plural: str) -> Manifest:
    """Return KubeRay's schema of version v1 of a kind, in which unknown fields are errors."""
    file = CRDS / f"ray.io_{plural}.yaml"
    if not file.is_file():
        pytest.skip(f"no KubeRay schemas at {CRDS}: name a folder in DPNET_KUBERAY_CRDS")
    # The loader in C takes one second of ten.
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    versions = yaml.load(file.read_text("utf-8"), loader)["spec"]["versions"]
    (schema,) = [v["schema"]["openAPIV3Schema"] for v in versions if v["name"] == "v1"]
    schema["properties"]["metadata"] = {"type": "object"}
    return dict(_strict(schema))


def _strict(schema: Any) -> Any:
    """Refuse unknown fields, and drop what JSON Schema does not know."""
    if isinstance(schema, list):
        return [_strict(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: _strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    if "properties" in schema and not schema.get("x-kubernetes-preserve-unknown-fields"):
        made["additionalProperties"] = False
    return made


# Network policies.


def connects(overlay: str, start: Mapping[str, str], end: Mapping[str, str], port: int) -> bool:
    """Return whether the policies allow pods of this namespace to connect.

    Args:
        overlay: The overlay.
        start: Labels of the pod that connects.
        end: Labels of the pod that listens.
        port: The TCP port.
    """
    policies = of_kind(overlay, "NetworkPolicy")
    may_send = _allowed(policies, "egress", "to", start, end, port)
    return may_send and admits(overlay, end, start, port)


def admits(overlay: str, end: Mapping[str, str], start: Mapping[str, str], port: int) -> bool:
    """Return whether the pod that listens admits the other one, whatever that one may send."""
    policies = of_kind(overlay, "NetworkPolicy")
    return _allowed(policies, "ingress", "from", end, start, port)


def _allowed(
    policies: list[Manifest],
    direction: str,
    side: str,
    pod: Mapping[str, str],
    peer: Mapping[str, str],
    port: int,
) -> bool:
    own = [
        each["spec"]
        for each in policies
        if direction.capitalize() in each["spec"]["policyTypes"]
        and selects(each["spec"]["podSelector"], pod)
    ]
    if not own:
        return True  # a pod that no policy selects is open
    return any(
        _has_port(rule, port) and any(_is_peer(each, peer) for each in rule.get(side, [{}]))
        for spec in own
        for rule in spec.get(direction, [])
    )


def _has_port(rule: Mapping[str, Any], port: int) -> bool:
    ports = rule.get("ports")
    return ports is None or any(
        each["port"] == port and each.get("protocol", "TCP") == "TCP" for each in ports
    )


def _is_peer(peer: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    if "ipBlock" in peer:
        return False  # addresses outside of the cluster
    space = peer.get("namespaceSelector")
    if space is not None and not selects(space, {"kubernetes.io/metadata.name": "dpnet"}):
        return False
    return selects(peer.get("podSelector", {}), labels)


def selects(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Return whether a label selector selects a pod."""
    wanted = selector.get("matchLabels", {})
    if any(labels.get(key) != value for key, value in wanted.items()):
        return False
    for each in selector.get("matchExpressions", []):
        assert each["operator"] == "In", each
        if labels.get(each["key"]) not in each["values"]:
            return False
    return True


def secret_references(overlay: str) -> set[tuple[str, str]]:
    """Return the Secrets that pods use, each with its key; all keys have the key `*`."""
    found = set()
    text = json.dumps([*rendered(overlay), flow_job(overlay), ray_job(overlay)])
    for name in re.findall(r'"secretRef": {"name": "([^"]+)"}', text):
        found.add((name, "*"))
    for reference in re.findall(r'"secretKeyRef": ({[^}]+})', text):
        record = json.loads(reference)
        found.add((record["name"], record["key"]))
    return found
