"""Run the flow from a command: on the Prefect API that is configured, or on a server of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.core.errors import PipelineError
from data_prep.core.progress import say
from data_prep.core.storage.store import Store
from dpnet.pipeline.config import CheckedConfig, Config
from flows.local_server.server import embedded_server

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # Errors reach the command as exceptions; their tracebacks go to the API, for the UI.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
}


def run_pipeline(
    config: CheckedConfig,
    root: str,
    home: Path,
    *,
    embedded: bool = False,
    debug: bool = False,
) -> dict[str, Any]:
    """Run the flow and return its summary. Raises what a stage raises.

    If `embedded` or if no Prefect API is configured, the flow runs on an embedded server with its
    database in `home`, and nothing of the user's Prefect profile is used.
    """
    os.environ.update({} if debug else QUIET)  # before Prefect's import, which sets logging up
    if not embedded and (url := _configured_api()):
        _check_reachable(url)
        return _run(config, root)
    with _embedded(home):
        return _run(config, root)


def watch_now(
    config: Config, store: Store, min_new: int, quiet_s: float, *, again: bool, debug: bool
) -> dict[str, Any]:
    """Look at the config's source once and tell the configured Prefect API of a change.

    Raises PipelineError where none is configured or it does not take the event.
    """
    os.environ.update({} if debug else QUIET)
    if not (url := _configured_api()):
        raise PipelineError(
            "no Prefect API is configured and no `dpnet up` is at work for this root, so nobody can"
            " be told: set PREFECT_API_URL to the server's, as http://127.0.0.1:4200/api."
        )
    _check_reachable(url, "set PREFECT_API_URL to the one that is to be told")
    from flows.new_data import watch

    return watch(config, store, min_new, quiet_s, again=again)


def _run(config: CheckedConfig, root: str) -> dict[str, Any]:
    from flows.pipeline import run_checked

    return run_checked(config, root)


def _configured_api() -> str | None:
    from prefect.settings import get_current_settings

    return get_current_settings().api.url


def _check_reachable(
    url: str, otherwise: str = "unset PREFECT_API_URL to run on an embedded one"
) -> None:
    from prefect.client.orchestration import get_client

    if error := get_client(sync_client=True).api_healthcheck():
        raise PipelineError(
            f"the Prefect API at {url} cannot be reached ({type(error).__name__}): start that"
            f" server, or {otherwise}."
        )


@contextmanager
def _embedded(home: Path) -> Iterator[None]:
    """Prefect in this process talks to an embedded server while in the block."""
    for name in [n for n in os.environ if n.startswith("PREFECT_") and n not in QUIET]:
        del os.environ[name]
    say("starting Prefect's embedded server")
    with embedded_server(home, os.environ, meanwhile=_use) as alone:
        if alone:
            _mark_killed_runs()
        try:
            yield
        finally:
            _send_what_is_queued()


def _use(home: Path, url: str) -> None:
    """Point Prefect at the server; this imports it, which takes as long as the server's start."""
    os.environ.update({"PREFECT_HOME": str(home), "PREFECT_API_URL": url})
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()
    import flows.pipeline  # noqa: F401


def _mark_killed_runs() -> None:
    """Runs that a killed command left as running: no process of theirs is alive."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter
    from prefect.client.schemas.objects import State, StateType

    unfinished = {"state": {"type": {"any_": ["RUNNING", "PENDING"]}}}
    with get_client(sync_client=True) as client:
        for run in client.read_flow_runs(flow_run_filter=FlowRunFilter.model_validate(unfinished)):
            killed: State[Any] = State(
                type=StateType.CRASHED, message="The command that ran it was killed."
            )
            client.set_flow_run_state(run.id, killed, force=True)


def _send_what_is_queued() -> None:
    """Logs and events are sent by threads, which would find the server gone."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        worker.drain_all(timeout=5)
