"""The launchers, and which one the settings ask for."""

from __future__ import annotations

from typing import Any, Protocol

from data_prep.core.stage import Work
from dpnet.training.settings import LaunchSettings


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


def choose_launcher(job: Any, launch: LaunchSettings, work: Work) -> Launcher:
    if launch.launcher == "local":
        from dpnet.training.ray.launch_local import LocalLauncher

        return LocalLauncher(job, launch)
    from dpnet.training.ray.launch_job import RayJobLauncher, cluster

    return RayJobLauncher(job, launch.model_copy(update={"address": cluster(launch)}), work)
