"""What we ask of MLflow's registry, versions and aliases, and how MLflow is reached.

Its tracking of use is off, it prints nothing, and each call here can be repeated: a version is
found again by its request digest. Of runs, `dpnet.tracking.mlflow_runs` knows.
"""

from __future__ import annotations

import calendar
import logging
import time
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import Manifest
from data_prep.core.storage.store import Store
from dpnet.tracking.mlflow_runs import LogUploader, flatten, log_figures, training_run
from dpnet.tracking.run_log import read_log

log = logging.getLogger(__name__)


def restore_versions(
    client: Any, store: Store, model: str, records: Mapping[int, dict[str, Any]]
) -> None:
    """Make versions again that storage has and MLflow has not: its database was lost.

    Raises PipelineError where MLflow's version of a number is another one than storage's.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    there = {int(v.version): v.tags.get("request_digest") for v in _versions(client, model)}
    for number in sorted(set(records) & set(there)):
        if there[number] != records[number]["request_digest"]:
            _refuse(model, number)
    lost = sorted(set(records) - set(there))
    for number in lost:
        record = records[number]
        source = _source(client, store, record["run"]["folder"])
        made = client.create_model_version(model, source=source, tags=_tags(record))
        if int(made.version) != number:
            client.delete_model_version(model, made.version)
            _refuse(model, number)
        client.set_registered_model_alias(model, record["alias"], made.version)
    if lost:
        log.info("MLflow had lost %d version(s) of %s: restored from storage.", len(lost), model)


def _refuse(model: str, number: int) -> NoReturn:
    raise PipelineError(
        f"version {number} of {model} in MLflow is not the one that this root's registry has:"
        " choose another register.model or register.tracking_uri."
    )


def ensure_version(
    client: Any,
    store: Store,
    model: str,
    record: Mapping[str, Any],
    training: Manifest,
    evaluation: Manifest,
) -> int:
    """The number of the version with the record's request digest, made if it is not there.

    `training` and `evaluation` are the two stages' manifests; a new version gets the training's
    MLflow run, with the evaluation's figures added.
    """
    digest = record["request_digest"]
    for version in _versions(client, model):
        if version.tags.get("request_digest") == digest:
            return int(version.version)
    run_id = _log_run(client, store, training, evaluation)
    source = _source(client, store, training.folder)
    made = client.create_model_version(model, source=source, run_id=run_id, tags=_tags(record))
    return int(made.version)


def _versions(client: Any, model: str) -> Iterator[Any]:
    token = None
    while token is None or token:
        page = client.search_model_versions(f"name='{model}'", page_token=token)
        yield from page
        token = page.token or ""


def _source(client: Any, store: Store, folder: str) -> str:
    """Where a version's model lies.

    MLflow's server refuses a path, which it would take for one of its own, and a file:// URI of
    another machine too: so it is told in a scheme that it does not know.
    """
    uri = store.uri
    if store.local_folder and client.tracking_uri.startswith("http"):
        real = store.local_folder.resolve()  # MLflow's server refuses a path through a link
        uri = f"dpnet-{real.as_uri()}"
    return f"{uri}/{folder}/model"


def _tags(record: Mapping[str, Any]) -> dict[str, str]:
    return {
        "request_digest": record["request_digest"],
        "run_digest": record["run"]["content_digest"],
        "evaluation_digest": record["evaluation"]["content_digest"],
        "pairs_digest": record["pairs_digest"],
    }


def _log_run(client: Any, store: Store, training: Manifest, evaluation: Manifest) -> str:
    """Add the evaluation's figures to the training's MLflow run; its id.

    The training's course is added too where it is missing: the database was lost, or MLflow could
    not be reached while it went on.
    """
    run_id = training_run(client, store, training)
    LogUploader(client, run_id).add(read_log(store, training.folder))
    client.set_tag(run_id, evaluation.stage, f"{store.uri}/{evaluation.folder}")
    # A fixed time, so that repeating the call adds no second point.
    at = calendar.timegm(time.strptime(evaluation.created, "%Y-%m-%dT%H:%M:%SZ")) * 1000
    figures = flatten(evaluation.summary["figures"])
    log_figures(client, run_id, {k: v for k, v in figures.items() if v is not None}, at)
    if client.get_run(run_id).info.status != "FINISHED":  # would take now for the training's end
        client.set_terminated(run_id)
    return run_id
