"""The MLflow run of a training. The first attempt, later attempts and the registration share it.

The experiment has the training's name, and a digest of the root if another root has this name.
In it, the run is found by the request digest of the train stage. All calls here can be repeated:
nothing is added twice.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from data_prep.core.digest import SHORT, sha256_bytes
from data_prep.core.manifest import Manifest, StageRef
from data_prep.core.paths import MLFLOW_ARTIFACTS
from data_prep.core.redact import redact
from data_prep.core.storage.store import Store

log = logging.getLogger(__name__)

_CALL_PARAMS, _CALL_METRICS = 100, 1000  # MLflow's limits for one call
# A metric that every record of a kind has.
_MARKS = {"train": "throughput.images_per_second", "validation": "validation.hole_psnr"}


def training_run(client: Any, store: Store, training: Manifest) -> str:
    """Return the id of a training's MLflow run. Create the run if it does not exist.

    Args:
        client: MLflow's client.
        store: the root.
        training: manifest of the train stage, or the draft of one.
    """
    from mlflow.entities import Param

    digest, place = training.request_digest, f"{store.uri}/{training.folder}"
    experiment = _experiment(client, store, training.name)
    found = client.search_runs([experiment], f"tags.train_digest = '{digest}'")
    # One server can serve several roots with the same training.
    ids = [run.info.run_id for run in found if run.data.tags.get("train") == place]
    if ids:
        run_id = str(ids[0])
    else:
        tags = {role: f"{store.uri}/{ref.folder}" for role, ref in training.inputs.items()}
        tags |= {"train_digest": digest, "train": place}
        name = f"{training.name}-{digest[:SHORT]}"
        run_id = str(client.create_run(experiment, tags=tags, run_name=name).info.run_id)
    params = [Param(k, str(v)[:6000]) for k, v in flatten(training.settings).items()]
    for start in range(0, len(params), _CALL_PARAMS):
        client.log_batch(run_id, params=params[start : start + _CALL_PARAMS])
    return run_id


def run_page(uri: str, store: Store, training: StageRef) -> str | None:
    """Return the address of a training's MLflow run in the web page of the server at `uri`.

    Return None if `uri` is not a server, or has no such run.
    """
    if not uri.startswith("http"):
        return None
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    *_, (_, experiment) = _experiments(client, store, training.name)
    if experiment is None:
        return None
    tags = f"tags.train_digest = '{training.request_digest}'"
    for run in client.search_runs([experiment.experiment_id], tags):
        if run.data.tags.get("train") == f"{store.uri}/{training.folder}":
            place = f"experiments/{experiment.experiment_id}/runs/{run.info.run_id}"
            return f"{redact(uri).rstrip('/')}/#/{place}"
    return None


def _experiment(client: Any, store: Store, name: str) -> str:
    """Return the id of the experiment of a training in this root. Create or restore it if needed.

    MLflow writes the artifacts of all runs of an experiment below one address, which never
    changes. So a copied or moved root, and a second root on one server, has an experiment of its
    own.
    """
    # By default it would be a folder in the working directory.
    location = f"{store.uri}/{MLFLOW_ARTIFACTS}"
    *_, (name, experiment) = _experiments(client, store, name)
    if experiment is None:
        return str(client.create_experiment(name, artifact_location=location))
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
        log.warning(
            "The experiment %s was deleted in MLflow: it is restored, because a training of this"
            " name writes to it.",
            name,
        )
    return str(experiment.experiment_id)


def _experiments(client: Any, store: Store, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the name of each experiment that a training may be in, with the experiment or None.

    The last one is that of this root. Before it there can be one of another root.
    """
    experiment = client.get_experiment_by_name(name)
    yield name, experiment
    place = f"/{MLFLOW_ARTIFACTS}"
    location = experiment.artifact_location.rstrip("/") if experiment is not None else ""
    if location.endswith(place) and location != f"{store.uri}{place}":
        own = f"{name}-{sha256_bytes(store.uri.encode())[:SHORT]}"
        yield own, client.get_experiment_by_name(own)


class LogUploader:
    """Adds new records of a training's log to its MLflow run.

    A training that resumes from a checkpoint repeats some steps, with the same results. Records
    that MLflow already has are skipped.
    """

    def __init__(self, client: Any, run_id: str) -> None:
        self.client, self.run_id = client, run_id
        self._last = {
            kind: max((m.step for m in client.get_metric_history(run_id, mark)), default=-1)
            for kind, mark in _MARKS.items()
        }
        self._trained = 0  # steps of training before the next record

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Add the next records of the log. Records may come again from the first one."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch: list[Any] = []
        for record in records:
            kind, step = record["kind"], record["step"]
            before = self._trained
            if kind == "train":
                self._trained = step
            if step <= self._last[kind]:
                continue
            figures = _figures(record, max(step - before, 1))
            if len(batch) + len(figures) > _CALL_METRICS:
                self.client.log_batch(self.run_id, metrics=batch)
                batch = []
            batch += [Metric(name, float(value), now, step) for name, value in figures.items()]
            self._last[kind] = step
        if batch:
            self.client.log_batch(self.run_id, metrics=batch)


def _figures(record: Mapping[str, Any], steps: int) -> dict[str, float]:
    """Return the metrics of a record. A record of training covers `steps` steps."""
    if record["kind"] == "validation":
        names = ("hole_psnr", "mean_fill_psnr", "smooth_fill_psnr")
        # Logs of earlier versions do not have the smooth fill.
        return {f"validation.{name}": record[name] for name in names if name in record}
    seconds = record["seconds"]
    figures = flatten({name: record.get(name, {}) for name in ("losses", "gradients")})
    figures["throughput.images_per_second"] = record["images"] / max(seconds, 1e-9)
    if "data_seconds" in record:  # logs of earlier versions do not have it
        data = record["data_seconds"]
        figures |= {
            "throughput.data_wait_share": data / max(seconds, 1e-9),
            "seconds_per_step.step": (seconds - data) / steps,
            "seconds_per_step.data": data / steps,
            "seconds_per_step.other": record["other_seconds"] / steps,
            "skipped.steps": record["skipped_steps"],
            "skipped.samples": record["skipped_samples"],
        }
    if "gpu_memory_gb" in record:
        figures["gpu_memory_gb"] = record["gpu_memory_gb"]
    return figures


def log_figures(client: Any, run_id: str, figures: Mapping[str, float], at: int) -> None:
    """Add figures of the whole run. With a fixed time, a repeated call adds nothing.

    Args:
        client: MLflow's client.
        run_id: id of the run.
        figures: values by name.
        at: time of the figures, in ms since 1970.
    """
    from mlflow.entities import Metric

    metrics = [Metric(name, float(value), at, 0) for name, value in figures.items()]
    for start in range(0, len(metrics), _CALL_METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + _CALL_METRICS])


def flatten(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted names. Replace characters that MLflow does not allow."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = before + re.sub(r"[^\w. /-]", "_", str(key))
        if isinstance(value, Mapping):
            found |= flatten(value, f"{name}.")
        else:
            found[name] = value
    return found
