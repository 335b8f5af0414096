"""Versions and aliases in MLflow's registry.

All calls here can be repeated: a version is found again by its request digest. The MLflow run of a
training is in `dpnet.tracking.mlflow_runs`.
"""

from __future__ import annotations

import calendar
import json
import logging
import time
from collections.abc import Container, Iterator, Mapping
from typing import Any, NoReturn

from data_prep.core.errors import PipelineError
from data_prep.core.lease import confirm_leases
from data_prep.core.manifest import Manifest, read_manifest
from data_prep.core.storage.store import Store
from dpnet.model_store.history import Entry
from dpnet.model_store.records import CHALLENGER, CHAMPION, INPUTS
from dpnet.tracking.mlflow_runs import LogUploader, flatten, log_figures, training_run
from dpnet.tracking.run_log import read_log

log = logging.getLogger(__name__)

_SYNCED = "dpnet.history"  # tag of the model: the number of the promotion that its alias shows
_LONGEST_TAG = 5000  # characters; MLflow refuses longer ones


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
        run_id = _restore_run(client, store, record)
        if not _create(client, model, number, source, _tags(record), run_id):
            deleted.add(number)
        elif record["alias"] == CHALLENGER:
            client.set_registered_model_alias(model, CHALLENGER, str(number))
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


def restore_tags(client: Any, model: str, records: Mapping[int, Mapping[str, Any]]) -> None:
    """Set the tags of versions that somebody removed or changed in MLflow."""
    for version in _versions(client, model):
        record = records.get(int(version.version))
        for name, text in _tags(record).items() if record is not None else ():
            if version.tags.get(name) != text:
                client.set_model_version_tag(model, version.version, name, text)


def restore_challenger(client: Any, model: str, records: Mapping[int, Mapping[str, Any]]) -> None:
    """Let the alias name the newest challenger, if no version has the alias."""
    there = {int(version.version) for version in _versions(client, model)}
    numbers = [n for n, record in records.items() if record["alias"] == CHALLENGER and n in there]
    if numbers and CHALLENGER not in client.get_registered_model(model).aliases:
        client.set_registered_model_alias(model, CHALLENGER, str(max(numbers)))


def _restore_run(client: Any, store: Store, record: Mapping[str, Any]) -> str | None:
    """Create the MLflow run of a version again, or return None if files for it are gone."""
    try:
        run, evaluation = (read_manifest(store, record[role]["folder"]) for role in INPUTS)
        return _log_run(client, store, run, evaluation)
    except (PipelineError, KeyError) as error:
        log.warning("MLflow gets no run of version %s: %s", record["version"], error)
        return None


def _create(
    client: Any,
    model: str,
    number: int,
    source: str,
    tags: dict[str, str],
    run_id: str | None,
) -> bool:
    """Create a version with this number. Return False if MLflow has given the number before.

    Args:
        client: MLflow's client.
        model: name of the model.
        number: the version's number.
        source: the address of its files.
        tags: its tags.
        run_id: id of the MLflow run of its training, or None.
    """
    before = 0
    while before < number:
        version = client.create_model_version(model, source=source, run_id=run_id, tags=tags)
        made = int(version.version)
        if made == number:
            return True
        client.delete_model_version(model, str(made))  # MLflow's next number is a higher one
        if made <= before:
            _refuse(model, number)
        before = made
    return False


def moved_alias(client: Any, model: str, entry: Entry) -> int | None:
    """Return the version that somebody gave the champion's alias in MLflow, or None.

    MLflow also names another version if it does not know of the last promotion yet. The tag
    `dpnet.history` of the model says which promotion it knows.

    Args:
        client: MLflow's client.
        model: name of the model.
        entry: the newest record of the history.
    """
    found = client.get_registered_model(model)
    named = found.aliases.get(CHAMPION)
    if named is None or int(named) == entry.version:
        return None
    synced = found.tags.get(_SYNCED)
    knows = entry.derived if synced is None else synced == str(entry.number)
    return int(named) if knows else None


def report_moved(store: Store, model: str, named: int, entry: Entry) -> None:
    """Say that the alias was moved, and how to promote the version that it named."""
    log.warning(
        "MLflow's alias %s of %s was moved to version %d. The champion of %s is still version %d,"
        " and MLflow's alias names it again. To promote version %d, run `dpnet registry promote %d"
        " --model %s --why TEXT`, or set register.mlflow_alias to adopt.",
        CHAMPION, model, named, store.label, entry.version, named, named, model,
    )  # fmt: skip


def set_champion(client: Any, model: str, entry: Entry, deleted: Container[int]) -> None:
    """Let MLflow's alias name the champion.

    Args:
        client: MLflow's client.
        model: name of the model.
        entry: the newest record of the history.
        deleted: the versions that were deleted in MLflow, which can have no alias.
    """
    found = client.get_registered_model(model)
    number = str(entry.version)
    if entry.version not in deleted and found.aliases.get(CHAMPION) != number:
        confirm_leases()
        client.set_registered_model_alias(model, CHAMPION, number)
    if found.tags.get(_SYNCED) != str(entry.number):
        client.set_registered_model_tag(model, _SYNCED, str(entry.number))


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
    tags = {
        "request_digest": record["request_digest"],
        "run_digest": record["run"]["content_digest"],
        "evaluation_digest": record["evaluation"]["content_digest"],
        "pairs_digest": record["pairs_digest"],
        "reason": str(record.get("reason", "")),
    }
    if record.get("gate"):
        tags["gate"] = json.dumps(record["gate"])
    return {name: text for name, text in tags.items() if text and len(text) <= _LONGEST_TAG}


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
