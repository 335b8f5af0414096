"""The flows `watch-raw-data` and `retrain`: from new photos to a better model.

`watch-raw-data` compares a source with the newest version of its dataset. If there are enough new
photos, it sends the event `dpnet.raw-data.changed`, and an automation starts `retrain`. The flows
keep no state. Storage records the announced changes (`data_prep/images/watch.py`) and the trained
data (`dpnet/pipeline/retrain.py`), so an event that comes twice trains once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact
from prefect.client.schemas.objects import State
from prefect.states import Completed
from pydantic import NonNegativeFloat, PositiveInt

from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from data_prep.core.text import markdown_table, markdown_text, printable
from data_prep.images.next_version import Changes, look
from data_prep.images.watch import watch
from dpnet.pipeline.chain import check_config, with_photographs
from dpnet.pipeline.config import Config, load_config, resolve_root
from dpnet.pipeline.retrain import NothingToDo
from dpnet.pipeline.retrain import retrain as retrain_stage
from dpnet.training.ray.launch import leaves_job
from flows.champion_events import champion_events
from flows.flow_run import (
    announce_champion,
    job_keeps_running,
    log_to_run,
    run_as_task,
    run_name,
    send_event,
    shorten_logged_errors,
    without_credentials,
)
from flows.forms import Evaluate, Images, Launch, Train, overrides_of, refuse_credentials
from flows.run_page import RunPage

CHANGED = "dpnet.raw-data.changed"
Outcome = dict[str, Any]

log = logging.getLogger(__name__)


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
    """Compare a config's source with the newest version of its dataset, and announce new photos.

    Nothing is prepared. Each change is announced once.

    Args:
        config: A packaged config or the path of a YAML file on the machine that runs it.
        root: The folder or s3://bucket/prefix that stores everything; if empty, DPNET_ROOT or the
            config's root.
        images: The photos, and how to cut them.
        min_new: How many new or changed photos are needed to announce a change.
        quiet_minutes: How many minutes the source must be unchanged before the announcement.
        again: Announce a change again that was announced before.
        overrides: Other options to change, such as images.quality=90.
    """
    shorten_logged_errors()
    given = overrides_of(images=images)
    refuse_credentials([*given, *overrides], "this run's parameters")
    resolved = load_config(config, [*given, *overrides])
    check_config(resolved, "images", root)
    store = open_store(resolve_root(root, resolved))
    with without_credentials(), log_to_run():
        found = check_source(resolved, store, min_new, quiet_minutes * 60, again=again)
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
    """Train from the champion on the current photos, and promote the better of the two models.

    The run is skipped if a model was trained on these photos before.

    Args:
        config: A packaged config or the path of a YAML file on the machine that runs it.
        root: The folder or s3://bucket/prefix that stores everything; if empty, DPNET_ROOT or the
            config's root.
        images: The photos, and how to cut them.
        train: How long to train, and with which options.
        launch: The machines that train.
        evaluate: The pairs of photo and mask to evaluate both models on.
        overrides: Other options to change, such as train.learning_rate=2e-4.
        event: The payload of the event dpnet.raw-data.changed, if it started this run.
    """
    shorten_logged_errors()
    given = overrides_of(images=images, train=train, launch=launch, evaluate=evaluate)
    refuse_credentials([*given, *overrides], "this run's parameters")
    resolved = load_config(config, [*given, *overrides])
    check_config(resolved, root=root)
    store = open_store(resolve_root(root, resolved))
    leaves_job.set(job_keeps_running)
    with without_credentials(), RunPage(resolved, store):
        return retrain_once(resolved, store, event)


def check_source(
    config: Config, store: Store, min_new: int = 1, quiet_s: float = 0.0, *, again: bool = False
) -> Outcome:
    """Compare the config's source with its dataset once, and announce a change if it is due.

    Args:
        config: The config with the source.
        store: The root.
        min_new: How many new or changed photos are needed, at least 1.
        quiet_s: For how many seconds the source must be unchanged.
        again: Announce a change even if it was announced before.

    Returns:
        The counts of the change, whether it was announced, and the reason.
    """
    images = with_photographs(config, store).images

    def announce(changes: Changes) -> None:
        counts = {key: getattr(changes, key) for key in ("new", "changed", "removed", "version")}
        about = {"dataset": images.name, "digest": changes.digest, **counts, "root": store.label}
        send_event(CHANGED, f"dpnet.dataset.{images.name}", images.name, about)

    changes, decision = watch(
        store,
        images.name,
        lambda: look(images, store),
        announce,
        time.time,
        min_new=min_new,
        quiet_s=quiet_s,
        again=again,
    )
    log.info("watch %s: %s", images.name, decision.reason)
    return {
        "dataset": images.name,
        **changes.to_json(),
        "announced": decision.announce,
        "reason": decision.reason,
    }


def retrain_once(
    config: Config, store: Store, event: Mapping[str, Any] | None = None
) -> Outcome | State[Outcome]:
    """Run the retrain stage, show its result on the run's page, and announce a new champion.

    Returns the summary, or the state "Skipped" with the reason if there is nothing to train.
    """
    dataset = (event or {}).get("dataset", config.images.name)
    if dataset != config.images.name:
        return _skipped(
            f"The event is about the dataset {printable(str(dataset))}, not about"
            f" {config.images.name}."
        )
    try:
        with champion_events(store, config.registry.model, announce_champion):
            ref = retrain_stage(config, store, run_as_task)
    except NothingToDo as nothing:
        text = str(nothing)
        return _skipped(text[0].upper() + text[1:])
    summary = {**ref.summary, "folder": ref.folder, "content_digest": ref.content_digest}
    create_markdown_artifact(
        comparison_table(summary),
        key="retrain",
        description=printable(f"Retrain of {ref.name} in {store.label}"),
    )
    if ref.skipped:
        made = f"they made version {summary['version']}"
        return _skipped(f"A model was trained on these images before: {made}.", summary)
    log.info("retrain: %s", summary["reason"])
    return summary


def comparison_table(summary: Mapping[str, Any]) -> str:
    """Return markdown that compares the champion with the new model and gives the reason."""
    images, champion = summary["images"], summary["champion"]
    decision = "promoted to champion" if summary["promoted"] else "kept as challenger"
    counts = ", ".join(f"{images[key]} {key}" for key in ("added", "changed", "removed"))
    rows = [(f"{summary['version']}", f"{summary['hole_psnr']:.2f}", f"new, {decision}")]
    if champion is not None:
        previous = (f"{champion['version']}", f"{champion['hole_psnr']:.2f}", "previous champion")
        rows.insert(0, previous)
    return "\n".join(
        [
            f"**{markdown_text(summary['model'])} version {summary['version']}: {decision}.**"
            f" {markdown_text(summary['reason'])}",
            "",
            *markdown_table(["version", "hole PSNR, dB", ""], rows),
            "",
            f"Both use the same frozen pairs ({summary['pairs_digest'][:12]}) of"
            f" {markdown_text(images['name'])}"
            f" version {images['version']} ({counts}).",
        ]
    )


def _skipped(reason: str, summary: Outcome | None = None) -> State[Outcome]:
    log.info("retrain: %s", reason)
    return Completed(name="Skipped", message=reason, data=summary or {"reason": reason})
