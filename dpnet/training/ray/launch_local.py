"""The launcher `local`: Ray on this machine, for as long as the training takes."""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_prep.core.errors import PipelineError
from data_prep.core.progress import say
from dpnet.training.job import TrainJob
from dpnet.training.settings import LaunchSettings

SCRATCH, PREFIX, LOCK = Path("/tmp"), "dpnet-ray-", ".lock"
REMOVE_S = 5.0  # for which Ray's scratch folder is tried to be removed


class LocalLauncher:
    def __init__(self, job: TrainJob, launch: LaunchSettings) -> None:
        self.job, self.launch = job, launch
        self.attempt = secrets.token_hex(4)
        self._training: Any = None

    def start(self) -> None:
        # A worker's prints are of no use to the user, Ray's own reports even less.
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this one
        import ray

        from dpnet.training.ray.workers import Training

        if ray.is_initialized():
            raise PipelineError("Ray already runs in this process: shut it down before training.")
        gpus = _gpus(self.job) if self.job.settings.gpus else 0
        say("train: starting Ray")
        # Sockets under a deep folder would exceed the system's limit of 107 bytes.
        _sweep(SCRATCH)
        scratch = Path(tempfile.mkdtemp(prefix=PREFIX, dir=SCRATCH))
        self._lock = (scratch / LOCK).open("wb")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._training = Training(self.job, scratch, self.attempt, self.launch.deadline_s)
        logging.getLogger("ray").setLevel(logging.ERROR)
        handlers = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(
                address="local",
                num_cpus=self.job.settings.workers + 1,
                num_gpus=gpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=128 << 20,  # nothing large passes through it
                _temp_dir=str(scratch),
            )
        except Exception as error:  # Ray raises plain ones, as where the machine is too busy
            what = str(error).split(". ")[0].rstrip(".")
            raise PipelineError(
                f"Ray did not start on this machine ({what}): give it less other work or more"
                " memory, then run the same again."
            ) from error
        if threading.current_thread() is threading.main_thread():
            for each, handler in handlers.items():  # Ray's own of SIGTERM aborts the process
                signal.signal(each, handler)
        self._training.start()

    def goes_on(self) -> bool:
        going: bool = self._training.goes_on()
        return going

    def cancel(self) -> None:
        if self._training is not None:
            self._training.stop(shared=False)
            _remove(self._training.scratch)
            self._lock.close()

    def print_stacks(self) -> None:
        if self._training is not None:
            self._training.print_stacks()


def _gpus(job: TrainJob) -> int:
    """How many GPUs this machine has, at most one for each worker."""
    import torch

    workers, found = job.settings.workers, torch.cuda.device_count()
    if found < (job.settings.min_workers or workers):
        build = "" if torch.version.cuda else ", whose build has no CUDA,"
        fewer = "lower train.workers, " if found else ""
        raise PipelineError(
            f"train.gpus is true and train.workers {workers}, but torch{build} finds {found} GPUs"
            f" on this machine: {fewer}leave train.gpus out to train on its CPU, or train on a Ray"
            " cluster with --launcher ray-job."
        )
    return min(found, workers)


def _sweep(scratch: Path) -> None:
    """Remove the folders of trainings that were killed: nobody holds their locks."""
    for folder in scratch.glob(f"{PREFIX}*"):
        with suppress(OSError), (folder / LOCK).open("rb") as lock:  # another user's, or at work
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Ray, stopped in the middle of its start, leaves agents behind that go on for a minute and
    put something there: they are ended first."""
    deadline = time.monotonic() + REMOVE_S
    while time.monotonic() < deadline:
        left = _writers(folder)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)
        if not left and not folder.exists():
            return
        time.sleep(0.05)


def _writers(folder: Path) -> list[int]:
    """Processes whose output goes to a file in `folder`; none where there is no /proc."""
    found = []
    for output in Path("/proc").glob("[0-9]*/fd/1"):
        with suppress(OSError):  # another user's, or it has ended
            if os.readlink(output).startswith(f"{folder}/"):
                found.append(int(output.parts[2]))
    return found
