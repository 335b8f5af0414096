"""Let MLflow follow storage: after a promotion by a command, and when its database was lost."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import PipelineError
from data_prep.core.lease import Lease, confirm_leases
from data_prep.core.manifest import read_manifest
from data_prep.core.paths import lease_key, registry_folder, version_key
from data_prep.core.redact import redact
from data_prep.core.storage.store import Store
from dpnet.model_store.history import read_history
from dpnet.model_store.records import RECORD, read_records, registration_folder
from dpnet.registry.card import card_facts, version_card
from dpnet.registry.promotion import settle
from dpnet.registry.settings import RegisterSettings
from dpnet.registry.stage import CARD, tracking_uri
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

    Missing model cards and records in the folders of its registrations are written again, too.

    Args:
        store: the root.
        model: name of the model.
        given: MLflow's address, or None for the default.

    Returns:
        The model, the champion, the versions in MLflow, those that were deleted there, and the keys
        of the files that were written again.
    """
    uri = tracking_uri(RegisterSettings.model_validate({"tracking_uri": given}), store)
    from dpnet.registry import mlflow_versions as mlflow
    from dpnet.tracking.mlflow_client import connect

    with Lease(store, lease_key(registry_folder(model))), connect(uri) as client:
        entries, records = settle(store, model), read_records(store, model)
        restored = [key for record in records.values() for key in _restore_files(store, record)]
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
        "restored": restored,
        "tracking_uri": redact(uri),
    }


def _restore_files(store: Store, record: Mapping[str, Any]) -> Iterator[str]:
    """Write the missing files of a registration again, and yield their keys.

    A file is written only if it has the hash that the manifest states.
    """
    folder = registration_folder(record)
    try:
        stated = {file.path: file.sha256 for file in read_manifest(store, folder).files}
    except PipelineError:  # `dpnet verify` reports it
        return
    missing = [name for name in (RECORD, CARD) if name in stated]
    for name in [name for name in missing if not store.exists(f"{folder}/{name}")]:
        if name == RECORD:
            data = store.read(version_key(record["model"], record["version"]))
        else:
            data = version_card(card_facts(store, record)).encode()
        if sha256_bytes(data) == stated[name]:
            confirm_leases()
            store.write(f"{folder}/{name}", data)
            yield f"{folder}/{name}"
        else:
            log.warning(
                "registry: %s/%s is missing, and cannot be made as it was: what it was made from or"
                " the version of dpnet has changed. Restore it from a backup.",
                store.label,
                f"{folder}/{name}",
            )
