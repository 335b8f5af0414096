"""The cost of training in hours and money, and the speed of earlier runs.

`plan.py` estimates the cost before training starts. Prices come from the config. They do not change
any result, so no digest contains them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_prep.core.manifest import StageRef
from data_prep.core.paths import RUNS, manifest_key
from data_prep.core.storage.store import Store
from dpnet.pipeline.settings import CostSettings
from dpnet.pipeline.yaml_text import read_yaml
from dpnet.tracking.run_log import hours_worked, read_log, read_status

if TYPE_CHECKING:  # the config is composed of this module's settings
    from dpnet.pipeline.config import Config


@dataclass(frozen=True)
class Cost:
    """Hours of training workers with and without a GPU, and the prices of such an hour."""

    gpu_hours: float
    cpu_hours: float
    prices: CostSettings

    @property
    def money(self) -> float:
        """Return the total price in `prices.currency`."""
        return self.gpu_hours * self.prices.gpu_hour + self.cpu_hours * self.prices.cpu_hour


def measured(store: Store, folder: str, prices: CostSettings) -> Cost:
    """Return what the run in `folder` has cost so far, by its log.

    The log covers the time from the first step to the last record, with validation and checkpoints.
    It does not cover the start of the workers. A step that was lost with a worker and repeated
    counts once.
    """
    return Cost(*hours_worked(_log(store, folder)), prices)


def cost_text(cost: Cost) -> str:
    """Return the cost as text, such as "3.2 GPU-hours, 8.00 USD (at 2.50 an hour)"."""
    prices = cost.prices
    used = ((cost.gpu_hours, prices.gpu_hour), (cost.cpu_hours, prices.cpu_hour))
    rates = [price for hours, price in used if hours and price]
    text = hours_text(cost.gpu_hours, cost.cpu_hours)
    if not rates:
        return text
    at = " and ".join(f"{price:.2f}" for price in rates)
    return f"{text}, {cost.money:.2f} {prices.currency} (at {at} an hour)"


def hours_text(gpu_hours: float, cpu_hours: float) -> str:
    """Return hours as text: "3.2 GPU-hours", "0.05 worker-hours", or both."""
    parts = []
    if gpu_hours:
        parts.append(f"{_number(gpu_hours)} GPU-hours")
    if cpu_hours or not gpu_hours:
        parts.append(f"{_number(cpu_hours)} worker-hours")
    return " and ".join(parts)


def _number(hours: float) -> str:
    if 0 < hours < 0.005:
        return "under 0.01"
    return f"{hours:.1f}" if hours >= 1 else f"{hours:.2f}"


def known_speed(store: Store, config: Config, gpus: bool) -> tuple[float, int, str] | None:
    """Return the speed of the newest run with the same network, image size and kind of device.

    Args:
        store: The root.
        config: The config to train.
        gpus: Whether each worker will have a GPU.

    Returns:
        Images per second and worker, with validation and checkpoints in the time; the number of
        workers; and the run's folder. None without such a run.
    """
    alike = []
    for folder in store.folders(RUNS):
        status = read_status(store, folder)
        if (status.get("size"), status.get("gpus")) == (config.masks.size, gpus):
            alike.append((status.get("time", 0.0), folder))
    for _, folder in sorted(alike, reverse=True):
        if _network(store, folder) == config.model.model_dump():
            log = [r for r in _log(store, folder) if r.get("kind") == "train"]
            worker_hours = sum(hours_worked(log))
            if worker_hours > 0:
                images = sum(record["images"] for record in log)
                workers = max(record.get("workers", 1) for record in log)
                return float(images / worker_hours / 3600), int(workers), folder
    return None


def _network(store: Store, folder: str) -> Any:
    """Return the `model` section of a run's request, or None if it cannot be read."""
    try:
        return read_yaml(store.read(f"{folder}/resolved-config.yaml").decode())["model"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _log(store: Store, folder: str) -> list[dict[str, Any]]:
    """Return a run's log. A damaged log counts as empty; `dpnet verify` reports it."""
    try:
        return read_log(store, folder)
    except ValueError:
        return []


def finished_steps(config: Config, store: Store, images: StageRef, masks: StageRef) -> int:
    """Return how many steps training will not repeat, because a checkpoint has them."""
    from dpnet.training.job import plan_training

    request, job = plan_training(config.training(images, masks), store)
    if store.exists(manifest_key(request.folder)):
        return config.train.steps
    from dpnet.training.extend import first_step  # needs torch

    return first_step(store, job)
