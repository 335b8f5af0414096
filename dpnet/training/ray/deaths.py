"""Recognize the deaths that Ray reports, and give each one a short reason.

Ray's own texts are long. After a lack of memory they list other programs of the machine with their
command lines, so no part of them is shown.
"""

from __future__ import annotations

_MEMORY = "a machine ran out of memory, and Ray ended a process there"
_LOW_MEMORY = "low on memory"  # in Ray's text about an actor that it has ended


def death_reason(error: BaseException | None) -> str | None:
    """Return the reason if Ray reports a death in an error or its causes, and None otherwise."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        each = waiting.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        if reason := _reason(each):
            return reason
        names = ("cause", "health_check_failure", "controller_failure", "__cause__")
        waiting += [found for n in names if isinstance(found := getattr(each, n, None), Exception)]
    return None


def _reason(error: BaseException) -> str | None:
    from ray import exceptions as of_ray

    if isinstance(error, of_ray.RayActorError):
        if error.preempted:
            return "a machine was taken away"
        if _LOW_MEMORY in error.error_msg:
            return _MEMORY
    reasons = (
        (of_ray.OutOfMemoryError, _MEMORY),
        (of_ray.NodeDiedError, "a machine died"),
        (of_ray.LocalRayletDiedError, "a machine died, or Ray on it"),
        (of_ray.WorkerCrashedError, "a process died"),
        (of_ray.ActorUnavailableError, "a process does not answer"),
        (of_ray.RayActorError, "a process died"),
        (of_ray.ObjectLostError, "a process or a machine died, and with it the data that it held"),
        (of_ray.ActorUnschedulableError, "the machine of a process is gone"),
        (of_ray.TaskUnschedulableError, "the machine of a process is gone"),
        (of_ray.ActorPlacementGroupRemoved, "the resources of the workers were taken away"),
        (of_ray.TaskPlacementGroupRemoved, "the resources of the workers were taken away"),
        (of_ray.RpcError, "a process of Ray does not answer"),
        (of_ray.RaySystemError, "a process of Ray died or does not answer"),
    )
    return next((reason for kind, reason in reasons if isinstance(error, kind)), None)
