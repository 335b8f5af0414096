"""The train stage: image shards and mask shards to a generator's weights.

This module is cheap to import; torch and Ray come in only when there is something to train.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from data_prep.core.digest import sha256_file
from data_prep.core.errors import ConfigError
from data_prep.core.progress import say
from data_prep.core.stage import Produced, Request, StageRef, Work, load_reference, run_stage
from data_prep.core.storage.store import Store
from data_prep.shards.shards import write_file
from dpnet.training.ray.launch import LaunchSettings


class ModelSettings(BaseModel):
    """Which network: a preset and the ablation switches (None leaves the preset's value)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Literal["tiny", "base", "large"] = Field(
        "base", description="tiny for tests and CPUs, base at the paper's 55.6 GMac, large."
    )
    pyramid: bool = Field(True, description="Pyramidal convolutions; false takes plain 3x3 ones.")
    attention: Literal["none", "single", "pyramid"] = Field(
        "pyramid", description="Keys from three encoder layers, from one, or no attention."
    )
    normalization: Literal["instance", "batch", "region", "dynamic"] = Field(
        "dynamic", description="dynamic is DPNet's; the others are for comparison."
    )
    mask: Literal["soft", "binary"] = Field("soft", description="How the mask is updated.")
    discriminator_sees_mask: bool = Field(True, description="The mask as a fourth channel.")


class LossSettings(BaseModel):
    """Weights of the losses. Not published; these are our choice."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hole: float = Field(6.0, ge=0, le=1e4, description="L1 in the hole.")
    valid: float = Field(1.0, ge=0, le=1e4, description="L1 on known pixels.")
    adversarial: float = Field(0.1, ge=0, le=1e4, description="Adversarial term; 0: no GAN.")
    gan: Literal["nsgan", "hinge"] = Field("nsgan", description="Form of the adversarial loss.")
    perceptual: float = Field(0.1, ge=0, le=1e4, description="VGG features; needs vgg_weights.")
    style: float = Field(250.0, ge=0, le=1e6, description="Gram matrices; needs vgg_weights.")
    total_variation: float = Field(0.0, ge=0, le=1e4, description="Smoothness in the hole.")
    vgg: Literal["vgg16", "vgg19"] = Field("vgg19", description="Which network vgg_weights is of.")
    vgg_weights: str | None = Field(
        None,
        description="File (.pth or .safetensors) with torchvision's VGG weights; without it the"
        " perceptual and style terms are off.",
    )


class TrainSettings(BaseModel):
    """How long and how training goes. Our choice throughout."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(200_000, ge=1, le=100_000_000, description="Optimiser steps.")
    batch_size: int = Field(16, ge=1, le=65_536, description="Samples a step, over all workers.")
    accumulate: int = Field(
        1, ge=1, le=1024, description="Parts that each worker's share of a batch is computed in."
    )
    learning_rate: float = Field(1e-4, gt=0, le=1, description="Of the generator, at its peak.")
    discriminator_learning_rate: float = Field(1e-4, gt=0, le=1, description="At its peak.")
    beta1: float = Field(0.0, ge=0, lt=1, description="Adam's first beta; the second is 0.99.")
    warmup_steps: int = Field(
        1000, ge=0, description="Linear rise of the learning rates, and of the adversarial term."
    )
    finetune_share: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Share of the steps, at the end, for fine-tuning: from half of the peak, where"
        " the learning rate stays until then, down to final_rate (cosine).",
    )
    final_rate: float = Field(
        0.1, ge=0, le=0.5, description="Learning rate at the end, as a share of the peak."
    )
    adversarial_from: int = Field(
        0,
        ge=0,
        description="Step at which the discriminator begins to learn and the adversarial term to"
        " rise to its weight, over warmup_steps.",
    )
    gradient_clip: float = Field(1.0, gt=0, le=1e6, description="Norm that gradients are cut to.")
    ema_decay: float = Field(0.999, ge=0, lt=1, description="Of the averaged generator.")
    max_skipped: int = Field(
        0,
        ge=0,
        description="Steps with a loss or gradient that is not finite that are left out before"
        " training stops.",
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Order, augmentation and initialisation.")
    init_from: str | None = Field(
        None,
        description="Generator to begin with: models:/NAME@champion, models:/NAME/VERSION, a run's"
        " folder or an exported one.",
    )
    validate_every: int = Field(2000, ge=1, description="Steps between validations.")
    validation_pairs: int = Field(240, ge=1, le=100_000, description="Frozen pairs to validate on.")
    patience: int | None = Field(
        None, ge=1, description="Validations without a better one after which training ends early."
    )
    result: Literal["last", "best"] = Field(
        "last", description="Which averaged generator comes out: the last, or the best validated."
    )
    checkpoint_every: int = Field(1000, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, le=1000, description="How many of the newest are kept.")
    keep_best: int = Field(1, ge=0, le=1000, description="How many of the best validated, besides.")
    lanes: int = Field(
        64,
        ge=1,
        le=65_536,
        description="Shards that are read side by side, over all workers; at least the workers.",
    )
    on_bad_sample: Literal["error", "skip"] = Field(
        "error",
        description="What to do where a shard fails its hash or a sample cannot be decoded; a"
        " skipped sample's place is taken by the next of its batch, and it is counted.",
    )
    loader_threads: int = Field(
        0, ge=0, le=1024, description="Threads of each worker that decode; 0: its share of cores."
    )
    cache: str | None = Field(
        None, description="Folder of each machine that keeps shards which come from S3."
    )
    cache_gb: float = Field(50.0, gt=0, description="What the cache may hold, in GB.")
    workers: int = Field(1, ge=1, le=4096, description="Ray training workers (DDP ranks).")
    min_workers: int | None = Field(
        None, ge=1, le=4096, description="Train with so many while there are no more (elastic)."
    )
    max_failures: int = Field(
        3, ge=0, le=10_000, description="Deaths of workers or machines that are got over by itself."
    )
    gpus: bool = Field(False, description="One GPU per worker.")
    compile: bool | None = Field(
        None, description="torch.compile; null: on a GPU, if a compiler works there."
    )

    @property
    def constant_until(self) -> int:
        """The step at which fine-tuning begins: up to there nothing depends on `steps`."""
        return math.floor(self.steps * (1 - self.finetune_share))


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


def train(
    model: ModelSettings,
    losses: LossSettings,
    settings: TrainSettings,
    launch: LaunchSettings,
    tracking_uri: str | None,
    name: str,
    images: StageRef,
    masks: StageRef,
    store: Store,
) -> StageRef:
    """Train, or take up training, and commit the averaged generator's weights.

    `tracking_uri` is the MLflow that is told how it goes; None: none is.
    """
    check_settings(settings)
    request, job = planned(model, losses, settings, name, images, masks, store)
    return run_stage(store, request, lambda work: _build(job, launch, tracking_uri, work), say)


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
    from dpnet.inpainting.api import find_model
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


def _build(job: TrainJob, launch: LaunchSettings, tracking_uri: str | None, work: Work) -> Produced:
    import yaml

    from dpnet.loading.shard_files import check_enough, find_shards
    from dpnet.training.extend import find_start
    from dpnet.training.ray.launch import launched
    from dpnet.training.result import collect

    if job.losses.vgg_weights is None and (job.losses.perceptual or job.losses.style):
        say(
            "train: the perceptual and style losses are off, they need VGG's weights: make a file"
            f" with `{vgg_command(job.losses.vgg, f'{job.losses.vgg}.pth')}` (pip install"
            " torchvision) and name it in losses.vgg_weights"
        )
    if job.settings.steps <= job.settings.warmup_steps:
        say(
            f"warning: train.warmup_steps is {job.settings.warmup_steps} and train.steps"
            f" {job.settings.steps}, so the learning rate does not reach its peak: lower the first."
        )
    for dataset in (job.images, job.masks):  # workers look too, but they are slow to start
        check_enough(find_shards(work.store, dataset, "train"), job.settings.batch_size)
    job = replace(job, extends=find_start(work.store, job))
    resolved = yaml.safe_dump(
        {
            "model": job.model.model_dump(),
            "losses": job.losses.model_dump(exclude={"vgg_weights"}),
            "train": job.settings.model_dump(),
        },
        sort_keys=False,
    ).encode()
    record = write_file(work, "resolved-config.yaml", resolved, content=False)
    resumed_from = launched(job, launch, tracking_uri, work)
    files, summary = collect(job, work)
    return Produced([record, *files], {**summary, "resumed_from": resumed_from})
