"""Run a training to its end: start it or find it running, and show its progress.

The launcher `local` runs Ray on this machine until training ends. The launcher `ray-job` submits a
job to a Ray cluster; the job continues after this process ends. Both store their work in the run's
folder, so either can resume, on any machine, what the other has begun.
"""

from __future__ import annotations

import logging
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

from data_prep.core.errors import LeaseLostError
from data_prep.core.lease import check_leases
from data_prep.core.progress import Progress
from data_prep.core.stage import Work
from dpnet.tracking.mlflow_follower import MlflowFollower
from dpnet.tracking.run_log import read_status
from dpnet.training.ray.launchers import Launcher, choose_launcher
from dpnet.training.settings import LaunchSettings

log = logging.getLogger(__name__)

POLL_S = 0.3
# Whether a job on a cluster continues when the process that follows it is stopped. It is called
# at that moment.
leaves_job: ContextVar[Callable[[], bool]] = ContextVar("leaves_job", default=lambda: False)
# Receives the facts of the launcher (see `Launcher`) when they change.
show_facts: ContextVar[Callable[[list[str]], None]] = ContextVar(
    "show_facts", default=lambda facts: None
)


def run_training(job: Any, launch: LaunchSettings, tracking_uri: str | None, work: Work) -> int:
    """Train to the end, on any launcher, and show the progress.

    Args:
        job: The training.
        launch: Where training runs.
        tracking_uri: MLflow server or database that receives the progress; None for no tracking.
        work: The stage's folder and lease.

    Returns:
        The step from which training resumed, 0 if it started from nothing.
    """
    launcher = choose_launcher(job, launch, work)
    resumed_from: int | None = None
    shown: list[str] = []

    def show() -> None:
        nonlocal shown
        if launcher.facts != shown:
            shown = launcher.facts
            show_facts.get()(shown)

    with (
        MlflowFollower(tracking_uri, work),
        Progress("train", job.settings.steps, "steps") as progress,
        _stacks_on_signal(launcher),
        _interruptible_wait() as wait,
    ):
        try:
            launcher.start()
            while launcher.is_running():
                show()
                check_leases()
                wait(POLL_S)
                status = read_status(work.store, work.folder)
                if status.get("attempt") != launcher.attempt:  # of an earlier attempt
                    continue
                if status["resumed_from"] != resumed_from:
                    resumed_from = status["resumed_from"]
                    if resumed_from:
                        log.info("train: resumes from the checkpoint of step %d", resumed_from)
                progress.update(status["step"], status["note"])
        except LeaseLostError:
            if launch.launcher == "local":  # a job has a lease of its own, and may be followed
                launcher.cancel()
            raise
        except Exception:
            show()
            launcher.cancel()
            raise
        except BaseException:  # this process is stopped
            if launch.launcher == "local" or not leaves_job.get()():
                launcher.cancel()
            raise
        launcher.cancel()
    return resumed_from or 0


@contextmanager
def _interruptible_wait() -> Iterator[Callable[[float], object]]:
    """Give a wait that always ends on Ctrl-C and SIGTERM.

    Python loses the exception of a signal handler that runs while an object is disposed of. The
    wait sees such a signal and calls the handler again. The handlers stay in place, because
    Prefect takes a cancellation for a crash if SIGTERM has another handler than its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield time.sleep
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    receiver, sender = socket.socketpair()
    with receiver, sender:
        sender.setblocking(False)
        before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)

        def wait(seconds: float) -> None:
            if not select.select([receiver], [], [], seconds)[0]:
                return
            for number in receiver.recv(4096):
                if number in handlers:
                    handler = signal.getsignal(number)
                    # A handler that has replaced itself has already run. A second call would act
                    # like a second Ctrl-C, which ends the process at once.
                    if callable(handler) and handler is handlers[signal.Signals(number)]:
                        handler(number, None)
                    raise KeyboardInterrupt

        try:
            yield wait
        finally:
            signal.set_wakeup_fd(before)


@contextmanager
def _stacks_on_signal(launcher: Launcher) -> Iterator[None]:
    """While in the block, SIGUSR1 logs what every worker is doing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def show(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=launcher.print_stacks, daemon=True).start()

    before = signal.signal(signal.SIGUSR1, show)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)
