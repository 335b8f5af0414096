"""The metrics of a root as plain values: trainings, datasets and champions.

Only small objects are read. Damaged and missing objects are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from data_prep.core.errors import PipelineError, StorageError
from data_prep.core.lease import is_claimed
from data_prep.core.manifest import read_head
from data_prep.core.paths import (
    IMAGES,
    REGISTRY,
    RUNS,
    TRAINING_LEASE,
    champion_key,
    lease_key,
    manifest_key,
)
from data_prep.core.record import parse_json
from data_prep.core.storage.store import Store
from dpnet.tracking.run_log import STATUS

KEEP_ENDED_S = 3600.0  # how long a finished training is exported
# Errors of reading a damaged record.
_DAMAGED = (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError)

# The description and the labels of each metric. All metrics are gauges.
METRICS = {
    "dpnet_up": ("The exporter answers.", ()),
    "dpnet_storage_up": ("The root can be read.", ()),
    "dpnet_train_step": ("Steps done.", ("run",)),
    "dpnet_train_steps": ("Steps of the whole training.", ("run",)),
    "dpnet_train_claimed": (
        "A runner holds a lease of the run, or was killed while it held it.",
        ("run",),
    ),
    "dpnet_train_last_progress_timestamp_seconds": ("Time of the last step.", ("run",)),
    "dpnet_train_images_per_second": ("Speed of all workers, without validation.", ("run",)),
    "dpnet_train_data_wait_share": ("Share of the time that the workers wait for data.", ("run",)),
    "dpnet_train_loss": ("Mean of a loss over the last logged steps.", ("run", "loss")),
    "dpnet_train_gpu_memory_gb": ("Maximum memory used on the first GPU, in GB.", ("run",)),
    "dpnet_train_skipped_steps": (
        "Steps skipped because a loss or gradient was not finite.",
        ("run",),
    ),
    "dpnet_train_skipped_samples": ("Samples skipped because they were damaged.", ("run",)),
    "dpnet_validation_hole_psnr": ("Hole PSNR of the last validation, in dB.", ("run",)),
    "dpnet_dataset_samples": (
        "Samples in the newest version.",
        ("dataset", "split", "version"),
    ),
    "dpnet_dataset_failed": ("Items of the newest version that could not be used.", ("dataset",)),
    "dpnet_champion_version": ("Version number of the champion.", ("model",)),
    "dpnet_champion_hole_psnr": (
        "Hole PSNR of the champion's evaluation, mean over bins, in dB.",
        ("model",),
    ),
}


class MetricValue(NamedTuple):
    """One value of a metric, with the values of its labels."""

    name: str
    labels: tuple[str, ...]
    value: float


class RootReader:
    """The reader of a root's metrics. It remembers the objects that cannot change any more."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._ended: set[str] = set()  # folders of trainings that are no longer exported
        self._versions: dict[str, dict[str, Any]] = {}  # summaries by version folder

    def read(self, now: float) -> list[MetricValue]:
        """Read all metrics.

        Args:
            now: The current time, in seconds since 1970.

        Raises:
            StorageError: The store does not answer.
            OSError: The folder cannot be read.
        """
        local = self.store.local_folder
        if local is not None and not local.is_dir():
            raise StorageError(f"the root {local} cannot be read: it is not a folder.")
        values: list[MetricValue] = []
        for folder in self.store.folders(RUNS):
            values += self._training(folder, now)
        for folder in self.store.folders(IMAGES):
            values += self._dataset(folder)
        for folder in self.store.folders(REGISTRY):
            values += self._champion(folder)
        return values

    def _training(self, folder: str, now: float) -> list[MetricValue]:
        if folder in self._ended:
            return []
        status = self._json(f"{folder}/{STATUS}")
        try:
            is_old = now - float(status.get("time", 0)) > KEEP_ENDED_S
            if is_old and self.store.exists(manifest_key(folder)):
                self._ended.add(folder)
                return []
            leases = (lease_key(folder), f"{folder}/{TRAINING_LEASE}")  # of launcher and job
            claimed = any(is_claimed(self.store, key) for key in leases)
            return list(_training_values(folder.rpartition("/")[2], status, claimed))
        except _DAMAGED:
            return []

    def _dataset(self, folder: str) -> list[MetricValue]:
        for version in self.store.folders(folder):
            if version not in self._versions:
                try:
                    self._versions[version] = read_head(self.store, version).summary
                except StorageError:
                    raise
                except PipelineError:  # not committed yet, or damaged
                    continue
        summaries = [v for key, v in self._versions.items() if key.startswith(f"{folder}/")]
        try:
            newest = max(summaries, key=lambda summary: int(summary["version"]), default=None)
            return list(_dataset_values(folder.rpartition("/")[2], newest)) if newest else []
        except _DAMAGED:
            return []

    def _champion(self, folder: str) -> list[MetricValue]:
        model = folder.rpartition("/")[2]
        record = self._json(champion_key(model))
        try:
            return [
                MetricValue("dpnet_champion_version", (model,), float(record["version"])),
                MetricValue("dpnet_champion_hole_psnr", (model,), float(record["hole_psnr"])),
            ]
        except _DAMAGED:
            return []

    def _json(self, key: str) -> dict[str, Any]:
        """Return the JSON object under `key`; an empty one if it is missing or damaged."""
        try:
            record = parse_json(self.store.read(key))
        except (FileNotFoundError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}


def _training_values(run: str, status: dict[str, Any], claimed: bool) -> Iterator[MetricValue]:
    def metric(name: str, value: Any) -> MetricValue:
        return MetricValue(name, (run,), float(value))

    yield metric("dpnet_train_step", status["step"])
    yield metric("dpnet_train_steps", status["steps"])
    yield metric("dpnet_train_claimed", claimed)
    yield metric("dpnet_train_last_progress_timestamp_seconds", status["time"])
    if validation := status.get("validation"):
        yield metric("dpnet_validation_hole_psnr", validation["hole_psnr"])
    if not (train := status.get("train")):
        return
    yield metric("dpnet_train_images_per_second", train["images_per_second"])
    share = train["data_seconds"] / max(train["seconds"], 1e-9)
    yield metric("dpnet_train_data_wait_share", share)
    for loss, value in train["losses"].items():
        yield MetricValue("dpnet_train_loss", (run, loss), float(value))
    for name in ("skipped_steps", "skipped_samples"):
        yield metric(f"dpnet_train_{name}", train[name])
    if "gpu_memory_gb" in train:
        yield metric("dpnet_train_gpu_memory_gb", train["gpu_memory_gb"])


def _dataset_values(dataset: str, summary: dict[str, Any]) -> Iterator[MetricValue]:
    for split, figures in summary["splits"].items():
        labels = (dataset, split, str(summary["version"]))
        yield MetricValue("dpnet_dataset_samples", labels, float(figures["samples"]))
    yield MetricValue("dpnet_dataset_failed", (dataset,), float(summary["failed"]))
