"""The retrain stage: train on new images from the champion, and promote the better model.

The request digest depends on the content of the images and masks and on the settings. So each state
of the data is trained on once, however many runs request it: the lease lets one run work, and the
commit marker stops the others.

A retrain that was killed resumes as it began. `plan.json` stores the champion that training starts
from, and `rival.json` the champion that the new model is compared with. Each is written once.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import StageRef, load_reference, read_manifest
from data_prep.core.paths import RETRAINS
from data_prep.core.record import parse_json, refuse_newer
from data_prep.core.stage import Produced, Request, Work, run_stage
from data_prep.core.storage.store import Store
from data_prep.images.stage import prepare_images
from data_prep.masks.stage import prepare_masks
from data_prep.shards.shards import write_file
from dpnet.evaluation.stage import evaluate
from dpnet.evaluation.weights import weights_of
from dpnet.model_store.history import find_champion
from dpnet.model_store.records import CHAMPION
from dpnet.pipeline.chain import Call, call_plainly, with_photographs
from dpnet.pipeline.config import Config
from dpnet.registry.stage import register, tracking_uri
from dpnet.training.job import LEASE_INTERVAL_S, check_settings, stage_request
from dpnet.training.settings import ModelSettings
from dpnet.training.stage import train

PLAN, RIVAL, RECORD = "plan.json", "rival.json", "retrain.json"
Record = dict[str, Any]

log = logging.getLogger(__name__)


class NothingToDo(PipelineError):
    """The champion was already trained on exactly these images."""


def retrain(config: Config, store: Store, call: Call = call_plainly) -> StageRef:
    """Train on new images from the champion, and promote the better of the two models.

    Both models are evaluated on the same frozen pairs. Without a champion, training starts from
    random weights. `call` runs each stage (see `run_chain`).

    Returns:
        The reference of the stage. Its summary has the images, the figures of both models, whether
        the new version was promoted, and the reason.

    Raises:
        NothingToDo: The champion was trained on exactly these images.
    """
    check_settings(config.train)
    tracking_uri(config.registry, store)  # to fail now, not after hours of training
    images = call("prepare images", prepare_images, with_photographs(config, store).images, store)
    masks = call("prepare masks", prepare_masks, config.masks, store)
    request = retrain_request(config, images, masks)
    return run_stage(
        store, request, lambda work: _build(work, config, call), interval=LEASE_INTERVAL_S
    )


def retrain_request(config: Config, images: StageRef, masks: StageRef) -> Request:
    """Return the request: the data and the settings.

    It leaves the champion out, because the retrain itself may change the champion.
    """
    training = stage_request(config.training(images, masks))
    model = config.registry.model
    return Request(
        stage="retrain",
        name=model,
        top=f"{RETRAINS}/{model}",
        settings={
            **training.settings,
            "evaluate": config.evaluate.requested(),
            "register": config.registry.requested(),
        },
        inputs=training.inputs,
        sources={**training.sources, **weights_of(config.evaluate).sources},
    )


def _build(work: Work, config: Config, call: Call) -> Produced:
    store, model = work.store, config.registry.model
    images, masks = (work.request.inputs[role] for role in ("images", "masks"))
    plan = _read_or_create(work, PLAN, lambda: _plan(store, config, images))
    settings, start = config.train, plan["champion"]
    if start is not None:
        reference = f"models:/{model}/{start['version']}"
        log.info("retrain: training starts from %s version %s", model, start["version"])
        settings = settings.model_copy(update={"init_from": reference})
    training = replace(config.training(images, masks), settings=settings)
    tracking = tracking_uri(config.registry, store)
    trained = call("train", train, training, config.launch, tracking, store)
    evaluation = call("evaluate", evaluate, config.evaluate, images, masks, trained, store)
    # The champion may have changed in the hours since the plan.
    rival = _read_or_create(
        work, RIVAL, lambda: {"champion": _version_and_run(find_champion(store, model))}
    )
    champion, champion_evaluation = rival["champion"], None
    if champion is not None:
        run = load_reference(store, champion["run"])
        arguments = (config.evaluate, images, masks, run, store)
        champion_evaluation = call("evaluate the champion", evaluate, *arguments)
    work.lease.check()
    registering = partial(register, measure=config.evaluate)
    registered = call(
        "register", registering, config.registry, trained, evaluation, store, champion_evaluation
    )
    summary = _summary(images, plan, champion, champion_evaluation, evaluation, registered)
    outputs = {
        "run": trained,
        "evaluation": evaluation,
        "against": champion_evaluation,
        "register": registered,
    }
    record = {
        **summary,
        "made": {role: ref.folder if ref is not None else None for role, ref in outputs.items()},
    }
    contents = {PLAN: plan, RIVAL: rival, RECORD: record}
    files = [write_file(work, name, _to_bytes(each)) for name, each in contents.items()]
    return Produced(files, summary)


def _plan(store: Store, config: Config, images: StageRef) -> Record:
    """Return the champion to start from. Raises PipelineError if training cannot start from it."""
    champion = find_champion(store, config.registry.model)
    if champion is not None:
        name = f"{champion['model']} version {champion['version']}"
        run = read_manifest(store, champion["run"]["folder"])
        if run.inputs["images"].content_digest == images.content_digest:
            raise NothingToDo(
                f"there is nothing to retrain: the champion, {name}, was trained on exactly these"
                f" images (version {images.summary['version']} of {images.name})."
            )
        _check_same_network(name, run.settings["model"], config.model)
    return {"champion": _version_and_run(champion), "images": images.folder}


def _check_same_network(name: str, champion: Record, requested: ModelSettings) -> None:
    """Raise PipelineError if the champion's weights do not fit the requested network."""
    for option, value in requested.model_dump(exclude={"discriminator_sees_mask"}).items():
        if champion.get(option) != value:
            raise PipelineError(
                f"training cannot start from the champion, {name}: it has model.{option}"
                f" {champion.get(option)} and this config {value}. Set"
                f" model.{option}={champion.get(option)}, or set register.model to a new name."
            )


def _version_and_run(champion: Record | None) -> Record | None:
    if champion is None:
        return None
    return {"version": champion["version"], "run": champion["run"]["folder"]}


def _read_or_create(work: Work, name: str, make: Callable[[], Record]) -> Record:
    """Return the record stored under `name`. Store the result of `make` if there is none."""
    key = work.key(name)
    if not work.store.exists(key):
        work.store.create(key, _to_bytes(make()))
    try:
        record = parse_json(work.store.read(key))
        refuse_newer(record, f"{work.store.label}/{key}")
        champion = record["champion"]
        if champion is None or {"version", "run"} <= champion.keys():
            return dict(record)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise PipelineError(
        f"{work.store.label}/{key} was altered: it does not say which champion was chosen."
        f" Restore it from a backup, or delete {work.folder} and run retrain again."
    )


def _summary(
    images: StageRef,
    plan: Record,
    champion: Record | None,
    champion_evaluation: StageRef | None,
    evaluation: StageRef,
    registered: StageRef,
) -> Record:
    counts = {key: images.summary[key] for key in ("version", "added", "changed", "removed")}
    compared = None
    if champion is not None and champion_evaluation is not None:
        hole_psnr = champion_evaluation.summary["hole_psnr"]
        compared = {"version": champion["version"], "hole_psnr": hole_psnr}
    return {
        "model": registered.summary["model"],
        "images": {"name": images.name, **counts},
        "started_from": plan["champion"] and plan["champion"]["version"],
        "champion": compared,
        "version": registered.summary["version"],
        "hole_psnr": evaluation.summary["hole_psnr"],
        "pairs_digest": evaluation.summary["pairs_digest"],
        "promoted": registered.summary["alias"] == CHAMPION,
        "reason": registered.summary["reason"],
    }


def _to_bytes(record: Record) -> bytes:
    return json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n"
