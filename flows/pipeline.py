"""The flows of the stages: from raw photos to a registered model, or to an earlier stage.

A task only calls its stage. Prefect caches nothing: a cached result would not show whether the
stage's files still exist. Only the commit marker under the stage's request digest decides whether a
stage is done. So a retry in the UI, the same command and a new run with the same inputs find the
same work, and a stage with a deleted folder is built again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from prefect import flow

from data_prep.core.redact import redact
from data_prep.core.storage.open import open_store
from dpnet.pipeline.chain import StageName, check_config, run_chain
from dpnet.pipeline.config import CheckedConfig, Config, load_config, resolve_root
from dpnet.pipeline.summary import summarize
from dpnet.training.ray.launch import leaves_job
from flows.champion_events import champion_events
from flows.flow_run import (
    announce_champion,
    job_keeps_running,
    run_name,
    shorten_logged_errors,
    without_credentials,
)
from flows.forms import Evaluate, Images, Launch, Train, overrides_of, refuse_credentials
from flows.run_page import RunPage

_FLOW: Any = {"flow_run_name": run_name, "persist_result": False}


@flow(name="dpnet-pipeline", **_FLOW)
def dpnet_pipeline(
    config: str = "demo",
    root: str = "",
    images: Images = Images(),  # noqa: B008 (they are frozen)
    train: Train = Train(),  # noqa: B008
    launch: Launch = Launch(),  # noqa: B008
    evaluate: Evaluate = Evaluate(),  # noqa: B008
    overrides: list[str] = [],  # noqa: B006
) -> dict[str, Any]:
    """Prepare images and masks, train DPNet, evaluate it and register the model.

    Committed stages are skipped. Run it again after a failure to resume where it stopped.

    Args:
        config: A packaged config (demo, places2, celeba-hq, paris-street-view) or the path of a
            YAML file on the machine that runs it. Empty fields below keep the config's values.
        root: The folder or s3://bucket/prefix that stores everything; if empty, DPNET_ROOT or the
            config's root.
        images: The photos, and how to cut them.
        train: How long to train, and with which options.
        launch: The machines that train.
        evaluate: The pairs of photo and mask to evaluate on.
        overrides: Other options to change, such as train.learning_rate=2e-4.
    """
    given = overrides_of(images=images, train=train, launch=launch, evaluate=evaluate)
    return run_stages("register", config, root, [*given, *overrides])


@flow(name="prepare-images", **_FLOW)
def prepare_images(
    config: str = "demo",
    root: str = "",
    images: Images = Images(),  # noqa: B008
    overrides: list[str] = [],  # noqa: B006
) -> dict[str, Any]:
    """Prepare image shards.

    If an earlier version of the dataset exists, only new and changed photos are read.

    Args:
        config: A packaged config or the path of a YAML file on the machine that runs it.
        root: The folder or s3://bucket/prefix that stores everything; if empty, DPNET_ROOT or the
            config's root.
        images: The photos, and how to cut them.
        overrides: Other options to change, such as images.quality=90.
    """
    return run_stages("images", config, root, [*overrides_of(images=images), *overrides])


@flow(name="prepare-masks", **_FLOW)
def prepare_masks(
    config: str = "demo",
    root: str = "",
    overrides: list[str] = [],  # noqa: B006
) -> dict[str, Any]:
    """Prepare mask shards.

    Args:
        config: A packaged config or the path of a YAML file on the machine that runs it.
        root: The folder or s3://bucket/prefix that stores everything; if empty, DPNET_ROOT or the
            config's root.
        overrides: Options to change, such as masks.train=100000.
    """
    return run_stages("masks", config, root, overrides)


@flow(name="train", **_FLOW)
def train_model(
    config: str = "demo",
    root: str = "",
    images: Images = Images(),  # noqa: B008
    train: Train = Train(),  # noqa: B008
    launch: Launch = Launch(),  # noqa: B008
    overrides: list[str] = [],  # noqa: B006
) -> dict[str, Any]:
    """Train DPNet, or resume training from its last checkpoint.

    Missing shards are prepared first.

    Args:
        config: A packaged config or the path of a YAML file on the machine that runs it.
        root: The folder or s3://bucket/prefix that stores everything; if empty, DPNET_ROOT or the
            config's root.
        images: The photos, and how to cut them.
        train: How long to train, and with which options.
        launch: The machines that train.
        overrides: Other options to change, such as train.learning_rate=2e-4.
    """
    given = overrides_of(images=images, train=train, launch=launch)
    return run_stages("train", config, root, [*given, *overrides])


@flow(name="evaluate", **_FLOW)
def evaluate_model(
    config: str = "demo",
    root: str = "",
    images: Images = Images(),  # noqa: B008
    train: Train = Train(),  # noqa: B008
    launch: Launch = Launch(),  # noqa: B008
    evaluate: Evaluate = Evaluate(),  # noqa: B008
    overrides: list[str] = [],  # noqa: B006
) -> dict[str, Any]:
    """Evaluate the model of a config on frozen pairs of photo and mask.

    Missing earlier stages run first.

    Args:
        config: A packaged config or the path of a YAML file on the machine that runs it.
        root: The folder or s3://bucket/prefix that stores everything; if empty, DPNET_ROOT or the
            config's root.
        images: The photos, and how to cut them.
        train: How long to train, and with which options.
        launch: The machines that train.
        evaluate: The pairs of photo and mask to evaluate on.
        overrides: Other options to change, such as evaluate.seed=1.
    """
    given = overrides_of(images=images, train=train, launch=launch, evaluate=evaluate)
    return run_stages("evaluate", config, root, [*given, *overrides])


@flow(name="register", **_FLOW)
def register_model(
    config: str = "demo",
    root: str = "",
    images: Images = Images(),  # noqa: B008
    train: Train = Train(),  # noqa: B008
    launch: Launch = Launch(),  # noqa: B008
    evaluate: Evaluate = Evaluate(),  # noqa: B008
    overrides: list[str] = [],  # noqa: B006
) -> dict[str, Any]:
    """Register the evaluated model of a config.

    Missing earlier stages run first.

    Args:
        config: A packaged config or the path of a YAML file on the machine that runs it.
        root: The folder or s3://bucket/prefix that stores everything; if empty, DPNET_ROOT or the
            config's root.
        images: The photos, and how to cut them.
        train: How long to train, and with which options.
        launch: The machines that train.
        evaluate: The pairs of photo and mask to evaluate on.
        overrides: Other options to change, such as register.model=faces.
    """
    given = overrides_of(images=images, train=train, launch=launch, evaluate=evaluate)
    return run_stages("register", config, root, [*given, *overrides])


def run_checked(checked: CheckedConfig, root: str) -> dict[str, Any]:
    """Run the whole pipeline with a config that a command has loaded and checked.

    The run's page shows the config's name and the overrides. Its file is not read again.
    """

    @flow(name=dpnet_pipeline.name, **_FLOW)
    def run(config: str, root: str, overrides: list[str]) -> dict[str, Any]:
        shorten_logged_errors()
        return _run("register", checked.resolved, root)

    return run(redact(checked.name), root, [redact(each) for each in checked.overrides])


def run_stages(
    wanted: StageName, config: str, root: str, overrides: Sequence[str]
) -> dict[str, Any]:
    """Load and check a config, then run the stages up to `wanted`. Return the summary.

    Args:
        wanted: The last stage to run.
        config: The name of a packaged config, or the path of a YAML file.
        root: A folder or an S3 URI; if empty, DPNET_ROOT or the config's root.
        overrides: Options to change, such as "train.steps=10".
    """
    shorten_logged_errors()
    refuse_credentials(overrides, "this run's parameters")
    resolved = load_config(config, overrides)
    check_config(resolved, wanted, root)
    return _run(wanted, resolved, root)


def _run(wanted: StageName, resolved: Config, root: str) -> dict[str, Any]:
    """Run the stages up to `wanted` and show them on the run's page. Return the summary."""
    start = time.monotonic()
    store = open_store(resolve_root(root, resolved))
    leaves_job.set(job_keeps_running)
    with without_credentials(), RunPage(resolved, store) as page:
        page.show_plan()
        with champion_events(store, resolved.registry.model, announce_champion):
            refs = run_chain(resolved, store, wanted, call=page.run_stage)
        page.show_results(refs)
    if wanted == "register":
        return summarize(resolved.name, store, refs, time.monotonic() - start)
    return {"name": resolved.name, "root": store.uri, "stages": [ref.to_json() for ref in refs]}
