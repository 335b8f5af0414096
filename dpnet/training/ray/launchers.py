"""Choose the launcher; the methods that each launcher has."""

from __future__ import annotations

from typing import Any, Protocol

from data_prep.core.stage import Work
from dpnet.training.settings import LaunchSettings


class Launcher(Protocol):
    """Starts a training, or finds a running one by the run's digest."""

    attempt: str  # names the start of training that it follows

    @property
    def facts(self) -> list[str]:
        """Return sentences about where training runs, and how earlier attempts ended."""

    def start(self) -> None:
        """Start training, or attach to a running one."""

    def is_running(self) -> bool:
        """Return whether training still runs. It is called several times a second.

        Raises PipelineError if training has failed for good.
        """

    def cancel(self) -> None:
        """Stop training. What it has saved stays."""

    def print_stacks(self) -> None:
        """Log what every worker is doing."""


def choose_launcher(job: Any, launch: LaunchSettings, work: Work) -> Launcher:
    """Return the launcher that `launch.launcher` names."""
    if launch.launcher == "local":
        from dpnet.training.ray.launch_local import LocalLauncher

        return LocalLauncher(job, launch)
    if launch.launcher == "kuberay":
        from dpnet.training.ray.launch_kuberay import KubeRayLauncher

        return KubeRayLauncher(job, launch, work)
    from dpnet.training.ray.jobs_client import cluster_address
    from dpnet.training.ray.launch_job import RayJobLauncher

    address = cluster_address(launch)
    return RayJobLauncher(job, launch.model_copy(update={"address": address}), work)
