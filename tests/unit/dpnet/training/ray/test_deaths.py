"""The deaths that Ray reports: which errors are deaths, and what people read about them."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from ray import exceptions as of_ray
from ray.train import ControllerError, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from data_prep.core.errors import PipelineError
from dpnet.training.ray.deaths import death_reason
from dpnet.training.ray.ray_train import _ray_failed, explain_error

OTHERS = "12\t3.1\tpython other.py --password=hunter2"
KILLED = (
    "Task was killed due to the node running low on memory.\nTop 10 memory users:\n"
    f"PID\tMEM(GB)\tCOMMAND\n{OTHERS}"
)
NUMBER = "0" * 56


def actor_died() -> of_ray.ActorDiedError:
    error = of_ray.ActorDiedError()
    error.error_msg = KILLED
    return error


DEATHS: dict[str, Any] = {
    "OutOfMemoryError": of_ray.OutOfMemoryError(KILLED),
    "NodeDiedError": of_ray.NodeDiedError(KILLED),
    "LocalRayletDiedError": of_ray.LocalRayletDiedError(),
    "WorkerCrashedError": of_ray.WorkerCrashedError(),
    "RayActorError": of_ray.RayActorError(error_msg=KILLED),
    "ActorDiedError": actor_died(),
    "ActorDiedError without memory": of_ray.ActorDiedError(),
    "preempted": of_ray.RayActorError(preempted=True),
    "ActorUnavailableError": of_ray.ActorUnavailableError(KILLED, None),
    "ObjectLostError": of_ray.ObjectLostError(NUMBER, None, KILLED),
    "ObjectFetchTimedOutError": of_ray.ObjectFetchTimedOutError(NUMBER, None, KILLED),
    "OwnerDiedError": of_ray.OwnerDiedError(NUMBER, None, KILLED),
    "ObjectReconstructionFailedError": of_ray.ObjectReconstructionFailedError(NUMBER),
    "ObjectFreedError": of_ray.ObjectFreedError(NUMBER, None, KILLED),
    "ReferenceCountingAssertionError": of_ray.ReferenceCountingAssertionError(NUMBER, None, ""),
    "ActorUnschedulableError": of_ray.ActorUnschedulableError(KILLED),
    "TaskUnschedulableError": of_ray.TaskUnschedulableError(KILLED),
    "ActorPlacementGroupRemoved": of_ray.ActorPlacementGroupRemoved(),
    "TaskPlacementGroupRemoved": of_ray.TaskPlacementGroupRemoved(),
    "RpcError": of_ray.RpcError(KILLED),
    "RaySystemError": of_ray.RaySystemError(KILLED),
}


def task_error(cause: Exception) -> of_ray.RayTaskError:
    return of_ray.RayTaskError("run", KILLED, cause, pid=1, ip="127.0.0.1")


def check_sentence(error: BaseException) -> None:
    told = explain_error(error, "root")
    assert isinstance(told, PipelineError)
    assert "hunter2" not in str(told)
    assert len(str(told)) < 300
    assert "same command again, it resumes" in str(told)


@pytest.mark.parametrize("name", DEATHS)
def test_a_controllers_death_of_every_class_restarts_training_and_is_told_in_a_sentence(
    name: str,
) -> None:
    death = DEATHS[name]
    for error in (
        death,
        task_error(death),
        task_error(death).as_instanceof_cause(),
        task_error(task_error(death)),
        ControllerError(death),
        ControllerError(task_error(death)),
    ):
        assert _ray_failed(error)
        assert death_reason(error) == death_reason(death) is not None
        check_sentence(error)


@pytest.mark.parametrize("name", DEATHS)
def test_a_workers_death_of_every_class_is_told_in_a_sentence(name: str) -> None:
    for failure in (DEATHS[name], WorkerHealthCheckFailedError(KILLED, DEATHS[name])):
        error = WorkerGroupError(KILLED, {0: failure})
        assert not _ray_failed(error)  # Ray has restarted the workers often enough
        assert death_reason(failure)
        check_sentence(error)


def test_a_lack_of_memory_is_named() -> None:
    for name in ("OutOfMemoryError", "RayActorError", "ActorDiedError"):
        assert "ran out of memory" in str(death_reason(DEATHS[name]))
    assert death_reason(DEATHS["ActorDiedError without memory"]) == "a process died"
    assert death_reason(DEATHS["preempted"]) == "a machine was taken away"


def test_other_errors_are_no_deaths() -> None:
    for error in (
        ValueError(KILLED),
        PipelineError("the root is gone"),
        of_ray.AuthenticationError("no token"),
        of_ray.ObjectStoreFullError("full"),
        task_error(ValueError("7")),
        WorkerGroupError("x", {0: ValueError("7")}),
    ):
        assert death_reason(error) is None
        assert not _ray_failed(error)
    check_sentence(of_ray.ObjectStoreFullError("full"))


def test_a_circle_of_causes_ends() -> None:
    one, two = ValueError(), ValueError()
    one.__cause__, two.__cause__ = two, one
    assert death_reason(one) is None
    assert pickle.loads(pickle.dumps(DEATHS["OutOfMemoryError"])).message == KILLED
