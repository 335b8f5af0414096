"""The launcher `ray-job`: a job on a Ray cluster, named after the run's digest.

The job continues when this process ends. The same command, on this machine or another, attaches to
it. Ray never reuses the id of a job. So if an attempt has failed or was stopped, the next attempt
gets the next number and resumes from the last checkpoint.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import shlex
import threading
import time
from typing import Any

import dpnet
from data_prep.core.digest import SHORT, sha256_bytes
from data_prep.core.errors import PipelineError
from data_prep.core.stage import Work
from dpnet.training.job import TrainJob
from dpnet.training.ray.job_log import log_stacks, show_log, wait_for_end
from dpnet.training.ray.jobs_client import connect_client, reason_of
from dpnet.training.settings import LaunchSettings

log = logging.getLogger(__name__)

SPEC = "job.json"
EXPLAINED = 3  # exit status of a driver with the reason for its end in its last line
ASK_S = 1.0  # between two requests for the job's state
STOP_S = 25.0  # how long to wait for a cancelled job to end
NO_PROGRAM = (126, 127)  # exit statuses of a shell


class RayJobLauncher:
    """Training in a job on a Ray cluster."""

    def __init__(self, job: TrainJob, launch: LaunchSettings, work: Work) -> None:
        self.job, self.launch, self.work = job, launch, work
        # Several roots may request the same training from one cluster.
        root = sha256_bytes(work.store.uri.encode())
        self.name = f"dpnet-{work.request.digest[:SHORT]}-{root[:4]}"
        self.address = str(launch.address)
        self.attempt = ""
        self._ends: dict[str, str] = {}  # why attempts ended
        self._client: Any = None
        self._deaths = 0
        self._asked, self._answered = 0.0, time.monotonic()
        self._warned = False

    def start(self) -> None:
        """Submit a job, or attach to the running one."""
        self._client = connect_client(self.address)
        write_spec(self.job, self.launch, self.work)
        self._submit_or_attach()

    @property
    def facts(self) -> list[str]:
        """Return where training runs, and how earlier attempts ended."""
        ends = [f"The job {name} {why}." for name, why in self._ends.items()]
        if not self.attempt or self.attempt in self._ends:
            return ends
        return [*ends, f"The job {self.attempt} trains. Ray dashboard: {self.address}"]

    def is_running(self) -> bool:
        """Return whether the job still runs. Raises PipelineError if it has failed for good."""
        if time.monotonic() - self._asked < ASK_S:
            return True
        self._asked = time.monotonic()
        try:
            running = self._look()
        except PipelineError:
            raise
        except Exception as error:  # Ray's client raises errors of many kinds
            self._no_answer(error)
            return True
        self._answered, self._warned = time.monotonic(), False
        return running

    def _look(self) -> bool:
        try:
            job = self._client.get_job_info(self.attempt)
        except RuntimeError as error:
            if "status code 404" not in str(error):
                raise
            self._restart("is unknown now, because the cluster was replaced")
            return True
        if not job.status.is_terminal():
            return True
        if job.status == "SUCCEEDED":
            return False
        if job.status == "STOPPED":
            self._ends[self.attempt] = "was stopped"
            raise PipelineError(f"the job {self.attempt} was stopped: the same command resumes it.")
        lines = self._client.get_job_logs(self.attempt).strip().splitlines()
        last = lines[-1][:1000] if lines else "without output"
        self._ends[self.attempt] = f"has ended: {last.rstrip('.')}"
        if job.driver_exit_code == EXPLAINED:
            raise PipelineError(last)
        if job.driver_exit_code in NO_PROGRAM or "No module named" in last:
            raise PipelineError(
                f"the head of the Ray cluster at {self.address} has no dpnet ({last}): set"
                " launch.python to the interpreter there that has it."
            )
        self._restart(f"died ({last})")
        return True

    def _restart(self, why: str) -> None:
        self._ends[self.attempt] = why
        if self._deaths >= self.job.settings.max_failures:
            raise PipelineError(
                f"the job {self.attempt} {why}, and train.max_failures is"
                f" {self.job.settings.max_failures}: read its log on {self.address}; the same"
                " command resumes."
            )
        self._deaths += 1
        log.warning("train: the job %s %s: it restarts from its last checkpoint", self.attempt, why)
        self._submit_or_attach()

    def _no_answer(self, error: Exception) -> None:
        """Warn once. Raises PipelineError after the deadline."""
        if time.monotonic() - self._answered > self.launch.deadline_s:
            raise PipelineError(
                f"the Ray cluster at {self.address} has not answered for"
                f" {self.launch.deadline_s} s ({reason_of(error)}): the same command resumes."
            ) from error
        if not self._warned:
            self._warned = True
            log.warning(
                "train: the Ray cluster at %s does not answer (%s): trying again",
                self.address,
                reason_of(error),
            )

    def cancel(self) -> None:
        """Stop the job, and wait until it has ended."""
        if not self.attempt:
            return
        try:
            self._client.stop_job(self.attempt)
            wait_for_end(self._client, self.attempt, STOP_S, "it does not end")
        except Exception as error:
            log.warning("train: the job %s may still run (%s)", self.attempt, reason_of(error))

    def print_stacks(self) -> None:
        """Log what every worker is doing. A separate job reads it on the cluster's machines."""
        name = f"{self.name}-stacks-{secrets.token_hex(3)}"
        log_stacks(self._client, name, self._entrypoint("--stacks", self.attempt))

    def _submit_or_attach(self) -> None:
        pattern = re.compile(rf"{re.escape(self.name)}-(\d+)")
        jobs = {}
        for job in self._client.list_jobs():
            if match := pattern.fullmatch(job.submission_id or ""):
                jobs[int(match[1])] = job.status
        newest = max(jobs, default=0)
        if newest and not jobs[newest].is_terminal():
            self.attempt = f"{self.name}-{newest}"
            log.info("train: attached to the running job %s on %s", self.attempt, self.address)
        else:
            attempt = f"{self.name}-{newest + 1}"
            try:
                self._client.submit_job(
                    entrypoint=self._entrypoint(attempt),
                    submission_id=attempt,
                    metadata={"run": self.work.folder},
                )
            except RuntimeError as error:
                raise PipelineError(
                    f"the Ray cluster at {self.address} refused the job ({reason_of(error)})."
                ) from error
            self.attempt = attempt
            log.info("train: the job %s is submitted to %s", self.attempt, self.address)
        threading.Thread(target=self._show_log, args=(self.attempt,), daemon=True).start()

    def _entrypoint(self, *arguments: str) -> str:
        return driver_command(self.launch, self.work, *arguments)

    def _show_log(self, job: str) -> None:
        show_log(self._client, job)


def driver_command(launch: LaunchSettings, work: Work, *arguments: str) -> str:
    """Return the command of a job that trains a run on a cluster's head."""
    words = [launch.python, "-m", "dpnet.ray_driver", *arguments]
    return shlex.join([*words, work.store.uri, work.folder])


def write_spec(job: TrainJob, launch: LaunchSettings, work: Work) -> None:
    """Write what the job's driver reads: the training, its deadline and the version of dpnet."""
    spec = {"job": job.to_json(), "deadline": launch.deadline_s, "version": dpnet.__version__}
    work.store.write(work.key(SPEC), json.dumps(spec, indent=1).encode())
