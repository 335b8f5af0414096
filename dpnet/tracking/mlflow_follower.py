"""Copy the log of a running training to MLflow.

A thread of the process that waits for the training reads the files in the run's folder
(`dpnet.tracking.run_log`) and adds new records to MLflow. The training can run on other machines.
Only this process writes, so SQLite is enough. Training never waits for MLflow and never fails with
it: an error is logged once, and the thread tries again at its next look.
"""

from __future__ import annotations

import logging
import os
import posixpath
import threading
from types import TracebackType

from data_prep.core.redact import redact
from data_prep.core.scratch import scratch_folder
from data_prep.core.stage import Work
from dpnet.tracking.mlflow_client import new_client, reason_of
from dpnet.tracking.mlflow_runs import LogUploader, training_run
from dpnet.tracking.run_log import LogReader, read_status

log = logging.getLogger(__name__)

EVERY_S = 5.0  # between two looks at the run's folder
FLUSH_S = 60.0  # longest wait for the last records
ABORT_S = 10.0  # the same if training has failed or was interrupted
PICTURES = "pictures"
# The next look is the retry. By default MLflow repeats one request for minutes.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class MlflowFollower:
    """Copies the log of a training to MLflow during a `with` block.

    Until the block ends the MLflow run is RUNNING, then FINISHED, FAILED after an error, or KILLED
    after an interrupt.

    Args:
        uri: MLflow's address. Nothing is copied without it.
        work: the train stage.
    """

    def __init__(self, uri: str | None, work: Work) -> None:
        self._uri, self._work = uri, work
        self._ended = threading.Event()
        self._status = "RUNNING"
        self._environment: list[str] = []
        self._run: _Run | None = None
        self._read = -1  # number of records at the last look
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._follow, name="dpnet-mlflow", daemon=True)

    def __enter__(self) -> MlflowFollower:
        if self._uri is not None:
            self._environment = [name for name in _PATIENCE if name not in os.environ]
            os.environ.update({name: _PATIENCE[name] for name in self._environment})
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._uri is None:
            return
        if kind is None:
            self._status = "FINISHED"
        else:
            self._status = "FAILED" if issubclass(kind, Exception) else "KILLED"
        self._ended.set()
        seconds = FLUSH_S if kind is None else ABORT_S
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._warn_not_logged(f"it needs more than {seconds:.0f} s for the last records")
        for name in self._environment:
            os.environ.pop(name, None)

    def _follow(self) -> None:
        store, folder = self._work.store, self._work.folder
        before = read_status(store, folder)  # of an earlier attempt
        begun = ended = False
        while not ended:
            ended = self._ended.wait(EVERY_S)
            try:
                status = read_status(store, folder)
                # Wait for the start of training: the imports of MLflow would slow down that of Ray.
                begun = begun or status != before
                if ended and (begun or self._status == "FINISHED"):
                    self._look(self._status)
                elif begun and status.get("records") != self._read:
                    self._look()
            except Exception as error:
                self._run = None  # ask MLflow again for the records that it has
                self._warn_not_logged(reason_of(error))

    def _look(self, status: str | None = None) -> None:
        """Add new records and images, and the final status if there is one."""
        if self._run is None:
            self._run = _Run(str(self._uri), self._work)
        self._run.log.add(self._run.reader.read())
        self._read = self._run.reader.count
        if status:
            self._run.client.set_terminated(self._run.id, status)
        try:
            self._run.add_pictures()
        except Exception as error:
            self._warn(
                f"MLflow does not take the validation images ({reason_of(error)}): they are in"
                f" {self._work.store.label}/{self._work.folder}/{PICTURES}",
                PICTURES,
            )

    def _warn_not_logged(self, why: str) -> None:
        self._warn(
            f"MLflow at {redact(str(self._uri))} does not take the log of training"
            f" ({why}): training continues, and the missing records are added at the latest when"
            " the model is registered",
            "log",
        )

    def _warn(self, sentence: str, subject: str) -> None:
        """Log a sentence, once for each subject."""
        if subject not in self._warned:
            self._warned.add(subject)
            log.warning("%s", sentence)


class _Run:
    """The training's MLflow run, with status RUNNING."""

    def __init__(self, uri: str, work: Work) -> None:
        self.work = work
        self.client = new_client(uri)
        self.id = training_run(self.client, work.store, work.request.draft())
        self.client.update_run(self.id, "RUNNING")
        self.log = LogUploader(self.client, self.id)
        self.reader = LogReader(work.store, work.folder)
        self._pictures: set[str] | None = None  # names of the images that MLflow has

    def add_pictures(self) -> None:
        """Store new images as artifacts."""
        if self._pictures is None:
            there = self.client.list_artifacts(self.id, PICTURES)
            self._pictures = {posixpath.basename(file.path) for file in there}
        for entry in self.work.store.list(self.work.key(PICTURES)):
            name = posixpath.basename(entry.key)
            if name not in self._pictures:
                with scratch_folder("picture-") as folder:
                    path = folder / name
                    path.write_bytes(self.work.store.read(entry.key))
                    self.client.log_artifact(self.id, str(path), PICTURES)
                self._pictures.add(name)
