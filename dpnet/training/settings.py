"""Settings of training: the network, the losses, the optimiser, where it runs."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


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


class LaunchSettings(BaseModel):
    """Where training runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    launcher: Literal["local", "ray-job"] = Field(
        "local", description="Ray on this machine, or a job on a Ray cluster."
    )
    address: str | None = Field(
        None,
        description="Of the cluster's dashboard, as http://head:8265, for ray-job; by default that"
        " of RAY_API_SERVER_ADDRESS or RAY_ADDRESS. Its token is RAY_AUTH_TOKEN's or the one in"
        " ~/.ray/auth_token.",
    )
    python: str = Field(
        "python", min_length=1, description="The interpreter on the cluster's head that has dpnet."
    )
    deadline_s: int = Field(
        1800,
        ge=1,
        le=604_800,
        description="Seconds without a sign of life, as while there are no free workers, after"
        " which training is given up.",
    )
