"""The launcher `local`: Ray on this machine, for as long as the training takes."""

from __future__ import annotations

import logging
import os
import secrets
from contextlib import ExitStack
from typing import Any

from data_prep.core.errors import PipelineError
from dpnet.training.job import TrainJob, training_lease
from dpnet.training.ray.start import connect, prepare_start
from dpnet.training.settings import LaunchSettings

log = logging.getLogger(__name__)

_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away
}


class LocalLauncher:
    """Training on a Ray that starts and ends with it."""

    def __init__(self, job: TrainJob, launch: LaunchSettings) -> None:
        self.job, self.launch = job, launch
        self.attempt = secrets.token_hex(4)
        self._training: Any = None
        self._started = ExitStack()

    def start(self) -> None:
        """Start Ray and the workers. Raises PipelineError if Ray does not start."""
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import ray

        from dpnet.training.ray.ray_train import Training

        if ray.is_initialized():
            raise PipelineError("Ray already runs in this process: shut it down before training.")
        gpus = _gpus(self.job) if self.job.settings.gpus else 0
        lease = self._started.enter_context(training_lease(self.job))
        log.info("train: starting Ray")
        start = self._started.enter_context(prepare_start())
        self._training = Training(
            self.job, start.folder, self.attempt, self.launch.deadline_s, lease.reference()
        )
        try:
            self._started.enter_context(start.in_this_process())
            connect(**start.init_options(self.job.settings.workers + 1, gpus))
        except Exception as error:  # Ray raises plain ones, for example on a busy machine
            reason = str(error).split(". ")[0].rstrip(".")
            raise PipelineError(
                f"Ray did not start on this machine ({reason}): end other programs or add memory,"
                " then run the same command again."
            ) from error
        self._training.start()

    @property
    def facts(self) -> list[str]:
        """Return nothing: training runs in this process and its children."""
        return []

    def is_running(self) -> bool:
        """Return whether training still runs."""
        running: bool = self._training.is_running()
        return running

    def cancel(self) -> None:
        """Stop the workers and Ray, and remove Ray's files."""
        if self._training is not None:
            self._training.stop(shared=False)
        self._started.close()

    def print_stacks(self) -> None:
        """Log what every worker is doing."""
        if self._training is not None:
            self._training.print_stacks()


def _gpus(job: TrainJob) -> int:
    """Return the number of GPUs to use on this machine, at most one for each worker."""
    import torch

    workers, found = job.settings.workers, torch.cuda.device_count()
    if found < (job.settings.min_workers or workers):
        build = "" if torch.version.cuda else " (built without CUDA)"
        fewer = "lower train.workers, " if found else ""
        raise PipelineError(
            f"train.gpus is true and train.workers is {workers}, but torch{build} finds {found}"
            f" GPUs on this machine: {fewer}leave train.gpus out to train on the CPU, or train on"
            " a Ray cluster with --launcher ray-job."
        )
    return min(found, workers)
