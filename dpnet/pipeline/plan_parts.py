"""The parts of a plan: sizes of data, machines, and requests to S3."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_prep.shards.split_size import SplitSize
from dpnet.pipeline.plan_figures import STATE_BYTES

if TYPE_CHECKING:
    from dpnet.pipeline.config import Config

PART = 16 << 20  # bytes; larger objects are sent in parts (`data_prep/core/storage/s3.py`)
LIST_PAGE = 1000  # keys in one answer of S3 to a listing
STATUS_S, LOG_STEPS = 5.0, 25  # between two writes of a run's status on S3; steps of a log record
TABLES = 12  # objects of a stage besides its shards: tables, lists, config, lease, manifest


@dataclass(frozen=True)
class DataSize:
    """The size of image or mask shards.

    Attributes:
        splits: size of each split.
        source: where the figures come from, for people.
        is_committed: whether the shards exist.
        photos: number of photos that are still to be read; 0 for masks.
        photo_bytes: their bytes; 0 if unknown.
        prepare_s: time of one photo on one core, in seconds; 0 if it was not measured here.
    """

    splits: Mapping[str, SplitSize]
    source: str
    is_committed: bool = False
    photos: int = 0
    photo_bytes: int = 0
    prepare_s: float = 0.0

    @property
    def samples(self) -> int:
        """Return the samples of all splits."""
        return sum(each.samples for each in self.splits.values())

    @property
    def shards(self) -> int:
        """Return the shards of all splits."""
        return sum(each.shards for each in self.splits.values())

    @property
    def bytes(self) -> int:
        """Return the bytes of all tars."""
        return sum(each.bytes for each in self.splits.values())


@dataclass(frozen=True)
class Machines:
    """The machines that train, as the options of `dpnet plan` describe them.

    Attributes:
        workers: number of training workers.
        gpus: whether each has a GPU.
        cores: cores that each GPU has for decoding.
        storage_mb: MB a second that the storage gives to all workers together.
        efficiency: speed of each of many workers, as a share of that in the measured run.
        restart_s: seconds between the loss of a machine and the next step; None for the measured
            time.
    """

    workers: int
    gpus: bool
    cores: float = 8.0
    storage_mb: float = 500.0
    efficiency: float = 0.9
    restart_s: float | None = None


@dataclass(frozen=True)
class Requests:
    """Requests to S3, if the root is there (and, for photos, the source)."""

    reads: int
    writes: int

    def __add__(self, other: Requests) -> Requests:
        return Requests(self.reads + other.reads, self.writes + other.writes)


def puts(size: float) -> int:
    """Return the requests that write an object of `size` bytes."""
    return 1 if size <= PART else math.ceil(size / PART) + 2  # the parts, their start and end


def image_requests(images: DataSize, *, from_s3: bool) -> Requests:
    """Return the requests that make image shards. Deleting is free.

    Each shard has a tar, an index and a worker's record, which is looked for first and deleted at
    the end. A test counts the requests of a real build, which also finds out which conditional
    writes the server knows.

    Args:
        images: The shards.
        from_s3: Whether the photos are on S3 too.
    """
    if images.is_committed:
        return Requests(5, 0)
    tar = images.bytes / max(images.shards, 1)
    listing = images.photos + math.ceil(images.photos / LIST_PAGE) if from_s3 else 0
    return Requests(listing + images.shards + 12, images.shards * (puts(tar) + 2) + 18)


def mask_requests(masks: DataSize) -> Requests:
    """Return the requests that make mask shards: a tar and an index each."""
    if masks.is_committed:
        return Requests(5, 0)
    tar = masks.bytes / max(masks.shards, 1)
    return Requests(masks.shards + 3, masks.shards * (puts(tar) + 1) + 6)


def training_requests(
    config: Config,
    images: DataSize,
    masks: DataSize,
    machines: Machines,
    steps: int,
    epochs: float,
    hours: float,
) -> Requests:
    """Return the requests of training.

    A shard is read whole, with its index, once in each epoch. A worker with a cache fetches the tar
    once. Validation reads an image and a mask for each pair. Status and log are written at most
    every five seconds.
    """
    s, reads = config.train, 0.0
    for data in (images, masks):
        split = data.splits["train"]
        passes = steps * s.batch_size / max(split.samples, 1)
        tars = min(passes, machines.workers) if s.cache is not None else passes
        reads += split.shards * (passes + tars)
    reads += (steps / s.validate_every + 1) * 2 * s.validation_pairs if steps else 0
    status = hours * 3600 / STATUS_S
    writes = status + min(status, steps / LOG_STEPS)
    writes += steps / s.checkpoint_every * (puts(STATE_BYTES[config.model.preset]) + 2)
    return Requests(math.ceil(reads), math.ceil(writes) + (TABLES if steps else 0))
