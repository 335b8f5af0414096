"""Find the finished stages of a config. Nothing is written, downloaded or built."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_prep.core.manifest import StageRef
from data_prep.core.stage import find_committed
from data_prep.core.storage.store import Store
from data_prep.masks.stage import find_masks
from dpnet.evaluation.stage import find_evaluation
from dpnet.registry.stage import find_registration
from dpnet.training.job import plan_training

if TYPE_CHECKING:
    from dpnet.pipeline.config import Config

STAGES = 5  # of the whole pipeline


def find_finished(config: Config, store: Store, images: StageRef | None) -> list[StageRef]:
    """Return the finished stages of a config in their order, up to the first unfinished one.

    Args:
        config: Settings of all stages.
        store: The root.
        images: The version of the photos that are there now; None if it is not built.

    Raises:
        PipelineError: A manifest is damaged, or an option names what does not exist.
    """
    if images is None:
        return []
    if (masks := find_masks(config.masks, store)) is None:
        return [images]
    request, _ = plan_training(config.training(images, masks), store)
    if (run := find_committed(store, request)) is None:
        return [images, masks]
    found = find_evaluation(config.evaluate, images, masks, run, store)
    if found is None:
        return [images, masks, run]
    registered = find_registration(config.registry, run, found, store)
    return [images, masks, run, found, *([registered] if registered else [])]
