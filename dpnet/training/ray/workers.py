"""The training loop under Ray Train: workers, their restarts, and what they need of Ray.

Ray starts the workers, watches over them, and starts them again when a worker or its machine dies.
It keeps nothing: checkpoints are the loop's own, on the root's storage, so every start, by whatever
Ray and wherever, finds the same ones. What Ray writes goes to a scratch folder.

What workers have to say goes through Ray's control service, which is there when storage is not.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import secrets
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from data_prep.core import progress
from data_prep.core.errors import PipelineError, StorageError, storage_error_in
from data_prep.core.logs import Forward, add_handler, start_logging
from data_prep.core.progress import say
from data_prep.core.storage.open import open_store
from dpnet.tracking.run_log import read_status
from dpnet.training.job import TrainJob

STOP_S = 3.0  # in which a training that is stopped leaves Ray
DEATHS = 3  # of Ray Train's own process in a row, without a step between, that are got over
LOOK_S = 2.0  # between two looks at the status
STACKS_S = 10.0  # for which the workers' stacks are waited for
_WORDS = "dpnet"  # namespace of what workers tell the driver


class Training:
    """A training on the Ray cluster that this process is connected to.

    Args:
        scratch: folder of this machine, for what Ray writes.
        attempt: names this start, so that what earlier ones left is not taken for its own.
        deadline: seconds without a sign of life after which it is given up.
    """

    def __init__(self, job: TrainJob, scratch: Path, attempt: str, deadline: float) -> None:
        self.job, self.scratch, self.attempt = job, scratch, attempt
        self.deadline = deadline
        self.store = open_store(job.root)
        self.error: BaseException | None = None
        self._stopped = False
        self._claim = f"{self.store.uri}/{job.folder}"
        self._looked = self._heard = time.monotonic()
        self._seen: dict[str, Any] = {}
        # In a thread, because in the main one Ray would take over SIGINT and not give it back.
        self._thread = threading.Thread(target=self._fit, name="ray-train", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, *, shared: bool) -> None:
        """Shut Ray down, and with it the workers; of a shared cluster, leave it.

        A cluster of one's own is not asked for anything first: a signal to the whole process group
        may have stopped its parts already, and Ray would wait for their answer.
        """
        import ray

        at_work = self._thread.is_alive()
        self._stopped = True
        if at_work:
            self._thread.join(STOP_S)
            if shared:
                with suppress(Exception):  # gone with its cluster, perhaps
                    self._give_up_claim()
        ray.shutdown()

    def _give_up_claim(self) -> None:
        """Ray sets resources aside for a training, for three minutes more if that is cut off."""
        import ray

        keeper = ray.get_actor("AutoscalingCoordinator", namespace="AutoscalingCoordinator")
        ray.get(keeper.cancel_request.remote(f"train-{self._claim}"), timeout=1)

    def goes_on(self) -> bool:
        """Whether it is still at work. Raises PipelineError where it has failed for good."""
        self._thread.join(0.2)
        alive = self._thread.is_alive()
        for kind, text, level, name in _words(self.attempt):
            if kind == "error":  # sooner than from Ray, which would start the workers again
                raise PipelineError(text)
            logging.getLogger(name).log(level, "%s", text)
        if not alive:
            if self.error is not None:
                raise explained(self.error, f"{self.store.uri}/{self.job.folder}") from self.error
            return False
        self._check_alive()
        return True

    def _check_alive(self) -> None:
        if time.monotonic() - self._looked < LOOK_S:
            return
        status, self._looked = self.status(), time.monotonic()
        if status != self._seen:
            self._seen, self._heard = status, self._looked
        if self._looked - self._heard > self.deadline:
            wanted = self.job.settings.min_workers or self.job.settings.workers
            what = "GPU" if self.job.settings.gpus else "CPU"
            raise PipelineError(
                f"training gave no sign of life for {self.deadline:.0f} s; it needs {wanted} free"
                f" workers with one {what} each, and the Ray cluster has {free(what)}: free some,"
                " add machines, lower train.workers or raise launch.deadline_s; the same command"
                " resumes."
            )

    def status(self) -> dict[str, Any]:
        """The newest status of this attempt."""
        status = read_status(self.store, self.job.folder)
        return status if status.get("attempt") == self.attempt else {}

    def print_stacks(self) -> None:
        """Print the stack of every thread of every worker."""
        for worker in self.status().get("workers", []):
            say(f"worker {worker['rank']}, process {worker['pid']} on {worker['host']}:")
            say(_stack_of(worker))

    def _fit(self) -> None:
        from ray.train.v2.api import data_parallel_trainer

        data_parallel_trainer.ray = _Stoppable(lambda: self._stopped)
        deaths, step = 0, None
        try:
            while True:
                try:
                    if self._trainer().fit().return_value:
                        return
                    say("train: goes on with the machines that stay")
                except Exception as error:
                    now = self.status().get("step")
                    deaths, step = 1 if now != step else deaths + 1, now
                    if self._stopped or not _ray_failed(error) or deaths > DEATHS:
                        raise
                    say("train: Ray Train's controller died: training is started again")
                    _release_workers()
        except BaseException as error:
            self.error = error

    def _trainer(self) -> Any:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchTrainer

        s = self.job.settings
        workers = s.workers if s.min_workers is None else (s.min_workers, s.workers)
        if s.min_workers is not None:
            # With how many it can begin Ray knows from a look some time ago: a machine that has
            # died since is waited for only so long before it looks again.
            os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "15")
        # Any number of tries to find free workers: it is the deadline that counts.
        failures = FailureConfig(max_failures=s.max_failures, controller_failure_limit=-1)
        name = self.job.folder.rpartition("/")[2]
        callbacks = [_callback(self.attempt)]
        trainer = TorchTrainer(
            _worker,
            train_loop_config={"job": self.job.to_json(), "attempt": self.attempt},
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=s.gpus),
            run_config=RunConfig(
                name=name,
                storage_path=str(self.scratch),
                failure_config=failures,
                callbacks=callbacks,
            ),
        )
        # What was set aside for one that died is this one's, because it has the same id.
        object.__setattr__(trainer.train_run_context, "run_id", self._claim)
        return trainer


class _Stoppable:
    """`ray` as Ray Train's trainer uses it, but that its waiting can be ended: a thread that is in
    `ray.get` while Ray is shut down ends the whole process, with status 1."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self._stopped = stopped

    def __getattr__(self, name: str) -> Any:
        import ray

        return getattr(ray, name)

    def get(self, result: Any) -> Any:
        import ray

        while not self._stopped():  # once Ray is shut down, asking it would start another one
            if ray.wait([result], timeout=0.3)[0]:
                return ray.get(result)
        raise SystemExit  # of this thread


def _callback(attempt: str) -> Any:
    """Runs in Ray Train's controller, and tells of workers that fail."""
    from ray.train import UserCallback

    class Failures(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Any]) -> None:
            # Where one dies the others fail too, because it does not answer.
            dead = [n for n, e in worker_exceptions.items() if hasattr(e, "health_check_failure")]
            if dead:
                text = f"died: {', '.join(map(str, dead))}"
            else:
                rank, error = next(iter(worker_exceptions.items()))
                text = f"failed: {rank} ({_last_line(error)})"
            _tell(attempt, "message", f"train: workers that {text}")

    return Failures()


def _last_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip().splitlines()[-1][:300]


def free(what: str) -> str:
    import ray

    return f"{ray.available_resources().get(what, 0):g} of {ray.cluster_resources().get(what, 0):g}"


def _ray_failed(error: BaseException) -> bool:
    """Whether it was Ray Train's controller that died or gave up, and not the training in it."""
    import ray
    from ray.train import ControllerError

    return isinstance(error, ray.exceptions.RayActorError | ControllerError)


def _release_workers() -> None:
    """Give back what a dead controller's workers held: Ray does so only with a dashboard."""
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


def explained(error: BaseException, where: str) -> BaseException:
    """What to tell of an error of Ray Train's: the worker's own, where a user can act on it."""
    failures = list(getattr(error, "worker_failures", {}).values())
    if controller := getattr(error, "controller_failure", None):
        failures.append(controller)
    causes = [cause for failure in failures for cause in _causes(failure)]
    for cause in causes:
        if isinstance(cause, PipelineError):
            return PipelineError(str(cause))
    for failure in failures:
        text = _last_line(failure)
        if full := storage_error_in(text, where):
            return full
        return PipelineError(
            f"training failed ({text}): run the same command again, it resumes from the last"
            " checkpoint."
        )
    if _ray_failed(error):
        return PipelineError(
            "training failed, Ray Train's controller died again and again: run the same command"
            " again, it resumes from the last checkpoint."
        )
    return error


def _causes(error: BaseException | None) -> list[BaseException]:
    found = []
    while error is not None:
        found.append(error)
        error = getattr(error, "cause", None) or error.__cause__
    return found


def _worker(config: dict[str, Any]) -> bool:
    """What each Ray worker runs: whether training has come to its end."""
    import torch

    from dpnet.training.loop import train_loop

    job, attempt = TrainJob.from_json(config["job"]), config["attempt"]
    start_logging()  # to Ray's log of this worker
    forward = Forward(lambda level, name, text: _tell(attempt, "message", text, level, name))
    add_handler(forward)
    progress.listeners.append(lambda text: _tell(attempt, "message", text))
    session = RaySession(attempt)
    if not job.settings.gpus:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // session.local_world))
    try:
        with _stacks_on_signal():
            return train_loop(job, session)
    except StorageError:
        raise  # may pass: Ray starts the workers again
    except PipelineError as error:
        _tell(attempt, "error", str(error))
        raise


def _tell(
    attempt: str,
    kind: Literal["message", "error"],
    text: str,
    level: int = logging.INFO,
    name: str = __name__,
) -> None:
    """Leave a log record, or the error that ends training, for the driver to collect."""
    from ray.experimental.internal_kv import _internal_kv_put

    with suppress(Exception):  # an error comes through Ray too, later
        key = f"{attempt}/{time.time_ns():020d}-{secrets.token_hex(4)}"
        _internal_kv_put(key, json.dumps([kind, text, level, name]), namespace=_WORDS)


def _words(attempt: str) -> Iterator[tuple[str, str, int, str]]:
    """Yield (kind, text, level, name of the logger) of each new message, the oldest first."""
    from ray.experimental.internal_kv import (
        _internal_kv_del,
        _internal_kv_get,
        _internal_kv_list,
    )

    for key in sorted(_internal_kv_list(f"{attempt}/", namespace=_WORDS)):
        kind, text, level, name = json.loads(_internal_kv_get(key, namespace=_WORDS))
        _internal_kv_del(key, namespace=_WORDS)
        yield kind, text, level, name


@contextmanager
def _stacks_on_signal() -> Iterator[None]:
    """SIGUSR1 writes what every thread is doing to a file, for `_dump`."""
    path = Path(tempfile.gettempdir(), _stack_file(os.getpid()))
    with path.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR1)
            path.unlink(missing_ok=True)


def _stack_file(process: int) -> str:
    return f"dpnet-stacks-{process}.txt"


def _stack_of(worker: dict[str, Any]) -> str:
    """The stacks of one worker, fetched by a task on its machine."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(worker["node"], soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(_dump).options(scheduling_strategy=here)
    try:
        return str(ray.get(task.remote(worker["pid"]), timeout=STACKS_S))
    except ray.exceptions.RayError as error:
        return f"its stacks cannot be had ({type(error).__name__})"


def _dump(process: int) -> str:
    file = Path(tempfile.gettempdir(), _stack_file(process))
    before = file.stat().st_size if file.exists() else 0
    os.kill(process, signal.SIGUSR1)
    deadline = time.monotonic() + STACKS_S / 2
    text = ""
    while time.monotonic() < deadline and not text.endswith("\n"):
        time.sleep(0.1)
        text = file.read_text()[before:] if file.exists() else ""
    return text


class RaySession:
    """The loop's surroundings inside a Ray Train worker."""

    def __init__(self, attempt: str) -> None:
        import ray
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world: int = context.get_world_size()
        self.local_world: int = context.get_local_world_size()
        self.device = ray.train.torch.get_device()
        self.node: str = ray.get_runtime_context().get_node_id()
        self.attempt = attempt
        self._told: Any = None

    def notice(self) -> bool:
        import ray.train

        info = ray.train.get_preemption_info()
        news = info is not None and info != self._told
        if news and self.rank == 0:
            say("train: a machine is about to be taken away: saving")
        self._told = info
        return news
