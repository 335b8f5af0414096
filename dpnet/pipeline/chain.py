"""The five stages in their order, each with its inputs from the stages before it.

`call` runs one stage; the flow passes a `call` that runs it as a Prefect task. A committed stage is
skipped, so the chain builds only missing stages.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.manifest import StageRef
from data_prep.core.paths import MANIFEST, PHOTOS, RUNS, cache_folder
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from data_prep.images.stage import prepare_images
from data_prep.masks.stage import prepare_masks
from data_prep.raw.sample_photos import write_sample_photos
from dpnet.evaluation.peers import check_peers, check_results
from dpnet.evaluation.stage import evaluate
from dpnet.evaluation.weights import find_weights
from dpnet.evaluation.workers import Place
from dpnet.pipeline.config import Config, resolve_root
from dpnet.registry.stage import check_tracking_uri, register, tracking_uri
from dpnet.training.job import check_network, check_settings, check_vgg_file, find_initial
from dpnet.training.ray.jobs_client import cluster_address
from dpnet.training.ray.kube_client import check_cluster, read_template
from dpnet.training.ray.rayjob import check_rayjob, check_shared_root
from dpnet.training.stage import train

log = logging.getLogger(__name__)

SAMPLE = "sample-photographs"  # a value of images.source: the photos in scikit-image

StageName = Literal["images", "masks", "train", "evaluate", "register"]
Call = Callable[..., StageRef]


def call_plainly(title: str, stage: Callable[..., StageRef], *arguments: Any) -> StageRef:
    """Run a stage in this process, without Prefect."""
    return stage(*arguments)


def run_chain(
    config: Config,
    store: Store,
    wanted: StageName = "register",
    call: Call = call_plainly,
    place: Place | None = None,
) -> list[StageRef]:
    """Run `wanted` and the stages before it. Return their references in that order.

    Args:
        config: Settings of all stages.
        store: The root.
        wanted: The last stage to run.
        call: Runs one stage: `call(title, stage, *arguments)`.
        place: Where the evaluation measures; by default on this machine.
    """
    refs: list[StageRef] = []

    def run(title: str, stage: Callable[..., StageRef], *arguments: Any) -> StageRef:
        ref = call(title, stage, *arguments, store)
        refs.append(ref)
        done = "done before" if ref.skipped else f"done in {ref.seconds:.1f} s"
        log.info("%s: %s", title, done)
        return ref

    if wanted == "register":
        tracking_uri(config.registry, store)  # to fail now, not after hours of training
    if wanted != "masks":
        images = run("prepare images", prepare_images, with_photographs(config, store).images)
    if wanted != "images":
        masks = run("prepare masks", prepare_masks, config.masks)
    if wanted in ("images", "masks"):
        return refs
    if wanted != "train":
        check_results(config.evaluate, images, masks, store)
    training = config.training(images, masks)
    trained = run("train", train, training, config.launch, _tracking(config, store))
    if wanted == "train":
        return refs
    evaluating = partial(evaluate, place=place) if place else evaluate
    evaluation = run("evaluate", evaluating, config.evaluate, images, masks, trained)
    if wanted == "register":
        registering = partial(register, measure=config.evaluate)
        run("register", registering, config.registry, trained, evaluation)
    return refs


def _tracking(config: Config, store: Store) -> str | None:
    """Return the MLflow that training reports to, or None without one."""
    try:
        return tracking_uri(config.registry, store)
    except ConfigError:  # the stage `register` needs MLflow, training does not
        return None


def check_config(config: Config, wanted: StageName = "register", root: str | None = None) -> None:
    """Check what the stages up to `wanted` need, before hours are spent on the first of them.

    Raises PipelineError if a file, a folder or a model is missing, if an address has a wrong form,
    or if settings contradict each other.

    Args:
        config: Settings of all stages.
        wanted: The last stage that will run.
        root: The root that was given, if any; see `resolve_root`.
    """
    from data_prep.raw.overlap import check_apart
    from data_prep.raw.source import check_source

    if wanted not in ("images", "masks"):
        check_settings(config.train)
        check_vgg_file(config.losses)
        check_tracking_uri(config.registry)
        if config.launch.launcher == "ray-job":
            cluster_address(config.launch)
        if config.launch.launcher == "kuberay":
            _check_kuberay(config, resolve_root(root, config))
        if config.train.init_from is not None:
            store = open_store(resolve_root(root, config))
            check_network(find_initial(config.train.init_from, store), config.model)
    if wanted in ("evaluate", "register"):
        find_weights(config.evaluate)
        if config.evaluate.compare:
            check_peers(config.evaluate, open_store(resolve_root(root, config)))
    if wanted == "register":
        tracking_uri(config.registry, open_store(resolve_root(root, config)))
    if wanted != "masks" and config.images.source != SAMPLE:
        check_source(config.images.source, config.images.layout)
        check_apart(config.images.source, resolve_root(root, config))
    if wanted != "images" and config.masks.file_splits and config.masks.external is not None:
        check_source(config.masks.external, "files", "masks.external")
        check_apart(config.masks.external, resolve_root(root, config), "masks.external")


def _check_kuberay(config: Config, root: str) -> None:
    """Check that a training can be started on Kubernetes.

    If the root has a finished training of the same name, perhaps none has to be started. Then a
    cluster that refuses is only a warning.
    """
    template = read_template(config.launch.template)
    job = check_rayjob(template, config.launch, config.train)
    check_shared_root(template, root)
    try:
        check_cluster(config.launch, job)
    except PipelineError as error:
        runs = f"{RUNS}/{config.name}-"
        found = (each.key for each in open_store(root).list(RUNS))
        if not any(key.startswith(runs) and key.endswith(f"/{MANIFEST}") for key in found):
            raise
        log.warning("%s", error)


def with_photographs(config: Config, store: Store) -> Config:
    """Return `config` with a folder of photos, after writing the sample photos if it names them."""
    if config.images.source != SAMPLE:
        return config
    top = store.local_folder or cache_folder()
    write_sample_photos(top / PHOTOS)
    images = config.images.model_copy(update={"source": str(top / PHOTOS)})
    return config.model_copy(update={"images": images})
