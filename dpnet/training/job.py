"""What a training worker needs, and the request of a run."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_prep.core.digest import sha256_file
from data_prep.core.errors import ConfigError
from data_prep.core.stage import (
    Request,
    StageRef,
    load_reference,
)
from data_prep.core.storage.store import Store
from dpnet.training.settings import LossSettings, ModelSettings, TrainSettings

# How it is computed, kept and read, not what comes out of it. The initial weights count by hash.
_NOT_ASKED = {
    "accumulate", "max_skipped", "init_from", "checkpoint_every", "keep_checkpoints", "keep_best",
    "on_bad_sample", "loader_threads", "cache", "cache_gb", "workers", "min_workers",
    "max_failures", "gpus", "compile",
}  # fmt: skip


@dataclass(frozen=True)
class TrainJob:
    """All that a training worker needs, on whatever machine it runs.

    Attributes:
        folder: the run's, a key under the root.
        asked: settings and digests that the run's request is made of; every checkpoint has them.
        init: store and folder of the generator to begin with, or None.
        extends: key of another run's checkpoint to begin with, or None.
    """

    root: str
    folder: str
    images: StageRef
    masks: StageRef
    model: ModelSettings
    losses: LossSettings
    settings: TrainSettings
    asked: Mapping[str, Any]
    init: tuple[str, str] | None = None
    extends: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "model": self.model.model_dump(),
            "losses": self.losses.model_dump(),
            "settings": self.settings.model_dump(),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> TrainJob:
        init = record["init"]
        return cls(
            **{
                **record,
                "images": StageRef(**record["images"]),
                "masks": StageRef(**record["masks"]),
                "model": ModelSettings(**record["model"]),
                "losses": LossSettings(**record["losses"]),
                "settings": TrainSettings(**record["settings"]),
                "init": None if init is None else (init[0], init[1]),
            }
        )


def planned(
    model: ModelSettings,
    losses: LossSettings,
    settings: TrainSettings,
    name: str,
    images: StageRef,
    masks: StageRef,
    store: Store,
) -> tuple[Request, TrainJob]:
    """What is asked of the stage, and what its workers are told."""
    if losses.vgg_weights is not None:  # the workers run in other folders
        path = str(Path(losses.vgg_weights).expanduser().absolute())
        losses = losses.model_copy(update={"vgg_weights": path})
    init = _initial(settings.init_from, store)
    request = train_request(model, losses, settings, name, images, masks, init)
    job = TrainJob(
        store.uri,
        request.folder,
        images,
        masks,
        model,
        losses,
        settings,
        asked(request),
        (init.store, init.folder) if init else None,
    )
    return request, job


def check_settings(settings: TrainSettings) -> None:
    """Raise ConfigError where numbers of workers, samples and lanes do not go together."""
    s = settings
    if s.min_workers is not None and s.min_workers > s.workers:
        raise ConfigError(
            f"train.min_workers is {s.min_workers} and train.workers {s.workers}: the first may not"
            " be more."
        )
    for option, most in (("batch_size", s.batch_size), ("lanes", s.lanes)):
        if s.workers > most:
            raise ConfigError(
                f"train.workers is {s.workers} and train.{option} {most}: each worker needs one of"
                f" its own, so raise train.{option} or lower train.workers."
            )


class Initial(NamedTuple):
    """The generator that a run begins with."""

    store: str  # URI
    folder: str
    sha256: str  # of its weights
    run: StageRef | None  # the run of this root that it is the result of


def _initial(reference: str | None, store: Store) -> Initial | None:
    if reference is None:
        return None
    from dpnet.model_store.find_model import find_model
    from dpnet.model_store.weights import RUN, read_config

    place, folder, _ = find_model(reference, store.uri)
    record, layout = read_config(place, folder)
    ref = None
    if place.uri == store.uri and layout == RUN:
        ref = load_reference(store, folder)
    return Initial(place.uri, folder, record["weights_sha256"], ref)


def train_request(
    model: ModelSettings,
    losses: LossSettings,
    settings: TrainSettings,
    name: str,
    images: StageRef,
    masks: StageRef,
    init: Initial | None = None,
) -> Request:
    sources = {}
    inputs = {"images": images, "masks": masks}
    loss_settings = losses.model_dump(exclude={"vgg_weights"})
    if losses.vgg_weights is None:
        loss_settings |= {"perceptual": 0.0, "style": 0.0}
    else:
        check_vgg_file(losses)
        sources["vgg"] = sha256_file(Path(losses.vgg_weights).expanduser())
    if init is not None:
        sources["init"] = init.sha256
        if init.run is not None:
            inputs["init"] = init.run
    return Request(
        stage="train",
        name=name,
        top="runs",
        slug=f"{name}-",
        settings={
            "model": model.model_dump(),
            "losses": loss_settings,
            "train": settings.model_dump(exclude=_NOT_ASKED),
        },
        inputs=inputs,
        sources=sources,
    )


def asked(request: Request) -> dict[str, Any]:
    """What the run's request is made of, as its checkpoints keep it."""
    return {
        **request.settings,
        "content digest": {role: ref.content_digest for role, ref in request.inputs.items()},
        "sha256": dict(request.sources),
    }


def check_vgg_file(losses: LossSettings) -> None:
    """Raise ConfigError where `losses.vgg_weights` names no file."""
    name = losses.vgg_weights
    if name is not None and not Path(name).expanduser().is_file():
        raise ConfigError(
            f"losses.vgg_weights names {name!r}, which is no file: make it with"
            f" `{vgg_command(losses.vgg, name)}`, or leave the option out."
        )


def vgg_command(kind: str, file: str) -> str:
    """What makes a file of torchvision's weights, where torchvision and a network are at hand."""
    return (
        'python -c "import sys, torch, torchvision.models as m;'
        f" torch.save(m.{kind}(weights='DEFAULT').state_dict(), sys.argv[1])\""
        f" {shlex.quote(file)}"
    )


def is_finished(job: TrainJob, step: int, finished: str) -> bool:
    """Whether a checkpoint at `step` is the run's last."""
    return step == job.settings.steps or bool(finished)
