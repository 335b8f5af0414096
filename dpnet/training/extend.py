"""Extend a run: a request for more steps starts from a checkpoint of the shorter run.

The number of steps changes the learning rate only after fine-tuning begins. Until then, the
checkpoints of both runs are the same, so extending one gives the same weights as training from the
start. For this, every run keeps its checkpoint at the start of fine-tuning.
"""

from __future__ import annotations

import logging

from data_prep.core.errors import PipelineError, StorageError
from data_prep.core.paths import RUNS
from data_prep.core.storage.store import Store
from dpnet.training.checkpoints import Mark, differences, marks
from dpnet.training.job import TrainJob

log = logging.getLogger(__name__)

_STEPS = "train.steps "


def first_step(store: Store, job: TrainJob) -> int:
    """Return the step from which training would continue now."""
    own = marks(store, job.folder)
    if own:
        return own[0].step
    best = _best(job, _others(store, job))
    return best.step if best else 0


def find_start(store: Store, job: TrainJob) -> str | None:
    """Return the key of another run's checkpoint to start from.

    Returns None if this run has a checkpoint of its own, or if no other run fits. If a run differs
    only in the number of steps, the log says what happens.
    """
    if marks(store, job.folder):
        return None
    others = _others(store, job)
    if not others:
        return None
    best = _best(job, others)
    longest = max(mark.asked["train"]["steps"] for mark in others)
    if best:
        log.info(
            "train: extends the run of %d steps in %s/%s from step %d; up to there both are the"
            " same",
            best.asked["train"]["steps"],
            store.label,
            best.folder.rpartition("/")[0],
            best.step,
        )
        return best.folder
    log.info(
        "train: a run with the same settings and %d steps exists, but it has no checkpoint from"
        " before step %d, where fine-tuning makes the two differ: training starts from step 0",
        longest,
        min(_common(mark, job) for mark in others) + 1,
    )
    return None


def _others(store: Store, job: TrainJob) -> list[Mark]:
    """Return the checkpoints of runs that differ only in the number of steps."""
    name = job.folder.rsplit("-", 1)[0]
    others: list[Mark] = []
    for run in store.folders(RUNS):
        if run.rsplit("-", 1)[0] == name and run != job.folder:
            try:
                found = marks(store, run)
            except StorageError:
                raise
            except PipelineError as error:  # this run needs no other one
                log.warning("train: another run cannot be extended: %s", error)
                continue
            others += [mark for mark in found if _only_steps_differ(mark, job)]
    return others


def _best(job: TrainJob, others: list[Mark]) -> Mark | None:
    """Return the last of the checkpoints that training may start from."""
    fitting = [mark for mark in others if mark.step <= _common(mark, job)]
    return max(fitting, key=lambda mark: mark.step, default=None)


def _only_steps_differ(mark: Mark, job: TrainJob) -> bool:
    differ = differences(mark.asked, job.asked)
    return bool(differ) and all(each.startswith(_STEPS) for each in differ)


def _common(mark: Mark, job: TrainJob) -> int:
    """Return the last step at which both runs are the same."""
    s = job.settings
    other = s.model_copy(update={"steps": mark.asked["train"]["steps"]})
    common = min(s.constant_until, other.constant_until)
    # A run also validates after its last step. A longer run may not validate at that step.
    extra = min(s.steps, other.steps)
    return common - 1 if common == extra and extra % s.validate_every else common
