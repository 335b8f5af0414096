"""The event `dpnet.model.promoted`: each change of a model's champion sends one.

An automation sends alerts from it (`flows/deployments.py`). The history in storage is the truth, so
an event that cannot be sent is only logged. A command must not wait for Prefect's import. So this
module does not import Prefect, and `post` sends an event as plain HTTP.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from data_prep.core.errors import PipelineError
from data_prep.core.redact import redact
from data_prep.core.storage.store import Store
from data_prep.core.web_guard import basic_auth
from dpnet.model_store.history import Entry, read_history
from dpnet.model_store.records import read_records
from flows.local_server.password import PASSWORD

PROMOTED = "dpnet.model.promoted"
_TIMEOUT_S = 3.0  # a command that people wait for gives up soon
_SPACE = uuid.UUID("4b3c4f5e-8f3a-5f0e-9a55-0d6f3a8b7c21")  # of the events' ids

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChampionEvent:
    """One change of the champion, as an event.

    Attributes:
        id: the same for the same record of the history, so that Prefect keeps it once.
        model: name of the model.
        payload: JSON values: model, version, champion (the former one or None), hole_psnr in dB,
            how, by, why, reason (a sentence for an alert), root.
    """

    id: uuid.UUID
    model: str
    payload: Mapping[str, Any]

    @property
    def resource(self) -> str:
        """Return the id of the resource that the event is about."""
        return f"dpnet.model.{self.model}"


@contextmanager
def champion_events(
    store: Store, model: str, send: Callable[[ChampionEvent], None]
) -> Iterator[None]:
    """Send an event for each change of the champion inside the block, even if the block fails.

    Args:
        store: the root.
        model: name of the model.
        send: sends one event. If it raises PipelineError, its text is logged.
    """
    before = _last(store, model)
    try:
        yield
    finally:
        try:
            for event in _since(store, model, before):
                send(event)
        except PipelineError as error:  # the champion is what the history says
            log.warning("%s", error)


def _last(store: Store, model: str) -> int | None:
    """Return the number of the newest record, or 0; None of a history that cannot be read."""
    try:
        return max((each.number for each in read_history(store, model)), default=0)
    except PipelineError:
        return None  # what changes the champion says so


def _since(store: Store, model: str, number: int | None) -> Iterator[ChampionEvent]:
    """Yield an event for each record after the one with this number."""
    if number is None:
        return
    new = [e for e in read_history(store, model) if e.number > number and not e.derived]
    if new:
        records = read_records(store, model)
        for entry in new:
            yield _event(store, model, entry, records)


def _event(
    store: Store, model: str, entry: Entry, records: Mapping[int, Mapping[str, Any]]
) -> ChampionEvent:
    psnr = {number: record.get("hole_psnr") for number, record in records.items()}
    former = entry.former
    why = redact(entry.why)
    payload = {
        "model": model,
        "version": entry.version,
        "hole_psnr": psnr.get(entry.version),
        "champion": former and {"version": former, "hole_psnr": psnr.get(former)},
        "how": entry.how,
        "by": entry.by,
        "why": why,
        "reason": f"{model} version {entry.version} is champion now, by {entry.by}. {why}",
        "root": store.label,
    }
    return ChampionEvent(uuid.uuid5(_SPACE, entry.digest), model, payload)


def post(event: ChampionEvent) -> None:
    """Send an event to the API at PREFECT_API_URL. Without an address, send nothing.

    Raises:
        PipelineError: the API cannot be reached or refuses the event.
    """
    url = os.environ.get("PREFECT_API_URL", "").rstrip("/")
    if not url:
        return
    import httpx

    body = {
        "id": str(event.id),
        "occurred": datetime.now(UTC).isoformat(),
        "event": PROMOTED,
        "resource": {
            "prefect.resource.id": event.resource,
            "prefect.resource.name": event.model,
        },
        "payload": dict(event.payload),
    }
    headers = {}
    if password := os.environ.get(PASSWORD):
        headers["Authorization"] = basic_auth(password)
    elif key := os.environ.get("PREFECT_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    try:
        answer = httpx.post(f"{url}/events", json=[body], headers=headers, timeout=_TIMEOUT_S)
        answer.raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, RuntimeError) as error:
        reason = type(error).__name__
        if isinstance(error, httpx.HTTPStatusError):
            reason = f"status {error.response.status_code}"
        raise PipelineError(
            f"the Prefect API did not accept the event {PROMOTED}: {reason}. Check that the server"
            " at PREFECT_API_URL is running and accepts your credentials. The champion changed all"
            " the same."
        ) from error
