"""The team of workers that a cluster has for an evaluation."""

from __future__ import annotations

from typing import Any

import pytest

from dpnet.pipeline.ray_data import team


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
