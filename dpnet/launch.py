"""Launching the training loop: Ray on this machine.

`run_local` starts Ray for the time of the training, runs the loop under Ray Train with DDP and
reads the result from the run's storage. Ray Train's run name is the stage's folder, so a run that
was cut off goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.errors import PipelineError, storage_error_in
from data_prep.progress import say
from data_prep.stage import FileRecord, Work
from data_prep.storage import LocalStore
from dpnet.train import TrainJob

Report = Callable[[int, str], None]


@dataclass(frozen=True)
class Outcome:
    """What training left: the weights' files and the log."""

    files: list[FileRecord]
    log: list[dict[str, Any]]
    resumed_from: int  # the step this call went on from


def run_local(job: TrainJob, work: Work, report: Report) -> Outcome:
    """Train with `train.workers` Ray workers on this machine; `report(step, note)` is called."""
    # A worker's prints are of no use to the user, Ray's own reports even less.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    # Sockets under a deep folder would exceed the system's limit of 107 bytes.
    scratch = Path(tempfile.mkdtemp(prefix="dpnet-ray-", dir="/tmp"))
    status = scratch / "status.json"
    storage, run = work.folder.rsplit("/", 1)
    root = work.store
    storage_path = (
        str(root.path(storage)) if isinstance(root, LocalStore) else f"{root.uri}/{storage}"
    )
    settings = job.settings
    try:
        say("train: starting Ray")
        with _quiet_ray(ray, scratch, settings.workers, settings.gpus):
            trainer = TorchTrainer(
                _worker,
                train_loop_config={"job": job, "status": str(status)},
                scaling_config=ScalingConfig(num_workers=settings.workers, use_gpu=settings.gpus),
                run_config=RunConfig(
                    name=run,
                    storage_path=storage_path,
                    checkpoint_config=CheckpointConfig(num_to_keep=settings.keep_checkpoints),
                    failure_config=FailureConfig(max_failures=1, controller_failure_limit=2),
                ),
            )
            result = _fit(trainer, status, report, f"{root.uri}/{work.folder}")
            checkpoint = result.checkpoint
            if checkpoint is None:
                raise PipelineError(
                    f"training of {root.uri}/{work.folder} ended without a checkpoint:"
                    " run the same command again."
                )
            with checkpoint.as_directory() as folder:
                return _collect(job, work, Path(folder), _resumed_from(status))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def _quiet_ray(ray: Any, scratch: Path, workers: int, gpus: bool) -> Iterator[None]:
    if ray.is_initialized():
        raise PipelineError("Ray already runs in this process: shut it down before training.")
    logging.getLogger("ray").setLevel(logging.ERROR)
    handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    ray.init(
        address="local",
        num_cpus=workers + 1,
        num_gpus=workers if gpus else 0,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=128 << 20,  # nothing large passes through it
        _temp_dir=str(scratch),
    )
    if threading.current_thread() is threading.main_thread():
        for each, handler in handlers.items():  # Ray's own of SIGTERM aborts the process
            signal.signal(each, handler)
    try:
        yield
    finally:
        ray.shutdown()


def _fit(trainer: Any, status: Path, report: Report, where: str) -> Any:
    """`trainer.fit()` in a thread, so that Ctrl-C stays ours and progress can be shown.

    In the main thread Ray would take over the handler of SIGINT and not give it back.
    """
    outcome: dict[str, Any] = {}
    told = False

    def fit() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=fit, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.5)
        seen = _read(status)
        if seen.get("resumed_from", 0) and not told:
            told = True
            say(f"train: goes on from the checkpoint of step {seen['resumed_from']}")
        if "step" in seen:
            report(seen["step"], seen["note"])
    if "error" in outcome:
        raise _plain(outcome["error"], where) from outcome["error"]
    return outcome["result"]


def _plain(error: BaseException, where: str) -> BaseException:
    """What to tell of an error of Ray Train's: the worker's own, where a user can act on it."""
    failures = list(getattr(error, "worker_failures", {}).values())
    if controller := getattr(error, "controller_failure", None):
        failures.append(controller)
    for failure in failures:
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, PipelineError):
                return PipelineError(str(cause))
            cause = getattr(cause, "cause", None) or cause.__cause__
        text = f"{type(failure).__name__}: {failure}".strip().splitlines()[-1]
        if full := storage_error_in(text, where):
            return full
        return PipelineError(
            f"training failed ({text}): run the same command again, it resumes from the"
            " last checkpoint."
        )
    return error


def _collect(job: TrainJob, work: Work, folder: Path, resumed_from: int) -> Outcome:
    import torch

    from dpnet.loop import LOG, initial_state
    from dpnet.weights import save_generator

    state = initial_state(job, torch.device("cpu"))
    state.load(folder)
    log = [json.loads(line) for line in (folder / LOG).read_text().splitlines()]
    facts = {
        "step": state.step,
        "images": job.images.content_digest,
        "masks": job.masks.content_digest,
    }
    return Outcome(save_generator(work.store, work.folder, state.ema, facts), log, resumed_from)


def _worker(config: dict[str, Any]) -> None:
    """What each Ray worker runs."""
    import torch

    from dpnet.loop import train_loop

    job: TrainJob = config["job"]
    if not job.settings.gpus:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // job.settings.workers))
    train_loop(job, RaySession(Path(config["status"])))


class RaySession:
    """The loop's surroundings inside a Ray Train worker."""

    def __init__(self, status: Path) -> None:
        import ray.train
        import ray.train.torch

        context = ray.train.get_context()
        self.rank: int = context.get_world_rank()
        self.world: int = context.get_world_size()
        self.device = ray.train.torch.get_device()
        self._status = status
        self._start = 0

    @contextmanager
    def latest(self) -> Iterator[Path | None]:
        import ray.train

        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            yield None
            return
        with checkpoint.as_directory() as folder:
            self._start = int(Path(checkpoint.path).name.removeprefix("step-"))
            yield Path(folder)

    def save(self, step: int, folder: Path | None) -> None:
        import ray.train

        checkpoint = None if folder is None else ray.train.Checkpoint.from_directory(folder)
        ray.train.report(
            {"step": step}, checkpoint=checkpoint, checkpoint_dir_name=f"step-{step:08d}"
        )

    def progress(self, step: int, note: str) -> None:
        if self.rank == 0:
            record = {"step": step, "note": note, "resumed_from": self._start}
            staged = self._status.with_suffix(".new")
            staged.write_text(json.dumps(record))
            os.replace(staged, self._status)


def _read(status: Path) -> dict[str, Any]:
    try:
        seen: dict[str, Any] = json.loads(status.read_text())
    except FileNotFoundError:
        return {}
    return seen


def _resumed_from(status: Path) -> int:
    return int(_read(status).get("resumed_from", 0))
