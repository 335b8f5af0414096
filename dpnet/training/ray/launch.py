"""Where training runs: a launcher begins it, or finds it at work, and is asked how it goes.

`local` is Ray on this machine, for as long as it takes; `ray-job` a job on a Ray cluster that goes
on when this process ends. Both leave their work in the run's folder, so any of them, on whatever
machine, takes up what another has begun.
"""

from __future__ import annotations

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

from data_prep.core.progress import Progress, say
from data_prep.core.stage import Work
from dpnet.tracking.mlflow_follower import MlflowFollower
from dpnet.tracking.run_log import read_status
from dpnet.training.ray.launchers import Launcher, choose_launcher
from dpnet.training.settings import LaunchSettings

POLL_S = 0.3
# Whether a job on a cluster goes on when the process that follows it is stopped: asked then.
leaves_job: ContextVar[Callable[[], bool]] = ContextVar("leaves_job", default=lambda: False)


def launched(job: Any, launch: LaunchSettings, tracking_uri: str | None, work: Work) -> int:
    """Train to the end, wherever it runs, and show how it goes; the step it was taken up from."""
    launcher = choose_launcher(job, launch, work)
    resumed_from: int | None = None
    with (
        MlflowFollower(tracking_uri, work),
        Progress("train", job.settings.steps, "steps") as progress,
        _stacks_on_signal(launcher),
        _waits() as wait,
    ):
        try:
            launcher.start()
            while launcher.goes_on():
                wait(POLL_S)
                status = read_status(work.store, work.folder)
                if status.get("attempt") != launcher.attempt:  # an earlier one's
                    continue
                if status["resumed_from"] != resumed_from:
                    resumed_from = status["resumed_from"]
                    if resumed_from:
                        say(f"train: goes on from the checkpoint of step {resumed_from}")
                progress.update(status["step"], status["note"])
        except Exception:
            launcher.cancel()
            raise
        except BaseException:  # it is stopped
            if launch.launcher == "local" or not leaves_job.get()():
                launcher.cancel()
            raise
        launcher.cancel()
    return resumed_from or 0


@contextmanager
def _waits() -> Iterator[Callable[[float], object]]:
    """A wait that Ctrl-C and SIGTERM end even where what their handlers raise is lost, because it
    comes up while an object is being disposed of.

    The handlers stay as they are: Prefect takes a cancellation for a crash where SIGTERM's is not
    its own.
    """
    if threading.current_thread() is not threading.main_thread():
        yield time.sleep
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    come, go = socket.socketpair()
    with come, go:
        go.setblocking(False)
        before = signal.set_wakeup_fd(go.fileno(), warn_on_full_buffer=False)

        def wait(seconds: float) -> None:
            if not select.select([come], [], [], seconds)[0]:
                return
            for number in come.recv(4096):
                if number in handlers:
                    handler = signal.getsignal(number)
                    # One that has put another in its place was heard, if in vain: the command's
                    # second Ctrl-C would end the process at once.
                    if callable(handler) and handler is handlers[signal.Signals(number)]:
                        handler(number, None)
                    raise KeyboardInterrupt

        try:
            yield wait
        finally:
            signal.set_wakeup_fd(before)


@contextmanager
def _stacks_on_signal(launcher: Launcher) -> Iterator[None]:
    """SIGUSR1 prints what every worker is doing."""
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
