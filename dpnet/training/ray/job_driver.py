"""What the launcher `ray-job` runs on the cluster's head:

    python -m dpnet.ray_driver ATTEMPT ROOT RUN
    python -m dpnet.ray_driver --stacks ATTEMPT ROOT RUN

RUN is the run's folder, in which the launcher has left what is to be trained. Exit status 0 when it
is trained; EXPLAINED when it cannot be, the last line says why.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time

from data_prep.core.errors import PipelineError
from data_prep.core.logs import start_logging
from data_prep.core.storage.open import open_store
from dpnet.training.job import TrainJob
from dpnet.training.ray.launch_job import EXPLAINED, SPEC
from dpnet.training.ray.start import scratch_folder
from dpnet.training.ray.workers import Training


def main() -> int:
    start_logging()
    *only_stacks, attempt, root, folder = sys.argv[1:]
    try:
        _train(attempt, root, folder, only_stacks=bool(only_stacks))
    except PipelineError as error:
        # Plain, because the launcher takes the last line as the reason.
        print(" ".join(str(error).split()), file=sys.stderr, flush=True)
        return EXPLAINED
    return 0


def _train(attempt: str, root: str, folder: str, *, only_stacks: bool) -> None:
    import ray

    try:
        spec = json.loads(open_store(root).read(f"{folder}/{SPEC}"))
    except FileNotFoundError:
        raise PipelineError(
            f"the cluster's head does not see {root}/{folder}, which this command has just written:"
            " choose a root that all machines share, S3 or a shared disk."
        ) from None
    ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    with scratch_folder() as scratch:
        training = Training(TrainJob.from_json(spec["job"]), scratch, attempt, spec["deadline"])
        try:
            if only_stacks:
                training.print_stacks()
                return
            signal.signal(
                signal.SIGUSR1,
                lambda *_: threading.Thread(target=training.print_stacks, daemon=True).start(),
            )
            training.start()
            while training.goes_on():
                time.sleep(0.3)
        finally:
            training.stop(shared=True)
