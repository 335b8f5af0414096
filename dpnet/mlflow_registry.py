"""What we ask of MLflow: runs, versions and aliases. Nothing else imports MLflow.

Its tracking of use is off, its artifacts stay out of the working directory, and each call here can
be repeated: a run or a version is found again by its request digest.
"""

from __future__ import annotations

import calendar
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from data_prep.digest import SHORT
from data_prep.errors import PipelineError
from data_prep.progress import say
from data_prep.storage import LocalStore, Store

_SQLITE = "sqlite:///"
_CALL_PARAMS, _CALL_METRICS = 100, 1000  # MLflow's limits for one call


@contextmanager
def connect(uri: str) -> Iterator[Any]:
    """An MLflow client for tracking and registry at `uri`; its errors become PipelineError."""
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # read when mlflow is imported
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient
    from sqlalchemy.exc import SQLAlchemyError

    # They would tell every migration of the schema, and tracebacks of what is raised anyway.
    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        if uri.startswith(_SQLITE):
            _create_database(Path(uri.removeprefix(_SQLITE)))
        yield MlflowClient(tracking_uri=uri, registry_uri=uri)
    except (MlflowException, SQLAlchemyError) as error:
        # SQLAlchemy may begin with advice to programmers, in a line of its own.
        lines = [line for line in str(error).splitlines() if not line.startswith("(raised as")]
        reason = lines[0] if lines else type(error).__name__
        raise PipelineError(
            f"MLflow at {_public(uri)} refused the registration ({reason}): check"
            " register.tracking_uri and that it can be written, then run the same command again."
        ) from error


def _create_database(path: Path) -> None:
    """Make MLflow's SQLite file unless it is there, all at once.

    MLflow builds it by some hundred migrations, and killed among them it leaves a file that it
    refuses for ever after (seen with 3.17).
    """
    if path.exists():
        return
    from mlflow.tracking import MlflowClient

    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder, "mlflow.db")
        MlflowClient(tracking_uri=f"{_SQLITE}{new}").search_experiments(max_results=1)
        LocalStore(path.parent).create(path.name, new.read_bytes())


def _public(uri: str) -> str:
    """A URI without user and password."""
    return re.sub(r"//[^/@]*@", "//", uri)


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
        source = _source(store, record["run"]["folder"])
        made = client.create_model_version(model, source=source, tags=_tags(record))
        if int(made.version) != number:
            client.delete_model_version(model, made.version)
            _refuse(model, number)
        client.set_registered_model_alias(model, record["alias"], made.version)
    if lost:
        say(f"MLflow did not know {len(lost)} version(s) of {model}: made again from storage.")


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
    training: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> int:
    """The number of the version with the record's request digest, made if it is not there.

    `training` and `evaluation` are the two stages' manifests; a new version gets an MLflow run with
    their settings and figures.
    """
    digest = record["request_digest"]
    for version in _versions(client, model):
        if version.tags.get("request_digest") == digest:
            return int(version.version)
    run_id = _log_run(client, store, model, digest, training, evaluation)
    source = _source(store, training["folder"])
    made = client.create_model_version(model, source=source, run_id=run_id, tags=_tags(record))
    return int(made.version)


def _versions(client: Any, model: str) -> Iterator[Any]:
    token = None
    while token is None or token:
        page = client.search_model_versions(f"name='{model}'", page_token=token)
        yield from page
        token = page.token or ""


def _source(store: Store, folder: str) -> str:
    return f"{store.uri}/{folder}/model"


def _tags(record: Mapping[str, Any]) -> dict[str, str]:
    return {
        "request_digest": record["request_digest"],
        "run_digest": record["run"]["content_digest"],
        "evaluation_digest": record["evaluation"]["content_digest"],
        "pairs_digest": record["pairs_digest"],
    }


def _log_run(
    client: Any,
    store: Store,
    model: str,
    digest: str,
    training: Mapping[str, Any],
    evaluation: Mapping[str, Any],
) -> str:
    """Log the training's settings and the evaluation's figures; the MLflow run's id."""
    from mlflow.entities import Metric, Param

    experiment = client.get_experiment_by_name(model)
    number = (
        experiment.experiment_id
        if experiment
        # Without a location it would be a folder of the working directory.
        else client.create_experiment(model, artifact_location=f"{store.uri}/mlflow-artifacts")
    )
    begun = client.search_runs([number], f"tags.request_digest = '{digest}'", max_results=1)
    if begun:  # by an earlier, killed call
        run_id = str(begun[0].info.run_id)
    else:
        name = f"{training['name']}-{training['request_digest'][:SHORT]}"
        tags = {"request_digest": digest} | {
            manifest["stage"]: f"{store.uri}/{manifest['folder']}"
            for manifest in (training, evaluation)
        }
        run_id = str(client.create_run(number, tags=tags, run_name=name).info.run_id)
    # A fixed time, so that repeating the call adds no second point.
    at = calendar.timegm(time.strptime(evaluation["created"], "%Y-%m-%dT%H:%M:%SZ")) * 1000
    params = [Param(k, str(v)[:6000]) for k, v in _leaves(training["settings"]).items()]
    figures = _leaves(evaluation["summary"]["figures"])
    metrics = [Metric(k, float(v), at, 0) for k, v in figures.items() if v is not None]
    for start in range(0, len(params), _CALL_PARAMS):
        client.log_batch(run_id, params=params[start : start + _CALL_PARAMS])
    for start in range(0, len(metrics), _CALL_METRICS):
        client.log_batch(run_id, metrics=metrics[start : start + _CALL_METRICS])
    client.set_terminated(run_id)
    return run_id


def _leaves(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """The leaves of nested mappings under dotted names, with the characters MLflow allows."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = before + re.sub(r"[^\w. /-]", "_", str(key))
        if isinstance(value, Mapping):
            leaves |= _leaves(value, f"{name}.")
        else:
            leaves[name] = value
    return leaves
