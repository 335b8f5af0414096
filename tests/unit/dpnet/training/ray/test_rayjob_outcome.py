"""Every state of a RayJob has an outcome in one sentence, and pods tell why they do not run."""

from __future__ import annotations

from typing import Any

import pytest

from dpnet.training.ray.launch_job import EXPLAINED
from dpnet.training.ray.rayjob_outcome import outcome_of, reason_of_pods

HEAD = {"template": {"spec": {"containers": [{"image": "registry/dpnet:1"}]}}}
TAIL = "Job entrypoint command failed with exit code {}, last available logs (truncated to" \
    " 20,000 chars):\n{}"  # fmt: skip


def job(deployment: str = "", state: str = "", **more: Any) -> dict[str, Any]:
    status = {"jobDeploymentStatus": deployment, "jobStatus": state, **more}
    spec = {"rayClusterSpec": {"headGroupSpec": HEAD}}
    return {"metadata": {"name": "a-1"}, "spec": spec, "status": status}


@pytest.mark.parametrize(
    ("deployment", "state", "more", "kind", "reason"),
    [
        ("", "", {}, "waiting", "is not seen by KubeRay's operator"),
        ("Initializing", "", {}, "waiting", "waits for its pods"),
        ("Waiting", "", {}, "waiting", "waits for a job to be submitted by hand"),
        ("Suspending", "", {}, "waiting", "is being suspended"),
        ("Suspended", "", {}, "waiting", "is suspended"),
        ("Retrying", "", {}, "waiting", "is being started again by KubeRay"),
        ("Running", "", {}, "waiting", "waits for the head of its Ray cluster"),
        ("Running", "PENDING", {}, "waiting", "waits for the head of its Ray cluster"),
        ("Running", "RUNNING", {}, "running", "is running"),
        ("Running", "SUCCEEDED", {}, "succeeded", "is finished"),
        ("Complete", "SUCCEEDED", {}, "succeeded", "is finished"),
        (
            "Failed", "SUCCEEDED",
            {"reason": "JobDeploymentStatusTransitionGracePeriodExceeded"}, "succeeded", "finished",
        ),
        ("Complete", "STOPPED", {}, "stopped", "was stopped"),
        ("Running", "STOPPED", {}, "stopped", "was stopped"),
        ("Complete", "", {}, "passing", "ended without a result of its job (no message)"),
        ("Failed", "FAILED", {"reason": "AppFailed", "message": "x\nKilled"}, "passing", "(Kil"),
        ("Complete", "FAILED", {"message": "x\nKilled"}, "passing", "died (Killed)"),
        ("Failed", "RUNNING", {"reason": "AppFailed"}, "passing", "lost the head"),
        ("Failed", "", {"reason": "SubmissionFailed", "message": "b."}, "passing", "submitted to"),
        ("Failed", "", {"reason": "JobStatusCheckTimeoutExceeded"}, "passing", "did not answer"),
        ("Failed", "", {"reason": "Later", "message": "b"}, "passing", "failed with Later (b)"),
        ("Failed", "", {}, "passing", "failed with no reason"),
        ("Failed", "RUNNING", {"reason": "DeadlineExceeded"}, "final", "activeDeadlineSeconds"),
        ("Failed", "", {"reason": "PreRunningDeadlineExceeded"}, "final", "did not start before"),
        ("ValidationFailed", "", {"message": "no."}, "final", "was refused by KubeRay (no)"),
        ("Failed", "", {"reason": "ValidationFailed", "message": "no"}, "final", "was refused"),
        ("Dreaming", "", {}, "waiting", "is in KubeRay's state 'Dreaming'"),
    ],
)  # fmt: skip
def test_every_state_of_a_rayjob_has_an_outcome(
    deployment: str, state: str, more: dict[str, Any], kind: str, reason: str
) -> None:
    outcome = outcome_of(job(deployment, state, **more))
    assert outcome.kind == kind
    assert reason in outcome.reason
    assert outcome.advice.endswith(".")


def test_a_rayjob_without_a_status_waits_for_the_operator() -> None:
    found = job()
    del found["status"]
    assert outcome_of(found).kind == "waiting"


def test_a_rayjob_that_is_being_deleted_has_been_stopped_unless_it_is_finished() -> None:
    found = job("Running", "RUNNING")
    found["metadata"]["deletionTimestamp"] = "now"
    assert outcome_of(found).kind == "stopped"
    found["status"]["jobStatus"] = "SUCCEEDED"
    assert outcome_of(found).kind == "succeeded"


def test_a_job_in_kueues_queue_waits_there() -> None:
    found = job("Suspended")
    found["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "gpus"}
    assert outcome_of(found).reason == "waits in Kueue's queue gpus"


@pytest.mark.parametrize(
    ("code", "last", "kind", "told"),
    [
        (EXPLAINED, "the disk is full.", "final", "the disk is full."),
        (127, "sh: 1: python: not found", "final", "set launch.image to one that has it"),
        (126, "sh: 1: python: denied", "final", "set launch.image to one that has it"),
        (1, "No module named 'dpnet'", "final", "set launch.image to one that has it"),
        (137, "Killed", "passing", "the same command resumes it."),
        (1, "ray.exceptions.RaySystemError: x", "passing", "the same command resumes it."),
    ],
)
def test_the_exit_status_of_the_driver_decides_whether_another_attempt_helps(
    code: int, last: str, kind: str, told: str
) -> None:
    message = TAIL.format(code, f"at work\n{last}\n")
    outcome = outcome_of(job("Failed", "FAILED", reason="AppFailed", message=message))
    assert outcome.kind == kind
    assert told in outcome.advice
    assert (outcome.reason == "") is (code == EXPLAINED)  # its own sentence is enough


def waiting(reason: str, message: str = "", **more: Any) -> dict[str, Any]:
    return {"state": {"waiting": {"reason": reason, "message": message}}, **more}


ENDED = {"terminated": {"reason": "OOMKilled", "exitCode": 137}}
PENDING = {
    "conditions": [
        {
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "0/3 nodes are available.",
        }
    ]
}  # fmt: skip


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ({"containerStatuses": [waiting("ImagePullBackOff", "no such.")]}, "BackOff (no such)"),
        ({"initContainerStatuses": [waiting("ErrImagePull")]}, "pod p: ErrImagePull"),
        ({"containerStatuses": [waiting("CreateContainerConfigError", "secret s")]}, "(secret s)"),
        (
            {"containerStatuses": [waiting("CrashLoopBackOff", lastState=ENDED)]},
            "CrashLoopBackOff (OOMKilled, exit status 137)",
        ),
        ({"containerStatuses": [{"state": ENDED}]}, "pod p: OOMKilled, exit status 137"),
        (PENDING, "pod p: Unschedulable (0/3 nodes are available)"),
        ({"phase": "Failed", "reason": "Evicted", "message": "disk"}, "pod p: Evicted (disk)"),
        ({"containerStatuses": [waiting("ContainerCreating")]}, ""),
        ({"phase": "Running"}, ""),
        ({}, ""),
    ],
)
def test_a_pod_tells_why_it_does_not_run(status: dict[str, Any], told: str) -> None:
    found = reason_of_pods([{"metadata": {"name": "p"}, "status": status}], [], [])
    assert told in found if told else found == ""


def event(about: str, message: str, at: str, kind: str = "Warning") -> dict[str, Any]:
    return {
        "type": kind, "reason": "FailedCreate", "message": message,
        "involvedObject": {"name": about}, "lastTimestamp": at, "metadata": {},
    }  # fmt: skip


def test_the_newest_warning_about_the_job_tells_why_there_are_no_pods() -> None:
    events = [
        event("c", "exceeded quota", "2026-11-30T10:00:02Z"),
        event("c", "an older one", "2026-11-30T10:00:01Z"),
        event("another", "of others", "2026-11-30T10:00:03Z"),
        event("c", "no warning", "2026-11-30T10:00:03Z", "Normal"),
    ]
    assert reason_of_pods([], events, ["j", "c"]) == "FailedCreate: exceeded quota"
    assert reason_of_pods([], events, ["j"]) == ""


def test_what_a_pod_says_comes_before_events() -> None:
    pod = {"metadata": {"name": "p"}, "status": PENDING}
    events = [event("p", "of the event", "2026-11-30T10:00:02Z")]
    assert reason_of_pods([pod], events, []).startswith("pod p: Unschedulable")
