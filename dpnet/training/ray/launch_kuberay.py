"""The launcher `kuberay`: a RayJob on Kubernetes, named after the run's digest.

KubeRay gives each RayJob a Ray cluster of its own and removes it at the end. The RayJob continues
when this process ends. The same command, on this machine or another, attaches to it. If an attempt
has failed or was stopped, the next attempt is a RayJob with the next number. It resumes from the
last checkpoint.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from importlib.metadata import version
from typing import Any

from data_prep.core.digest import SHORT, sha256_bytes
from data_prep.core.errors import PipelineError
from data_prep.core.stage import Work
from dpnet.tracking.run_log import read_status
from dpnet.training.job import TrainJob
from dpnet.training.ray.follow_rayjob import Follower
from dpnet.training.ray.job_log import log_stacks, show_log
from dpnet.training.ray.jobs_client import connect_client, reason_of
from dpnet.training.ray.kube_client import Kube, KubeError, fatal, read_template
from dpnet.training.ray.launch_job import driver_command, write_spec
from dpnet.training.ray.rayjob import RUN, Attempt, is_of, number_of, render_rayjob
from dpnet.training.ray.rayjob_outcome import Outcome, deleted, outcome_of, reason_of_pods
from dpnet.training.settings import LaunchSettings

log = logging.getLogger(__name__)

TRY_S = 2.0  # between two tries to create the RayJob
EXPLAIN_S = 15.0  # between two looks at why a RayJob waits
# A server that has just started refuses requests that it takes a little later, and at first does
# not know the kinds of KubeRay.
SETTLE_S = 90.0
STOP_S = 25.0  # how long to wait until a cancelled RayJob is gone
QUIET = 3  # deadlines without a sign from the run's folder, after which the driver counts as lost


class KubeRayLauncher:
    """Training in a RayJob on Kubernetes."""

    def __init__(self, job: TrainJob, launch: LaunchSettings, work: Work) -> None:
        self.job, self.launch, self.work = job, launch, work
        # Several roots may request the same training in one namespace.
        root = sha256_bytes(work.store.uri.encode())
        self.name = f"dpnet-{work.request.digest[:SHORT]}-{root[:4]}"
        self.template = read_template(launch.template)
        self._render(self._attempt(1))  # an error of the template is shown before any request
        self.attempt = ""
        self._kube: Any = None
        self._follower: Follower | None = None
        self._deaths = 0
        self._kind = ""  # of the last outcome
        self._clock = _Clock()  # since that kind
        self._refused: _Clock | None = None
        self._asked = 0.0
        self._why = ""
        self._ends: dict[str, str] = {}  # of attempts, as sentences without a full stop
        self._warned = self._keep = self._tried = False

    @property
    def facts(self) -> list[str]:
        """Return where training runs or why it waits, and how earlier attempts ended."""
        ends = [f"The {end}." for end in self._ends.values()]
        if self._follower is None or self.attempt in self._ends:
            return ends
        if self._kind == "running":
            return [*ends, f"The {self._label} trains. {_reach(self._follower.job)}"]
        return [*ends, f"The {self._label} {self._why or 'waits for its pods'}."]

    def start(self) -> None:
        """Create a RayJob, or attach to the running one."""
        self._kube = Kube(self.launch.context, self.launch.namespace)
        self._try_to_start(first=True)

    def is_running(self) -> bool:
        """Return whether training still runs. Raises PipelineError if it has failed for good."""
        follower = self._follower
        if follower is None:
            if time.monotonic() - self._asked > TRY_S:
                self._try_to_start()
            return True
        self._check_answers(follower)
        gone = follower.gone  # read first: its last state is there before
        outcome = outcome_of(follower.job)
        if gone and outcome.kind != "succeeded":
            outcome = deleted()
        if outcome.kind != self._kind:
            self._kind, self._clock, self._asked = outcome.kind, _Clock(), time.monotonic()
            if outcome.kind == "running":
                self._follow_log(follower.job)
        if outcome.kind == "succeeded":
            return False
        if outcome.kind == "stopped":
            self._end(outcome.reason)
            raise PipelineError(f"the {self._label} {outcome.reason}: {outcome.advice}")
        if outcome.kind == "final":
            self._keep = True
            raise PipelineError(self._final(outcome))
        if outcome.kind == "passing":
            self._restart(outcome)
        elif follower.error is not None:  # nothing is known about the present
            pass
        elif outcome.kind == "waiting":
            self._check_start(outcome)
        else:
            self._check_signs()
        return True

    def cancel(self) -> None:
        """Delete the training's RayJobs, and wait until they are gone."""
        if self._follower is not None:
            self._follower.stop()
        if not self._tried:  # there is nothing to delete
            return
        if self._keep and self.launch.ttl_s:
            log.warning(
                "train: the %s stays, and its pods for %d s: kubectl -n %s describe rayjob %s",
                self._label,
                self.launch.ttl_s,
                self._kube.namespace,
                self._rayjob,
            )
            return
        deadline, problem = time.monotonic() + STOP_S, ""
        while time.monotonic() < deadline:
            try:
                names = [each["metadata"]["name"] for each in self._ours()]
                if not names:
                    return
                for name in names:
                    self._kube.delete(name)
                problem = "they are still being deleted"
            except KubeError as error:
                problem = str(error)
                if not error.passes:
                    break
            time.sleep(0.5)
        log.warning(
            "train: RayJobs may still run (%s): kubectl -n %s delete rayjob -l %s=%s",
            problem,
            self._kube.namespace,
            RUN,
            self.name,
        )

    def print_stacks(self) -> None:
        """Log what every worker is doing. A separate job reads it on the cluster's machines."""
        try:
            client = connect_client(_dashboard(self._follower.job if self._follower else {}))
        except PipelineError as error:
            log.warning("train: the workers' stacks are not available (%s)", error)
            return
        name = f"{self.name}-stacks-{secrets.token_hex(3)}"
        log_stacks(client, name, driver_command(self.launch, self.work, "--stacks", self.attempt))

    @property
    def _rayjob(self) -> str:
        return str(self._follower.job["metadata"]["name"]) if self._follower else self.name

    @property
    def _label(self) -> str:
        return f"RayJob {self._kube.namespace}/{self._rayjob}"

    def _attempt(self, number: int) -> Attempt:
        return Attempt(
            run=self.name,
            number=number,
            token=secrets.token_hex(3),
            digest=self.work.request.digest,
            root=self.work.store.label,
            folder=self.work.folder,
        )

    def _render(self, attempt: Attempt) -> dict[str, Any]:
        entrypoint = driver_command(self.launch, self.work, attempt.job_id)
        settings = self.job.settings
        return render_rayjob(
            self.template, attempt, self.launch, settings, version("ray"), entrypoint
        )

    def _try_to_start(self, first: bool = False) -> None:
        """Create or attach. An error that passes is tried again, until the deadline."""
        self._asked = time.monotonic()
        try:
            self._create_or_attach()
        except KubeError as error:
            passes = error.passes and not (first and error.status == 401)
            if not passes and (first or self._clock.seconds > SETTLE_S):
                raise fatal(error, "cannot start the RayJob") from error
            self._asked += max((error.wait or 0.0) - TRY_S, 0.0)
            quota = error.status == 403
            deadline = self.launch.pending_s if quota else self.launch.deadline_s
            self._clock.check(
                deadline,
                f"no RayJob could be created in {deadline} s ({error}): the same command tries"
                " again.",
            )
            self._warn_once(error, deadline)

    def _create_or_attach(self) -> None:
        ours = {number_of(each): each for each in self._ours()}
        newest = max(ours, default=0)
        for number, job in sorted(ours.items()):
            if number == newest and self._is_alive(job):
                self._attach(job, "attached to")
                return
            if not self._tried:  # those of earlier commands; the reasons of this one are shown
                end = _result(outcome_of(job))
                log.info("train: attempt %d %s", number, end)
                label = f"RayJob {self._kube.namespace}/{job['metadata']['name']}"
                self._ends[job["spec"]["jobId"]] = f"{label} {end}"
        attempt = self._attempt(newest + 1)
        job = self._render(attempt)
        # Not when attaching: a head that restarts reads it again, perhaps with an older version.
        write_spec(self.job, self.launch, self.work)
        self._tried = True
        try:
            created = self._kube.create(job)
        except KubeError as error:
            if error.status != 409:
                raise
            created = self._taken(attempt)
        said = "created" if created["spec"]["jobId"] == attempt.job_id else "attached to"
        self._attach(created, said)

    def _is_alive(self, job: dict[str, Any]) -> bool:
        """Return whether a RayJob trains, will train, or has finished the run that is here."""
        outcome = outcome_of(job)
        if outcome.kind == "succeeded":
            status = read_status(self.work.store, self.work.folder)
            return bool(status.get("attempt") == job["spec"]["jobId"])
        return outcome.kind in ("waiting", "running")

    def _taken(self, attempt: Attempt) -> dict[str, Any]:
        """Return the RayJob that another launcher has just made under the same name."""
        found: dict[str, Any] = self._kube.get(attempt.name)
        if not is_of(found, attempt):
            raise PipelineError(
                f"the RayJob {self._kube.namespace}/{attempt.name} exists, and is not of this"
                " training: look at it with `kubectl describe`, delete it if nobody needs it, or"
                " set launch.namespace to another one."
            )
        return found

    def _ours(self) -> list[dict[str, Any]]:
        jobs, _ = self._kube.jobs(labels=f"{RUN}={self.name}")
        return [each for each in jobs if is_of(each, self._attempt(0))]

    def _attach(self, job: dict[str, Any], said: str) -> None:
        if self._follower is not None:
            self._follower.stop()
        self.attempt = job["spec"]["jobId"]
        self._follower = Follower(self._kube, job)
        self._kind, self._clock = "", _Clock()
        self._why, self._warned, self._tried = "", False, True
        log.info("train: %s the %s", said, self._label)

    def _restart(self, outcome: Outcome) -> None:
        reason = self._end(self._with_pods(outcome.reason))
        if self._deaths >= self.job.settings.max_failures:
            self._keep = True
            raise PipelineError(
                f"the {self._label} {reason}, and train.max_failures is"
                f" {self.job.settings.max_failures}: the same command resumes."
            )
        self._deaths += 1
        log.warning(
            "train: the %s %s: the next attempt resumes from its last checkpoint",
            self._label,
            reason,
        )
        assert self._follower
        self._follower.stop()
        self._follower, self._clock, self._asked = None, _Clock(), 0.0

    def _final(self, outcome: Outcome) -> str:
        if not outcome.reason:
            self._end(_result(outcome))
            return outcome.advice
        reason = self._end(self._with_pods(outcome.reason))
        return f"the {self._label} {reason}: {outcome.advice}"

    def _end(self, reason: str) -> str:
        """Note why the present attempt ended, for the page of the run, and return it."""
        self._ends[self.attempt] = f"{self._label} {reason}"
        return reason

    def _check_answers(self, follower: Follower) -> None:
        """Warn once if Kubernetes does not answer. Raises PipelineError after the deadline."""
        error = follower.error
        if error is None:
            self._warned, self._refused = False, None
            return
        if error.passes:
            self._refused = None
        elif self._refused is None:
            self._refused = _Clock()
        elif self._refused.seconds > SETTLE_S:
            raise fatal(error, f"cannot follow the {self._label}") from error
        if time.monotonic() - follower.answered > self.launch.deadline_s:
            raise PipelineError(
                f"Kubernetes has not answered for {self.launch.deadline_s} s ({error}): the same"
                " command attaches to the RayJob again."
            ) from error
        self._warn_once(error, self.launch.deadline_s)

    def _warn_once(self, error: KubeError, seconds: int) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "train: Kubernetes at %s does not do as asked (%s): trying again for %d s",
                self._kube.address,
                error,
                seconds,
            )

    def _check_start(self, outcome: Outcome) -> None:
        """Show why the RayJob waits. Raises PipelineError after the deadline."""
        late = self._clock.seconds > self.launch.pending_s
        if not late and time.monotonic() - self._asked < EXPLAIN_S:
            return
        self._asked = time.monotonic()
        reason = self._with_pods(outcome.reason)
        if reason != self._why:
            self._why = reason
            log.info("train: the %s %s", self._label, reason)
        self._clock.check(
            self.launch.pending_s,
            f"the {self._label} did not start in {self.launch.pending_s} s, because it {reason}:"
            " remove the cause or raise launch.pending_s; the same command resumes.",
        )

    def _with_pods(self, reason: str) -> str:
        """Add the reason that the cluster gives for its pods to a reason."""
        assert self._follower
        status = self._follower.job.get("status") or {}
        cluster = status.get("rayClusterName") or ""
        try:
            pods = self._kube.pods(f"ray.io/cluster={cluster}") if cluster else []
            found = reason_of_pods(pods, self._kube.events(), (self._rayjob, cluster))
        except KubeError as error:
            return f"{reason}, and its pods cannot be looked at, because {error}"
        return f"{reason} ({found})" if found else reason

    def _check_signs(self) -> None:
        """Raise PipelineError if the run's folder shows no sign of life for very long.

        The driver on the cluster gives up after one deadline. This one is for a driver that is lost
        while KubeRay does not report it.
        """
        deadline = QUIET * self.launch.deadline_s
        if time.monotonic() - self._asked < EXPLAIN_S:
            return
        self._asked = time.monotonic()
        self._clock.look(read_status(self.work.store, self.work.folder))
        self._clock.check(
            deadline,
            f"the {self._label} is running, but the run's folder has had no sign of it for"
            f" {deadline} s: look at its pods and at KubeRay's operator; the same command resumes.",
        )

    def _follow_log(self, job: dict[str, Any]) -> None:
        """Show the job's log, if Ray's dashboard can be reached."""
        log.info("train: the %s is running", self._label)
        threading.Thread(
            target=_show_log, args=(_dashboard(job), self.attempt), daemon=True
        ).start()


def _now() -> float:
    """Return seconds of a clock that nobody sets. Those of Kubernetes may be hours off."""
    return time.monotonic()


class _Clock:
    """Measures how long nothing has changed, by this machine's monotonic clock."""

    def __init__(self) -> None:
        self._since = _now()
        self._seen: dict[str, Any] = {}

    @property
    def seconds(self) -> float:
        return _now() - self._since

    def look(self, state: dict[str, Any]) -> None:
        """Begin again if the state is new."""
        if state != self._seen:
            self._since, self._seen = _now(), state

    def check(self, deadline: float, sentence: str) -> None:
        """Raise PipelineError with a sentence if more than `deadline` seconds have passed."""
        if self.seconds > deadline:
            raise PipelineError(sentence)


def _result(outcome: Outcome) -> str:
    """Return what became of an earlier attempt."""
    return outcome.reason or f"has ended: {outcome.advice.rstrip('.')}"


def _reach(job: dict[str, Any]) -> str:
    """Return where Ray's dashboard is, and how to reach it from outside of the cluster."""
    address = _dashboard(job)
    host, _, port = address.partition("://")[2].partition(":")
    service, *inside = host.split(".")
    if "svc" not in inside:
        return f"Ray dashboard: {address}"
    forward = f"kubectl -n {job['metadata']['namespace']} port-forward service/{service} {port}"
    return f"Ray dashboard inside of the cluster: {address} (outside: {forward})"


def _dashboard(job: dict[str, Any]) -> str:
    address = str((job.get("status") or {}).get("dashboardURL") or "")
    return address if "://" in address else f"http://{address}"


def _show_log(address: str, job: str) -> None:
    try:
        client = connect_client(address)
    except PipelineError as error:
        log.info(
            "train: the log of %s cannot be followed from here (%s): the progress comes from the"
            " run's folder",
            job,
            reason_of(error.__cause__ or error),
        )
        return
    show_log(client, job)
