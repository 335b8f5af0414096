"""The log of a job on a Ray cluster, and the stacks of its workers, through the Jobs API."""

from __future__ import annotations

import asyncio
import logging
import re
import time
from typing import Any

from dpnet.training.ray.jobs_client import reason_of

log = logging.getLogger(__name__)

STACKS_S = 30.0  # how long to wait for the workers' stacks
_RECORD = re.compile(r"\S+Z (DEBUG|INFO|WARNING|ERROR|CRITICAL) [\w.]+: (.*)")  # core/logs.py


def show_log(client: Any, job: str) -> None:
    """Log the lines of a job's log as they arrive, until the job ends."""

    async def show() -> None:
        async for lines in client.tail_job_logs(job):
            for line in lines.splitlines():
                level, text = _level_and_text(line)
                log.log(level, "%s: %s", job, text)

    try:
        asyncio.run(show())
    except Exception as error:  # training does not depend on its log
        log.debug("the log of %s cannot be followed: %s", job, error)


def log_stacks(client: Any, name: str, entrypoint: str) -> None:
    """Log what every worker is doing. A separate job reads it on the cluster's machines.

    Args:
        client: Of the cluster's Jobs API.
        name: Name of the separate job.
        entrypoint: Its command.
    """
    try:
        client.submit_job(entrypoint=entrypoint, submission_id=name)
        wait_for_end(client, name, STACKS_S, "they do not arrive")
        log.info("%s", client.get_job_logs(name))
    except Exception as error:
        log.warning("train: the workers' stacks are not available (%s)", reason_of(error))


def wait_for_end(client: Any, job: str, seconds: float, problem: str) -> None:
    """Wait until a job has ended. Raises TimeoutError with `problem` after `seconds`."""
    deadline = time.monotonic() + seconds
    while not client.get_job_status(job).is_terminal():
        if time.monotonic() > deadline:
            raise TimeoutError(problem)
        time.sleep(0.5)


def _level_and_text(line: str) -> tuple[int, str]:
    """Return level and text of a line of a job's log, without time and module."""
    if match := _RECORD.fullmatch(line):
        return logging.getLevelNamesMapping()[match[1]], match[2]
    return logging.INFO, line
