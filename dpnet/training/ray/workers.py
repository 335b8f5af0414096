"""Run the training in each Ray Train worker; its session."""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack
from typing import Any

from data_prep.core.errors import PipelineError, StorageError
from data_prep.core.lease import Follower
from data_prep.core.logs import add_handler, start_logging
from data_prep.core.storage.open import open_store
from dpnet.training.job import TrainJob
from dpnet.training.ray.messages import forward_logs, send_error
from dpnet.training.ray.stacks import stacks_on_signal

log = logging.getLogger(__name__)


def run_worker(config: dict[str, Any]) -> bool:
    """Run the training loop in a Ray Train worker. Return whether training is finished.

    Args:
        config: `job`, the TrainJob as JSON; `attempt`, the name of this start; and `lease`, the
            reference to the driver's lease. Rank 0, which writes, stops if the driver loses it.
    """
    import torch

    from dpnet.training.loop import train_loop

    job, attempt = TrainJob.from_json(config["job"]), config["attempt"]
    start_logging()  # to Ray's log of this worker
    add_handler(forward_logs(attempt))
    session = RaySession(attempt)
    if not job.settings.gpus:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // session.local_world))
    try:
        with stacks_on_signal(), ExitStack() as stack:
            if session.rank == 0 and config.get("lease"):
                stack.enter_context(Follower(open_store(job.root), config["lease"]))
            return train_loop(job, session)
    except StorageError:
        raise  # it may be temporary: Ray restarts the workers
    except PipelineError as error:
        send_error(attempt, str(error))
        raise


class RaySession:
    """The surroundings of the loop inside a Ray Train worker."""

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
        self._noticed: Any = None

    def notice(self) -> bool:
        """Return whether Ray newly announces that a machine will be taken away."""
        import ray.train

        info = ray.train.get_preemption_info()
        is_new = info is not None and info != self._noticed
        if is_new and self.rank == 0:
            log.warning("train: a machine will be taken away soon, saving a checkpoint")
        self._noticed = info
        return is_new
