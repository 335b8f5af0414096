"""Print what the threads of a worker are doing, on whatever machine it runs."""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_NAME = "dpnet-stacks"
STACKS_S = 10.0  # how long to wait for the stacks of one worker


@contextmanager
def stacks_on_signal() -> Iterator[None]:
    """In a worker: on SIGUSR1, write the stack of every thread to a file for `_dump`.

    The file is in memory and has no path, so nobody else can read it or put another in its place,
    and a kill leaves nothing.
    """
    with open(os.memfd_create(_NAME), "w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR1)


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


def _stack_file(process: int) -> Path | None:
    """Return the file of a worker's stacks, or None if the process is not a worker of ours."""
    with suppress(OSError):  # it has ended
        for file in Path(f"/proc/{process}/fd").iterdir():
            with suppress(OSError):
                if os.readlink(file).startswith(f"/memfd:{_NAME}"):
                    return file
    return None


def _dump(process: int) -> str:
    file = _stack_file(process)
    if file is None:  # SIGUSR1 would end the process
        return ""
    text = ""
    with file.open() as stacks:
        stacks.seek(0, os.SEEK_END)
        os.kill(process, signal.SIGUSR1)
        deadline = time.monotonic() + STACKS_S / 2
        while time.monotonic() < deadline and not text.endswith("\n"):
            time.sleep(0.1)
            text += stacks.read()
    return text
