"""Versions and aliases in MLflow's registry.

All calls here can be repeated: a version is found again by its request digest. The MLflow run of a
training is in `dpnet.tracking.mlflow_runs`.
"""

from __future__ import annotations

import calendar
import logging
import time
from collections.abc import Container, Iterator, Mapping
from typing import Any, NoReturn

from data_prep.core.errors import PipelineError
from data_prep.core.lease import confirm_leases
from data_prep.core.manifest import Manifest
from data_prep.core.paths import registry_folder
from data_prep.core.storage.store import Store
from dpnet.tracking.mlflow_runs import LogUploader, flatten, log_figures, training_run
from dpnet.tracking.run_log import read_log

log = logging.getLogger(__name__)


def restore_versions(
    client: Any, store: Store, model: str, records: Mapping[int, dict[str, Any]]
) -> set[int]:
    """Create the versions that storage has and MLflow does not, because its database was lost.

    A version that somebody deleted in MLflow cannot be created again, because MLflow gives no
    number twice. It stays in storage, and MLflow continues without it.

    Args:
        client: MLflow's client.
        store: the root.
        model: name of the model.
        records: the records in storage, by version.

    Returns:
        The versions that were deleted in MLflow.

    Raises:
        PipelineError: MLflow has another version under one of the numbers.
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
    deleted = {number for number in lost if number < max(there, default=0)}
    for number in lost:
        if number in deleted:
            continue
        confirm_leases()
        record = records[number]
        source = _source(client, store, record["run"]["folder"])
        if _create(client, model, number, source, _tags(record)):
            client.set_registered_model_alias(model, record["alias"], str(number))
        else:
            deleted.add(number)
    if restored := [number for number in lost if number not in deleted]:
        count = len(restored)
        log.info("MLflow had lost %d version(s) of %s: restored from storage.", count, model)
    if deleted:
        log.warning(
            "MLflow has no version %s of %s any more: it was deleted there, and MLflow gives no"
            " number twice. The model and its record stay in %s, so models:/%s/%d still works here."
            " Nothing needs to be done.",
            ", ".join(map(str, sorted(deleted))),
            model,
            store.label,
            model,
            min(deleted),
        )
    return deleted


def _create(client: Any, model: str, number: int, source: str, tags: dict[str, str]) -> bool:
    """Create a version with this number. Return False if MLflow has given the number before.

    Args:
        client: MLflow's client.
        model: name of the model.
        number: the version's number.
        source: the address of its files.
        tags: its tags.
    """
    before = 0
    while before < number:
        made = int(client.create_model_version(model, source=source, tags=tags).version)
        if made == number:
            return True
        client.delete_model_version(model, str(made))  # MLflow's next number is a higher one
        if made <= before:
            _refuse(model, number)
        before = made
    return False


def keep_alias(
    client: Any, store: Store, champion: Mapping[str, Any], alias: str, deleted: Container[int]
) -> None:
    """Set MLflow's alias to the champion of the root again if somebody moved it, and say so.

    Args:
        client: MLflow's client.
        store: the root.
        champion: the record of the champion.
        alias: the champion's alias.
        deleted: the versions that were deleted in MLflow, which can have no alias.
    """
    model, number = champion["model"], champion["version"]
    named = client.get_registered_model(model).aliases.get(alias)
    if named is not None and int(named) == number:
        return
    again = "" if number in deleted else ", and MLflow's alias names it again"
    if number not in deleted:
        confirm_leases()
        client.set_registered_model_alias(model, alias, str(number))
    if named is None:
        return
    top = f"{store.label}/{registry_folder(model)}"
    log.warning(
        "MLflow's alias %s of %s was moved to version %s. The champion of this root is still"
        " version %d%s. To promote version %s, copy %s/v%s.json to %s/champion.json.",
        alias, model, named, number, again, named, top, named, top,
    )  # fmt: skip


def _refuse(model: str, number: int) -> NoReturn:
    raise PipelineError(
        f"version {number} of {model} in MLflow is not the one in the registry of this root:"
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
    """Return the number of the version with the record's request digest, created if needed.

    A new version belongs to the MLflow run of the training, which also gets the figures of the
    evaluation.

    Args:
        client: MLflow's client.
        store: the root.
        model: name of the model.
        record: the record of the version, without its number.
        training: manifest of the train stage.
        evaluation: manifest of the evaluation.
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
    """Return the address of a version's model.

    MLflow's server refuses paths and file:// URIs, because it takes them for its own files. So a
    folder gets a scheme that the server does not know.
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
    """Add the figures of the evaluation to the training's MLflow run. Return the run's id.

    Missing records of the training's log are added too. They are missing if the database was lost,
    or if MLflow could not be reached during training.
    """
    run_id = training_run(client, store, training)
    try:
        LogUploader(client, run_id).add(read_log(store, training.folder))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PipelineError(
            f"the log in {store.label}/{training.folder} was altered, so MLflow cannot get it:"
            " restore it from a backup, or delete it."
        ) from None
    client.set_tag(run_id, evaluation.stage, f"{store.uri}/{evaluation.folder}")
    # With a fixed time a repeated call adds no second point.
    at = calendar.timegm(time.strptime(evaluation.created, "%Y-%m-%dT%H:%M:%SZ")) * 1000
    figures = flatten(evaluation.summary["figures"])
    log_figures(client, run_id, {k: v for k, v in figures.items() if v is not None}, at)
    if (
        client.get_run(run_id).info.status != "FINISHED"
    ):  # else it would change the end time of the run
        client.set_terminated(run_id)
    return run_id
