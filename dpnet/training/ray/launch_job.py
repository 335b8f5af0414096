"""The launcher `ray-job`: a job on a Ray cluster, known by the run's digest.

The job goes on when this process ends; the same command, here or elsewhere, attaches to it. A job
keeps its id for ever, so the next attempt after one that failed or was stopped gets the next
number, and takes the run up from its last checkpoint.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import secrets
import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.core.digest import SHORT, sha256_bytes
from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.progress import say
from data_prep.core.stage import Work
from dpnet.training.job import TrainJob
from dpnet.training.settings import LaunchSettings

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # as Ray's own commands take them
SPEC = "job.json"
EXPLAINED = 3  # exit status of a driver whose last line says why training cannot go on
ASK_S = 1.0  # between two questions after the job's state
ANSWER_S = 30.0  # for which the cluster is waited for at each
STOP_S = 25.0  # for which a cancelled job is waited for
STACKS_S = 30.0  # for which the workers' stacks are waited for
_NO_PROGRAM = (126, 127)  # of a shell


class RayJobLauncher:
    def __init__(self, job: TrainJob, launch: LaunchSettings, work: Work) -> None:
        self.job, self.launch, self.work = job, launch, work
        # Several roots may ask one cluster for the same.
        root = sha256_bytes(work.store.uri.encode())
        self.name = f"dpnet-{work.request.digest[:SHORT]}-{root[:4]}"
        self.address = str(launch.address)
        self.attempt = ""
        self._client: Any = None
        self._deaths = 0
        self._asked, self._answered = 0.0, time.monotonic()
        self._told = False

    def start(self) -> None:
        self._client = _connected(self.address)
        spec = {"job": self.job.to_json(), "deadline": self.launch.deadline_s}
        self.work.store.write(self.work.key(SPEC), json.dumps(spec, indent=1).encode())
        self._begin_or_attach()

    def goes_on(self) -> bool:
        if time.monotonic() - self._asked < ASK_S:
            return True
        self._asked = time.monotonic()
        try:
            going = self._look()
        except PipelineError:
            raise
        except Exception as error:  # what Ray's client raises is of many kinds
            self._no_answer(error)
            return True
        self._answered, self._told = time.monotonic(), False
        return going

    def _look(self) -> bool:
        try:
            job = self._client.get_job_info(self.attempt)
        except RuntimeError as error:
            if "status code 404" not in str(error):
                raise
            self._begin_again("is unknown now, the cluster is another one")
            return True
        if not job.status.is_terminal():
            return True
        if job.status == "SUCCEEDED":
            return False
        if job.status == "STOPPED":
            raise PipelineError(f"the job {self.attempt} was stopped: the same command resumes it.")
        lines = self._client.get_job_logs(self.attempt).strip().splitlines()
        last = lines[-1][:1000] if lines else "without a word"
        if job.driver_exit_code == EXPLAINED:
            raise PipelineError(last)
        if job.driver_exit_code in _NO_PROGRAM or "No module named" in last:
            raise PipelineError(
                f"the head of the Ray cluster at {self.address} has no dpnet ({last}): name in"
                " launch.python the interpreter there that has it."
            )
        self._begin_again(f"died ({last})")
        return True

    def _begin_again(self, why: str) -> None:
        if self._deaths >= self.job.settings.max_failures:
            raise PipelineError(
                f"the job {self.attempt} {why}, and train.max_failures is"
                f" {self.job.settings.max_failures}: look at its log on {self.address}; the same"
                " command resumes."
            )
        self._deaths += 1
        say(f"train: the job {self.attempt} {why}: it is begun again from its last checkpoint")
        self._begin_or_attach()

    def _no_answer(self, error: Exception) -> None:
        """Say so once; raise PipelineError after the deadline."""
        if time.monotonic() - self._answered > self.launch.deadline_s:
            raise PipelineError(
                f"the Ray cluster at {self.address} has not answered for"
                f" {self.launch.deadline_s} s ({_reason(error)}): the same command resumes."
            ) from error
        if not self._told:
            self._told = True
            say(
                f"warning: the Ray cluster at {self.address} does not answer ({_reason(error)}):"
                " asking on"
            )

    def cancel(self) -> None:
        if not self.attempt:
            return
        try:
            self._client.stop_job(self.attempt)
            deadline = time.monotonic() + STOP_S
            while not self._client.get_job_status(self.attempt).is_terminal():
                if time.monotonic() > deadline:
                    raise TimeoutError("it does not end")
                time.sleep(0.5)
        except Exception as error:
            say(f"warning: the job {self.attempt} may still be at work ({_reason(error)})")

    def print_stacks(self) -> None:
        """By a job of its own: the workers are on the cluster's machines."""
        name = f"{self.name}-stacks-{secrets.token_hex(3)}"
        try:
            self._client.submit_job(
                entrypoint=self._entrypoint("--stacks", self.attempt), submission_id=name
            )
            deadline = time.monotonic() + STACKS_S
            while not self._client.get_job_status(name).is_terminal():
                if time.monotonic() > deadline:
                    raise TimeoutError("they do not come")
                time.sleep(0.5)
            say(self._client.get_job_logs(name))
        except Exception as error:
            say(f"warning: the workers' stacks cannot be had ({_reason(error)})")

    def _begin_or_attach(self) -> None:
        pattern = re.compile(rf"{re.escape(self.name)}-(\d+)")
        jobs = {}
        for job in self._client.list_jobs():
            if match := pattern.fullmatch(job.submission_id or ""):
                jobs[int(match[1])] = job.status
        newest = max(jobs, default=0)
        if newest and not jobs[newest].is_terminal():
            self.attempt = f"{self.name}-{newest}"
            say(f"train: the job {self.attempt} is at work on {self.address}: attached to it")
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
                    f"the Ray cluster at {self.address} refused the job ({_reason(error)})."
                ) from error
            self.attempt = attempt
            say(f"train: the job {self.attempt} is submitted to {self.address}")
        threading.Thread(target=self._show_log, args=(self.attempt,), daemon=True).start()

    def _entrypoint(self, *arguments: str) -> str:
        words = [self.launch.python, "-m", "dpnet.ray_driver", *arguments]
        return shlex.join([*words, self.work.store.uri, self.work.folder])

    def _show_log(self, job: str) -> None:
        """Print the job's log as it grows."""

        async def show() -> None:
            async for lines in self._client.tail_job_logs(job):
                for line in lines.splitlines():
                    say(f"{job}: {line}")

        try:
            asyncio.run(show())
        except Exception:
            return  # a log that breaks off takes nothing from the training


def _connected(address: str) -> Any:
    """A client of the cluster's Jobs API. Raises PipelineError where it is not to be had."""
    from ray.exceptions import AuthenticationError

    own = Path("~/.ray/auth_token").expanduser()
    try:
        try:
            return _client(address, _token())
        except AuthenticationError:
            if not own.exists():
                raise
            return _client(address, own.read_text().strip())  # only to who asks for one
    except AuthenticationError as error:
        raise PipelineError(
            f"the Ray cluster at {address} wants its token ({_reason(error)}): give it in"
            f" RAY_AUTH_TOKEN, or in the file {own} or the one that RAY_AUTH_TOKEN_PATH names."
        ) from error
    except Exception as error:
        raise PipelineError(
            f"cannot reach a Ray cluster at {address} ({_reason(error)}): give the address of its"
            " dashboard, as http://head:8265."
        ) from error


def _token() -> str:
    """The token that the user gives for the cluster, empty if none."""
    given = os.environ.get("RAY_AUTH_TOKEN", "")
    if not given and (path := os.environ.get("RAY_AUTH_TOKEN_PATH")):
        given = Path(path).expanduser().read_text().strip()
    return given


def _client(address: str, token: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for part in ("job.sdk", "dashboard_sdk"):
        logging.getLogger(f"ray.dashboard.modules.{part}").setLevel(logging.WARNING)

    class Client(JobSubmissionClient):  # type: ignore[misc]
        """Ray's own waits for an answer for ever."""

        def _do_request(self, method: str, endpoint: str, **options: Any) -> Any:
            return super()._do_request(method, endpoint, **options, timeout=ANSWER_S)

    with _no_other_address():
        client = Client(address, headers={"Authorization": f"Bearer {token}"} if token else None)
    client.list_jobs()
    return client


@contextmanager
def _no_other_address() -> Iterator[None]:
    """For Ray's client an address in the environment would count more than the one it is given."""
    kept = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _reason(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    if plain := re.search(r"\[Errno -?\d+\] ([\w ]+)|Read (timed out)", text):  # of much around it
        return plain[1] or plain[2]
    return text.splitlines()[0].rstrip(".:")[:200]


def cluster(launch: LaunchSettings) -> str:
    """Of the cluster's dashboard. Raises ConfigError where none is given."""
    # RAY_ADDRESS may also be that of the control service, which takes no jobs.
    given = [launch.address, *(os.environ.get(name, "") for name in ADDRESSES)]
    for address in given:
        if address and (address == launch.address or address.startswith("http")):
            return address
    raise ConfigError(
        "launch.address is missing: the launcher ray-job needs the address of a Ray cluster's"
        " dashboard, as --address http://head:8265."
    )
