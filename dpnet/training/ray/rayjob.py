"""The RayJob of a training: pure functions from a template and the settings to the object.

KubeRay runs a RayJob: it starts a Ray cluster in pods, submits the entrypoint to it, reports, and
removes the pods at the end.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.core.errors import ConfigError
from data_prep.core.paths import RUNS
from data_prep.core.redact import has_credentials
from dpnet.training.settings import LaunchSettings, TrainSettings

GROUP, VERSION, PLURAL = "ray.io", "v1", "rayjobs"
MANAGER = "dpnet-pipeline"
RUN, NUMBER = f"{MANAGER}/run", f"{MANAGER}/attempt"  # labels
DIGEST, ROOT, FOLDER = (f"{MANAGER}/{each}" for each in ("digest", "root", "folder"))  # annotations
_MANAGED_BY = "app.kubernetes.io/managed-by"
_QUEUE = "kueue.x-k8s.io/queue-name"
_GPU = "nvidia.com/gpu"
# What restricted pods must say of each container.
_RESTRICTED = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
# KubeRay ends a job whose pods do not start, if no launcher does it.
_LATER_S = 120
# Kinds of volumes that each pod has for itself.
_OWN_VOLUMES = {"emptyDir", "configMap", "secret", "downwardAPI", "projected", "ephemeral"}


@dataclass(frozen=True)
class Attempt:
    """One start of a training on Kubernetes.

    Attributes:
        run: Name of the training's RayJobs, without the number: from the digest and the root.
        number: From 1.
        token: A word of its own for this start. Numbers come back after a clean-up.
        digest: The request digest.
        root: The root, as it is shown.
        folder: Key of the run's folder.
    """

    run: str
    number: int
    token: str
    digest: str
    root: str
    folder: str

    @property
    def name(self) -> str:
        """Return the RayJob's name."""
        return f"{self.run}-{self.number}"

    @property
    def job_id(self) -> str:
        """Return the name of the Ray job, under which the driver reports its status."""
        return f"{self.name}-{self.token}"


def render_rayjob(
    template: Mapping[str, Any],
    attempt: Attempt,
    launch: LaunchSettings,
    train: TrainSettings,
    ray_version: str,
    entrypoint: str,
) -> dict[str, Any]:
    """Return the RayJob to create.

    Args:
        template: A RayJob with the pods, from `launch.template` or the packaged one.
        attempt: The start that it is for.
        launch: Image, Secrets, queue and deadlines.
        train: Number of workers and whether they have GPUs.
        ray_version: Version of Ray to name where the template names none.
        entrypoint: Command of the job.

    Raises:
        ConfigError: The template cannot run a training.
    """
    job = json.loads(json.dumps(template, default=str))  # no part twice, as after a YAML alias
    cluster, head, workers = _parts(job)
    cluster.setdefault("rayVersion", ray_version)
    for place, pod in (("headGroupSpec", _pod(head)), ("workerGroupSpecs[0]", _pod(workers))):
        _fill_pod(pod, place, launch)
    _fill_workers(workers, train)
    if workers["minReplicas"] < workers["maxReplicas"]:  # Ray asks for the others
        cluster["enableInTreeAutoscaling"] = True
        # KubeRay's autoscaler is a container of the head, and asks Kubernetes for pods.
        _pod(head)["automountServiceAccountToken"] = True
        options = cluster.setdefault("autoscalerOptions", {})
        options.setdefault("securityContext", copy.deepcopy(_RESTRICTED))
    old = job.get("metadata") or {}
    labels = dict(old.get("labels") or {})
    if launch.queue:
        labels[_QUEUE] = launch.queue
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "RayJob",
        "metadata": {
            "name": attempt.name,
            "labels": {
                **labels,
                _MANAGED_BY: MANAGER,
                RUN: attempt.run,
                NUMBER: str(attempt.number),
            },
            "annotations": {**(old.get("annotations") or {}), **_marks(attempt)},
        },
        "spec": {
            **job["spec"],
            "entrypoint": entrypoint,
            "jobId": attempt.job_id,
            # KubeRay submits the job itself. If the head dies, it submits it again to the next.
            "submissionMode": "HTTPMode",
            "backoffLimit": 0,  # the launcher restarts, because it knows what can pass
            "preRunningDeadlineSeconds": launch.pending_s + _LATER_S,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": launch.ttl_s,
            "suspend": bool(launch.queue),  # Kueue admits it
        },
    }


def check_rayjob(
    template: Mapping[str, Any], launch: LaunchSettings, train: TrainSettings
) -> dict[str, Any]:
    """Return an example of the RayJob that a template and the settings make.

    Raises ConfigError if no training can be made from them.
    """
    example = Attempt("dpnet-check", 0, "word", "0", "s3://root", f"{RUNS}/check")
    return render_rayjob(template, example, launch, train, version("ray"), "true")


def check_shared_root(template: Mapping[str, Any], root: str) -> None:
    """Raise ConfigError if the pods of a template do not have the folder of a root.

    Args:
        template: The RayJob to start from.
        root: `s3://bucket/prefix`, or the path of a folder.
    """
    if root.startswith("s3://"):
        return
    folder = Path(root).expanduser().absolute()
    _, head, workers = _parts(template)
    if not all(_has_folder(_pod(group), folder) for group in (head, workers)):
        raise ConfigError(
            f"the root is {root}, a folder that the pods of a training do not have: set it to"
            " s3://BUCKET/PREFIX, or mount a shared volume there in all pods of launch.template."
        )


def _has_folder(pod: Mapping[str, Any], folder: Path) -> bool:
    """Return whether a pod mounts a volume at a folder that other pods can have too."""
    shared = {
        volume["name"] for volume in pod.get("volumes") or [] if not _OWN_VOLUMES & volume.keys()
    }
    return any(
        mount["name"] in shared and folder.is_relative_to(mount["mountPath"])
        for mount in pod["containers"][0].get("volumeMounts") or []
    )


def is_of(job: Mapping[str, Any], attempt: Attempt) -> bool:
    """Return whether a RayJob belongs to the training of an attempt."""
    found = job["metadata"].get("annotations") or {}
    return all(found.get(name) == value for name, value in _marks(attempt).items())


def number_of(job: Mapping[str, Any]) -> int:
    """Return the number of the attempt that a RayJob of ours is for, 0 for another one."""
    name, _, number = str(job["metadata"]["name"]).rpartition("-")
    labels = job["metadata"].get("labels") or {}
    return int(number) if labels.get(RUN) == name and number.isdecimal() else 0


def _marks(attempt: Attempt) -> dict[str, str]:
    return {DIGEST: attempt.digest, ROOT: attempt.root, FOLDER: attempt.folder}


def _parts(job: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return the cluster, the head and the group of workers of a template."""
    try:
        cluster = job["spec"]["rayClusterSpec"]
        head = cluster["headGroupSpec"]
        (workers,) = cluster["workerGroupSpecs"]
        for group in (head, workers):
            assert isinstance(_pod(group)["containers"][0], dict)
    except (KeyError, TypeError, ValueError, IndexError, AssertionError):
        raise ConfigError(
            "launch.template is not a RayJob for training: it needs spec.rayClusterSpec with"
            " headGroupSpec and exactly one of workerGroupSpecs, each with a container."
        ) from None
    if job["spec"].get("clusterSelector"):
        raise ConfigError(
            "launch.template has spec.clusterSelector, but each training gets a Ray cluster of its"
            " own: remove it. To train on an existing cluster, use the launcher ray-job."
        )
    return cluster, head, workers


def _pod(group: Mapping[str, Any]) -> dict[str, Any]:
    pod: dict[str, Any] = group["template"]["spec"]
    return pod


def _fill_pod(pod: dict[str, Any], place: str, launch: LaunchSettings) -> None:
    for container in _containers(pod):
        for variable in container.get("env") or []:
            name, value = variable.get("name"), variable.get("value")
            if value and has_credentials(f"{name}={value}"):
                raise ConfigError(
                    f"launch.template has the value of {name} in {place}, where everybody who may"
                    " see the RayJob can read it: put it into a Secret, and name the Secret in"
                    " launch.secrets or in the template."
                )
    ray = pod["containers"][0]
    if launch.image:
        ray["image"] = launch.image
    if not ray.get("image"):
        raise ConfigError(
            "launch.image is missing: the launcher kuberay needs a container image with dpnet and"
            " Ray, such as --set launch.image=registry/dpnet:0.2.0."
        )
    secrets = [{"secretRef": {"name": name}} for name in launch.secrets]
    if secrets:
        ray["envFrom"] = [*(ray.get("envFrom") or []), *secrets]


def _containers(pod: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    yield from pod["containers"]
    yield from pod.get("initContainers") or []


def _fill_workers(group: dict[str, Any], train: TrainSettings) -> None:
    """Set the number of worker pods, and a GPU for each if the template has none."""
    parameters = group.setdefault("rayStartParams", {})
    if train.gpus:
        each = _gpus(_pod(group)["containers"][0])
    else:
        each = _whole(parameters.setdefault("num-cpus", "1"), "rayStartParams.num-cpus")
    least = math.ceil((train.min_workers or train.workers) / each)
    most = math.ceil(train.workers / each)
    group.update(replicas=least, minReplicas=least, maxReplicas=most)


def _gpus(container: dict[str, Any]) -> int:
    """Return the number of GPUs of a container, after adding one if it has none."""
    limits = container.setdefault("resources", {}).setdefault("limits", {})
    for name, number in limits.items():
        if name.endswith("/gpu"):
            return _whole(number, f"resources.limits of {name}")
    limits[_GPU] = "1"
    return 1


def _whole(value: Any, what: str) -> int:
    text = str(value)
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(
            f"launch.template has {value!r} as {what} of its workers: give a whole number from 1,"
            " the number of training workers in each pod."
        )
    return int(text)
