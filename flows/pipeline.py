"""The flows of the stages: raw photographs to a registered model, or as far as one wants.

A task only calls its stage. Nothing is cached in Prefect: whether a stage is done is told by its
commit marker alone, one cheap read under the stage's request digest, so a retry from the UI, the
same command typed again and a new run with the same inputs all land on the same work, and a deleted
folder is built again. A cached Prefect result would say nothing about what still exists.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from prefect import flow

from data_prep.core.storage.open import open_store
from dpnet.pipeline.chain import StageName, check_config, run_chain
from dpnet.pipeline.config import CheckedConfig, Config, load_config, resolve_root
from dpnet.pipeline.summary import summarize
from dpnet.training.ray.launch import leaves_job
from flows.forms import Evaluate, Images, Launch, Train, overrides_of
from flows.run_page import (
    Story,
    as_task,
    is_left_running,
    run_name,
    tell_errors_in_a_sentence,
)

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

    Stages that are committed under the root are skipped, so running it again after a failure goes
    on where it stopped.

    Args:
        config: A packaged config (demo, places2, celeba-hq, paris-street-view) or the path of a
            YAML file on the machine that runs it. Fields below that are left empty have its values.
        root: Where everything is stored, a folder or s3://bucket/prefix; empty means DPNET_ROOT or
            the config's.
        images: Which photographs, and how they are cut.
        train: How long and with what training goes.
        launch: Where training runs.
        evaluate: What the model is evaluated on.
        overrides: Any other options to change, each like train.learning_rate=2e-4.
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
    """Prepare image shards. Of a source that was prepared before, only what is new is read.

    Args:
        config: A packaged config or the path of a YAML file on the machine that runs it.
        root: Where everything is stored; empty means DPNET_ROOT or the config's.
        images: Which photographs, and how they are cut.
        overrides: Any other options to change, each like images.quality=90.
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
        root: Where everything is stored; empty means DPNET_ROOT or the config's.
        overrides: Options to change, each like masks.train=100000.
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
    """Train DPNet, or take up training from its last checkpoint. Shards that are missing are made.

    Args:
        config: A packaged config or the path of a YAML file on the machine that runs it.
        root: Where everything is stored; empty means DPNET_ROOT or the config's.
        images: Which photographs, and how they are cut.
        train: How long and with what training goes.
        launch: Where training runs.
        overrides: Any other options to change, each like train.learning_rate=2e-4.
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
    """Evaluate the model of a config on frozen pairs. What it needs and is missing is made.

    Args:
        config: A packaged config or the path of a YAML file on the machine that runs it.
        root: Where everything is stored; empty means DPNET_ROOT or the config's.
        images: Which photographs, and how they are cut.
        train: How long and with what training goes.
        launch: Where training runs.
        evaluate: What the model is evaluated on.
        overrides: Any other options to change, each like evaluate.seed=1.
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
    """Register the evaluated model of a config. What it needs and is missing is made.

    Args:
        config: A packaged config or the path of a YAML file on the machine that runs it.
        root: Where everything is stored; empty means DPNET_ROOT or the config's.
        images: Which photographs, and how they are cut.
        train: How long and with what training goes.
        launch: Where training runs.
        evaluate: What the model is evaluated on.
        overrides: Any other options to change, each like register.model=faces.
    """
    given = overrides_of(images=images, train=train, launch=launch, evaluate=evaluate)
    return run_stages("register", config, root, [*given, *overrides])


def run_checked(checked: CheckedConfig, root: str) -> dict[str, Any]:
    """Run the whole pipeline with a config that a command has loaded and checked.

    The run's page shows the config's name and the overrides. Its file is not read again.
    """

    @flow(name=dpnet_pipeline.name, **_FLOW)
    def run(config: str, root: str, overrides: list[str]) -> dict[str, Any]:
        tell_errors_in_a_sentence()
        return _run("register", checked.resolved, root)

    return run(checked.name, root, list(checked.overrides))


def run_stages(
    wanted: StageName, config: str, root: str, overrides: Sequence[str]
) -> dict[str, Any]:
    """Load and check a config, then run the chain up to `wanted`. Return the summary."""
    tell_errors_in_a_sentence()
    resolved = load_config(config, overrides)
    check_config(resolved, wanted)
    return _run(wanted, resolved, root)


def _run(wanted: StageName, resolved: Config, root: str) -> dict[str, Any]:
    """Run the chain up to `wanted` and show it on the run's page. Return the summary."""
    start = time.monotonic()
    store = open_store(resolve_root(root, resolved))
    leaves_job.set(is_left_running)
    with Story(resolved, store) as story:
        story.announce()
        refs = run_chain(resolved, store, wanted, call=as_task)
        story.conclude(refs)
    if wanted == "register":
        return summarize(resolved.name, store, refs, time.monotonic() - start)
    return {"name": resolved.name, "root": store.uri, "stages": [ref.to_json() for ref in refs]}
