"""The flows `watch-raw-data` and `retrain`: new photographs to a better model.

Watching compares a source with the newest version of its dataset and sends the event
`dpnet.raw-data.changed`; what listens to it starts `retrain`. Neither flow remembers anything:
what was announced and what was trained is told by storage (`data_prep/images/watch.py`,
`dpnet/pipeline/retrain.py`), so an event that comes twice trains once.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import httpx
from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.events.schemas.events import Event, RelatedResource, Resource
from prefect.states import Completed
from pydantic import NonNegativeFloat, PositiveInt

from data_prep.core.errors import PipelineError
from data_prep.core.progress import say
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from data_prep.images.next_version import Changes, look
from data_prep.images.watch import watch as watch_once
from dpnet.pipeline.chain import check_config, with_photographs
from dpnet.pipeline.config import Config, load_config, resolve_root
from dpnet.pipeline.retrain import NothingToDo
from dpnet.pipeline.retrain import retrain as retrain_stage
from dpnet.training.ray.launch import leaves_job
from flows.forms import Evaluate, Images, Launch, Train, overrides_of
from flows.run_page import (
    Story,
    as_task,
    is_left_running,
    run_name,
    tell_errors_in_a_sentence,
)

CHANGED, PROMOTED = "dpnet.raw-data.changed", "dpnet.model.promoted"
Outcome = dict[str, Any]


@flow(name="watch-raw-data", flow_run_name=run_name, persist_result=False)
def watch_raw_data(
    config: str = "demo",
    root: str = "",
    images: Images = Images(),  # noqa: B008 (they are frozen)
    min_new: PositiveInt = 1,
    quiet_minutes: NonNegativeFloat = 0.0,
    again: bool = False,
    overrides: list[str] = [],  # noqa: B006
) -> Outcome | State[Outcome]:
    """Compare a config's source with the newest version of its dataset, and tell of a change.

    Nothing is prepared. What is told of once is not told of again.

    Args:
        config: A packaged config or the path of a YAML file on the machine that runs it.
        root: Where everything is stored; empty means DPNET_ROOT or the config's.
        images: Which photographs, and how they are cut.
        min_new: How many images must be new or changed.
        quiet_minutes: How long the source must have stood still.
        again: Also tell of what was told of before.
        overrides: Any other options to change, each like images.quality=90.
    """
    tell_errors_in_a_sentence()
    resolved = load_config(config, [*overrides_of(images=images), *overrides])
    check_config(resolved, "images")
    store = open_store(resolve_root(root, resolved))
    found = watch(resolved, store, min_new, quiet_minutes * 60, again=again)
    if found["announced"]:
        return found
    return Completed(name="Skipped", message=found["reason"], data=found)


@flow(name="retrain", flow_run_name=run_name, persist_result=False)
def retrain(
    config: str = "demo",
    root: str = "",
    images: Images = Images(),  # noqa: B008
    train: Train = Train(),  # noqa: B008
    launch: Launch = Launch(),  # noqa: B008
    evaluate: Evaluate = Evaluate(),  # noqa: B008
    overrides: list[str] = [],  # noqa: B006
    event: dict[str, Any] = {},  # noqa: B006
) -> Outcome | State[Outcome]:
    """Train from the champion on the images that are there now, and promote the better of both.

    What was trained on before is skipped.

    Args:
        config: A packaged config or the path of a YAML file on the machine that runs it.
        root: Where everything is stored; empty means DPNET_ROOT or the config's.
        images: Which photographs, and how they are cut.
        train: How long and with what training goes.
        launch: Where training runs.
        evaluate: What both models are evaluated on.
        overrides: Any other options to change, each like train.learning_rate=2e-4.
        event: The payload of dpnet.raw-data.changed that started it, if one did.
    """
    tell_errors_in_a_sentence()
    given = overrides_of(images=images, train=train, launch=launch, evaluate=evaluate)
    resolved = load_config(config, [*given, *overrides])
    check_config(resolved)
    store = open_store(resolve_root(root, resolved))
    leaves_job.set(is_left_running)
    with Story(resolved, store):
        return retrain_once(resolved, store, event)


def watch(
    config: Config, store: Store, min_new: int = 1, quiet_s: float = 0.0, *, again: bool = False
) -> Outcome:
    """One look at the config's source: its counts, whether they were announced, and why (not)."""
    images = with_photographs(config, store).images

    def announce(changes: Changes) -> None:
        counts = {key: getattr(changes, key) for key in ("new", "changed", "removed", "version")}
        about = {"dataset": images.name, "digest": changes.digest, **counts, "root": store.label}
        send(CHANGED, f"dpnet.dataset.{images.name}", images.name, about)

    changes, decision = watch_once(
        store,
        images.name,
        lambda: look(images, store),
        announce,
        time.time,
        min_new=min_new,
        quiet_s=quiet_s,
        again=again,
    )
    say(f"watch {images.name}: {decision.reason}")
    return {
        "dataset": images.name,
        **changes.to_json(),
        "announced": decision.announce,
        "reason": decision.reason,
    }


def retrain_once(
    config: Config, store: Store, event: Mapping[str, Any] | None = None
) -> Outcome | State[Outcome]:
    """The body of the flow: the stage, what the run page shows of it, and word of a promotion."""
    dataset = (event or {}).get("dataset", config.images.name)
    if dataset != config.images.name:
        return _skipped(f"The event is of the dataset {dataset}, not of {config.images.name}.")
    try:
        ref = retrain_stage(config, store, as_task)
    except NothingToDo as nothing:
        text = str(nothing)
        return _skipped(text[0].upper() + text[1:])
    summary = {**ref.summary, "folder": ref.folder, "content_digest": ref.content_digest}
    create_markdown_artifact(
        as_markdown(summary), key="retrain", description=f"Retrain of {ref.name} in {store.label}"
    )
    if ref.skipped:
        done = f"version {summary['version']} came of them"
        return _skipped(f"These images were trained on before: {done}.", summary)
    if summary["promoted"]:
        _tell_of_promotion(summary, store)
    say(f"retrain: {summary['reason']}")
    return summary


def as_markdown(summary: Mapping[str, Any]) -> str:
    """Champion and challenger side by side, and the reason."""
    images, champion = summary["images"], summary["champion"]
    kept = "promoted to champion" if summary["promoted"] else "kept as challenger"
    counts = ", ".join(f"{images[key]} {key}" for key in ("added", "changed", "removed"))
    rows = [(summary["version"], summary["hole_psnr"], f"new, {kept}")]
    if champion is not None:
        rows.insert(0, (champion["version"], champion["hole_psnr"], "champion before"))
    lines = [f"| {version} | {psnr:.2f} | {what} |" for version, psnr, what in rows]
    return "\n".join(
        [
            f"**{summary['model']} version {summary['version']}: {kept}.** {summary['reason']}",
            "",
            "| version | hole PSNR, dB | |",
            "|---|---|---|",
            *lines,
            "",
            f"Both on the same frozen pairs ({summary['pairs_digest'][:12]}) of {images['name']}"
            f" version {images['version']} ({counts}).",
        ]
    )


def send(event: str, resource: str, name: str, payload: Mapping[str, Any]) -> None:
    """Send an event to the Prefect API, and know that it took it.

    Prefect's own `emit_event` leaves that to a thread, which only logs what it could not send.
    Raises PipelineError where the API cannot be reached or refuses.
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
    made = Event(
        event=event,
        resource=Resource({"prefect.resource.id": resource, "prefect.resource.name": name}),
        related=related,
        payload=dict(payload),
    )
    try:
        with get_client(sync_client=True) as client:
            body = [made.model_dump(mode="json")]
            client.request("POST", "/events", json=body).raise_for_status()
    except (httpx.HTTPError, RuntimeError) as error:
        raise PipelineError(
            f"the Prefect API did not take the event {event} ({_cause(error)}): see that the server"
            " of PREFECT_API_URL runs and lets you in, and run this again."
        ) from error


def _cause(error: Exception) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"status {error.response.status_code}"
    return type(error).__name__


def _tell_of_promotion(summary: Mapping[str, Any], store: Store) -> None:
    names = ("model", "version", "hole_psnr", "champion", "reason", "images")
    about = {**{name: summary[name] for name in names}, "root": store.label}
    try:
        send(PROMOTED, f"dpnet.model.{summary['model']}", summary["model"], about)
    except PipelineError as error:  # it is the champion all the same
        say(f"warning: {error}")


def _skipped(reason: str, summary: Outcome | None = None) -> State[Outcome]:
    say(f"retrain: {reason}")
    return Completed(name="Skipped", message=reason, data=summary or {"reason": reason})
