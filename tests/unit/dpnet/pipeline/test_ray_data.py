"""The team of workers that a cluster has for an evaluation."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from data_prep.core.errors import PipelineError
from dpnet.pipeline import ray_data
from dpnet.pipeline.ray_data import _end_dataset, _told, team


def node(*, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"Alive": alive, "Resources": {"memory": 1e9, **resources}}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([node(CPU=2)], (2, 0, 1)),
        ([node(CPU=16)], (4, 0, 4)),
        ([node(CPU=16), node(CPU=2)], (2, 0, 9)),
        ([node(CPU=8), node(CPU=8, alive=False)], (4, 0, 2)),
        ([node(), node(CPU=1)], (1, 0, 1)),  # a head without cores
        ([node()], (1, 0, 1)),  # workers may still come
        ([node(CPU=32, GPU=4)], (8, 1, 4)),
        ([node(CPU=32, GPU=4), node(CPU=64)], (8, 1, 4)),  # no values of two kinds in one report
        ([node(CPU=4, GPU=8)], (1, 1, 4)),
        ([node(CPU=16, GPU=1), node(CPU=8, GPU=2)], (4, 1, 3)),
    ],
)
def test_a_worker_has_a_gpu_or_some_cores(
    nodes: list[dict[str, Any]], expected: tuple[int, int, int]
) -> None:
    assert team(nodes) == expected


def test_a_death_is_one_sentence_and_other_errors_stay_as_they_are() -> None:
    from ray.exceptions import NodeDiedError

    death = NodeDiedError("a long text of Ray\nwith lines")
    told = _told(death)
    assert isinstance(told, PipelineError)
    assert str(told) == (
        "the cluster stopped the evaluation (a machine died): run the same command again, it"
        " resumes."
    )
    assert told.__cause__ is death
    for error in (PipelineError("ours"), KeyError("a bug")):
        assert _told(error) is error


class Executor(threading.Thread):
    """A thread that executes a dataset until it is shut down, as that of Ray Data."""

    def __init__(self, dataset: str) -> None:
        super().__init__(name=f"StreamingExecutor-{dataset}_0", daemon=True)
        self._stopped = threading.Event()
        self.start()

    def run(self) -> None:
        self._stopped.wait()

    def shutdown(self, *, force: bool) -> None:
        self._stopped.set()


def test_the_end_of_a_dataset_ends_its_own_execution_and_its_reader(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_data, "END_S", 20.0)
    ours, other = Executor("evaluate-1"), Executor("evaluate-2")
    reader = threading.Thread(target=ours.join, daemon=True)
    reader.start()
    _end_dataset(reader, "evaluate-1")
    assert not reader.is_alive()
    assert not ours.is_alive()
    assert other.is_alive()
    other.shutdown(force=True)


def test_a_dataset_that_does_not_end_is_left_after_some_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray_data, "END_S", 0.1)
    executor = Executor("evaluate-1")
    reader = threading.Thread(target=executor.join, daemon=True)
    reader.start()
    _end_dataset(reader, "evaluate-2")
    assert reader.is_alive()
    executor.shutdown(force=True)
