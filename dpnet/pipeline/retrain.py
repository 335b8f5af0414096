"""The retrain stage: new images, a model that starts from the champion, and the better one stays.

Asked for by the content of images and masks and by the settings, so one state of the data is
trained on once, whoever asks and however often: the lease lets one work, the commit marker tells
the others. `plan.json` and `rival.json` are each written once and fix which champion it starts from
and which it is compared with, so that a retrain that was killed goes on as it began.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import StageRef, load_reference, read_manifest
from data_prep.core.progress import say
from data_prep.core.stage import Produced, Request, Work, run_stage
from data_prep.core.storage.store import Store
from data_prep.images.stage import prepare_images
from data_prep.masks.stage import prepare_masks
from data_prep.shards.shards import write_file
from dpnet.evaluation.stage import evaluate
from dpnet.model_store.records import CHAMPION, find_champion
from dpnet.pipeline.chain import Call, call_plainly, with_photographs
from dpnet.pipeline.config import Config
from dpnet.registry.stage import register, tracking_uri
from dpnet.training.job import check_settings, stage_request
from dpnet.training.settings import ModelSettings
from dpnet.training.stage import train

PLAN, RIVAL, RECORD = "plan.json", "rival.json", "retrain.json"
Record = dict[str, Any]


class NothingToDo(PipelineError):
    """The champion was trained on these very images; the message says so in one sentence."""


def retrain(config: Config, store: Store, call: Call = call_plainly) -> StageRef:
    """Prepare what is new, train from the champion, evaluate both on the same frozen pairs, and
    make the better one the champion.

    `call` runs each stage (see `run_chain`). Without a champion it trains from nothing. The summary
    tells of the images, both figures, whether the new version was promoted, and why. Raises
    NothingToDo where the champion was trained on exactly these images.
    """
    check_settings(config.train)
    tracking_uri(config.registry, store)  # better refused now than after hours of training
    images = call("prepare images", prepare_images, with_photographs(config, store).images, store)
    masks = call("prepare masks", prepare_masks, config.masks, store)
    request = retrain_request(config, images, masks)
    return run_stage(store, request, lambda work: _build(work, config, call), say)


def retrain_request(config: Config, images: StageRef, masks: StageRef) -> Request:
    """What is asked: the data and the settings. Not the champion, which one retrain may change."""
    training = stage_request(config.training(images, masks))
    model = config.registry.model
    return Request(
        stage="retrain",
        name=model,
        top=f"retrains/{model}",
        settings={
            **training.settings,
            "evaluate": config.evaluate.model_dump(exclude={"threads"}),
            "register": {"model": model},
        },
        inputs=training.inputs,
        sources=training.sources,
    )


def _build(work: Work, config: Config, call: Call) -> Produced:
    store, model = work.store, config.registry.model
    images, masks = (work.request.inputs[role] for role in ("images", "masks"))
    plan = _once(work, PLAN, lambda: _plan(store, config, images))
    settings, start = config.train, plan["champion"]
    if start is not None:
        reference = f"models:/{model}/{start['version']}"
        say(f"retrain: starts from {model} version {start['version']}")
        settings = settings.model_copy(update={"init_from": reference})
    training = replace(config.training(images, masks), settings=settings)
    tracking = tracking_uri(config.registry, store)
    trained = call("train", train, training, config.launch, tracking, store)
    evaluation = call("evaluate", evaluate, config.evaluate, images, masks, trained, store)
    # Whoever is champion now: another may have been registered in the hours since the start.
    rivals = _once(work, RIVAL, lambda: {"champion": _named(find_champion(store, model))})
    rival, against = rivals["champion"], None
    if rival is not None:
        run = load_reference(store, rival["run"])
        of_champion = (config.evaluate, images, masks, run, store)
        against = call("evaluate the champion", evaluate, *of_champion)
    work.lease.check()
    registered = call("register", register, config.registry, trained, evaluation, store, against)
    summary = _summary(images, plan, rival, against, evaluation, registered)
    made = {"run": trained, "evaluation": evaluation, "against": against, "register": registered}
    record = {
        **summary,
        "made": {role: ref.folder if ref is not None else None for role, ref in made.items()},
    }
    parts = {PLAN: plan, RIVAL: rivals, RECORD: record}
    files = [write_file(work, name, _bytes(part)) for name, part in parts.items()]
    return Produced(files, summary)


def _plan(store: Store, config: Config, images: StageRef) -> Record:
    """What the retrain starts from. Raises where there is no sense in it."""
    champion = find_champion(store, config.registry.model)
    if champion is not None:
        name = f"{champion['model']} version {champion['version']}"
        run = read_manifest(store, champion["run"]["folder"])
        if run.inputs["images"].content_digest == images.content_digest:
            raise NothingToDo(
                f"the champion, {name}, was trained on exactly these images (version"
                f" {images.summary['version']} of {images.name}), so there is nothing to retrain."
            )
        _check_network(name, run.settings["model"], config.model)
    return {"champion": _named(champion), "images": images.folder}


def _check_network(name: str, champions: Record, asked: ModelSettings) -> None:
    """Raise PipelineError unless the champion's weights fit the network that is asked for."""
    for option, value in asked.model_dump(exclude={"discriminator_sees_mask"}).items():
        if champions.get(option) != value:
            raise PipelineError(
                f"the champion, {name}, has model.{option} {champions.get(option)} and this config"
                f" {value}, so training cannot start from it: set"
                f" model.{option}={champions.get(option)}, or give the new network a register.model"
                " of its own."
            )


def _named(champion: Record | None) -> Record | None:
    if champion is None:
        return None
    return {"version": champion["version"], "run": champion["run"]["folder"]}


def _once(work: Work, name: str, make: Callable[[], Record]) -> Record:
    """What was written under `name` the first time; `make` says what to write then."""
    key = work.key(name)
    if not work.store.exists(key):
        work.store.create(key, _bytes(make()))
    try:
        return dict(json.loads(work.store.read(key)))
    except ValueError:
        raise PipelineError(
            f"{work.store.uri}/{key} was altered: delete {work.folder} and retrain again."
        ) from None


def _summary(
    images: StageRef,
    plan: Record,
    rival: Record | None,
    against: StageRef | None,
    evaluation: StageRef,
    registered: StageRef,
) -> Record:
    counts = {key: images.summary[key] for key in ("version", "added", "changed", "removed")}
    champion = None
    if rival is not None and against is not None:
        champion = {"version": rival["version"], "hole_psnr": against.summary["hole_psnr"]}
    return {
        "model": registered.summary["model"],
        "images": {"name": images.name, **counts},
        "started_from": plan["champion"] and plan["champion"]["version"],
        "champion": champion,
        "version": registered.summary["version"],
        "hole_psnr": evaluation.summary["hole_psnr"],
        "pairs_digest": evaluation.summary["pairs_digest"],
        "promoted": registered.summary["alias"] == CHAMPION,
        "reason": registered.summary["reason"],
    }


def _bytes(record: Record) -> bytes:
    return json.dumps(record, indent=1, ensure_ascii=False).encode() + b"\n"
