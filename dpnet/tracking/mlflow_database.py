"""The place of MLflow's database, if no other one is configured."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

from data_prep.core.digest import sha256_bytes
from data_prep.core.network_disk import (
    ADVICE,
    database_cache,
    local_top,
    network_disk,
    refuse_network_disk,
)
from data_prep.core.paths import MLFLOW_DATABASE
from data_prep.core.private_files import create_private, private_folder
from data_prep.core.storage.store import Store

log = logging.getLogger(__name__)


def mlflow_database(store: Store) -> Path | None:
    """Return the file of the MLflow database that belongs to a root; None for a root on S3.

    A root on a network disk has it in this user's cache folder. It begins as a copy of the one that
    an older version has made in the root.

    Raises:
        ConfigError: the cache folder is on a network disk too.
    """
    top = store.local_folder
    if top is None or local_top(store) is not None:
        return None if top is None else top / MLFLOW_DATABASE
    home = database_cache() / f"mlflow-{sha256_bytes(top.as_uri().encode())[:12]}"
    database = home / MLFLOW_DATABASE
    refuse_network_disk(database, "MLflow's database", f"{ADVICE}, or set register.tracking_uri")
    if (old := top / MLFLOW_DATABASE).exists() and not database.exists():
        create_private(private_folder(home) / MLFLOW_DATABASE, old.read_bytes())
    _say_once(f"{top} is on a network disk ({network_disk(top)}): MLflow's database is {database}")
    return database


@cache
def _say_once(text: str) -> None:
    log.info(text)
