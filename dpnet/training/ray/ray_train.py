"""Run a training with Ray Train on the Ray cluster that this process is connected to.

Ray starts the workers, watches them, and restarts them if a worker or its machine dies. Ray keeps
no checkpoints. The loop writes its own to the root's storage, so every start finds the same ones,
on any cluster. The files that Ray writes go to a scratch folder.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.core.errors import PipelineError, storage_error_in
from data_prep.core.storage.open import open_store
from dpnet.tracking.run_log import read_status
from dpnet.training.job import TrainJob
from dpnet.training.ray import workers
from dpnet.training.ray.deaths import death_reason
from dpnet.training.ray.messages import forward_logs, receive
from dpnet.training.ray.stacks import stacks_of

log = logging.getLogger(__name__)

STOP_S = 3.0  # how long a stopped training may take to leave Ray
DEATHS = 3  # how often in a row Ray Train's controller may die without a new step
LOOK_S = 2.0  # between two reads of the status


class Training:
    """A training on the Ray cluster that this process is connected to.

    Args:
        job: The training.
        scratch: Folder of this machine for the files that Ray writes.
        attempt: Name of this start. It separates its status from that of earlier starts.
        deadline: Seconds without progress after which training is given up.
        lease: Reference to the lease that this process holds while it trains.
    """

    def __init__(
        self,
        job: TrainJob,
        scratch: Path,
        attempt: str,
        deadline: float,
        lease: Mapping[str, Any] | None = None,
    ) -> None:
        self.job, self.scratch, self.attempt = job, scratch, attempt
        self.deadline, self.lease = deadline, lease
        self.store = open_store(job.root)
        self.error: BaseException | None = None
        self._stopped = False
        # Not the thread's own state: if Ctrl-C interrupts a `join`, Python 3.11 takes a running
        # thread for an ended one.
        self._ended = threading.Event()
        self._claim = f"{self.store.uri}/{job.folder}"
        self._looked = self._heard = time.monotonic()
        self._seen: dict[str, Any] = {}
        # In a thread: in the main thread Ray would replace the handler of SIGINT.
        self._thread = threading.Thread(target=self._fit, name="ray-train", daemon=True)

    def start(self) -> None:
        """Start the workers, without waiting for them."""
        self._thread.start()

    def stop(self, *, shared: bool) -> None:
        """Stop the workers and disconnect from Ray.

        Args:
            shared: The cluster has other users. Otherwise Ray shuts down without a request to its
                processes: a signal to the process group may have stopped some, and Ray would wait
                for their answer.
        """
        import ray

        running = self._thread.ident is not None and not self._ended.is_set()
        self._stopped = True
        if running:
            self._ended.wait(STOP_S)
            if shared:
                with suppress(Exception):  # the cluster may be gone
                    self._release_claim()
        ray.shutdown()

    def _release_claim(self) -> None:
        """Release the resources that Ray would reserve for three minutes after a stop."""
        import ray

        keeper = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(keeper.cancel_request.remote(f"train-{self._claim}"), timeout=1)

    def is_running(self) -> bool:
        """Return whether training still runs. Raises PipelineError if it has failed for good."""
        ended = self._ended.wait(0.2)
        receive(self.attempt)  # raises a worker's error before Ray restarts the workers
        if ended:
            if self.error is not None:
                where = f"{self.store.label}/{self.job.folder}"
                raise explain_error(self.error, where) from self.error
            return False
        self._check_progress()
        return True

    def _check_progress(self) -> None:
        """Raise PipelineError if the status has not changed for `deadline` seconds."""
        if time.monotonic() - self._looked < LOOK_S:
            return
        status, self._looked = self.status(), time.monotonic()
        if status != self._seen:
            self._seen, self._heard = status, self._looked
        if self._looked - self._heard > self.deadline:
            needed = self.job.settings.min_workers or self.job.settings.workers
            kind = "GPU" if self.job.settings.gpus else "CPU"
            raise PipelineError(
                f"training made no progress for {self.deadline:.0f} s: it needs {needed} free"
                f" workers with one {kind} each, and the Ray cluster has {_free(kind)}. Free some,"
                " add machines, lower train.workers or raise launch.deadline_s; the same command"
                " resumes."
            )

    def status(self) -> dict[str, Any]:
        """Return the newest status of this attempt."""
        status = read_status(self.store, self.job.folder)
        return status if status.get("attempt") == self.attempt else {}

    def print_stacks(self) -> None:
        """Log the stack of every thread of every worker."""
        for worker in self.status().get("workers", []):
            log.info("worker %s, process %s on %s:", *(worker[k] for k in ("rank", "pid", "host")))
            log.info("%s", stacks_of(worker))

    def _fit(self) -> None:
        deaths, in_a_row, step = 0, 0, None
        try:
            from ray.train.v2.api import data_parallel_trainer

            data_parallel_trainer.ray = _Stoppable(lambda: self._stopped)
            while True:
                try:
                    if self._trainer().fit().return_value:
                        return
                    log.info("train: continues on the remaining machines")
                except Exception as error:
                    now = self.status().get("step")
                    deaths, in_a_row, step = deaths + 1, 1 if now != step else in_a_row + 1, now
                    often = deaths > self.job.settings.max_failures or in_a_row > DEATHS
                    if self._stopped or not _ray_failed(error) or often:
                        raise
                    log.warning(
                        "train: Ray Train's controller died (%s), training restarts",
                        _short(error),
                    )
                    _release_workers()
        except BaseException as error:
            self.error = error
        finally:
            self._ended.set()

    def _trainer(self) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        from dpnet.training.ray.process_group import ProcessGroup

        s = self.job.settings
        number = s.workers if s.min_workers is None else (s.min_workers, s.workers)
        if s.min_workers is not None:
            # Ray chooses the number of workers from an earlier look at the cluster. If a machine
            # has died since, Ray waits for it only this long before it looks again.
            os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
        # The deadline limits the search for free workers, not a number of tries.
        failures = FailureConfig(max_failures=s.max_failures, controller_failure_limit=-1)
        trainer = TorchTrainer(
            workers.run_worker,
            train_loop_config={
                "job": self.job.to_json(),
                "attempt": self.attempt,
                "lease": self.lease,
            },
            torch_config=ProcessGroup(),
            scaling_config=ScalingConfig(num_workers=number, use_gpu=s.gpus),
            run_config=RunConfig(
                name=self.job.folder.rpartition("/")[2],
                storage_path=str(self.scratch),
                failure_config=failures,
                callbacks=[_failures_callback(self.attempt)],
            ),
        )
        # With the same id, this start inherits the resources reserved for one that died.
        object.__setattr__(trainer.train_run_context, "run_id", self._claim)
        return trainer


class _Stoppable:
    """The module `ray` for Ray Train's trainer, with a `get` that can be ended.

    A thread inside `ray.get` while Ray shuts down would end the whole process with status 1.
    """

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __getattr__(self, name: str) -> Any:
        import ray

        return getattr(ray, name)

    def get(self, result: Any) -> Any:
        """Wait for a result. After a stop, end this thread."""
        import ray

        while not self._stopped():  # after Ray's shutdown, a call would start another Ray
            if ray.wait([result], timeout=0.3)[0]:
                return ray.get(result)
        raise SystemExit  # ends this thread only


def _failures_callback(attempt: str) -> Any:
    """Return a callback that runs in Ray Train's controller and reports failed workers."""
    from ray.train import UserCallback

    class Failures(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Any]) -> None:
            """Report the workers that died, or the first error of those that failed."""
            # If one worker dies, the others fail too, because it does not answer.
            dead = [n for n, e in worker_exceptions.items() if hasattr(e, "health_check_failure")]
            if dead:
                text = f"died: {', '.join(map(str, dead))}"
            else:
                rank, error = next(iter(worker_exceptions.items()))
                text = f"failed: {rank} ({_short(error)})"
            forward_logs(attempt).emit(
                logging.makeLogRecord(
                    {"name": __name__, "levelno": logging.WARNING, "msg": f"train: workers {text}"}
                )
            )

    return Failures()


def _short(error: BaseException) -> str:
    """Return the reason of a death, and of another error the last line."""
    if reason := death_reason(error):
        return reason
    return f"{type(error).__name__}: {error}".strip().splitlines()[-1][:300]


def _free(kind: str) -> str:
    """Return how many CPUs or GPUs of the cluster are free, such as "1 of 4"."""
    import ray

    return f"{ray.available_resources().get(kind, 0):g} of {ray.cluster_resources().get(kind, 0):g}"


def _ray_failed(error: BaseException) -> bool:
    """Return whether Ray Train's controller died or gave up, and not the training in it."""
    from ray.train import ControllerError, TrainingFailedError

    if isinstance(error, TrainingFailedError):  # with other kinds, Ray has restarted often enough
        return isinstance(error, ControllerError)
    return death_reason(error) is not None


def _release_workers() -> None:
    """Release the resources of a dead controller's workers. Ray needs a dashboard to do that."""
    import ray
    from ray._raylet import PlacementGroupID
    from ray.util.placement_group import (
        PlacementGroup,
        placement_group_table,
        remove_placement_group,
    )

    job = ray.get_runtime_context().get_job_id()  # the last part of each of its groups' ids
    for number, group in placement_group_table().items():
        if number.endswith(job) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(PlacementGroupID.from_hex(number)))


def explain_error(error: BaseException, where: str) -> BaseException:
    """Return the error to show for one of Ray Train's: a worker's own if a user can act on it.

    Args:
        error: The error that Ray Train raised.
        where: Root and folder of the run.
    """
    from ray.exceptions import RayError

    failures = list(getattr(error, "worker_failures", {}).values())
    if controller := getattr(error, "controller_failure", None):
        failures.append(controller)
    causes = [cause for failure in failures for cause in _causes(failure)]
    for cause in causes:
        if isinstance(cause, PipelineError):
            return PipelineError(str(cause))
    for failure in failures:
        text = _short(failure)
        if full := storage_error_in(text, where):
            return full
        return PipelineError(
            f"training failed ({text}): run the same command again, it resumes from the last"
            " checkpoint."
        )
    if _ray_failed(error):
        return PipelineError(
            f"training failed: Ray Train's controller died too often ({_short(error)}). Run the"
            " same command again, it resumes from the last checkpoint."
        )
    if isinstance(error, RayError):
        return PipelineError(
            f"training failed ({_short(error)}): run the same command again, it resumes from the"
            " last checkpoint."
        )
    return error


def _causes(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None:
        found.append(error)
        error = getattr(error, "cause", None) or error.__cause__
    return found
