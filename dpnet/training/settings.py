"""Settings of training: network, losses, optimiser, and where training runs."""

from __future__ import annotations

import math
import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator


class ModelSettings(BaseModel):
    """The network: a preset and switches for comparisons."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Literal["tiny", "base", "large"] = Field(
        "base",
        description="Size of the network: tiny for tests and CPUs, base with the paper's 55.6 GMac,"
        " or large.",
    )
    pyramid: bool = Field(
        True, description="Use pyramidal convolutions; false uses plain 3x3 convolutions."
    )
    attention: Literal["none", "single", "pyramid"] = Field(
        "pyramid",
        description="Take the attention's keys from three encoder layers (pyramid), from one"
        " (single), or use no attention (none).",
    )
    normalization: Literal["instance", "batch", "region", "dynamic"] = Field(
        "dynamic",
        description="Kind of normalization: dynamic is DPNet's, the others are for comparison.",
    )
    statistics: Literal["own", "known", "whole"] = Field(
        "known",
        description="Whose mean and variance dynamic normalization uses: those of the known region"
        " for the hole too (known), of the whole map (whole), or of each region (own, as before"
        " 0.3).",
    )
    mask: Literal["soft", "binary"] = Field(
        "soft", description="How each layer updates the mask: to values from 0 to 1, or to 0 or 1."
    )
    discriminator_sees_mask: bool = Field(
        True, description="Give the discriminator the mask as a fourth channel."
    )


class LossSettings(BaseModel):
    """Weights of the loss terms. The paper publishes none; these are our choice."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hole: float = Field(6.0, ge=0, le=1e4, description="Weight of the L1 loss in the hole.")
    valid: float = Field(1.0, ge=0, le=1e4, description="Weight of the L1 loss on known pixels.")
    adversarial: float = Field(
        0.1,
        ge=0,
        le=1e4,
        description="Weight of the adversarial loss; 0 trains without a discriminator.",
    )
    gan: Literal["nsgan", "hinge"] = Field("nsgan", description="Form of the adversarial loss.")
    perceptual: float = Field(
        0.1,
        ge=0,
        le=1e4,
        description="Weight of the distance between VGG features; needs vgg_weights.",
    )
    style: float = Field(
        250.0,
        ge=0,
        le=1e6,
        description="Weight of the distance between Gram matrices of VGG features; needs"
        " vgg_weights.",
    )
    total_variation: float = Field(
        0.0, ge=0, le=1e4, description="Weight of the smoothness loss in the hole."
    )
    vgg: Literal["vgg16", "vgg19"] = Field(
        "vgg19", description="Network that the weights in vgg_weights belong to."
    )
    vgg_weights: str | None = Field(
        None,
        description="File (.pth or .safetensors) with torchvision's VGG weights. Without it the"
        " perceptual and style losses are off.",
    )


class TrainSettings(BaseModel):
    """Length and course of training. All defaults are our choice."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: int = Field(
        200_000, ge=1, le=100_000_000, description="Number of optimiser steps in the whole run."
    )
    batch_size: int = Field(
        16, ge=1, le=65_536, description="Samples in one step, all workers together."
    )
    accumulate: int = Field(
        1,
        ge=1,
        le=1024,
        description="Number of parts in which each worker computes its share of a batch; more parts"
        " need less memory.",
    )
    activation_checkpointing: bool = Field(
        False,
        description="Keep less for the backward pass, and compute the residual blocks again there:"
        " less memory, but slower. The result is the same.",
    )
    learning_rate: float = Field(
        1e-4, gt=0, le=1, description="Peak learning rate of the generator."
    )
    discriminator_learning_rate: float = Field(
        1e-4, gt=0, le=1, description="Peak learning rate of the discriminator."
    )
    beta1: float = Field(
        0.0, ge=0, lt=1, description="First beta of the optimiser Adam; the second is 0.99."
    )
    warmup_steps: int = Field(
        1000,
        ge=0,
        description="Steps in which the learning rates rise from 0 to their peak; the adversarial"
        " loss rises over the same number of steps.",
    )
    finetune_share: float = Field(
        0.2,
        ge=0,
        le=1,
        description="Share of the steps, at the end, in which the learning rate falls (cosine) from"
        " half of the peak to final_rate. Before, it is constant.",
    )
    final_rate: float = Field(
        0.1, ge=0, le=0.5, description="Learning rate at the end, as a share of the peak."
    )
    adversarial_from: int = Field(
        0,
        ge=0,
        description="Step at which the discriminator starts to learn. From there the adversarial"
        " loss rises to its weight over warmup_steps.",
    )
    gradient_clip: float = Field(
        1.0, gt=0, le=1e6, description="Largest norm of a gradient; larger gradients are scaled."
    )
    ema_decay: float = Field(
        0.999,
        ge=0,
        lt=1,
        description="Decay of the averaged generator: the share of it that each step keeps.",
    )
    max_skipped: int = Field(
        0,
        ge=0,
        description="Number of steps with a loss or gradient that is not finite to skip before"
        " training stops.",
    )
    seed: int = Field(
        0, ge=0, lt=2**31, description="Seed of sample order, augmentation and initial weights."
    )
    init_from: str | None = Field(
        None,
        description="Generator to start from: pretrained (the weights in the package),"
        " models:/NAME@champion, models:/NAME/VERSION, the folder of a run, or the folder of an"
        " exported model. A training state in that folder"
        " (`dpnet export --training-state`) is continued too: discriminator and optimisers.",
    )
    validate_every: int = Field(2000, ge=1, description="Steps between validations.")
    validation_pairs: int = Field(
        240,
        ge=1,
        le=100_000,
        description="Number of fixed pairs of image and mask to validate on.",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="Number of validations without a better result after which training ends early;"
        " null: never.",
    )
    result: Literal["last", "best"] = Field(
        "last",
        description="Averaged generator to store as the result: the last one, or the one with the"
        " best validation.",
    )
    checkpoint_every: int = Field(1000, ge=1, description="Steps between checkpoints.")
    keep_checkpoints: int = Field(
        2, ge=1, le=1000, description="Number of newest checkpoints to keep."
    )
    keep_best: int = Field(
        1,
        ge=0,
        le=1000,
        description="Number of checkpoints with the best validation to keep as well.",
    )
    lanes: int = Field(
        64,
        ge=1,
        le=65_536,
        description="Number of shards to read at the same time, all workers together; at least one"
        " for each worker.",
    )
    on_bad_sample: Literal["error", "skip"] = Field(
        "error",
        description="Reaction to a shard that does not match its hash, or a sample that cannot be"
        " decoded: stop (error), or count it and use the next sample of the batch twice (skip).",
    )
    loader_threads: int = Field(
        0,
        ge=0,
        le=1024,
        description="Threads in each worker that decode samples; 0: the worker's share of the"
        " cores.",
    )
    cache: str | None = Field(
        None, description="Folder on each machine in which to keep shards from S3."
    )
    cache_gb: float = Field(50.0, gt=0, description="Largest size of the cache, in GB.")
    workers: int = Field(1, ge=1, le=4096, description="Number of Ray training workers.")
    min_workers: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Fewest workers to train with while more are not free; null: always all"
        " workers.",
    )
    max_failures: int = Field(
        3,
        ge=0,
        le=10_000,
        description="How many worker or machine failures to recover from automatically.",
    )
    gpus: bool = Field(False, description="Use one GPU for each worker.")
    compile: bool | None = Field(
        None,
        description="Compile the network with torch.compile; null: on a GPU, if a compiler works"
        " there.",
    )

    @property
    def constant_until(self) -> int:
        """Return the step at which fine-tuning begins. Until there, nothing depends on `steps`."""
        return math.floor(self.steps * (1 - self.finetune_share))


class LaunchSettings(BaseModel):
    """The place where training runs."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    launcher: Literal["local", "ray-job", "kuberay"] = Field(
        "local",
        description="Where training runs: with Ray on this machine (local), in a job on a Ray"
        " cluster (ray-job), or in a RayJob on Kubernetes (kuberay).",
    )
    address: str | None = Field(
        None,
        description="Address of the cluster's dashboard, such as http://head:8265, for ray-job; by"
        " default the value of RAY_API_SERVER_ADDRESS or RAY_ADDRESS. The token comes from"
        " RAY_AUTH_TOKEN or ~/.ray/auth_token.",
    )
    python: str = Field(
        "python",
        min_length=1,
        description="Python interpreter on the cluster's head, or in the image, that has dpnet"
        " installed.",
    )
    deadline_s: int = Field(
        1800,
        ge=1,
        le=604_800,
        description="Seconds without progress, for example while no workers are free, after which"
        " training is given up.",
    )
    image: str | None = Field(
        None,
        description="Container image with dpnet and Ray, for kuberay; null: the one in template."
        " Its version of dpnet must be that of the command.",
    )
    template: str | None = Field(
        None,
        description="YAML file with the RayJob to start from, for kuberay: resources, node"
        " selectors, tolerations, service account, volumes; null: the packaged rayjob.yaml.",
    )
    namespace: str | None = Field(
        None,
        description="Kubernetes namespace for kuberay; null: that of the context, or of the pod in"
        " which the command runs.",
    )
    context: str | None = Field(
        None,
        description="Context of the kubeconfig for kuberay; null: the current one, or the service"
        " account of the pod in which the command runs.",
    )
    secrets: tuple[str, ...] = Field(
        (),
        description="Names of Kubernetes Secrets whose keys become environment variables of the"
        " training pods, for kuberay, such as one with AWS_SECRET_ACCESS_KEY.",
    )
    queue: str | None = Field(
        None, description="Queue of Kueue in which a kuberay job waits for its turn; null: none."
    )
    pending_s: int = Field(
        1800,
        ge=1,
        le=2_592_000,
        description="Seconds that a kuberay job may wait for its pods or in its queue before it is"
        " given up.",
    )
    ttl_s: int = Field(
        0,
        ge=0,
        le=604_800,
        description="Seconds for which the pods of a failed kuberay job stay, so that they can be"
        " looked at.",
    )

    @field_validator("namespace")
    @classmethod
    def _is_namespace(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", value):
            raise ValueError("a name of small letters, digits and '-' such as dpnet")
        return value

    @field_validator("secrets")
    @classmethod
    def _are_secrets(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not all(re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", name) for name in value):
            raise ValueError("names of small letters, digits, '-' and '.' such as [dpnet-storage]")
        return value

    @field_validator("image")
    @classmethod
    def _is_image(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/:@-]*", value):
            raise ValueError("the name of an image such as registry.example.com/dpnet:0.2.0-cpu")
        return value
