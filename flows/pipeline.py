"""The flow `dpnet-pipeline`: raw photographs to a registered model, one task a stage.

A task only calls its stage. Nothing is cached in Prefect: whether a stage is done is told by its
commit marker alone, one cheap read under the stage's request digest, so a retry from the UI, the
same command typed again and a new run with the same inputs all land on the same work, and a deleted
folder is built again. A cached Prefect result would say nothing about what still exists.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from pydantic import Field

from data_prep.stage import StageRef
from data_prep.storage import open_store
from dpnet.chain import run_chain
from dpnet.config import load_config, resolve_root
from dpnet.summary import as_markdown, summarize


@flow(name="dpnet-pipeline", persist_result=False, validate_parameters=True)
def dpnet_pipeline(
    config: Annotated[
        str,
        Field(description="A packaged config (demo, places2, …) or the path of a YAML file."),
    ] = "demo",
    root: Annotated[
        str | None,
        Field(description="Where everything is stored; by default DPNET_ROOT or the config's."),
    ] = None,
    overrides: Annotated[
        list[str],
        Field(description="Options to change, each like train.steps=10."),
    ] = [],  # noqa: B006 (Prefect shows it in the form; nothing changes it)
) -> dict[str, Any]:
    """Prepare images and masks, train DPNet, evaluate it and register the model.

    Stages that are committed under the root are skipped. Running it again after a failure goes on
    where it stopped.
    """
    start = time.monotonic()
    resolved = load_config(config, overrides)
    place = resolve_root(root, resolved)
    store = open_store(place)
    refs = run_chain(resolved, store, call=_as_task)
    summary = summarize(resolved.name, store, refs, time.monotonic() - start)
    create_markdown_artifact(
        as_markdown(summary), key="dpnet-pipeline", description=f"Run of {resolved.name} in {place}"
    )
    return summary


def _as_task(title: str, stage: Callable[..., StageRef], *arguments: Any) -> StageRef:
    return task(name=title, cache_policy=NO_CACHE, persist_result=False)(stage)(*arguments)
