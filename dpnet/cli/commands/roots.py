"""The root that a command reads or writes, and the Prefect server that belongs to it."""

from __future__ import annotations

import os
import secrets
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from data_prep.core.errors import StorageError, storage_error
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from dpnet.model_store.find_model import the_root

Outcome = tuple[dict[str, Any], str]  # what a command returns: JSON values with "ok", and a text


def root_to_read(args: Namespace) -> str:
    """Return --root, else DPNET_ROOT, else the demo's root."""
    return the_root(args.root)


def check_root(store: Store) -> None:
    """Write and delete an empty object, so that a bad root is reported before hours of work.

    Raises:
        StorageError: the root cannot be written.
    """
    probe = f".probe-{secrets.token_hex(4)}"
    try:
        store.write(probe, b"")
        store.delete(probe)
    except StorageError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # for example under /proc
            raise StorageError(
                f"the root {store.label} cannot be created: choose another --root."
            ) from error
        if isinstance(error.__cause__, OSError):
            raise storage_error(error.__cause__, f"the root {store.label}") from error
        raise


def use_server_of_up(root: str) -> None:
    """Set PREFECT_API_URL to the server of `dpnet up`, unless another server is configured.

    Call it before Prefect is imported, because Prefect reads the variable at its import.

    Raises:
        PipelineError: a `dpnet up` of this root is starting, and is not ready in a minute.
    """
    from flows.local_server.up import wait_for_running

    if "PREFECT_API_URL" not in os.environ and (up := wait_for_running(root)):
        os.environ["PREFECT_API_URL"] = up.api_url
    use_password_of_up(root)


def use_password_of_up(root: str) -> None:
    """Set the password of the root's `dpnet up`, if its server is configured without one."""
    from data_prep.core.password_file import stored_password
    from flows.local_server.password import PASSWORD
    from flows.local_server.up import find_running, home_of

    url = os.environ.get("PREFECT_API_URL")
    if not url or os.environ.get(PASSWORD):
        return
    up = find_running(root)
    if (
        up is not None
        and up.api_url == url
        and (kept := stored_password(home_of(open_store(root))))
    ):
        os.environ[PASSWORD] = kept


def use_mlflow_of_up(root: str) -> None:
    """Set MLflow's address to the server of `dpnet up`, unless another one is configured.

    MLflow's webhooks fire only for what its server is asked, not for changes in its database.
    """
    from data_prep.core.password_file import stored_password
    from flows.local_server.password import PASSWORD
    from flows.local_server.up import find_running, home_of

    if "MLFLOW_TRACKING_URI" in os.environ or (up := find_running(root)) is None:
        return
    login = os.environ.get(PASSWORD) or stored_password(home_of(open_store(root))) or ""
    user, _, password = login.partition(":")
    os.environ |= {
        "MLFLOW_TRACKING_URI": up.mlflow_url,
        "MLFLOW_TRACKING_USERNAME": user,
        "MLFLOW_TRACKING_PASSWORD": password,
    }


@contextmanager
def announced(store: Store, model: str) -> Iterator[None]:
    """Send Prefect an event for each change of the champion inside the block.

    Prefect and MLflow are those of `dpnet up`, unless others are configured.
    """
    from flows.champion_events import champion_events, post

    use_server_of_up(store.label)
    use_mlflow_of_up(store.label)
    with champion_events(store, model, post):
        yield
