"""Run a flow from a command: on the configured Prefect API, or on an embedded server."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.core.errors import PipelineError
from data_prep.core.network_disk import refuse_network_disk
from data_prep.core.storage.store import Store
from dpnet.pipeline.config import CheckedConfig, Config
from flows.local_server.password import PASSWORD
from flows.local_server.server import embedded_server

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # The command gets errors as exceptions. The API gets their tracebacks, for the UI.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}

log = logging.getLogger(__name__)


def run_pipeline(
    config: CheckedConfig,
    root: str,
    home: Path,
    *,
    embedded: bool = False,
    debug: bool = False,
) -> dict[str, Any]:
    """Run the pipeline flow and return its summary. Raises the errors of the stages.

    Args:
        config: A config that the command has loaded and checked.
        root: A folder or an S3 URI.
        home: The folder of the embedded server's database.
        embedded: Use an embedded server even if a Prefect API is configured. An embedded server
            uses nothing of the user's Prefect profile.
        debug: Print Prefect's own log on the console.
    """
    # Before Prefect is imported: the import configures logging.
    os.environ.update({} if debug else QUIET)
    if not embedded and (url := _configured_api()):
        _check_reachable(url)
        return _run(config, root)
    with _embedded_prefect(home):
        return _run(config, root)


def watch_now(
    config: Config, store: Store, min_new: int, quiet_s: float, *, again: bool, debug: bool
) -> dict[str, Any]:
    """Compare the config's source with its dataset once, and announce a change to the Prefect API.

    Args:
        config: The config with the source.
        store: The root.
        min_new: How many new or changed photos are needed, at least 1.
        quiet_s: For how many seconds the source must be unchanged.
        again: Announce a change even if it was announced before.
        debug: Print Prefect's own log on the console.

    Raises:
        PipelineError: No Prefect API is configured, or it does not accept the event.
    """
    os.environ.update({} if debug else QUIET)
    if not (url := _configured_api()):
        raise PipelineError(
            "the change cannot be announced: no Prefect API is configured and no `dpnet up` is"
            " running for this root. Start `dpnet up`, or set PREFECT_API_URL to a server's address"
            " such as http://127.0.0.1:4200/api."
        )
    _check_reachable(url, "set PREFECT_API_URL to another server")
    from flows.new_data import check_source

    return check_source(config, store, min_new, quiet_s, again=again)


def _run(config: CheckedConfig, root: str) -> dict[str, Any]:
    from flows.pipeline import run_checked

    return run_checked(config, root)


def _configured_api() -> str | None:
    from prefect.settings import get_current_settings

    return get_current_settings().api.url


def _check_reachable(
    url: str, otherwise: str = "unset PREFECT_API_URL to use an embedded server"
) -> None:
    from prefect.client.orchestration import get_client

    try:
        error = get_client(sync_client=True).api_healthcheck()
    except Exception as unexpected:  # whatever an answer of another server makes of Prefect's code
        error = unexpected
    if error:
        raise PipelineError(
            f"the Prefect API at {url} cannot be reached: {type(error).__name__}. Start that"
            f" server, or {otherwise}."
        )


@contextmanager
def _embedded_prefect(home: Path) -> Iterator[None]:
    """Run an embedded server and make Prefect in this process use it, inside the block."""
    refuse_network_disk(home, "the folder of Prefect's database")
    for name in [n for n in os.environ if n.startswith("PREFECT_") and n not in QUIET]:
        del os.environ[name]
    log.info("starting Prefect's embedded server")
    with embedded_server(home, os.environ, while_starting=_use_server) as exclusive:
        if exclusive:
            _mark_killed_runs()
        try:
            yield
        finally:
            _send_queued_logs_and_events()


def _use_server(home: Path, url: str, password: str) -> None:
    """Configure Prefect to use the server with this `user:password`.

    This imports Prefect, which takes about as long as the server takes to start.
    """
    os.environ.update({"PREFECT_HOME": str(home), "PREFECT_API_URL": url, PASSWORD: password})
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()
    import flows.pipeline  # noqa: F401


def _mark_killed_runs() -> None:
    """Mark runs as crashed that a killed command left in the state running."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.objects import State, StateType

    unfinished = {"state": {"type": {"any_": ["RUNNING", "PENDING"]}}}
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(unfinished)):
            killed: State[Any] = State(
                type=StateType.CRASHED, message="The command of this run was killed."
            )
            client.set_flow_run_state(run.id, killed, force=True)


def _send_queued_logs_and_events() -> None:
    """Send what Prefect's threads have queued, before the server stops."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        worker.drain_all(timeout=5)
