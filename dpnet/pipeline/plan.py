"""The plan of a config: how much data, time and money it takes, before anything starts.

Everything here is a pure function of the config and of facts that `plan_facts.py` reads.
`plan_text.py` shows the result. Where nothing is known, a figure that was measured elsewhere is
used, and the plan says where and when.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from data_prep.core.errors import ConfigError
from data_prep.core.text import count_of
from dpnet.pipeline.cost import Cost
from dpnet.pipeline.plan_figures import (
    DECODE_MS,
    DECODE_SOURCE,
    MEASURED_SIDE,
    PREPARE_MS,
    PREPARE_SOURCE,
    RESTART_CPU_S,
    RESTART_GPU_S,
    RESTART_SOURCES,
    STATE_BYTES,
    Speed,
)
from dpnet.pipeline.plan_parts import (
    TABLES,
    DataSize,
    Machines,
    Requests,
    image_requests,
    mask_requests,
    training_requests,
)

if TYPE_CHECKING:
    from dpnet.pipeline.config import Config

TABLE_GPUS = (1, 2, 4, 8, 16, 32, 64)
TABLE_IMAGES = (10**5, 10**6, 10**7, 10**8)


@dataclass(frozen=True)
class Rates:
    """Images per second that each part can give to all workers; 0 if the part does not matter.

    Attributes:
        compute: of the workers' GPUs, or of workers without one.
        decode: of the cores that decode for GPUs.
        storage: of the storage.
        gpus: whether the workers have GPUs.
    """

    compute: float
    decode: float
    storage: float
    gpus: bool

    @property
    def limits(self) -> dict[str, float]:
        """Return the rates of the parts that matter."""
        compute = "GPU" if self.gpus else "workers"
        named = {compute: self.compute, "CPU decode": self.decode, "storage": self.storage}
        return {name: rate for name, rate in named.items() if rate}

    @property
    def bottleneck(self) -> str:
        """Return the name of the slowest part."""
        return min(self.limits, key=lambda name: self.limits[name])

    @property
    def images_per_second(self) -> float:
        """Return the rate of the slowest part."""
        return min(self.limits.values())


@dataclass(frozen=True)
class Interruption:
    """The cost of the loss of one machine without a warning.

    Attributes:
        steps: steps that are made twice, on average.
        most_steps: steps that are made twice at most.
        seconds: time until training is where it was, on average, without the wait for a machine.
        cost: price of this time on all workers, which wait for each other.
    """

    steps: float
    most_steps: int
    seconds: float
    cost: Cost


@dataclass(frozen=True)
class Row:
    """One row of the table: a number of images, and the hours of training by number of GPUs."""

    images: int
    shards: int
    bytes: int
    steps: int
    prepare_core_hours: float
    hours: Mapping[int, float]
    bottlenecks: Mapping[int, str]


@dataclass(frozen=True)
class Plan:
    """Data, time and money that a config takes. Times are in hours; None where no speed is known.

    Attributes:
        steps: optimiser steps that are still to be made.
        epochs: how often training reads each training image.
        cores_per_worker: cores that one GPU needs for decoding.
        requests: of each stage, by its name.
        currency: of all prices.
        request_money: price of all requests.
        storage_money: price of storing shards and checkpoints for a month.
        assumptions: sentences about figures that were not measured for this config.
        finished: names of the finished stages.
    """

    name: str
    images: DataSize
    masks: DataSize
    machines: Machines
    steps: int
    batch: int
    epochs: float
    prepare_core_hours: float
    speed: Speed | None
    rates: Rates | None
    hours: float | None
    cost: Cost | None
    cores_per_worker: float
    interruption: Interruption | None
    requests: Mapping[str, Requests]
    currency: str
    request_money: float
    storage_money: float
    table: Sequence[Row]
    assumptions: Sequence[str] = field(default_factory=list)
    finished: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON values."""
        values = asdict(self)
        for key, data in (("images", self.images), ("masks", self.masks)):
            values[key] |= {"samples": data.samples, "shards": data.shards, "bytes": data.bytes}
        values["cost"] = None if self.cost is None else _cost_json(self.cost)
        if self.rates is not None:
            values["rates"] = {
                **self.rates.limits,
                "bottleneck": self.rates.bottleneck,
                "images_per_second": self.rates.images_per_second,
            }
        if self.interruption is not None:
            values["interruption"]["cost"] = _cost_json(self.interruption.cost)
        return values


def _cost_json(cost: Cost) -> dict[str, float]:
    hours = {"gpu_hours": cost.gpu_hours, "cpu_hours": cost.cpu_hours}
    return {**hours, "money": cost.money}


def make_plan(
    config: Config,
    images: DataSize,
    masks: DataSize,
    machines: Machines,
    speed: Speed | None,
    steps: int,
    notes: Sequence[str] = (),
) -> Plan:
    """Plan a config.

    Args:
        config: The config.
        images: Size of its image shards.
        masks: Size of its mask shards.
        machines: The machines that train.
        speed: Speed of one worker; None if it is unknown.
        steps: Steps that are still to be made, 0 to `config.train.steps`.
        notes: Sentences about what was assumed for `images` and `masks`.

    Raises:
        ConfigError: The numbers contradict each other.
    """
    batch, train = config.train.batch_size, images.splits["train"].samples
    if machines.workers > batch:
        raise ConfigError(
            f"the plan has {machines.workers} workers and train.batch_size is {batch}, but each"
            " worker needs at least one sample: raise train.batch_size or plan with fewer GPUs."
        )
    if train < batch:
        raise ConfigError(
            f"there are {train} images to train on, fewer than a batch of {batch}: plan with more"
            " --images, or lower train.batch_size."
        )
    epochs = steps * batch / train
    rates = hours = cost = lost = None
    if speed is not None:
        rates = rates_of(config, images, masks, machines, speed)
        hours = steps * batch / rates.images_per_second / 3600
        cost = _cost(config, hours, machines)
        lost = _interruption(config, machines, rates)
    pairs = masks.splits["eval"].samples
    requests = {
        "images": image_requests(images, from_s3=config.images.source.startswith("s3://")),
        "masks": mask_requests(masks),
        "train": training_requests(config, images, masks, machines, steps, epochs, hours or 0.0),
        "evaluate": Requests(2 * min(config.evaluate.max_pairs, pairs), TABLES),
    }
    total = sum(requests.values(), Requests(0, 0))
    prices = config.cost
    stored = images.bytes + masks.bytes + _kept_checkpoints(config)
    return Plan(
        name=config.name,
        images=images,
        masks=masks,
        machines=machines,
        steps=steps,
        batch=batch,
        epochs=epochs,
        prepare_core_hours=images.photos * prepare_seconds(images) / 3600,
        speed=speed,
        rates=rates,
        hours=hours,
        cost=cost,
        cores_per_worker=cores_for(config, speed),
        interruption=lost,
        requests=requests,
        currency=prices.currency,
        request_money=total.reads / 1000 * prices.s3_reads_1000
        + total.writes / 1000 * prices.s3_writes_1000,
        storage_money=stored / 1e9 * prices.storage_gb_month,
        table=_table(config, images, masks, machines, speed),
        assumptions=[*notes, *_assumptions(images, machines, speed, batch)],
    )


def decode_ms(config: Config) -> float:
    """Return the processor time of decoding one image with its mask, in milliseconds."""
    return DECODE_MS * (config.masks.size / MEASURED_SIDE) ** 2


def prepare_seconds(images: DataSize) -> float:
    """Return the time of preparing one photo on one core, in seconds."""
    return images.prepare_s or PREPARE_MS / 1000


def cores_for(config: Config, speed: Speed | None) -> float:
    """Return how many cores one worker needs to decode what its GPU trains on."""
    return 0.0 if speed is None else speed.images_per_second * decode_ms(config) / 1000


def rates_of(
    config: Config, images: DataSize, masks: DataSize, machines: Machines, speed: Speed
) -> Rates:
    """Return how fast each part of training can be.

    Workers without a GPU decode on the cores that they train on, and their measured speed includes
    it. Storage does not matter where each machine keeps all shards in its cache.
    """
    each = speed.images_per_second
    if machines.workers > speed.workers:
        each *= machines.efficiency
    train, mask = images.splits["train"], masks.splits["train"]
    pair = train.bytes / train.samples + mask.bytes / max(mask.samples, 1)
    cached = config.train.cache is not None and train.bytes <= config.train.cache_gb * 1e9
    decode = machines.cores * machines.workers / decode_ms(config) * 1000
    return Rates(
        compute=each * machines.workers,
        decode=decode if machines.gpus else 0.0,
        storage=0.0 if cached else machines.storage_mb * 1e6 / pair,
        gpus=machines.gpus,
    )


def _cost(config: Config, hours: float, machines: Machines) -> Cost:
    worker_hours = hours * machines.workers
    pair = (worker_hours, 0.0) if machines.gpus else (0.0, worker_hours)
    return Cost(*pair, config.cost)


def _interruption(config: Config, machines: Machines, rates: Rates) -> Interruption:
    """Return the cost of losing a machine, at a moment that is as likely as any other."""
    most = min(config.train.checkpoint_every, config.train.steps)
    restart = machines.restart_s
    if restart is None:
        restart = RESTART_GPU_S if machines.gpus else RESTART_CPU_S
    seconds = most / 2 * config.train.batch_size / rates.images_per_second + restart
    return Interruption(most / 2, most, seconds, _cost(config, seconds / 3600, machines))


def _kept_checkpoints(config: Config) -> int:
    kept = config.train.keep_checkpoints + config.train.keep_best + 1  # one before fine-tuning
    made = math.ceil(config.train.steps / config.train.checkpoint_every)
    return min(kept, made) * STATE_BYTES[config.model.preset]


def _table(
    config: Config, images: DataSize, masks: DataSize, machines: Machines, speed: Speed | None
) -> list[Row]:
    """Return the hours of training for other numbers of images and GPUs.

    Each image is trained on as often as in this config, and each GPU has the same samples a step,
    so with more GPUs there are fewer steps.
    """
    if speed is None:
        return []
    train = images.splits["train"]
    epochs = config.train.steps * config.train.batch_size / train.samples
    uncached = config.model_copy(update={"train": config.train.model_copy(update={"cache": None})})
    photos = images.photos / images.samples if images.photos else 1.0  # for each image
    found = []
    for number in TABLE_IMAGES:
        hours, slowest = {}, {}
        for gpus in TABLE_GPUS:
            many = replace(machines, workers=gpus)
            rates = rates_of(uncached, images, masks, many, speed)
            hours[gpus] = number * epochs / rates.images_per_second / 3600
            slowest[gpus] = rates.bottleneck
        size = images.bytes / images.samples * number
        shards = math.ceil(number * images.shards / images.samples)
        steps = math.ceil(number * epochs / config.train.batch_size)
        prepare = number * photos * prepare_seconds(images) / 3600
        found.append(Row(number, shards, round(size), steps, prepare, hours, slowest))
    return found


def _assumptions(
    images: DataSize, machines: Machines, speed: Speed | None, batch: int
) -> list[str]:
    """Return sentences about the figures that are not this config's own.

    Args:
        images: The image shards.
        machines: The machines that train.
        speed: Speed of one worker; None if it is unknown.
        batch: Samples in one step, all workers together.
    """
    said = []
    if speed is None:
        said.append("The speed of training is unknown: give --images-per-second.")
    else:
        each = f"{speed.images_per_second:.1f} images/s for each worker"
        said.append(f"Speed of training: {each}, {speed.source}.")
        if machines.workers > speed.workers or machines.gpus:
            said.append(
                f"With more than {count_of(speed.workers, 'worker')} each has"
                f" {machines.efficiency:.0%} of that speed: assumed, not measured (--efficiency)."
            )
        own = batch / machines.workers
        if own < speed.batch:
            said.append(
                f"That was with {speed.batch} samples in a step of each worker. Here each has"
                f" {own:g}, and small steps are slower: raise train.batch_size, or measure."
            )
    if not images.prepare_s and images.photos:
        said.append(f"Preparing: {PREPARE_SOURCE}.")
    if machines.gpus:
        said.append(f"Decoding: {DECODE_SOURCE}; each GPU has {machines.cores:g} cores (--cores).")
    said.append(
        f"Storage gives {machines.storage_mb:g} MB/s to all workers together: assumed"
        " (--storage-mb)."
    )
    restart = machines.restart_s
    why = RESTART_SOURCES[machines.gpus] if restart is None else f"{restart:g} s as given"
    said.append(f"Restart after a loss: {why}, and the time until another machine is there.")
    return said
