"""Where training runs: a launcher begins it, or finds it at work, and is asked how it goes.

`local` is Ray on this machine, for as long as it takes; `ray-job` a job on a Ray cluster that goes
on when this process ends. Both leave their work in the run's folder, so any of them, on whatever
machine, takes up what another has begun.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from data_prep.core.errors import ConfigError
from data_prep.core.progress import Progress, say
from data_prep.core.stage import Work
from dpnet.tracking.mlflow_follower import Tracker
from dpnet.tracking.run_log import read_status

POLL_S = 0.3
# Whether a job on a cluster goes on when the process that follows it is stopped: asked then.
leaves_job: ContextVar[Callable[[], bool]] = ContextVar("leaves_job", default=lambda: False)
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")  # as Ray's own commands take them


class LaunchSettings(BaseModel):
    """Where training runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    launcher: Literal["local", "ray-job"] = Field(
        "local", description="Ray on this machine, or a job on a Ray cluster."
    )
    address: str | None = Field(
        None,
        description="Of the cluster's dashboard, as http://head:8265, for ray-job; by default that"
        " of RAY_API_SERVER_ADDRESS or RAY_ADDRESS. Its token is RAY_AUTH_TOKEN's or the one in"
        " ~/.ray/auth_token.",
    )
    python: str = Field(
        "python", min_length=1, description="The interpreter on the cluster's head that has dpnet."
    )
    deadline_s: int = Field(
        1800,
        ge=1,
        le=604_800,
        description="Seconds without a sign of life, as while there are no free workers, after"
        " which training is given up.",
    )


class Launcher(Protocol):
    """Begins a training or finds it at work; everything is known by the run's digest."""

    attempt: str  # names the start of training that it follows

    def start(self) -> None:
        """Begin, or attach to the one that is at work."""

    def goes_on(self) -> bool:
        """Whether it is at work, asked several times a second. Raises PipelineError where it has
        failed for good."""

    def cancel(self) -> None:
        """Stop it; what it has saved stays."""

    def print_stacks(self) -> None:
        """Print what every worker is doing."""


def launched(job: Any, launch: LaunchSettings, tracking_uri: str | None, work: Work) -> int:
    """Train to the end, wherever it runs, and show how it goes; the step it was taken up from."""
    launcher = _launcher(job, launch, work)
    resumed_from: int | None = None
    with (
        Tracker(tracking_uri, work),
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


def _launcher(job: Any, launch: LaunchSettings, work: Work) -> Launcher:
    if launch.launcher == "local":
        from dpnet.training.ray.launch_local import LocalLauncher

        return LocalLauncher(job, launch)
    from dpnet.training.ray.launch_job import RayJobLauncher

    return RayJobLauncher(job, launch.model_copy(update={"address": cluster(launch)}), work)


def cluster(launch: LaunchSettings) -> str:
    """Of the cluster's dashboard. Raises ConfigError where none is given."""
    # RAY_ADDRESS may also be that of the control service, which takes no jobs.
    given = [launch.address, *(os.environ.get(name, "") for name in ADDRESSES)]
    for address in given:
        if address and (address == launch.address or address.startswith("http")):
            return address
    raise ConfigError(
        "launch.address is missing: the launcher ray-job needs the address of a Ray cluster's"
        " dashboard, as --address http://head:8265."
    )


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
