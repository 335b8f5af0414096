"""Read what a plan needs to know: the dataset, the source, and the speed of earlier runs.

Nothing is written under the root. What is not known here comes from the layout of a published
dataset or from measured figures, and the plan says so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.manifest import StageRef, reference
from data_prep.core.paths import PHOTOS
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.store import Store
from data_prep.core.tar_format import padded
from data_prep.core.text import count_of
from data_prep.masks.shard_task import planned_sizes
from data_prep.masks.stage import find_masks
from data_prep.raw.sample_photos import write_sample_photos
from data_prep.shards.split_size import SplitSize, tar_bytes
from dpnet.loading.shard_files import find_shards
from dpnet.pipeline.chain import SAMPLE
from dpnet.pipeline.cost import finished_steps, known_speed
from dpnet.pipeline.finished import find_finished
from dpnet.pipeline.plan import Plan, make_plan
from dpnet.pipeline.plan_figures import (
    KEPT_BYTES,
    PIXEL_BYTES,
    PUBLISHED,
    SIDECAR,
    Speed,
    benchmark_speed,
)
from dpnet.pipeline.plan_parts import DataSize, Machines

if TYPE_CHECKING:
    from data_prep.images.settings import ImagesSettings
    from dpnet.pipeline.config import Config

MASKS_DRAWN = 48  # to estimate their size
SPLITS, MASK_SPLITS = ("train", "val", "test"), ("train", "eval")


@dataclass(frozen=True)
class Given:
    """The figures that the options of `dpnet plan` give; None where they give none.

    Attributes:
        images: number of photos of the source.
        workers: number of workers, each with a GPU.
        images_per_second: speed of one worker.
    """

    images: int | None = None
    workers: int | None = None
    images_per_second: float | None = None


def plan_config(
    config: Config, store: Store | None, given: Given, machines: Machines | None = None
) -> Plan:
    """Plan a config by its source, its root, and the options.

    Args:
        config: The config.
        store: The root; None if there is none.
        given: The options.
        machines: The options that describe machines; their workers and GPUs are replaced.

    Raises:
        ConfigError: The number of images is unknown, or options contradict each other.
    """
    notes: list[str] = []
    images, version = _images(config.images, store, given.images, notes)
    done = [] if store is None else find_finished(config, store, version)
    steps, masks = config.train.steps, None
    if store is not None and (made := find_masks(config.masks, store)) is not None:
        masks = _committed(store, made, MASK_SPLITS)
    if store is not None and len(done) > 1:
        steps -= finished_steps(config, store, done[0], done[1])
    plan = _plan(config, store, images, masks or _drawn(config), steps, notes, given, machines)
    return replace(plan, finished=tuple(ref.stage for ref in done))


def plan_here(
    config: Config, store: Store, images: StageRef | None = None, masks: StageRef | None = None
) -> Plan | None:
    """Plan the training of a flow run, from what its root holds. The source is not listed.

    Args:
        config: The config.
        store: The root.
        images: The image shards, if they are made. With both kinds, finished steps do not count.
        masks: The mask shards, if they are made.

    Returns:
        The plan, or None while the number of images is unknown.
    """
    notes: list[str] = []
    size = None if images is None else _committed(store, images, SPLITS)
    if size is None and (size := _newest(config.images, store) or _published(config.images)):
        notes.append("The source is not listed yet. Before training, the plan is made again.")
    if size is None:
        return None
    steps = config.train.steps
    if images is None or masks is None:
        mask_size = _drawn(config)
    else:
        mask_size = _committed(store, masks, MASK_SPLITS)
        steps -= finished_steps(config, store, images, masks)
    return _plan(config, store, size, mask_size, steps, notes, Given(), None)


def _plan(
    config: Config,
    store: Store | None,
    images: DataSize,
    masks: DataSize,
    steps: int,
    notes: list[str],
    given: Given,
    machines: Machines | None,
) -> Plan:
    """Choose the machines and the speed, and make the plan.

    Args:
        config: The config.
        store: The root; None if there is none.
        images: Size of the image shards.
        masks: Size of the mask shards.
        steps: Steps that are still to be made.
        notes: Sentences about what was assumed.
        given: The options.
        machines: The options that describe machines, or None.
    """
    gpus = config.train.gpus or given.workers is not None
    speed = _speed(config, store, gpus, given)
    if speed is None and not gpus and (other := _speed(config, store, True, given)):
        gpus, speed = True, other
        notes.append(
            "The config trains without GPUs (train.gpus), and no speed of its network is known"
            " there. The plan is for GPUs."
        )
    workers = given.workers or config.train.workers
    machines = replace(machines or Machines(1, gpus), workers=workers, gpus=gpus)
    return make_plan(config, images, masks, machines, speed, steps, notes)


def _speed(config: Config, store: Store | None, gpus: bool, given: Given) -> Speed | None:
    """Return the speed of one worker: given, of an earlier run, or of the benchmarks."""
    if given.images_per_second is not None:
        return Speed(given.images_per_second, 1, "as given (--images-per-second)")
    if store is not None and (known := known_speed(store, config, gpus)) is not None:
        each, workers, folder = known
        return Speed(each, workers, f"measured in {store.label}/{folder}")
    return benchmark_speed(config.model.preset, config.masks.size, gpus)


def _drawn(config: Config) -> DataSize:
    """Return the size of the mask shards before they are made."""
    sizes = planned_sizes(config.masks, MASKS_DRAWN)
    number = min(MASKS_DRAWN, config.masks.train)
    return DataSize(sizes, f"size estimated from {count_of(number, 'mask')}, drawn for this plan")


def _images(
    settings: ImagesSettings, store: Store | None, number: int | None, notes: list[str]
) -> tuple[DataSize, StageRef | None]:
    """Return the size of the image shards, and the version if it is built. Note assumptions.

    Args:
        settings: of the dataset.
        store: The root; None if there is none.
        number: The number of photos that was given, or None.
        notes: Sentences are appended.
    """
    found, version, reason = None, None, ""
    try:
        found, version = _surveyed(settings, store, notes)
    except PipelineError as error:
        reason = " ".join(str(error).split())
        found = _newest(settings, store) if store is not None else None
    if number is not None:
        return _given(settings, number, found), None
    if found is None:
        found = _published(settings)
        if found is None:
            raise ConfigError(
                f"the number of images is unknown: {reason} Or give --images N to plan without the"
                " source."
            )
    if reason:
        notes.append(f"The source cannot be listed: {reason}")
    return found, version


def _surveyed(
    settings: ImagesSettings, store: Store | None, notes: list[str]
) -> tuple[DataSize, StageRef | None]:
    """List the source and look at some photos. Raises PipelineError if it cannot be listed."""
    from data_prep.images.survey import survey

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dpnet-plan-")))
        if settings.source == SAMPLE:
            photos = folder / PHOTOS
            top = store.local_folder if store is not None else None
            if top is not None and (top / PHOTOS).is_dir():
                photos = top / PHOTOS
            else:
                write_sample_photos(photos)
            settings = settings.model_copy(update={"source": str(photos)})
        found = survey(settings, store or LocalStore(folder / "root"))
    if found.committed:
        size = DataSize(found.splits, "the committed version; nothing is new", True)
        return size, found.committed
    if found.failed:
        notes.append(
            f"{found.failed} of {found.looked_at} photos that were looked at cannot be used, and"
            " the estimate leaves out this share."
        )
    looked = count_of(found.looked_at, "photo")
    source = f"the source's listing; size estimated from {looked}, prepared for this plan"
    size = DataSize(found.splits, source, False, found.photos, found.photo_bytes, found.seconds)
    return size, None


def _newest(settings: ImagesSettings, store: Store) -> DataSize | None:
    """Return the size of the newest committed version with these settings, or None."""
    from data_prep.images.versions import versions

    requested = settings.request_settings()
    same = [each for each in versions(store, settings.name) if each.settings == requested]
    if not same:
        return None
    return _committed(store, reference(same[-1], 0.0, skipped=True), SPLITS)


def _committed(store: Store, ref: StageRef, splits: tuple[str, ...]) -> DataSize:
    """Return the size of committed shards, as their manifest has it."""
    sizes = {}
    for split in splits:
        shards = find_shards(store, ref, split)
        size = sum(shard.size for shard in shards.shards)
        sizes[split] = SplitSize(shards.samples, len(shards.shards), size)
    return DataSize(sizes, f"{store.label}/{ref.folder}", True)


def _published(settings: ImagesSettings) -> DataSize | None:
    """Return the size of a published dataset, or None if its layout is not one of them."""
    photos = PUBLISHED.get(settings.layout)
    if photos is None:
        return None
    counts = dict(photos)
    for split, share in (("val", settings.val), ("test", settings.test)):
        if split not in counts:  # drawn from train
            counts[split] = round(photos["train"] * share)
            counts["train"] -= counts[split]
    return _assumed(settings, counts, f"assumed: the published size of {settings.layout}")


def _given(settings: ImagesSettings, number: int, found: DataSize | None) -> DataSize:
    """Return the size of a given number of photos, with the shares and sizes that are known."""
    if found is not None and found.samples:
        scale = number / (found.photos or found.samples)
        sizes = {
            split: SplitSize(
                max(1, round(size.samples * scale)),
                max(1, -(-round(size.shards * scale) // 1)),
                round(size.bytes * scale),
            )
            for split, size in found.splits.items()
        }
        source = f"--images {number:,}, in the proportions of: {found.source}"
        return DataSize(sizes, source, False, number, 0, found.prepare_s)
    counts = {
        "val": round(number * settings.val),
        "test": round(number * settings.test),
    }
    counts = {"train": number - sum(counts.values()), **counts}
    return _assumed(settings, counts, f"--images {number:,}")


def _assumed(settings: ImagesSettings, photos: Mapping[str, int], source: str) -> DataSize:
    """Return the size of a dataset of which only the number of photos is known.

    Args:
        settings: of the dataset.
        photos: number of photos of each split.
        source: where the numbers come from, for people.
    """
    tiles = settings.max_tiles if settings.mode == "tiles" else 1
    if settings.mode == "keep":
        each = KEPT_BYTES
    else:
        each = round(PIXEL_BYTES[settings.format] * settings.size**2)
    sizes = {}
    for split in SPLITS:
        shards = -(-photos[split] // settings.shard_items)
        samples = photos[split] * tiles
        size = tar_bytes(samples * (padded(each) + SIDECAR), shards)
        sizes[split] = SplitSize(samples, shards, size)
    kind = "an unchanged file" if settings.mode == "keep" else f"a {settings.format} sample"
    more = f", and {tiles} tiles of each photo" if tiles > 1 else ""
    return DataSize(
        sizes, f"{source}; {each / 1000:.0f} KB for {kind}{more}", False, sum(photos.values())
    )
