"""The flow `dpnet-pipeline`: raw photographs to a registered model, one task a stage.

A task only calls its stage. Nothing is cached in Prefect: whether a stage is done is told by its
commit marker alone, one cheap read under the stage's request digest, so a retry from the UI, the
same command typed again and a new run with the same inputs all land on the same work, and a deleted
folder is built again. A cached Prefect result would say nothing about what still exists.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE

from data_prep.stage import StageRef
from data_prep.storage import open_store
from dpnet.chain import run_chain
from dpnet.config import load_config, resolve_root
from dpnet.summary import as_markdown, summarize


@flow(name="dpnet-pipeline", persist_result=False)
def dpnet_pipeline(
    config: str = "demo",
    root: str = "",
    overrides: list[str] = [],  # noqa: B006 (plain types make a plain form in the Prefect UI)
) -> dict[str, Any]:
    """Prepare images and masks, train DPNet, evaluate it and register the model.

    Stages that are committed under the root are skipped, so running it again after a failure goes
    on where it stopped.

    Args:
        config: A packaged config (demo, places2, celeba-hq, paris-street-view) or the path of a
            YAML file on the machine that runs it.
        root: Where everything is stored, a folder or s3://bucket/prefix; empty means DPNET_ROOT or
            the config's.
        overrides: Options to change, each like train.steps=10.
    """
    start = time.monotonic()
    resolved = load_config(config, overrides)
    place = resolve_root(root, resolved)
    store = open_store(place)
    refs = run_chain(resolved, store, call=as_task)
    summary = summarize(resolved.name, store, refs, time.monotonic() - start)
    create_markdown_artifact(
        as_markdown(summary), key="dpnet-pipeline", description=f"Run of {resolved.name} in {place}"
    )
    return summary


def as_task(title: str, stage: Callable[..., StageRef], *arguments: Any) -> StageRef:
    """The stage as a task of the flow that is running."""
    return task(name=title, cache_policy=NO_CACHE, persist_result=False)(stage)(*arguments)
