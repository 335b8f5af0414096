"""Let MLflow follow storage: after a promotion by a command, and when its database was lost."""

from __future__ import annotations

import logging
import os
from typing import Any

from data_prep.core.errors import PipelineError
from data_prep.core.lease import Lease
from data_prep.core.paths import lease_key, registry_folder
from data_prep.core.redact import redact
from data_prep.core.storage.store import Store
from dpnet.model_store.history import read_history
from dpnet.model_store.records import read_records
from dpnet.registry.promotion import settle
from dpnet.registry.settings import RegisterSettings
from dpnet.registry.stage import tracking_uri
from dpnet.tracking.mlflow_database import mlflow_database

log = logging.getLogger(__name__)

# A command that people wait for gives up on a server soon; the next registration tries again.
_QUICK = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "3"}


def follow(store: Store, model: str, given: str | None) -> str:
    """Let MLflow's alias name the champion. Return a sentence about what happened.

    A failure is no error, because storage says who is champion.

    Args:
        store: the root.
        model: name of the model.
        given: MLflow's address, or None for the default.
    """
    uri = given or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        try:
            database = mlflow_database(store)
        except PipelineError:
            database = None
        if database is None or not database.exists():
            return "There is no MLflow here, so no alias was set."
    for name, value in _QUICK.items():
        os.environ.setdefault(name, value)
    try:
        uri = tracking_uri(RegisterSettings.model_validate({"tracking_uri": given}), store)
        from dpnet.registry.mlflow_versions import set_champion
        from dpnet.tracking.mlflow_client import connect

        with connect(uri) as client:
            set_champion(client, model, read_history(store, model)[-1], ())
    except (PipelineError, ImportError) as error:
        reason = str(error).rstrip(".")
        return (
            f"MLflow's alias was not set ({reason}). The next registration sets it, and `dpnet"
            " registry rebuild` does."
        )
    return f"MLflow's alias at {redact(uri)} names it."


def rebuild(store: Store, model: str, given: str | None) -> dict[str, Any]:
    """Make MLflow's registry of a model whole again: versions, tags, aliases and runs.

    Args:
        store: the root.
        model: name of the model.
        given: MLflow's address, or None for the default.

    Returns:
        The model, the champion, the versions in MLflow, and those that were deleted there.
    """
    uri = tracking_uri(RegisterSettings.model_validate({"tracking_uri": given}), store)
    from dpnet.registry import mlflow_versions as mlflow
    from dpnet.tracking.mlflow_client import connect

    with Lease(store, lease_key(registry_folder(model))), connect(uri) as client:
        entries, records = settle(store, model), read_records(store, model)
        deleted = mlflow.restore_versions(client, store, model, records)
        mlflow.restore_tags(client, model, records)
        mlflow.restore_challenger(client, model, records)
        if entries:
            mlflow.set_champion(client, model, entries[-1], deleted)
    return {
        "model": model,
        "champion": entries[-1].version if entries else None,
        "versions": sorted(set(records) - deleted),
        "deleted": sorted(deleted),
        "tracking_uri": redact(uri),
    }
