"""The RayJob that a training becomes: what the launcher fills in, and what it refuses."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from data_prep.core.errors import ConfigError
from dpnet.training.ray.kube_client import ACCESS, read_template, role
from dpnet.training.ray.rayjob import (
    Attempt,
    check_shared_root,
    is_of,
    number_of,
    render_rayjob,
)
from dpnet.training.settings import LaunchSettings, TrainSettings

ATTEMPT = Attempt("dpnet-0123456789ab-cdef", 2, "a1b2c3", "0123456789abcdef", "s3://b/r", "runs/a")


def rendered(template: Any = None, train: Any = None, **launch: Any) -> dict[str, Any]:
    launch.setdefault("image", "registry/dpnet:1")
    settings = TrainSettings(**(train or {}))
    found = template or read_template(None)
    return render_rayjob(found, ATTEMPT, LaunchSettings(**launch), settings, "2.60.0", "run it")


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the pods of the head and of the workers."""
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [group["template"]["spec"] for group in groups]


def workers(job: dict[str, Any]) -> dict[str, Any]:
    (found,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return dict(found)


def test_the_name_says_the_digest_and_the_attempt_and_fits_kuberay() -> None:
    job = rendered()
    assert job["metadata"]["name"] == "dpnet-0123456789ab-cdef-2"
    assert len(job["metadata"]["name"]) <= 47
    assert job["spec"]["jobId"] == "dpnet-0123456789ab-cdef-2-a1b2c3"
    assert job["metadata"]["labels"] == {
        "app.kubernetes.io/managed-by": "dpnet-pipeline",
        "dpnet-pipeline/run": "dpnet-0123456789ab-cdef",
        "dpnet-pipeline/attempt": "2",
    }
    assert job["metadata"]["annotations"] == {
        "dpnet-pipeline/digest": "0123456789abcdef",
        "dpnet-pipeline/root": "s3://b/r",
        "dpnet-pipeline/folder": "runs/a",
    }


def test_the_same_inputs_give_the_same_rayjob_and_leave_the_template_alone() -> None:
    template = read_template(None)
    assert rendered(template, {"gpus": True}) == rendered(template, {"gpus": True})
    assert template == read_template(None)


def test_a_rayjob_is_recognized_by_its_marks_and_not_by_its_name() -> None:
    job = rendered()
    assert is_of(job, ATTEMPT)
    assert number_of(job) == 2
    for mark in ("digest", "root", "folder"):
        other = rendered()
        other["metadata"]["annotations"][f"dpnet-pipeline/{mark}"] = "another"
        assert not is_of(other, ATTEMPT)
    foreign = {"metadata": {"name": job["metadata"]["name"]}}
    assert not is_of(foreign, ATTEMPT)
    assert number_of(foreign) == 0


def test_kuberay_ends_the_pods_and_leaves_retries_to_the_launcher() -> None:
    spec = rendered(ttl_s=7, pending_s=100)["spec"]
    assert spec["entrypoint"] == "run it"
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["ttlSecondsAfterFinished"] == 7
    assert spec["backoffLimit"] == 0
    assert spec["submissionMode"] == "HTTPMode"
    assert 100 < spec["preRunningDeadlineSeconds"] < 400  # the launcher comes first
    assert spec["suspend"] is False


def test_a_queue_suspends_the_job_until_kueue_admits_it() -> None:
    job = rendered(queue="gpus")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert job["spec"]["suspend"] is True


@pytest.mark.parametrize(
    ("train", "limits", "cpus", "replicas"),
    [
        ({"workers": 4}, {}, "1", (4, 4)),
        ({"workers": 4}, {}, "3", (2, 2)),
        ({"workers": 4, "min_workers": 2}, {}, "1", (2, 4)),
        ({"workers": 16, "gpus": True}, {}, "1", (16, 16)),
        ({"workers": 16, "gpus": True}, {"nvidia.com/gpu": 8}, "1", (2, 2)),
        ({"workers": 12, "gpus": True}, {"amd.com/gpu": "8"}, "1", (2, 2)),
    ],
)
def test_there_are_as_many_worker_pods_as_the_workers_need(
    train: dict[str, Any], limits: dict[str, Any], cpus: str, replicas: tuple[int, int]
) -> None:
    template = read_template(None)
    group = workers(template)
    group["rayStartParams"]["num-cpus"] = cpus
    group["template"]["spec"]["containers"][0]["resources"]["limits"].update(limits)
    job = rendered(template, train)
    found = workers(job)
    assert (found["minReplicas"], found["maxReplicas"]) == replicas
    assert found["replicas"] == replicas[0]
    scaled = job["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling", False)
    assert scaled is (replicas[0] < replicas[1])
    head, worker = pods(job)
    assert head["automountServiceAccountToken"] is scaled
    restricted = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    options = job["spec"]["rayClusterSpec"].get("autoscalerOptions", {})
    assert options.get("securityContext") == (restricted if scaled else None)
    assert worker["automountServiceAccountToken"] is False


def test_gpus_are_asked_for_only_where_training_uses_them() -> None:
    head, plain = pods(rendered())
    assert "nvidia.com/gpu" not in plain["containers"][0]["resources"]["limits"]
    head, with_gpu = pods(rendered(train={"gpus": True}))
    assert with_gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in head["containers"][0]["resources"]["limits"]


def test_secrets_are_only_named() -> None:
    for pod in pods(rendered(secrets=("storage", "ray"))):
        assert pod["containers"][0]["envFrom"] == [
            {"secretRef": {"name": "storage"}},
            {"secretRef": {"name": "ray"}},
        ]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "abc"),
        ("RAY_AUTH_TOKEN", "abc"),
        ("TRACKING", "http://user:word@host"),
    ],
)
def test_a_credential_in_the_template_is_refused(name: str, value: str) -> None:
    template = read_template(None)
    pods(template)[1]["containers"][0]["env"] = [{"name": name, "value": value}]
    with pytest.raises(ConfigError, match=f"has the value of {name} in .*: put it into a Secret"):
        rendered(template)


def test_the_packaged_pods_are_restricted() -> None:
    for pod in pods(rendered(train={"gpus": True})):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        (container,) = pod["containers"]
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert container["image"] == "registry/dpnet:1"
    assert rendered()["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_the_template_keeps_what_the_launcher_does_not_fill_in() -> None:
    template = read_template(None)
    template["metadata"] = {"labels": {"team": "a"}, "annotations": {"note": "b"}, "name": "x"}
    template["spec"]["activeDeadlineSeconds"] = 99
    template["spec"]["rayClusterSpec"]["rayVersion"] = "2.61.0"
    pods(template)[0]["containers"][0]["image"] = "registry/other:2"
    job = rendered(template)
    assert job["metadata"]["labels"]["team"] == "a"
    assert job["metadata"]["annotations"]["note"] == "b"
    assert job["metadata"]["name"] == ATTEMPT.name
    assert job["spec"]["activeDeadlineSeconds"] == 99
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == "2.61.0"
    pods(template)[1]["containers"][0]["image"] = "registry/other:2"
    assert {pod["containers"][0]["image"] for pod in pods(rendered(template, image=None))} == {
        "registry/other:2"
    }


def test_a_missing_image_is_named() -> None:
    with pytest.raises(ConfigError, match=r"launch\.image is missing"):
        rendered(image=None)


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda spec: spec.pop("rayClusterSpec"), "is not a RayJob for training"),
        (lambda spec: spec["rayClusterSpec"].pop("workerGroupSpecs"), "exactly one of worker"),
        (lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"].append({}), "exactly one of"),
        (
            lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"].update(
                containers=[]
            ),
            "each with a container",
        ),
        (lambda spec: spec.update(clusterSelector={"ray.io/cluster": "a"}), "use the launcher ray"),
        (
            lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0]["rayStartParams"].update(
                {"num-cpus": "many"}
            ),
            "has 'many' as rayStartParams.num-cpus",
        ),
    ],
)
def test_a_template_that_cannot_train_is_refused(break_it: Any, told: str) -> None:
    template = read_template(None)
    break_it(template["spec"])
    with pytest.raises(ConfigError, match=told):
        rendered(template)


def test_a_template_that_is_not_a_rayjob_is_refused(tmp_path: Path) -> None:
    for text, told in (("[", "cannot be read as YAML"), ("kind: Pod", "is not a RayJob")):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ConfigError, match=told):
            read_template(str(tmp_path / "a.yaml"))
    with pytest.raises(ConfigError, match=r"but there is no such file"):
        read_template(str(tmp_path / "missing.yaml"))


def test_the_role_has_no_right_to_read_secrets_or_to_change_anything_but_rayjobs() -> None:
    rights = {(group, kind): set(verbs) for group, kind, verbs in ACCESS}
    assert rights == {
        ("ray.io", "rayjobs"): {"create", "get", "list", "watch", "delete"},
        ("", "pods"): {"list"},
        ("", "events"): {"list"},
    }
    rules = role("train")["rules"]
    assert [set(rule["verbs"]) for rule in rules] == list(rights.values())
    assert role("train")["metadata"]["namespace"] == "train"


def test_the_role_in_the_documentation_is_the_one_that_the_launcher_needs() -> None:
    page = (Path(__file__).parents[5] / "docs/training.md").read_text("utf-8")
    begin = page.index("    apiVersion: rbac")
    found = yaml.safe_load(textwrap.dedent(page[begin : page.index("\n\n", begin)]))
    assert found["rules"] == role("any")["rules"]
    assert found["metadata"]["name"] == role("any")["metadata"]["name"]


SHARED = {"name": "data", "persistentVolumeClaim": {"claimName": "data"}}
OWN = {"name": "data", "emptyDir": {}}


@pytest.mark.parametrize(
    ("root", "volume", "groups", "fits"),
    [
        ("s3://bucket/root", None, [], True),
        ("/data/dpnet", None, [], False),
        ("/data/dpnet", SHARED, [0, 1], True),
        ("/data", SHARED, [0, 1], True),
        ("/database", SHARED, [0, 1], False),
        ("/data/dpnet", SHARED, [0], False),
        ("/data/dpnet", OWN, [0, 1], False),
    ],
)
def test_a_root_that_the_pods_do_not_have_is_refused(
    root: str, volume: dict[str, Any] | None, groups: list[int], fits: bool
) -> None:
    template = json.loads(json.dumps(read_template(None)))  # no part twice
    for number in groups:
        pod = pods(template)[number]
        pod["volumes"].append(volume)
        pod["containers"][0]["volumeMounts"].append({"name": "data", "mountPath": "/data"})
    if fits:
        check_shared_root(template, root)
    else:
        with pytest.raises(ConfigError, match=f"the root is {root}, a folder that the pods"):
            check_shared_root(template, root)


@pytest.mark.parametrize(
    "launch",
    [{"namespace": "Bad_NS"}, {"secrets": ("No_Such",)}, {"image": "Bad Image!"}],
)
def test_a_name_that_kubernetes_cannot_have_is_refused(launch: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="such as"):
        LaunchSettings(**launch)
    good = {"namespace": "my-team", "secrets": ("a.b-1",), "image": "host:5000/a/b@sha256:0"}
    LaunchSettings(**good)  # type: ignore[arg-type]
