"""One flow run: its name, its log, its tasks, and its job on a cluster."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from uuid import UUID, uuid4

import httpx
from prefect import runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.events.schemas.events import Event, RelatedResource, Resource
from prefect.logging import get_logger, get_run_logger
from prefect.states import Completed

from data_prep.core.errors import PipelineError
from data_prep.core.logs import PrintableLines, add_handler, remove_handler
from data_prep.core.manifest import StageRef
from data_prep.core.redact import redact
from data_prep.core.text import printable
from dpnet.pipeline.summary import holds
from flows.champion_events import PROMOTED, ChampionEvent

MAX_NAME = 100  # characters


def run_name() -> str:
    """Return the name of the current run: its config and the options changed in the form."""
    parameters = runtime.flow_run.parameters
    parts = [str(parameters.get("config", ""))]
    for name, value in parameters.items():
        if hasattr(value, "model_dump"):
            value = value.model_dump(exclude_none=True)
        if isinstance(value, dict) and name != "event":
            parts += [f"{name}.{option}={each}" for option, each in value.items() if each != ""]
    parts += [str(each) for each in parameters.get("overrides") or []]
    if parameters.get("root"):
        parts.append(f"in {parameters['root']}")
    name = printable(redact(", ".join(parts)))
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"


class RunLogHandler(logging.Handler):
    """A logging handler that copies records to a Prefect run's log, with their levels."""

    def __init__(self, run_log: logging.LoggerAdapter[logging.Logger] | logging.Logger) -> None:
        super().__init__()
        self.setFormatter(PrintableLines())
        self._run_log = run_log

    def emit(self, record: logging.LogRecord) -> None:
        """Log the formatted record in the run's log."""
        # As an argument: a "%" in the message is text.
        self._run_log.log(record.levelno, "%s", self.format(record))


@contextmanager
def log_to_run() -> Iterator[None]:
    """Copy the log of our packages to the run's log, from level INFO, inside the block."""
    handler = RunLogHandler(get_run_logger())
    add_handler(handler)
    try:
        yield
    finally:
        remove_handler(handler)


@contextmanager
def without_credentials() -> Iterator[None]:
    """Hide credentials and controls in the messages of errors that are not ours, inside the block.

    Prefect stores the message as the state of the run, logs its traceback and sends it in alerts.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        trace = "".join(traceback.format_exception(error))
        if _shown(trace) == trace:
            raise
        hidden = RuntimeError(printable(redact(f"{type(error).__name__}: {error}")))
    else:
        return
    raise hidden from None  # else tracebacks show the error with the credentials too


def shorten_logged_errors() -> None:
    """Log each of our errors once and without a traceback, in this process of a flow run.

    The message of a PipelineError already says what to do. Prefect would log it three times, each
    time with its traceback.
    """
    for name in ("task_runs", "flow_runs"):
        get_logger(name).addFilter(_shorten_error)


_logged: list[BaseException] = []


def _shorten_error(record: logging.LogRecord) -> bool:
    error = record.exc_info[1] if record.exc_info else None
    if not isinstance(error, PipelineError):
        # The message and the traceback may repeat names and addresses.
        record.msg, record.args = "%s", (_shown(record.getMessage()),)
        if error is not None:  # formatters use this text in place of the error's own
            text = "".join(traceback.format_exception(error)).rstrip("\n")
            record.exc_text = _shown(text)
        return True
    if error in _logged:
        return False
    _logged.append(error)
    record.exc_info, record.msg, record.args = None, "%s", (str(error),)
    return True


def _shown(text: str) -> str:
    """Return a text of several lines without credentials and without controls."""
    return printable(redact(text), newlines=True)


def run_as_task(title: str, stage: Callable[..., StageRef], *arguments: Any) -> StageRef:
    """Run a stage as a Prefect task. Its state is "Skipped" if the stage was done before."""

    results: list[StageRef] = []  # Prefect returns only the state of a task that returns a state

    @task(name=title, cache_policy=NO_CACHE, persist_result=False)
    def run() -> State[None]:
        with without_credentials():
            ref = stage(*arguments)
        results.append(ref)
        what = printable(f"{holds(ref.stage, ref.summary)} in {ref.folder}")
        if ref.skipped:
            return Completed(name="Skipped", message=f"Done before: {what}.")
        return Completed(message=f"{what[0].upper()}{what[1:]}.")

    run()
    return results[-1]


def announce_champion(event: ChampionEvent) -> None:
    """Send a change of a champion from a flow run. Raises PipelineError like `send_event`."""
    send_event(PROMOTED, event.resource, event.model, event.payload, event.id)


def send_event(
    event: str,
    resource: str,
    name: str,
    payload: Mapping[str, Any],
    number: UUID | None = None,
) -> None:
    """Send an event to the Prefect API, and check that the API accepts it.

    Prefect's own `emit_event` sends from a thread, which only logs a failure.

    Args:
        event: The name of the event.
        resource: The id of the resource that the event is about.
        name: The name of that resource.
        payload: The JSON values of the event.
        number: The id of the event, or None for a new one.

    Raises:
        PipelineError: The API cannot be reached or refuses the event.
    """
    related = []
    if (context := FlowRunContext.get()) and context.flow_run:
        run = context.flow_run
        related = [
            RelatedResource(
                {
                    "prefect.resource.id": f"prefect.flow-run.{run.id}",
                    "prefect.resource.role": "flow-run",
                    "prefect.resource.name": run.name,
                }
            )
        ]
    new = Event(
        event=event,
        resource=Resource({"prefect.resource.id": resource, "prefect.resource.name": name}),
        related=related,
        payload=dict(payload),
        id=number or uuid4(),
    )
    try:
        with get_client(sync_client=True) as client:
            body = [new.model_dump(mode="json")]
            client.request("POST", "/events", json=body).raise_for_status()
    except (httpx.HTTPError, RuntimeError, ValueError) as error:  # the last of an odd answer
        raise PipelineError(
            f"the Prefect API did not accept the event {event}: {_cause(error)}. Check that the"
            " server at PREFECT_API_URL is running and accepts your credentials, then run this"
            " again."
        ) from error


def _cause(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}"
    return type(error).__name__


def job_keeps_running() -> bool:
    """Return whether a job on a cluster keeps running when this flow run's process is stopped.

    It does if a deployment started the run, unless the run is cancelled: a retry attaches to the
    job. A run without a deployment belongs to a command, and its job ends with it.
    """
    context = FlowRunContext.get()
    if context is None or context.flow_run is None or context.flow_run.deployment_id is None:
        return False
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(context.flow_run.id).state
    except Exception:  # without a server, assume a restart of the machine: nobody cancelled
        return True
    return state is None or not (state.is_cancelling() or state.is_cancelled())
