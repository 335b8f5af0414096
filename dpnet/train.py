"""The train stage: image shards and mask shards to a generator's weights.

This module is cheap to import; torch and Ray come in only when there is something to train.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from data_prep.digest import sha256_bytes, sha256_file
from data_prep.errors import ConfigError
from data_prep.progress import Progress, say
from data_prep.stage import FileRecord, Produced, Request, StageRef, Work, run_stage
from data_prep.storage import Store


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
    seed: int = Field(0, ge=0, lt=2**31, description="Order, augmentation and initialisation.")
    validate_every: int = Field(2000, ge=1, description="Steps between validations.")
    validation_pairs: int = Field(240, ge=1, le=100_000, description="Frozen pairs to validate on.")
    checkpoint_every: int = Field(1000, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(2, ge=1, le=1000, description="How many checkpoints are kept.")
    workers: int = Field(1, ge=1, le=4096, description="Ray training workers (DDP ranks).")
    gpus: bool = Field(False, description="One GPU per worker.")
    compile: bool | None = Field(
        None, description="torch.compile; null: on a GPU, if a compiler works there."
    )


# What the run looks like, not what comes out of it.
_NOT_ASKED = {"checkpoint_every", "keep_checkpoints", "workers", "gpus", "compile"}


@dataclass(frozen=True)
class TrainJob:
    """All that a training worker needs, on whatever machine it runs."""

    root: str
    images: StageRef
    masks: StageRef
    model: ModelSettings
    losses: LossSettings
    settings: TrainSettings


def train(
    model: ModelSettings,
    losses: LossSettings,
    settings: TrainSettings,
    name: str,
    images: StageRef,
    masks: StageRef,
    store: Store,
) -> StageRef:
    """Train, or take up training, and commit the averaged generator's weights."""
    if settings.batch_size % settings.workers:
        raise ConfigError(
            f"train.batch_size is {settings.batch_size} and train.workers {settings.workers}:"
            " choose a batch size that the workers divide."
        )
    if losses.vgg_weights is not None:  # the workers run in other folders
        path = str(Path(losses.vgg_weights).expanduser().absolute())
        losses = losses.model_copy(update={"vgg_weights": path})
    request = train_request(model, losses, settings, name, images, masks)
    job = TrainJob(store.uri, images, masks, model, losses, settings)
    return run_stage(store, request, lambda work: _build(job, work), say)


def train_request(
    model: ModelSettings,
    losses: LossSettings,
    settings: TrainSettings,
    name: str,
    images: StageRef,
    masks: StageRef,
) -> Request:
    sources = {}
    loss_settings = losses.model_dump(exclude={"vgg_weights"})
    if losses.vgg_weights is None:
        loss_settings |= {"perceptual": 0.0, "style": 0.0}
    else:
        check_vgg_file(losses)
        sources["vgg"] = sha256_file(Path(losses.vgg_weights).expanduser())
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
        inputs={"images": images, "masks": masks},
        sources=sources,
    )


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


def _build(job: TrainJob, work: Work) -> Produced:
    import yaml

    from dpnet.launch import run_local

    if job.losses.vgg_weights is None and (job.losses.perceptual or job.losses.style):
        say(
            "train: the perceptual and style losses are off, they need VGG's weights: make a file"
            f" with `{vgg_command(job.losses.vgg, f'{job.losses.vgg}.pth')}` (pip install"
            " torchvision) and name it in losses.vgg_weights"
        )
    steps = job.settings.steps
    with Progress("train", steps, "steps") as progress:
        outcome = run_local(job, work, progress.update)
    log = outcome.log
    files = list(outcome.files)
    resolved = yaml.safe_dump(
        {
            "model": job.model.model_dump(),
            "losses": job.losses.model_dump(exclude={"vgg_weights"}),
            "train": job.settings.model_dump(),
        },
        sort_keys=False,
    ).encode()
    text = "".join(json.dumps(record) + "\n" for record in log).encode()
    for path, data in (("resolved-config.yaml", resolved), ("log.jsonl", text)):
        work.store.write(work.key(path), data)
        files.append(FileRecord(path, len(data), sha256_bytes(data), content=False))
    return Produced(files, _summary(job, log, outcome.resumed_from))


def _summary(job: TrainJob, log: list[dict[str, Any]], resumed_from: int) -> dict[str, Any]:
    validations = [record for record in log if record["kind"] == "validation"]
    training = [record for record in log if record["kind"] == "train"]
    first, last = validations[0], validations[-1]
    seconds = sum(record["seconds"] for record in training)
    images = sum(record["images"] for record in training)
    return {
        "steps": job.settings.steps,
        "samples": job.settings.steps * job.settings.batch_size,
        "parameters": last["parameters"],
        "hole_psnr": last["hole_psnr"],
        "hole_psnr_at_start": first["hole_psnr"],
        "mean_fill_psnr": last["mean_fill_psnr"],
        "images_per_second": round(images / max(seconds, 1e-9), 1),
        "resumed_from": resumed_from,
    }
