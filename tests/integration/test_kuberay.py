"""The launcher `kuberay` on a real Kubernetes API server, in which everything goes wrong once.

The API server, its rights, tokens, watches and validation are real. In place of KubeRay's operator,
one of ours moves the RayJobs through KubeRay's states; no Ray runs here.
"""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from clusters import wait_until
from kube_operator import Operator, Script
from kube_server import Busy, KubeProxy, KubeServer, Namespace, kube_proxy

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.storage.local import LocalStore
from dpnet.training.ray import follow_rayjob, kube_client, launch_kuberay
from dpnet.training.ray.kube_client import (
    ACCESS,
    Kube,
    KubeError,
    check_cluster,
    read_template,
    role,
)
from dpnet.training.ray.launch_job import EXPLAINED
from dpnet.training.ray.launch_kuberay import KubeRayLauncher
from dpnet.training.ray.rayjob import check_rayjob
from dpnet.training.settings import LaunchSettings, TrainSettings

pytestmark = [pytest.mark.integration, pytest.mark.slow]
DIGEST = "0123456789abcdef" * 4


@dataclass
class Place:
    """A namespace with an operator, behind a proxy, and a root."""

    namespace: Namespace
    proxy: KubeProxy
    operator: Operator
    folder: Path

    def launcher(self, failures: int = 1, **launch: Any) -> KubeRayLauncher:
        job: Any = SimpleNamespace(to_json=dict, settings=TrainSettings(max_failures=failures))
        work: Any = SimpleNamespace(
            store=LocalStore(self.folder / "root"),
            folder="runs/a-1",
            request=SimpleNamespace(digest=DIGEST),
            key="runs/a-1/{}".format,
        )
        settings = LaunchSettings(image="registry/dpnet:1", **launch)
        return KubeRayLauncher(job, settings, work)

    def started(self, failures: int = 1, **launch: Any) -> KubeRayLauncher:
        launcher = self.launcher(failures, **launch)
        launcher.start()
        return launcher

    def running(self, failures: int = 1, **launch: Any) -> KubeRayLauncher:
        """Start a launcher, and return it when its job is running."""
        launcher = self.started(failures, **launch)
        until(launcher, lambda: launcher._kind == "running")
        return launcher

    def script(self, number: int = 1) -> Script:
        """Return what runs the job of an attempt."""
        name = f"{self.launcher().name}-{number}"
        wait_until(lambda: self.operator.rays.get(name), "no Ray cluster")
        found: Script = self.operator.rays[name]
        return found

    def names(self) -> list[str]:
        """Return the RayJobs by the end of their names."""
        return [name.rpartition("-")[2] for name in self.namespace.objects()]

    def is_clean(self) -> bool:
        return not self.namespace.objects() and not self.namespace.objects("rayclusters")


def until(launcher: KubeRayLauncher, true: Callable[[], object], seconds: float = 30) -> None:
    """Ask a launcher whether it is running, until something is true."""

    def step() -> bool:
        assert launcher.is_running()
        return bool(true())

    wait_until(step, "it does not come so far", seconds)


def finish(launcher: KubeRayLauncher, seconds: float = 30) -> None:
    """Follow a training to its end, as `run_training` does."""
    wait_until(lambda: not launcher.is_running(), "it does not end", seconds)
    launcher.cancel()


def fails(launcher: KubeRayLauncher, seconds: float = 30) -> str:
    """Follow a training until it fails, and return the error."""
    with pytest.raises(PipelineError) as found:
        wait_until(lambda: not launcher.is_running(), "it does not fail", seconds)
    launcher.cancel()
    return str(found.value)


@pytest.fixture(scope="module")
def proxy(kubernetes_api: KubeServer) -> Iterator[KubeProxy]:
    with kube_proxy(kubernetes_api) as proxy:
        yield proxy


@pytest.fixture
def place(
    kubernetes_api: KubeServer,
    proxy: KubeProxy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> Iterator[Place]:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(launch_kuberay, "TRY_S", 0.2)
    monkeypatch.setattr(launch_kuberay, "EXPLAIN_S", 0.2)
    monkeypatch.setattr(follow_rayjob, "LONGEST_WAIT_S", 1.0)
    # The dashboard of an operator without Ray answers nobody.
    monkeypatch.setattr(launch_kuberay, "_show_log", lambda address, job: None)
    namespace = kubernetes_api.make_namespace()
    config = namespace.kubeconfig(tmp_path / "kubeconfig", proxy.url)
    monkeypatch.setenv("KUBECONFIG", str(config))
    operator = Operator(namespace)
    proxy.requests.clear()
    yield Place(namespace, proxy, operator, tmp_path)
    operator.close()


def test_a_training_runs_to_its_end_with_exactly_the_rights_of_the_role_and_leaves_nothing(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    launcher = place.running()
    assert place.names() == ["1"]
    again = place.started()  # the same command, after the first was killed
    assert again.attempt == launcher.attempt
    assert "attached to the RayJob" in caplog.text
    job = place.namespace.objects()[f"{launcher.name}-1"]
    assert f"dpnet.ray_driver {launcher.attempt} " in job["spec"]["entrypoint"]
    place.script().job = ("SUCCEEDED", "")
    finish(again)
    wait_until(place.is_clean, "something is left")
    # A conflict reads the other's RayJob.
    with pytest.raises(KubeError):
        again._kube.get("missing")
    asked = {(group, kind, verb) for group, kind, verbs in ACCESS for verb in verbs}
    assert place.namespace.server.used(place.namespace.name) == asked


def test_two_launchers_at_once_make_one_rayjob(place: Place) -> None:
    launchers = [place.launcher() for _ in range(4)]
    for launcher in launchers:  # nobody sees the RayJob of another one before making its own
        launcher._ours = list  # type: ignore[method-assign]
    threads = [threading.Thread(target=launcher.start) for launcher in launchers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert place.names() == ["1"]
    assert len({launcher.attempt for launcher in launchers}) == 1
    assert place.proxy.count("POST") == 4


def test_a_foreign_rayjob_of_the_same_name_is_left_alone(place: Place) -> None:
    name = f"{place.launcher().name}-1"
    body = {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": name}, "spec": {}}
    place.operator.running = False
    place.namespace.custom.create_namespaced_custom_object(*place.namespace.kinds(), body)
    launcher = place.launcher()
    with pytest.raises(
        PipelineError, match=rf"{name} exists, and is not of this training: .*delete"
    ):
        launcher.start()
    launcher.cancel()
    assert name in place.namespace.objects()


def test_another_root_is_another_rayjob(place: Place) -> None:
    first = place.started()
    place.folder = place.folder / "other"
    assert place.started().attempt != first.attempt
    assert len(place.namespace.objects()) == 2


def test_the_api_server_may_be_away_and_the_end_of_the_job_is_still_seen(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    launcher = place.running()
    with place.proxy.outage():
        until(launcher, lambda: "does not do as asked" in caplog.text)
        place.script().job = ("SUCCEEDED", "")
        began = time.monotonic()
        until(launcher, lambda: time.monotonic() - began > 2)
    finish(launcher)
    assert caplog.text.count("does not do as asked") == 1


def test_an_api_server_that_stays_away_is_waited_for_until_the_deadline(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_kuberay, "STOP_S", 1.0)
    launcher = place.running(deadline_s=2)
    with place.proxy.outage():
        assert re.match(r"Kubernetes has not answered for 2 s \(.+\): the same", fails(launcher))
    with place.proxy.outage():
        second = place.started(deadline_s=1)  # it may be away from the start
        assert "no RayJob could be created in 1 s" in fails(second)
    assert place.names() == ["1"]  # it goes on training


def test_a_restart_of_the_api_server_ends_nothing(place: Place) -> None:
    launcher = place.running()
    place.namespace.server.restart()
    place.script().job = ("SUCCEEDED", "")
    finish(launcher, 60)
    wait_until(place.is_clean, "something is left")


def test_watches_that_end_or_begin_too_late_are_followed_by_others(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube_client, "WATCH_S", 1)
    launcher = place.running()
    lists = place.proxy.count("GET", "fieldSelector=metadata.name") - place.proxy.count(
        "GET", "watch=True"
    )
    watches = place.proxy.count("GET", "watch=True")
    until(launcher, lambda: place.proxy.count("GET", "watch=True") > watches + 1)

    def listed() -> int:
        both = place.proxy.count("GET", "fieldSelector=metadata.name")
        return both - place.proxy.count("GET", "watch=True")

    assert listed() == lists  # the server ended the watch: no need to list
    place.proxy.old = 1
    until(launcher, lambda: listed() == lists + 1)  # 410: it lists again
    place.proxy.cut()
    place.script().job = ("SUCCEEDED", "")
    finish(launcher)


def test_a_server_with_too_much_to_do_is_asked_again_when_it_says(place: Place) -> None:
    place.proxy.busy = Busy(2, "POST", wait=1)
    launcher = place.started()
    until(launcher, lambda: launcher.attempt)
    times = [at for at, method, _ in place.proxy.requests if method == "POST"]
    assert [later - at >= 1 for at, later in pairwise(times)] == [True, True]
    place.proxy.busy = Busy(3, "GET")
    place.proxy.cut()
    place.script().job = ("SUCCEEDED", "")
    finish(launcher)


def test_a_token_that_was_rotated_is_read_again(place: Place, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("an-old-token")
    place.namespace.kubeconfig(tmp_path / "kubeconfig", place.proxy.url, tokenFile=str(token))
    kube = Kube(None, None)
    with pytest.raises(KubeError, match="refuses the credentials"):
        kube.jobs()
    with pytest.raises(PipelineError, match="refuses the credentials of this user"):
        place.started()
    token.write_text(place.namespace.token())
    assert kube.jobs()[0] == []


@pytest.mark.parametrize("verb", ["create", "list", "watch"])
def test_a_missing_right_is_named(place: Place, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_kuberay, "SETTLE_S", 1.0)
    change_role(place, "rayjobs", lambda verbs: [each for each in verbs if each != verb])
    with pytest.raises(PipelineError) as found:
        finish(place.started())
    assert (
        f"this user may not {verb} rayjobs.ray.io in the namespace {place.namespace.name}"
        in str(found.value)
    )
    assert f"system:serviceaccount:{place.namespace.name}:flows" in str(found.value)
    assert f"give it the verb {verb} on rayjobs.ray.io" in str(found.value)


def test_a_training_runs_without_the_right_to_look_at_pods(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    change_role(place, "pods", lambda verbs: ["watch"])
    place.operator.make = unready
    launcher = place.started()
    until(
        launcher, lambda: "its pods cannot be looked at, because this user may not" in caplog.text
    )
    place.script().ready = True
    until(launcher, lambda: launcher._kind == "running")


def unready() -> Script:
    script = Script()
    script.ready = False
    return script


def change_role(place: Place, resource: str, change: Callable[[list[str]], list[str]]) -> None:
    from kubernetes import client

    changed = role(place.namespace.name)
    for rule in changed["rules"]:
        if rule["resources"] == [resource]:
            rule["verbs"] = change(rule["verbs"])
    rbac = client.RbacAuthorizationV1Api(place.namespace.api)
    rbac.replace_namespaced_role(changed["metadata"]["name"], place.namespace.name, changed)


NO_IMAGE = {
    "phase": "Pending",
    "containerStatuses": [
        {
            "name": "ray", "image": "registry/dpnet:1", "imageID": "", "ready": False,
            "restartCount": 0,
            "state": {"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling"}},
        }
    ],
}  # fmt: skip
NO_NODE = {
    "phase": "Pending",
    "conditions": [
        {
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.",
        }
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("status", "event", "told"),
    [
        (NO_IMAGE, None, r"pod head: ImagePullBackOff \(Back-off pulling\)"),
        (NO_NODE, None, r"pod head: Unschedulable \(0/3 nodes .* nvidia.com/gpu\)"),
        (None, "exceeded quota: gpus", r"FailedToCreateHeadPod: exceeded quota: gpus"),
        (None, None, r"because it waits for its pods: remove"),
    ],
)
def test_pods_that_do_not_start_end_at_the_deadline_with_the_clusters_reason(
    place: Place, status: Any, event: str | None, told: str
) -> None:
    place.operator.make = unready
    launcher = place.started(pending_s=2)
    name = f"{launcher.name}-1"
    place.script()
    (cluster,) = place.namespace.objects("rayclusters")
    if status:
        place.namespace.pod(cluster, "head", status)
    if event:
        place.namespace.event(cluster, "FailedToCreateHeadPod", event)
    error = fails(launcher)
    assert re.search(
        rf"{name} did not start in 2 s, because it waits for its pods.*{told}|{told}", error
    )
    assert "raise launch.pending_s; the same command resumes." in error
    wait_until(place.is_clean, "something is left")


def test_a_rayjob_that_no_operator_takes_up_says_so(place: Place) -> None:
    place.operator.running = False
    error = fails(place.started(pending_s=1))
    assert "is not seen by KubeRay's operator (is it running, and does it watch" in error
    assert place.is_clean()


def test_a_death_is_followed_by_the_next_attempt_and_the_last_by_an_error(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    launcher = place.running(failures=1)
    place.script(1).fail(137, "at work", "Killed")
    until(launcher, lambda: launcher.attempt.startswith(f"{launcher.name}-2-"))
    assert "-1 died (Killed): the next attempt resumes from its last checkpoint" in caplog.text
    until(launcher, lambda: launcher._kind == "running")
    assert place.script(1).ended
    label = f"The RayJob {place.namespace.name}/{launcher.name}"
    assert launcher.facts == [
        f"{label}-1 died (Killed).",
        f"{label}-2 trains. Ray dashboard: http://127.0.0.1:9",
    ]
    later = place.started()  # the reasons of earlier attempts are on the page of a later run too
    assert later.attempt == launcher.attempt
    assert "train: attempt 1 died (Killed)" in caplog.text
    assert later.facts[0] == launcher.facts[0]
    place.script(2).fail(1, "at work", "out of luck")
    assert re.search(r"-2 died \(out of luck\), and train.max_failures is 1: ", fails(launcher))
    wait_until(place.is_clean, "something is left")


@pytest.mark.parametrize(
    ("code", "last", "told"),
    [
        (EXPLAINED, "the disk is full.", r"^the disk is full\.$"),
        (127, "sh: 1: python: not found", r"the image registry/dpnet:1 has no dpnet \(sh: 1: "),
        (1, "No module named 'dpnet'", r"set launch\.image to one that has it"),
    ],
)
def test_an_error_that_another_attempt_cannot_fix_ends_training(
    place: Place, code: int, last: str, told: str
) -> None:
    launcher = place.running()
    place.script().fail(code, "at work", last)
    assert re.search(told, fails(launcher))
    wait_until(place.is_clean, "something is left")
    assert len(place.operator.rays) == 1


@pytest.mark.parametrize(
    ("deployment", "reason", "told"),
    [
        ("ValidationFailed", "ValidationFailed", r"was refused by KubeRay \(as told\): correct"),
        ("Failed", "DeadlineExceeded", "has run for its activeDeadlineSeconds: raise them"),
        ("Failed", "PreRunningDeadlineExceeded", "did not start before its preRunningDeadline"),
        ("Failed", "SubmissionFailed", None),
        ("Failed", "AppFailed", None),
        ("Failed", "JobStatusCheckTimeoutExceeded", None),
        ("Failed", "JobDeploymentStatusTransitionGracePeriodExceeded", None),
    ],
)
def test_a_failure_that_kuberay_reports_is_final_or_followed_by_another_attempt(
    place: Place, deployment: str, reason: str, told: str | None
) -> None:
    launcher = place.running()
    status = {"jobDeploymentStatus": deployment, "reason": reason, "message": "as told."}
    place.operator.forced[f"{launcher.name}-1"] = status
    if told:
        assert re.search(told, fails(launcher))
        wait_until(place.is_clean, "something is left")
    else:
        until(launcher, lambda: launcher.attempt.startswith(f"{launcher.name}-2-"))
        until(launcher, lambda: launcher._kind == "running")


def test_the_pods_of_a_failed_job_stay_if_asked(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    launcher = place.running(ttl_s=600)
    place.script().fail(EXPLAINED, "the disk is full.")
    fails(launcher)
    assert f"describe rayjob {launcher.name}-1" in caplog.text
    assert place.names() == ["1"]
    assert not place.script().ended
    place.script().job = ("RUNNING", "")
    again = place.running()
    assert again.attempt.startswith(f"{launcher.name}-2-")
    assert "train: attempt 1 has ended: the disk is full" in caplog.text
    assert again.facts[0].endswith("-1 has ended: the disk is full.")
    again.cancel()
    wait_until(place.is_clean, "something is left")


def test_a_rayjob_that_was_deleted_by_hand_ends_training(place: Place) -> None:
    launcher = place.running()
    place.namespace.custom.delete_namespaced_custom_object(
        *place.namespace.kinds(), f"{launcher.name}-1"
    )
    assert re.search(r"was deleted, by hand or with its namespace: the same", fails(launcher))


def test_a_rayjob_that_was_deleted_after_its_end_was_a_success(place: Place) -> None:
    launcher = place.running()  # KubeRay's operator can be set to delete what is finished
    place.script().job = ("SUCCEEDED", "")
    name = f"{launcher.name}-1"
    job = place.namespace.kinds()

    def finished() -> bool:
        return place.namespace.objects()[name]["status"].get("jobStatus") == "SUCCEEDED"

    with place.proxy.outage():
        wait_until(finished, "it does not end")
    place.namespace.custom.delete_namespaced_custom_object(*job, name)
    finish(launcher)


def test_a_stopped_job_is_not_started_again(place: Place) -> None:
    launcher = place.running()
    place.script().job = ("STOPPED", "")
    assert re.search(r"-1 was stopped: the same command resumes it\.", fails(launcher))
    assert len(place.operator.rays) == 1


def test_cancelling_before_a_pod_starts_deletes_the_rayjob(place: Place) -> None:
    place.operator.make = unready
    launcher = place.started()
    place.script()
    launcher.cancel()
    assert place.is_clean()
    place.operator.running = False
    unseen = place.started()  # KubeRay's operator does not know it yet
    assert place.names() == ["1"]
    unseen.cancel()
    assert place.is_clean()


def test_cancelling_stops_the_job_and_leaves_nothing(place: Place) -> None:
    launcher = place.running()
    launcher.cancel()
    assert place.script().stopped
    wait_until(place.is_clean, "something is left")
    assert place.running().attempt != launcher.attempt  # its status is told from the old one's


def test_cancelling_without_an_operator_ends_and_says_what_may_run(
    place: Place, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(launch_kuberay, "STOP_S", 1.0)
    launcher = place.running()
    place.operator.running = False
    began = time.monotonic()
    launcher.cancel()
    assert time.monotonic() - began < 10
    assert "RayJobs may still run (they are still being deleted): kubectl -n" in caplog.text
    place.operator.running = True


def test_a_job_waits_in_its_queue_until_kueue_admits_it(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    launcher = place.started(queue="gpus")
    until(launcher, lambda: "waits in Kueue's queue gpus" in caplog.text)
    admit = {"spec": {"suspend": False}}
    name = f"{launcher.name}-1"
    place.namespace.custom.patch_namespaced_custom_object(*place.namespace.kinds(), name, admit)
    until(launcher, lambda: launcher._kind == "running")


def test_an_unknown_field_of_the_template_is_refused(place: Place, tmp_path: Path) -> None:
    template = kube_client.read_template(None)
    template["spec"]["backofLimit"] = 3
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(template))
    with pytest.raises(
        PipelineError, match=r'unknown field "spec.backofLimit".*correct launch\.temp'
    ):
        place.started(template=str(tmp_path / "job.yaml"))


@pytest.mark.parametrize("gpus", [False, True])
def test_the_api_server_takes_every_field_of_a_rayjob_with_all_options(
    place: Place, gpus: bool
) -> None:
    place.operator.running = False
    launcher = place.launcher(queue="gpus", secrets=("storage", "token"), ttl_s=60)
    settings = TrainSettings(workers=8, min_workers=2, gpus=gpus)
    launcher.job = SimpleNamespace(to_json=dict, settings=settings)  # type: ignore[assignment]
    launcher.start()
    (job,) = place.namespace.objects().values()
    (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert [workers[each] for each in ("replicas", "minReplicas", "maxReplicas")] == [2, 2, 8]
    launcher.cancel()
    assert place.is_clean()


def test_a_namespace_that_is_being_deleted_or_missing_is_named(place: Place) -> None:
    with pytest.raises(PipelineError, match=r"may not list .* in the namespace elsewhere"):
        place.started(namespace="elsewhere")
    place.namespace.core.delete_namespace(place.namespace.name)
    with pytest.raises(PipelineError, match=r"is being deleted\): wait until it is gone"):
        place.started()


def test_a_missing_namespace_is_named_to_who_may_see_it(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KUBECONFIG", str(place.namespace.server.folder / "admin.kubeconfig"))
    with pytest.raises(PipelineError, match=r"there is no namespace nowhere\): make it with"):
        place.started(namespace="nowhere")


def test_a_context_that_is_missing_is_named(place: Place) -> None:
    with pytest.raises(
        ConfigError, match=r"launch\.context is 'gone', but the kubeconfig has: here"
    ):
        place.started(context="gone")


def test_an_untrusted_api_server_is_not_asked_again(place: Place, tmp_path: Path) -> None:
    config = yaml.safe_load((tmp_path / "kubeconfig").read_text())
    del config["clusters"][0]["cluster"]["certificate-authority"]
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
    with pytest.raises(PipelineError, match=r"is not trusted: .*check the certificate-authority"):
        place.started()


HOURS = 3600.0


@pytest.mark.parametrize("ahead", [-5 * HOURS, 5 * HOURS])
def test_deadlines_do_not_depend_on_the_clock_of_the_cluster(
    place: Place, caplog: pytest.LogCaptureFixture, ahead: float
) -> None:
    place.operator.ahead = ahead
    place.operator.make = unready
    launcher = place.started(pending_s=60)
    place.script()
    (cluster,) = place.namespace.objects("rayclusters")
    place.namespace.event(cluster, "Failed", "an older one", ahead=ahead - 60)
    place.namespace.event(cluster, "Failed", "a newer one", ahead=ahead)
    until(launcher, lambda: "Failed: a newer one" in caplog.text)
    began = time.monotonic()
    until(launcher, lambda: time.monotonic() - began > 3)
    place.script().ready = True
    until(launcher, lambda: launcher._kind == "running")
    launcher.cancel()
    wait_until(place.is_clean, "something is left")
    place.operator.rays.clear()  # the next one has the same name
    assert "did not start in 2 s" in fails(place.started(pending_s=2))


@pytest.mark.parametrize(
    ("first", "last", "told"),
    [(-40, -10, "has expired"), (10, 40, "is not yet valid")],
)
def test_a_certificate_of_another_time_is_an_error_that_names_the_clock(
    place: Place, tmp_path: Path, first: int, last: int, told: str
) -> None:
    key = certificate(place.namespace.server, tmp_path, first, last)
    with kube_proxy(place.namespace.server, key) as proxy:
        place.namespace.kubeconfig(tmp_path / "kubeconfig", proxy.url)
        with pytest.raises(PipelineError) as found:
            place.started()
    assert re.search(
        rf"\(the certificate of https://127\.0\.0\.1:\d+ {told}, by the clock of this machine:"
        r" \d{4}-\d\d-\d\d \d\d:\d\d UTC\): set the clock if it is wrong",
        str(found.value),
    )


def certificate(server: KubeServer, folder: Path, first: int, last: int) -> Path:
    """Make a certificate of the server's authority from one day to another, as days from now."""
    now, pki = datetime.now(UTC), server.folder / "pki"
    key = folder / "server.key"
    shutil.copy(pki / "apiserver.key", key)
    dates = [f"{now + timedelta(days=each):%Y%m%d%H%M%SZ}" for each in (first, last)]
    (folder / "index.txt").touch()
    (folder / "ca.cnf").write_text(
        f"[ca]\ndefault_ca = own\n[own]\ndatabase = {folder}/index.txt\npolicy = any\n"
        "rand_serial = yes\ndefault_md = sha256\nx509_extensions = names\n"
        "[any]\ncommonName = supplied\n[names]\nsubjectAltName = IP:127.0.0.1\n"
    )
    options = {
        "-config": folder / "ca.cnf", "-outdir": folder, "-cert": pki / "ca.crt",
        "-keyfile": pki / "ca.key", "-in": pki / "apiserver.csr", "-out": key.with_suffix(".crt"),
        "-startdate": dates[0], "-enddate": dates[1],
    }  # fmt: skip
    words = [str(word) for option in options.items() for word in option]
    command = ["openssl", "ca", "-batch", "-notext", *words]
    subprocess.run(command, check=True, capture_output=True)
    return key


def test_refused_credentials_name_the_clock_that_is_off(place: Place, tmp_path: Path) -> None:
    place.namespace.kubeconfig(tmp_path / "kubeconfig", place.proxy.url, token="an-old-token")
    place.proxy.ahead = 3 * HOURS + 30
    try:
        with pytest.raises(PipelineError) as found:
            place.started()
    finally:
        place.proxy.ahead = 0.0
    assert (
        "or have expired (its clock is 3 h 0 min ahead of the clock of this machine)): log in"
        in (str(found.value))
    )


def test_a_cluster_without_kuberay_is_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    from kubernetes import client

    registration = client.ApiregistrationV1Api(place.namespace.api)
    served = registration.read_api_service("v1.ray.io")
    served.metadata.resource_version = served.status = None
    place.operator.running = False
    registration.delete_api_service("v1.ray.io")
    try:
        kube = Kube(None, None)

        def gone() -> bool:
            try:
                kube.jobs()
            except KubeError as error:
                return error.status == 404
            return False

        wait_until(gone, "it is still served")
        with pytest.raises(PipelineError, match=r"knows no rayjobs\.ray\.io\): install KubeRay"):
            place.started()
    finally:
        registration.create_api_service(served)

        def back() -> bool:
            try:
                return place.namespace.objects() is not None
            except client.exceptions.ApiException:
                return False

        wait_until(back, "it is not served again")


EXAMPLE = check_rayjob(read_template(None), LaunchSettings(image="a/b:1"), TrainSettings())


def refused(job: dict[str, Any] = EXAMPLE, **launch: Any) -> PipelineError:
    with pytest.raises(PipelineError) as found:
        check_cluster(LaunchSettings(**launch), job)
    return found.value


def test_a_look_before_the_first_stage_creates_nothing(place: Place) -> None:
    check_cluster(LaunchSettings(), EXAMPLE)
    assert place.proxy.count("POST", "dryRun=All") == 1
    assert place.names() == []


def test_a_look_before_the_first_stage_finds_what_the_cluster_refuses(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "may not create rayjobs.ray.io in the namespace other" in str(refused(namespace="other"))
    assert "Choose one" in str(refused(context="other"))
    wrong = {**EXAMPLE, "spec": {**EXAMPLE["spec"], "subissionMode": "HTTPMode"}}
    assert "correct launch.template" in str(refused(wrong))
    admin = place.namespace.server.folder / "admin.kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(admin))
    missing = refused(namespace="no-such")
    assert "there is no namespace no-such" in str(missing)
    assert isinstance(missing, ConfigError)
    config = place.namespace.kubeconfig(tmp_path / "wrong", token="wrong")
    monkeypatch.setenv("KUBECONFIG", str(config))
    assert "refuses the credentials" in str(refused())


def test_a_look_before_the_first_stage_asks_a_server_that_is_away_a_few_times(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kube_client, "_TRIES_S", (0.1, 0.1))
    with place.proxy.outage():
        error = str(refused())
    assert f"the API server {place.proxy.url} does not answer" in error
    assert place.proxy.count("POST") == 3
    place.proxy.busy = Busy(9)
    check_cluster(LaunchSettings(), EXAMPLE)  # the launcher waits
    place.proxy.busy = None
