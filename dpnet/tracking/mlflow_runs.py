"""The MLflow run of a training: who trains, whoever resumes it and the registration share one.

It is found again by the digest of the train stage's request, in the experiment that has the
training's name. What is asked of MLflow here can be repeated and adds nothing twice.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Mapping
from typing import Any

from data_prep.core.digest import SHORT
from data_prep.core.manifest import Manifest, StageRef
from data_prep.core.paths import MLFLOW_ARTIFACTS
from data_prep.core.storage.store import Store

_CALL_PARAMS, _CALL_METRICS = 100, 1000  # MLflow's limits for one call
# Of each kind of record, a figure that every one has.
_MARKS = {"train": "throughput.images_per_second", "validation": "validation.hole_psnr"}


def training_run(client: Any, store: Store, training: Manifest) -> str:
    """The id of the MLflow run of a training, made if it is not there.

    `training` is a train stage's manifest, or the draft of one.
    """
    from mlflow.entities import Param

    digest, place = training.request_digest, f"{store.uri}/{training.folder}"
    experiment = _experiment(client, store, training.name)
    found = client.search_runs([experiment], f"tags.train_digest = '{digest}'")
    # A server may serve several roots, in which the same is trained.
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
    """The address of a training's MLflow run in the UI of the server at `uri`; None where there is
    no server or no such run."""
    if not uri.startswith("http"):
        return None
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(training.name)
    if experiment is None:
        return None
    tags = f"tags.train_digest = '{training.request_digest}'"
    for run in client.search_runs([experiment.experiment_id], tags):
        if run.data.tags.get("train") == f"{store.uri}/{training.folder}":
            place = f"experiments/{experiment.experiment_id}/runs/{run.info.run_id}"
            return f"{uri.rstrip('/')}/#/{place}"
    return None


def _experiment(client: Any, store: Store, name: str) -> str:
    if experiment := client.get_experiment_by_name(name):
        return str(experiment.experiment_id)
    # Without a location it would be a folder of the working directory.
    return str(client.create_experiment(name, artifact_location=f"{store.uri}/{MLFLOW_ARTIFACTS}"))


class LogUploader:
    """The course of a training in its MLflow run: adds of the log what is not there yet.

    A training that is taken up from a checkpoint does some of its steps again, and the same comes
    out of them; those that MLflow has are passed over.
    """

    def __init__(self, client: Any, run_id: str) -> None:
        self.client, self.run_id = client, run_id
        self._last = {
            kind: max((m.step for m in client.get_metric_history(run_id, mark)), default=-1)
            for kind, mark in _MARKS.items()
        }

    def add(self, records: Iterable[Mapping[str, Any]]) -> None:
        """`records`: the whole log."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch: list[Any] = []
        trained = 0  # steps before the record
        for record in records:
            kind, step = record["kind"], record["step"]
            before = trained
            if kind == "train":
                trained = step
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
    """What MLflow is told of a record of the log; one of training is about `steps` steps."""
    if record["kind"] == "validation":
        return {f"validation.{name}": record[name] for name in ("hole_psnr", "mean_fill_psnr")}
    seconds = record["seconds"]
    figures = flatten({name: record.get(name, {}) for name in ("losses", "gradients")})
    figures["throughput.images_per_second"] = record["images"] / max(seconds, 1e-9)
    if "data_seconds" in record:  # not in logs of earlier versions
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
    """Figures of the whole run, of the time `at` (ms): at a fixed one, a repetition adds none."""
    from mlflow.entities import Metric

    metrics = [Metric(name, float(value), at, 0) for name, value in figures.items()]
    for start in range(0, len(metrics), _CALL_METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + _CALL_METRICS])


def flatten(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """The leaves of nested mappings under dotted names, with the characters MLflow allows."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        name = before + re.sub(r"[^\w. /-]", "_", str(key))
        if isinstance(value, Mapping):
            found |= flatten(value, f"{name}.")
        else:
            found[name] = value
    return found
