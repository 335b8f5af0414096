"""Print what the threads of a worker are doing, on whatever machine it runs."""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

STACKS_S = 10.0  # how long to wait for the stacks of one worker


@contextmanager
def stacks_on_signal() -> Iterator[None]:
    """In a worker: on SIGUSR1, write the stack of every thread to a file for `_dump`."""
    path = _stack_file(os.getpid())
    with path.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR1)
            path.unlink(missing_ok=True)


def stacks_of(worker: dict[str, Any]) -> str:
    """Return the stacks of one worker. A task on its machine reads them.

    Args:
        worker: The worker's `node` and `pid`, as in the run's status.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(worker["node"], soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(_dump).options(scheduling_strategy=there)
    try:
        return str(ray.get(task.remote(worker["pid"]), timeout=STACKS_S))
    except ray.exceptions.RayError as error:
        return f"its stacks are not available ({type(error).__name__})"


def _stack_file(process: int) -> Path:
    return Path(tempfile.gettempdir(), f"dpnet-stacks-{process}.txt")


def _dump(process: int) -> str:
    file = _stack_file(process)
    before = file.stat().st_size if file.exists() else 0
    os.kill(process, signal.SIGUSR1)
    deadline = time.monotonic() + STACKS_S / 2
    text = ""
    while time.monotonic() < deadline and not text.endswith("\n"):
        time.sleep(0.1)
        text = file.read_text()[before:] if file.exists() else ""
    return text
