"""The launcher `local`: Ray on this machine, for as long as the training takes."""

from __future__ import annotations

import os
import secrets
from contextlib import ExitStack
from typing import Any

from data_prep.core.errors import PipelineError
from data_prep.core.progress import say
from dpnet.training.job import TrainJob
from dpnet.training.ray.start import connect, prepare_start
from dpnet.training.settings import LaunchSettings

_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # nobody takes this machine away
}


class LocalLauncher:
    def __init__(self, job: TrainJob, launch: LaunchSettings) -> None:
        self.job, self.launch = job, launch
        self.attempt = secrets.token_hex(4)
        self._training: Any = None
        self._started = ExitStack()

    def start(self) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import ray

        from dpnet.training.ray.workers import Training

        if ray.is_initialized():
            raise PipelineError("Ray already runs in this process: shut it down before training.")
        gpus = _gpus(self.job) if self.job.settings.gpus else 0
        say("train: starting Ray")
        start = self._started.enter_context(prepare_start())
        self._training = Training(self.job, start.folder, self.attempt, self.launch.deadline_s)
        try:
            connect(**start.init_options(self.job.settings.workers + 1, gpus))
        except Exception as error:  # Ray raises plain ones, as where the machine is too busy
            what = str(error).split(". ")[0].rstrip(".")
            raise PipelineError(
                f"Ray did not start on this machine ({what}): give it less other work or more"
                " memory, then run the same again."
            ) from error
        self._training.start()

    def goes_on(self) -> bool:
        going: bool = self._training.goes_on()
        return going

    def cancel(self) -> None:
        if self._training is not None:
            self._training.stop(shared=False)
        self._started.close()

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
