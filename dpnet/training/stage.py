"""The train stage: image shards and mask shards to a generator's weights.

This module is cheap to import. It imports torch and Ray only if there is something to train.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from data_prep.core.manifest import StageRef
from data_prep.core.stage import Produced, Work, run_stage
from data_prep.core.storage.store import Store
from data_prep.shards.shards import write_file
from dpnet.training.job import (
    LEASE_INTERVAL_S,
    TrainJob,
    TrainRequest,
    check_settings,
    plan_training,
    vgg_command,
)
from dpnet.training.settings import LaunchSettings

log = logging.getLogger(__name__)


def train(
    training: TrainRequest, launch: LaunchSettings, tracking_uri: str | None, store: Store
) -> StageRef:
    """Train, or resume training, and commit the averaged generator's weights.

    Args:
        training: What to train, on which data.
        launch: Where training runs.
        tracking_uri: MLflow server or database that receives the progress; None for no tracking.
        store: The root.
    """
    check_settings(training.settings)
    request, job = plan_training(training, store)
    return run_stage(
        store,
        request,
        lambda work: _build(job, launch, tracking_uri, work),
        interval=LEASE_INTERVAL_S,
    )


def _build(job: TrainJob, launch: LaunchSettings, tracking_uri: str | None, work: Work) -> Produced:
    """Train to the end and write the result. The arguments are those of `train`."""
    import yaml

    from dpnet.loading.shard_files import check_enough, find_shards
    from dpnet.training.extend import find_start
    from dpnet.training.ray.launch import run_training
    from dpnet.training.result import collect

    if job.losses.vgg_weights is None and (job.losses.perceptual or job.losses.style):
        log.info(
            "train: the perceptual and style losses are off, because they need VGG's weights. Make"
            " a file with `%s` (pip install torchvision) and name it in losses.vgg_weights.",
            vgg_command(job.losses.vgg, f"{job.losses.vgg}.pth"),
        )
    if job.settings.steps <= job.settings.warmup_steps:
        log.warning(
            "train: train.warmup_steps is %d and train.steps is %d, so the learning rate does not"
            " reach its peak: lower train.warmup_steps.",
            job.settings.warmup_steps,
            job.settings.steps,
        )
    for dataset in (job.images, job.masks):  # workers check this too, but they start slowly
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
    resumed_from = run_training(job, launch, tracking_uri, work)
    files, summary = collect(job, work)
    return Produced([record, *files], {**summary, "resumed_from": resumed_from})
