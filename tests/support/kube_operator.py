"""A stand-in for KubeRay's operator: it moves RayJobs through the states of KubeRay 1.7.

The states, and what leads from one to the next, are those of `rayjob_controller.go`. What runs the
job is chosen by the test: `Script` only says how it goes; `RealRay` starts a real Ray cluster as
processes of this machine, with the entrypoint and the environment of the RayJob. It also deletes
what belongs to a deleted RayJob, as Kubernetes' garbage collector does.
"""

from __future__ import annotations

import base64
import calendar
import os
import secrets
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

from clusters import Cluster, ray_cluster
from kube_server import Namespace

CHECK_TIMEOUT_S = 15.0  # KubeRay's own is five minutes
FINALIZER = "ray.io/rayjob-finalizer"
MESSAGE = "Job entrypoint command failed with exit code {}, last available logs (truncated to" \
    " 20,000 chars):\n{}"  # fmt: skip


class Ray(Protocol):
    """The Ray cluster or the script that runs the job of one RayJob."""

    def start(self, job: dict[str, Any]) -> str:
        """Start the Ray cluster, and return its dashboard's address; "" if it is not ready."""

    def state(self, job: dict[str, Any]) -> tuple[str, str]:
        """Submit the job if it is not known, and return its status and message."""

    def stop_job(self) -> None:
        """Stop the job."""

    def end(self) -> None:
        """End the Ray cluster."""


class Script:
    """A Ray cluster that does what the test says.

    Attributes:
        ready: Whether its pods run.
        job: Status and message of its job.
    """

    def __init__(self) -> None:
        self.ready = True
        self.job = ("RUNNING", "")
        self.stopped = self.ended = False

    def start(self, job: dict[str, Any]) -> str:
        return "127.0.0.1:9" if self.ready else ""

    def state(self, job: dict[str, Any]) -> tuple[str, str]:
        return self.job

    def stop_job(self) -> None:
        self.stopped = True

    def end(self) -> None:
        self.ended = True

    def fail(self, code: int, *lines: str) -> None:
        """Let the driver end with an exit status and these last lines."""
        self.job = ("FAILED", MESSAGE.format(code, "\n".join(lines)))


class RealRay:
    """A head and a node for each worker pod, as processes of this machine.

    Args:
        namespace: Where the Secrets of the pods are.
        token_file: Gets the cluster's token, as a Secret would give it to who may read the log.
    """

    def __init__(self, namespace: Namespace, token_file: Path) -> None:
        self._namespace, self._token_file = namespace, token_file
        self._stack = ExitStack()
        self._cluster: Cluster | None = None
        self._client: Any = None
        self._submitted = ""

    def start(self, job: dict[str, Any]) -> str:
        if self._cluster is None:
            spec = job["spec"]["rayClusterSpec"]
            (workers,) = spec["workerGroupSpecs"]
            environment = {
                **self._environment(workers["template"]["spec"]["containers"][0]),
                # The image's `python`.
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            }
            self._cluster = self._stack.enter_context(ray_cluster(workers["replicas"], environment))
            self._token_file.write_text(self._cluster.token)
        return self._cluster.dashboard.removeprefix("http://")

    def state(self, job: dict[str, Any]) -> tuple[str, str]:
        from ray.job_submission import JobSubmissionClient

        assert self._cluster
        if self._client is None:
            headers = {"Authorization": f"Bearer {self._cluster.token}"}
            self._client = JobSubmissionClient(self._cluster.dashboard, headers=headers)
        name = job["status"]["jobId"]
        if name != self._submitted:
            self._client.submit_job(entrypoint=job["spec"]["entrypoint"], submission_id=name)
            self._submitted = name
        info = self._client.get_job_info(name)
        return str(info.status.value), info.message or ""

    def stop_job(self) -> None:
        if self._submitted:
            with suppress(Exception):
                self._client.stop_job(self._submitted)

    def end(self) -> None:
        self._stack.close()
        self._cluster = self._client = None

    @property
    def cluster(self) -> Cluster:
        assert self._cluster
        return self._cluster

    def _environment(self, container: dict[str, Any]) -> dict[str, str]:
        """Return the environment of a container, with the values of its Secrets."""
        found: dict[str, str] = {}
        for source in container.get("envFrom") or []:
            secret = self._namespace.core.read_namespaced_secret(
                source["secretRef"]["name"], self._namespace.name
            )
            for name, value in (secret.data or {}).items():
                found[name] = base64.b64decode(value).decode()
        own = {each["name"]: each["value"] for each in container.get("env") or []}
        return {**found, **{name: value for name, value in own.items() if name != "HOME"}}


class Operator:
    """The operator of one namespace, in a thread.

    Attributes:
        running: Whether it works; a test may switch it off.
        make: Makes what runs the job of a new RayJob.
        rays: What runs the jobs, by the RayJob's name; those that have ended too.
        forced: Status fields that replace those of a RayJob, by its name.
        ahead: Seconds by which the cluster's clock is ahead of this machine's.
    """

    def __init__(self, namespace: Namespace, make: Any = Script) -> None:
        self.namespace, self.make = namespace, make
        self.running = True
        self.rays: dict[str, Any] = {}
        self.forced: dict[str, dict[str, Any]] = {}
        self.ahead = 0.0
        self.error: BaseException | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop working, and end all Ray clusters."""
        self._ended.set()
        self._thread.join(60)
        for ray in self.rays.values():
            if ray is not None:
                ray.end()
        assert self.error is None, self.error

    def _work(self) -> None:
        import urllib3
        from kubernetes.client.exceptions import ApiException

        while not self._ended.wait(0.1):
            if not self.running:
                continue
            try:
                for job in self.namespace.objects().values():
                    self._reconcile(job)
            except ApiException as error:  # another one has changed it meanwhile
                if error.status not in (403, 404, 409, 503):
                    self.error = error
                    return
            except urllib3.exceptions.HTTPError:  # the API server restarts
                continue
            except BaseException as error:
                self.error = error
                return

    def _reconcile(self, job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        status = dict(job.get("status") or {})
        if job["metadata"].get("deletionTimestamp"):
            self._clean(job)
            return
        new = {**status, **self._next(job, status), **self.forced.get(name, {})}
        new = {field: value for field, value in new.items() if value is not None}
        if new != status:
            job["status"] = new
            self.namespace.custom.replace_namespaced_custom_object_status(
                *self.namespace.kinds(), name, job
            )

    def _next(self, job: dict[str, Any], status: dict[str, Any]) -> dict[str, Any]:
        """Return the changes of the status, as one step of KubeRay's reconciliation makes them."""
        spec, name = job["spec"], job["metadata"]["name"]
        ray = self.rays.setdefault(name, None)
        match status.get("jobDeploymentStatus", ""):
            case "":
                if FINALIZER not in (job["metadata"].get("finalizers") or []):
                    self._set_finalizers(name, [FINALIZER])
                    return {}
                return {
                    "jobId": spec["jobId"],
                    "rayClusterName": f"{name}-{secrets.token_hex(2)}x",
                    "jobDeploymentStatus": "Initializing",
                    "startTime": self._now(),
                }
            case "Initializing":
                if spec.get("suspend"):
                    return {"jobDeploymentStatus": "Suspending"}
                if late := self._late(spec, status):
                    return late
                if ray is None:
                    self._make_cluster(job, status["rayClusterName"])
                    ray = self.rays[name] = self.make()
                address = ray.start({**job, "status": status})
                if not address:
                    return {}
                return {"dashboardURL": address, "jobDeploymentStatus": "Running"}
            case "Running":
                if spec.get("suspend"):
                    return {"jobDeploymentStatus": "Suspending"}
                try:
                    state, message = ray.state({**job, "status": status})
                except Exception as error:  # its head does not answer
                    return self._unanswered(status, error)
                changes = {
                    "jobStatus": state,
                    "message": message,
                    "jobStatusCheckFailureStartTime": None,
                }
                if state in ("SUCCEEDED", "STOPPED"):
                    changes |= {"jobDeploymentStatus": "Complete", "endTime": self._now()}
                if state == "FAILED":
                    changes |= {
                        "jobDeploymentStatus": "Failed",
                        "reason": "AppFailed",
                        "endTime": self._now(),
                    }
                return changes
            case "Suspending":
                self._end(name, status.get("rayClusterName", ""))
                return {
                    "jobDeploymentStatus": "Suspended",
                    "jobStatus": "",
                    "rayClusterName": "",
                    "dashboardURL": "",
                    "jobId": "",
                }
            case "Suspended":
                return {} if spec.get("suspend") else {"jobDeploymentStatus": "", "jobStatus": ""}
            case "Complete" | "Failed":
                if spec.get("shutdownAfterJobFinishes") and not spec["ttlSecondsAfterFinished"]:
                    self._end(name, status.get("rayClusterName", ""))
        return {}

    def _unanswered(self, status: dict[str, Any], error: Exception) -> dict[str, Any]:
        since = status.get("jobStatusCheckFailureStartTime")
        if not since:
            return {"jobStatusCheckFailureStartTime": self._now()}
        if self._age(since) < CHECK_TIMEOUT_S:
            return {}
        return {
            "jobDeploymentStatus": "Failed",
            "reason": "JobStatusCheckTimeoutExceeded",
            "message": f"Job status checks have been failing since {since}: {error}"[:300],
            "endTime": self._now(),
        }

    def _late(self, spec: dict[str, Any], status: dict[str, Any]) -> dict[str, Any]:
        if self._age(status["startTime"]) < spec.get("preRunningDeadlineSeconds", 1e9):
            return {}
        return {
            "jobDeploymentStatus": "Failed",
            "reason": "PreRunningDeadlineExceeded",
            "message": "The RayJob has passed the preRunningDeadlineSeconds.",
        }

    def _make_cluster(self, job: dict[str, Any], name: str) -> None:
        owner = {
            "apiVersion": "ray.io/v1",
            "kind": "RayJob",
            "name": job["metadata"]["name"],
            "uid": job["metadata"]["uid"],
            "controller": True,
            "blockOwnerDeletion": True,
        }
        body = {
            "apiVersion": "ray.io/v1",
            "kind": "RayCluster",
            "metadata": {"name": name, "ownerReferences": [owner]},
            "spec": job["spec"]["rayClusterSpec"],
        }
        self.namespace.custom.create_namespaced_custom_object(
            *self.namespace.kinds("rayclusters"), body
        )

    def _clean(self, job: dict[str, Any]) -> None:
        """End what belongs to a RayJob that is being deleted, then let it go."""
        name, status = job["metadata"]["name"], job.get("status") or {}
        ray = self.rays.get(name)
        if ray is not None and status.get("jobStatus") not in ("SUCCEEDED", "FAILED", "STOPPED"):
            ray.stop_job()
        self._set_finalizers(name, [])
        self._end(name, status.get("rayClusterName", ""))

    def _end(self, name: str, cluster: str) -> None:
        from kubernetes.client.exceptions import ApiException

        ray = self.rays.get(name)
        if ray is not None:
            ray.end()
        if cluster:
            with suppress(ApiException):
                self.namespace.custom.delete_namespaced_custom_object(
                    *self.namespace.kinds("rayclusters"), cluster
                )

    def _set_finalizers(self, name: str, finalizers: list[str]) -> None:
        self.namespace.custom.patch_namespaced_custom_object(
            *self.namespace.kinds(), name, {"metadata": {"finalizers": finalizers}}
        )

    def _age(self, when: str) -> float:
        then = calendar.timegm(time.strptime(when, "%Y-%m-%dT%H:%M:%SZ"))
        return time.time() + self.ahead - then

    def _now(self) -> str:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + self.ahead))
