"""The meaning of a RayJob's status for the training, in one sentence each. Pure functions.

The states are those of KubeRay 1.7. A state that a later KubeRay adds counts as waiting, so the
deadline for jobs that do not start covers it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dpnet.training.ray.launch_job import EXPLAINED, NO_PROGRAM

Kind = Literal["waiting", "running", "succeeded", "stopped", "passing", "final"]
_EXIT = re.compile(r"failed with exit code (-?\d+)")
_STARTING = ("ContainerCreating", "PodInitializing")
_LONGEST = 500  # characters of a reason


@dataclass(frozen=True)
class Outcome:
    """The state of a RayJob.

    Attributes:
        kind: waiting: it does not train yet. running, succeeded. stopped: a person stopped it.
            passing: it failed in a way that another attempt can get past. final: it failed, and
            another attempt would fail too.
        reason: What happened. It continues a sentence that begins with the RayJob. Empty if the
            job itself has explained its end.
        advice: What to do, for stopped and final; or the job's own sentence.
    """

    kind: Kind
    reason: str
    advice: str = "the same command resumes it."


_WAITING = {
    "": "is not seen by KubeRay's operator (is it running, and does it watch the namespace?)",
    "Initializing": "waits for its pods",
    "Waiting": "waits for a job to be submitted by hand",
    "Suspending": "is being suspended",
    "Suspended": "is suspended",
    "Retrying": "is being started again by KubeRay",
}


def outcome_of(job: Mapping[str, Any]) -> Outcome:
    """Return how a RayJob goes, from its last state."""
    status = job.get("status") or {}
    deployment, state = status.get("jobDeploymentStatus", ""), status.get("jobStatus", "")
    reason, message = status.get("reason", ""), _short(status.get("message", ""))
    if state == "SUCCEEDED":
        return Outcome("succeeded", "is finished")
    if job["metadata"].get("deletionTimestamp"):
        return deleted()
    if deployment == "ValidationFailed" or reason == "ValidationFailed":
        return Outcome(
            "final", f"was refused by KubeRay ({message})", "correct launch.template, then"
            " run the same command again."
        )  # fmt: skip
    if state == "STOPPED":
        return Outcome("stopped", "was stopped")
    if reason == "DeadlineExceeded":
        return Outcome(
            "final", "has run for its activeDeadlineSeconds", "raise them in launch.template; the"
            " same command resumes."
        )  # fmt: skip
    if reason == "PreRunningDeadlineExceeded":
        return Outcome(
            "final", "did not start before its preRunningDeadlineSeconds", "free or add machines,"
            " or raise launch.pending_s; the same command resumes."
        )  # fmt: skip
    if state == "FAILED":
        return _failed_app(status.get("message", ""), job)
    if deployment == "Failed":
        return Outcome("passing", _failed(reason, message))
    if deployment == "Complete":
        return Outcome("passing", f"ended without a result of its job ({message or 'no message'})")
    if deployment == "Running":
        if state == "RUNNING":
            return Outcome("running", "is running")
        return Outcome("waiting", "waits for the head of its Ray cluster to begin the job")
    known = _WAITING.get(deployment)
    if deployment in ("Suspended", "Suspending") and (queue := _queue(job)):
        known = f"waits in Kueue's queue {queue}"
    return Outcome("waiting", known or f"is in KubeRay's state {deployment!r}")


def deleted() -> Outcome:
    """Return the outcome of a RayJob that somebody has deleted."""
    return Outcome(
        "stopped",
        "was deleted, by hand or with its namespace",
        "the same command starts another one, which resumes.",
    )


def _failed(reason: str, message: str) -> str:
    known = {
        "SubmissionFailed": "could not be submitted to its Ray cluster",
        "AppFailed": "lost the head of its Ray cluster",
        "JobStatusCheckTimeoutExceeded": "lost the head of its Ray cluster, which did not answer",
        "JobDeploymentStatusTransitionGracePeriodExceeded": "did not end in time",
    }
    text = known.get(reason, f"failed with {reason or 'no reason'}")
    return f"{text} ({message})" if message else text


def _failed_app(message: str, job: Mapping[str, Any]) -> Outcome:
    """Return the outcome of a job whose driver has ended with an error.

    Args:
        message: Ray's message, with the exit status and the last lines of the driver's log.
        job: The RayJob.
    """
    lines = message.strip().splitlines()
    last = lines[-1][:1000] if lines else "without output"
    found = _EXIT.search(message)
    code = int(found[1]) if found else None
    if code == EXPLAINED:
        return Outcome("final", "", last)
    if code in NO_PROGRAM or "No module named" in last:
        head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
        image = head["containers"][0].get("image")
        return Outcome(
            "final",
            f"cannot start: the image {image} has no dpnet ({_short(last)})",
            "set launch.image to one that has it, and launch.python to its interpreter.",
        )
    return Outcome("passing", f"died ({_short(last)})")


def reason_of_pods(
    pods: Iterable[Mapping[str, Any]], events: Iterable[Mapping[str, Any]], names: Iterable[str]
) -> str:
    """Return why pods do not run, or "" if no reason is known.

    Args:
        pods: The pods of the Ray cluster.
        events: The events of the namespace.
        names: Names of the RayJob and of its Ray cluster, whose events count as well.
    """
    pods = list(pods)
    found = [reason for pod in pods if (reason := _reason_of_containers(pod))]
    found += [reason for pod in pods if (reason := _reason_of_conditions(pod))]
    if found:
        return found[0]
    about = {*names, *(pod["metadata"]["name"] for pod in pods)}
    warnings = [
        event
        for event in events
        if event.get("type") == "Warning" and event["involvedObject"].get("name") in about
    ]
    if warnings:
        newest = max(warnings, key=_time_of)
        return f"{newest.get('reason')}: {_short(newest.get('message') or '')}"
    return ""


def _reason_of_containers(pod: Mapping[str, Any]) -> str:
    status = pod.get("status") or {}
    name = pod["metadata"]["name"]
    for each in [
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    ]:
        state = each.get("state") or {}
        waiting, ended = state.get("waiting") or {}, state.get("terminated") or {}
        ended = ended or (each.get("lastState") or {}).get("terminated") or {}
        if (reason := waiting.get("reason")) and reason not in _STARTING:
            detail = waiting.get("message") or _ending(ended)
            return f"pod {name}: {reason}{f' ({_short(detail)})' if detail else ''}"
        if ended.get("exitCode"):
            return f"pod {name}: {_ending(ended)}"
    return ""


def _ending(ended: Mapping[str, Any]) -> str:
    if not ended:
        return ""
    return f"{ended.get('reason') or 'Error'}, exit status {ended.get('exitCode')}"


def _reason_of_conditions(pod: Mapping[str, Any]) -> str:
    status = pod.get("status") or {}
    for each in status.get("conditions") or []:
        if each.get("type") == "PodScheduled" and each.get("status") == "False":
            reason, message = each.get("reason", ""), _short(each.get("message") or "")
            return f"pod {pod['metadata']['name']}: {reason} ({message})"
    if status.get("phase") == "Failed":  # evicted, or its node is gone
        reason, message = status.get("reason") or "Failed", _short(status.get("message") or "")
        return f"pod {pod['metadata']['name']}: {reason}{f' ({message})' if message else ''}"
    return ""


def _time_of(event: Mapping[str, Any]) -> str:
    series = event.get("series") or {}
    times = (series.get("lastObservedTime"), event.get("lastTimestamp"), event.get("eventTime"))
    made = (event.get("metadata") or {}).get("creationTimestamp")
    return str(next((each for each in (*times, made) if each), ""))


def _queue(job: Mapping[str, Any]) -> str:
    labels = job["metadata"].get("labels") or {}
    return str(labels.get("kueue.x-k8s.io/queue-name", ""))


def _short(text: str) -> str:
    """Return a text in one line without its last full stop."""
    return " ".join(text.split())[:_LONGEST].rstrip(".:")
