"""Train in a job on a Ray cluster's head, for the launcher `ray-job`.

    python -m dpnet.ray_driver ATTEMPT ROOT RUN
    python -m dpnet.ray_driver --stacks ATTEMPT ROOT RUN

RUN is the run's folder. The launcher has written the training's description there. With --stacks,
it logs what every worker of the attempt is doing.

Exit status: 0 when training is finished; EXPLAINED when it cannot continue, with the reason in the
last line.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from contextlib import ExitStack

import dpnet
from data_prep.core.errors import PipelineError
from data_prep.core.lease import check_leases
from data_prep.core.logs import start_logging
from data_prep.core.scratch import scratch_folder
from data_prep.core.standard_streams import prepare_streams
from data_prep.core.storage.open import open_store
from dpnet.training.job import TrainJob, training_lease
from dpnet.training.ray.launch_job import EXPLAINED, SPEC
from dpnet.training.ray.ray_train import Training
from dpnet.training.ray.start import forbid_other_starts


def main() -> int:
    """Run the job that the arguments of this process name. Return the exit status."""
    prepare_streams()
    start_logging()
    *only_stacks, attempt, root, folder = sys.argv[1:]
    try:
        _train(attempt, root, folder, only_stacks=bool(only_stacks))
    except PipelineError as error:
        print(" ".join(str(error).split()), file=sys.stderr, flush=True)
        return EXPLAINED
    return 0


def _train(attempt: str, root: str, folder: str, *, only_stacks: bool) -> None:
    import ray

    try:
        spec = json.loads(open_store(root).read(f"{folder}/{SPEC}"))
    except FileNotFoundError:
        raise PipelineError(
            f"the cluster's head cannot find {root}/{folder}, which the launcher has just written:"
            " choose a root that all machines share, S3 or a shared disk."
        ) from None
    _check_version(spec.get("version"))
    forbid_other_starts()
    job = TrainJob.from_json(spec["job"])
    with ExitStack() as stack:
        # Another job or a local training of the same run may go on: its log says that this one
        # waits. The job holds the lease, because its launcher may be killed.
        lease = None if only_stacks else stack.enter_context(training_lease(job)).reference()
        ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
        scratch = stack.enter_context(scratch_folder("ray-"))
        training = Training(job, scratch, attempt, spec["deadline"], lease)
        try:
            if only_stacks:
                training.print_stacks()
                return
            signal.signal(
                signal.SIGUSR1,
                lambda *_: threading.Thread(target=training.print_stacks, daemon=True).start(),
            )
            training.start()
            while training.is_running():
                check_leases()
                time.sleep(0.3)
        finally:
            training.stop(shared=True)


def _check_version(asked: str | None) -> None:
    """Raise PipelineError if another version of dpnet has described the training.

    It may mean another training by the same settings.

    Args:
        asked: Version of the command that started the job; None: one that did not say.
    """
    if asked is not None and asked != dpnet.__version__:
        raise PipelineError(
            f"the command that started this training has dpnet {asked}, and the cluster's head has"
            f" {dpnet.__version__}: install the same version in both places. On Kubernetes, set"
            f" launch.image to an image with {asked}."
        )
