"""The manifests of infra/k8s: valid, restricted, pinned, and consistent with each other."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path
from typing import Any, get_args

import jsonschema
import kubernetes_validate
import pytest
import yaml
from k8s_manifests import (
    CUSTOM,
    K8S,
    OVERLAYS,
    REPOSITORY,
    Manifest,
    PodSpec,
    admits,
    connects,
    crd_schema,
    flow_job,
    kustomize,
    named,
    of_kind,
    pod_specs,
    ray_job,
    ray_templates,
    rendered,
    secret_references,
    selects,
)

from dpnet.pipeline.config import load_config, load_settings
from dpnet.training.settings import LaunchSettings
from flows.deployments import DeploySettings

KUBERNETES = "1.34"  # of the schemas
VERSION = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]["version"]
SECRET = re.compile(r"PASSWORD|SECRET|TOKEN|AUTH_STRING|CONNECTION_URL|STORE_URI|ACCESS_KEY")
# Volumes that the level `restricted` of Pod Security allows, and that need no storage class.
VOLUMES = {"configMap", "emptyDir", "secret"}

overlays = pytest.mark.parametrize("overlay", OVERLAYS)


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']} {manifest['metadata'].get('name')}"


def test_there_is_an_overlay_for_small_clusters_for_gpus_and_for_spot_machines() -> None:
    assert OVERLAYS == ["gpu", "local", "spot"]


# Valid.


@overlays
def test_every_built_in_object_is_valid_and_has_no_unknown_field(overlay: str) -> None:
    checked = [each for each in rendered(overlay) if each["kind"] not in CUSTOM]
    assert len(checked) > 30
    for manifest in [*checked, flow_job(overlay)]:
        try:
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        except kubernetes_validate.ValidationError as error:
            pytest.fail(f"{name_of(manifest)}: {error.message} at {list(error.path)}")


def problems_of(manifest: Manifest) -> list[str]:
    schema = crd_schema(f"{manifest['kind'].lower()}s")
    found = jsonschema.Draft202012Validator(schema).iter_errors(manifest)
    return [f"{'.'.join(map(str, each.absolute_path))}: {each.message}" for each in found]


@overlays
def test_ray_clusters_and_the_template_of_rayjobs_fit_kuberays_schemas(overlay: str) -> None:
    clusters = of_kind(overlay, "RayCluster")
    assert clusters
    for manifest in [*clusters, ray_job(overlay)]:
        assert problems_of(manifest) == [], name_of(manifest)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"subissionMode": "HTTPMode"}, "'subissionMode' was unexpected"),
        ({"backoffLimit": "3"}, "'3' is not of type 'integer'"),
    ],
)
def test_a_typing_error_in_a_rayjob_is_found(change: dict[str, Any], said: str) -> None:
    job = ray_job("gpu")
    job["spec"] |= change
    assert said in " ".join(problems_of(job))


def test_the_queue_of_kueue_is_in_the_namespace_and_what_is_cluster_wide_is_in_none() -> None:
    made = list(yaml.safe_load_all(kustomize(K8S / "kueue")))
    spaces = {each["kind"]: each["metadata"].get("namespace") for each in made}
    assert spaces == {"ResourceFlavor": None, "ClusterQueue": None, "LocalQueue": "dpnet"}


@overlays
def test_a_private_registry_is_one_line_in_an_overlay(overlay: str, tmp_path: Path) -> None:
    shutil.copytree(K8S, tmp_path / "k8s")  # kustomize reads only below a folder
    file = tmp_path / "k8s/overlays" / overlay / "kustomization.yaml"
    line = "- ../../components/private-registry"
    file.write_text(file.read_text("utf-8").replace(f"# {line}", line))
    secret = [{"name": "registry"}]
    made = list(yaml.safe_load_all(kustomize(file.parent)))
    accounts = [each for each in made if each["kind"] == "ServiceAccount"]
    assert len(accounts) == 4
    assert all(each["imagePullSecrets"] == secret for each in accounts)
    # KubeRay makes the account of the head of an autoscaled cluster.
    (cluster,) = [each for each in made if each["kind"] == "RayCluster"]
    assert ray_templates(cluster["spec"])[0]["spec"]["imagePullSecrets"] == secret


@pytest.mark.parametrize("overlay", ["gpu", "spot"])
def test_the_page_that_fills_photos_can_have_a_gpu_and_scale_on_its_queue(
    overlay: str, tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(K8S, tmp_path / "k8s")
    file = tmp_path / "k8s/overlays" / overlay / "kustomization.yaml"
    text = file.read_text("utf-8")
    for name in ("serve-gpu", "serve-queue"):
        assert f"# - ../../components/{name}" in text
        text = text.replace(f"# - ../../components/{name}", f"- ../../components/{name}")
    file.write_text(text)
    made = list(yaml.safe_load_all(kustomize(file.parent)))
    (deployment, scaler) = (
        next(m for m in made if (m["kind"], m["metadata"]["name"]) == (kind, "serve"))
        for kind in ("Deployment", "HorizontalPodAutoscaler")
    )
    for manifest in (deployment, scaler):
        kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
    spec = deployment["spec"]["template"]["spec"]
    (container,) = spec["containers"]
    assert container["image"] == f"registry.example.com/dpnet:{VERSION}-cuda"
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert spec["nodeSelector"] == {"dpnet/pool": "gpu"}
    assert {each["key"] for each in spec["tolerations"]} == {"nvidia.com/gpu"}
    (metric,) = scaler["spec"]["metrics"]
    assert metric["pods"]["metric"]["name"] == "dpnet_serve_queue"
    code = (REPOSITORY / "dpnet/serving/metrics.py").read_text("utf-8")
    assert '"dpnet_serve_queue"' in code


@overlays
def test_the_page_that_fills_photos_has_memory_for_the_photos_that_it_takes(overlay: str) -> None:
    (container,) = named(overlay, "Deployment", "serve")["spec"]["template"]["spec"]["containers"]
    pixels = int(container["args"][container["args"].index("--max-pixels") + 1])
    limit = int(container["resources"]["limits"]["memory"].removesuffix("Gi")) * 2**30
    assert pixels * 150 < limit  # bytes a pixel, measured where the holes are at two corners
    assert pixels > 4032 * 3024  # a photo of a phone


# Restricted.


def all_pods(overlay: str) -> list[PodSpec]:
    pods = list(pod_specs(overlay))
    kinds = {pod.name.split()[0] for pod in pods}
    assert kinds == {"Deployment", "StatefulSet", "Job", "RayCluster", "RayJob"}
    return pods


@overlays
def test_every_pod_passes_the_level_restricted_of_pod_security(overlay: str) -> None:
    namespace = named(overlay, "Namespace", "dpnet")
    assert namespace["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in all_pods(overlay):
        context = pod.spec["securityContext"]
        assert context["runAsNonRoot"] is True, pod.name
        assert context["runAsUser"] > 0, pod.name
        assert context["seccompProfile"] == {"type": "RuntimeDefault"}, pod.name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys(), pod.name
        for container in pod.containers:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False, pod.name
            assert own["capabilities"] == {"drop": ["ALL"]}, pod.name
            assert "privileged" not in own, pod.name
            assert not any("hostPort" in port for port in container.get("ports", [])), pod.name


@overlays
def test_no_pod_writes_into_its_image_and_every_temporary_folder_has_a_limit(overlay: str) -> None:
    for pod in all_pods(overlay):
        claims = {"data"} if pod.name.startswith("StatefulSet") else set()
        kinds = {volume["name"]: volume.keys() - {"name"} for volume in pod.spec["volumes"]}
        assert all(kind <= VOLUMES for kind in kinds.values()), pod.name
        for volume in pod.spec["volumes"]:
            if "emptyDir" in volume:
                assert volume["emptyDir"].get("sizeLimit"), f"{pod.name}: {volume['name']}"
        for container in pod.containers:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, pod.name
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert "emptyDir" in kinds[mounts["/tmp"]], pod.name
            assert set(mounts.values()) <= kinds.keys() | claims, pod.name


@overlays
def test_every_container_reserves_and_limits_what_it_uses(overlay: str) -> None:
    for pod in all_pods(overlay):
        for container in pod.containers:
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys(), pod.name
            assert "memory" in resources["limits"], pod.name
    # Where trainings are elastic, the head has the operator's autoscaler as a second container.
    clusters = [each["spec"] for each in of_kind(overlay, "RayCluster")]
    clusters += [ray_job(overlay)["spec"]["rayClusterSpec"]] if overlay == "spot" else []
    for cluster in clusters:
        autoscaler = cluster["autoscalerOptions"]
        assert "memory" in autoscaler["resources"]["limits"]
        assert autoscaler["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert {"name": "tmp", "mountPath": "/tmp"} in autoscaler["volumeMounts"]


@overlays
def test_only_the_worker_and_flow_runs_get_a_token_of_the_kubernetes_api(overlay: str) -> None:
    accounts = {each["metadata"]["name"]: each for each in of_kind(overlay, "ServiceAccount")}
    assert not any(each["automountServiceAccountToken"] for each in accounts.values())
    with_token = set()
    for pod in all_pods(overlay):
        # The operator gives the head of an autoscaled cluster an account of its own.
        account = pod.spec.get("serviceAccountName", "ray-cpu")
        assert account in {*accounts, "ray-cpu"}, pod.name
        if pod.spec["automountServiceAccountToken"]:
            with_token.add(account)
    assert with_token == {"prefect-worker", "flows", "ray-cpu"}


@overlays
def test_the_rights_are_namespaced_and_exactly_those_of_the_code(overlay: str) -> None:
    assert of_kind(overlay, "ClusterRole", "ClusterRoleBinding") == []
    rights = {
        role["metadata"]["name"]: {
            (group, resource): set(rule["verbs"])
            for rule in role["rules"]
            for group in rule["apiGroups"]
            for resource in rule["resources"]
        }
        for role in of_kind(overlay, "Role")
    }
    assert rights == {
        # prefect_kubernetes: the worker creates, reads and ends jobs; its observer watches.
        "prefect-worker": {
            ("batch", "jobs"): {"create", "delete", "get", "list", "watch"},
            ("", "pods"): {"list", "watch"},
            ("", "pods/log"): {"get"},
        },
        # dpnet/training/ray: the launcher starts RayJobs and says why their pods wait.
        "flows": {
            ("ray.io", "rayjobs"): {"create", "delete", "get", "list", "watch"},
            ("", "pods"): {"list"},
            ("", "events"): {"list"},
        },
    }
    for binding in of_kind(overlay, "RoleBinding"):
        (subject,) = binding["subjects"]
        assert (subject["name"], subject["namespace"]) == (binding["roleRef"]["name"], "dpnet")


@overlays
def test_secrets_are_only_referred_to_and_the_page_of_operations_makes_each_of_them(
    overlay: str,
) -> None:
    assert of_kind(overlay, "Secret") == []
    for pod in all_pods(overlay):
        for container in pod.containers:
            for variable in container.get("env", []):
                if SECRET.search(variable["name"]) and "INTEGRATIONS" not in variable["name"]:
                    assert "valueFrom" in variable, f"{pod.name}: {variable['name']}"
    for config in of_kind(overlay, "ConfigMap"):
        assert not any(SECRET.search(key) for key in config["data"]), name_of(config)
    page = (REPOSITORY / "docs/operations.md").read_text("utf-8").replace("\\\n", " ")
    made = {
        (name, key)
        for name, words in re.findall(r"kubectl -n dpnet create secret generic (\S+)(.*)", page)
        for key in ["*", *re.findall(r"--from-literal=(\w+)=", words)]
    }
    assert secret_references(overlay) <= made


@overlays
def test_the_pages_that_the_files_of_an_overlay_name_say_what_is_promised(overlay: str) -> None:
    first = (K8S / "overlays" / overlay / "rayjob.yaml").read_text("utf-8").splitlines()[0]
    assert "docs/training.md says what the launcher adds" in first
    page = (REPOSITORY / "docs/training.md").read_text("utf-8")
    assert "The launcher fills in" in page


# Pinned.


@overlays
def test_every_image_has_a_version_and_ours_have_that_of_the_package(overlay: str) -> None:
    text = json.dumps([*rendered(overlay), flow_job(overlay)])
    images = {c["image"] for pod in all_pods(overlay) for c in pod.containers} - {"dpnet:0"}
    images |= set(re.findall(r"registry\.example\.com/dpnet:[\w.-]+", text))
    for image in images:
        assert re.search(r":v?\d+\.\d+[\w.-]*$", image), image
        if "example.com" in image:
            assert image.partition(":")[2] in (f"{VERSION}-cpu", f"{VERSION}-cuda"), image
    assert any(image.endswith("-cuda") for image in images) == (overlay != "local")
    servers = {c["image"] for pod in all_pods(overlay) for c in pod.containers}
    assert not any(image.endswith("-cuda") for image in servers), "flow runs need no GPU"


@overlays
def test_ray_clusters_have_the_version_of_ray_that_is_tested_and_its_token(overlay: str) -> None:
    pinned = re.search(
        r"^ray==(.+)$", (REPOSITORY / "constraints.txt").read_text("utf-8"), re.MULTILINE
    )
    assert pinned is not None
    specs = [each["spec"] for each in of_kind(overlay, "RayCluster")]
    for spec in [*specs, ray_job(overlay)["spec"]["rayClusterSpec"]]:
        assert spec["rayVersion"] == pinned[1]
        assert spec["authOptions"] == {"mode": "token"}


# Consistent.


@overlays
def test_every_server_has_probes_and_a_disruption_budget_that_lets_a_node_be_drained(
    overlay: str,
) -> None:
    budgets = of_kind(overlay, "PodDisruptionBudget")
    for manifest in of_kind(overlay, "Deployment", "StatefulSet"):
        (container,) = manifest["spec"]["template"]["spec"]["containers"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert probe in container, f"{name_of(manifest)} has no {probe}"
        labels = manifest["spec"]["template"]["metadata"]["labels"]
        own = [each["spec"] for each in budgets if selects(each["spec"]["selector"], labels)]
        assert len(own) == 1, name_of(manifest)
        scaled = [each["spec"] for each in of_kind(overlay, "HorizontalPodAutoscaler")]
        minimum = {each["scaleTargetRef"]["name"]: each["minReplicas"] for each in scaled}
        name = manifest["metadata"]["name"]
        assert ("replicas" in manifest["spec"]) == (name not in minimum), name
        replicas = manifest["spec"].get("replicas") or minimum[name]
        assert own[0].get("minAvailable", replicas - 1) < replicas, name_of(manifest)
    assert len(budgets) == len(of_kind(overlay, "Deployment", "StatefulSet"))


@overlays
def test_every_service_leads_to_a_port_of_one_kind_of_pod(overlay: str) -> None:
    for service in of_kind(overlay, "Service"):
        found = [
            pod for pod in pod_specs(overlay)
            if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)
        ]  # fmt: skip
        assert len(found) == 1, name_of(service)
        names = {port["name"] for c in found[0].containers for port in c["ports"]}
        # Without it, older API servers refuse a server-side apply.
        assert all(port.get("protocol") for port in service["spec"]["ports"]), name_of(service)
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= names


@overlays
def test_every_config_map_that_a_pod_uses_exists(overlay: str) -> None:
    existing = {each["metadata"]["name"] for each in of_kind(overlay, "ConfigMap")}
    for pod in all_pods(overlay):
        used = set(re.findall(r'"configMap(?:Ref)?": {"name": "([^"]+)"', json.dumps(pod.spec)))
        assert used <= existing, pod.name


def known_overrides(settings: DeploySettings) -> list[str]:
    """All overrides, as soon as there is the launcher that they name."""
    if "kuberay" in get_args(LaunchSettings.model_fields["launcher"].annotation):
        return settings.overrides
    return [each for each in settings.overrides if not each.startswith("launch.")]


@overlays
def test_the_deployments_of_an_overlay_have_a_config_that_can_be_loaded(
    overlay: str, tmp_path: Path
) -> None:
    files = named(overlay, "ConfigMap", "dpnet-files")["data"]
    (tmp_path / "deploy.yaml").write_text(files["deploy.yaml"])
    settings = load_settings(DeploySettings, tmp_path / "deploy.yaml")
    config = load_config(settings.config, known_overrides(settings))
    assert config.train.gpus == (overlay != "local")
    assert config.images.source.startswith("s3://") or overlay == "local"
    assert settings.watch is None
    assert settings.retrain is None
    options = dict(each.split("=", 1) for each in settings.overrides)
    assert options["launch.launcher"] == "kuberay"
    assert options["launch.template"] == "/etc/dpnet/rayjob.yaml"
    assert options["launch.image"].endswith("-cpu" if overlay == "local" else "-cuda")
    for secret in options["launch.secrets"].strip("[]").split(","):
        assert (secret, "*") in secret_references(overlay)
    job = json.loads(files["base-job-template.json"])["job_configuration"]["job_manifest"]
    assert {"name": "files", "configMap": {"name": "dpnet-files"}} in (
        job["spec"]["template"]["spec"]["volumes"]
    )
    if config.train.cache:
        folder = Path(config.train.cache)
        (workers,) = ray_templates(ray_job(overlay)["spec"]["rayClusterSpec"])[1:]
        mounts = workers["spec"]["containers"][0]["volumeMounts"]
        assert any(folder.is_relative_to(mount["mountPath"]) for mount in mounts)


def test_gpus_are_asked_for_by_workers_only_and_spot_machines_are_tolerated_by_workers_only() -> (
    None
):
    for overlay, pool in (("gpu", "gpu"), ("spot", "gpu-spot")):
        head, workers = ray_templates(ray_job(overlay)["spec"]["rayClusterSpec"])
        gpu = workers["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
        assert gpu == "1"
        assert "nvidia.com/gpu" not in json.dumps(head)
        assert workers["spec"]["nodeSelector"] == {"dpnet/pool": pool}
        tolerated = {each["key"] for each in workers["spec"]["tolerations"]}
        assert ("dpnet/spot" in tolerated) == (overlay == "spot")
        assert "tolerations" not in head["spec"]
    head, _ = ray_templates(ray_job("spot")["spec"]["rayClusterSpec"])
    assert head["spec"]["nodeSelector"] == {"dpnet/pool": "on-demand"}


@overlays
def test_the_cluster_for_cpu_work_has_no_workers_without_work(overlay: str) -> None:
    spec = named(overlay, "RayCluster", "ray-cpu")["spec"]
    assert spec["enableInTreeAutoscaling"] is True
    (workers,) = spec["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"]) == (0, 0)
    assert workers["maxReplicas"] > 0
    assert spec["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}


# Network.

ALLOWED = [
    ("flow-run", "prefect-server", 4200),
    ("flow-run", "mlflow", 5000),
    ("flow-run", "training", 8265),
    ("flow-run", "ray-cpu", 10001),
    ("prefect-worker", "prefect-server", 4200),
    ("dpnet-deploy", "prefect-server", 4200),
    ("prefect-server", "postgres", 5432),
    ("prefect-migrate", "postgres", 5432),
    ("mlflow", "postgres", 5432),
    ("mlflow-upgrade", "postgres", 5432),
    ("training", "training", 6379),
]


def labels_of(overlay: str) -> dict[str, dict[str, str]]:
    return {pod.labels["app.kubernetes.io/name"]: dict(pod.labels) for pod in pod_specs(overlay)}


@overlays
def test_the_network_policies_allow_the_connections_that_are_needed_and_no_others(
    overlay: str,
) -> None:
    pods = labels_of(overlay)
    ports = (22, 443, 4200, 5000, 5432, 6379, 8080, 8265, 8400, 9808, 10001)
    found = {
        (start, end, port)
        for start in pods
        for end in pods
        for port in ports
        if connects(overlay, pods[start], pods[end], port)
    }
    assert set(ALLOWED) <= found
    ray = {"training", "ray-cpu"}
    others = {each for each in found - set(ALLOWED) if not (each[0] in ray and each[1] in ray)}
    # What clients of the servers may do too; a client of Ray still needs its token.
    clients = {"flow-run", "prefect-worker", "dpnet-deploy"}
    assert {start for start, _, _ in others} <= clients
    assert {(end, port) for _, end, port in others} <= {
        ("prefect-server", 4200), ("mlflow", 5000),
        ("training", 8265), ("training", 10001), ("ray-cpu", 8265), ("ray-cpu", 10001),
    }  # fmt: skip


@overlays
def test_each_server_admits_only_its_clients_whatever_others_may_send(overlay: str) -> None:
    pods = labels_of(overlay)
    admitted = {
        end: {start for start in pods if admits(overlay, pods[end], pods[start], port)}
        for end, port in (
            ("postgres", 5432),
            ("prefect-server", 4200),
            ("exporter", 9808),
            ("serve", 8400),
        )
    }
    assert admitted == {
        "postgres": {"prefect-server", "prefect-migrate", "mlflow", "mlflow-upgrade"},
        "prefect-server": {"flow-run", "prefect-worker", "dpnet-deploy"},
        "exporter": set(),  # Prometheus is in another namespace
        "serve": set(),  # and so is a gateway
    }


@overlays
def test_everything_else_is_denied_and_the_metadata_service_is_out_of_reach(overlay: str) -> None:
    deny = named(overlay, "NetworkPolicy", "deny")["spec"]
    assert deny == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for policy in of_kind(overlay, "NetworkPolicy"):
        for rule in policy["spec"].get("egress", []):
            for peer in rule["to"]:
                if block := peer.get("ipBlock"):
                    assert block["except"] == ["169.254.0.0/16"]
                    assert {port["port"] for port in rule["ports"]} == {443, 6443, 8443}


@overlays
def test_pods_that_use_storage_may_reach_it(overlay: str) -> None:
    policy = named(overlay, "NetworkPolicy", "storage-and-api")["spec"]["podSelector"]
    for pod in pod_specs(overlay):
        uses = "dpnet-storage" in json.dumps(pod.spec) or pod.name.startswith("RayJob")
        if uses or pod.spec["automountServiceAccountToken"]:
            assert selects(policy, pod.labels), pod.name
