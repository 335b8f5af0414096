"""A run that is asked for more steps goes on from a checkpoint of the shorter one.

The learning rate depends on the number of steps from where fine-tuning begins, nothing does before
that. So a checkpoint up to there is the same in both runs, and going on from it gives the same
weights as training from the start. Every run keeps the checkpoint at that point for this.
"""

from __future__ import annotations

from data_prep.core.paths import RUNS
from data_prep.core.progress import say
from data_prep.core.storage.store import Store
from dpnet.training.checkpoints import Mark, differences, marks
from dpnet.training.job import TrainJob

_STEPS = "train.steps "


def first_step(store: Store, job: TrainJob) -> int:
    """The step that training would go on from now."""
    own = marks(store, job.folder)
    if own:
        return own[0].step
    best = _best(job, _others(store, job))
    return best.step if best else 0


def find_start(store: Store, job: TrainJob) -> str | None:
    """Key of the other run's checkpoint to begin with; None where this run has one, or none fits.

    Says what it does where there is a run that differs in the number of steps alone.
    """
    if marks(store, job.folder):
        return None
    others = _others(store, job)
    if not others:
        return None
    best = _best(job, others)
    longest = max(mark.asked["train"]["steps"] for mark in others)
    if best:
        say(
            f"train: extends the run of {best.asked['train']['steps']} steps in"
            f" {store.uri}/{best.folder.rpartition('/')[0]} from step {best.step}, up to which both"
            " are the same"
        )
        return best.folder
    say(
        f"train: there is a run with the same settings and {longest} steps, but no checkpoint of it"
        f" from before step {min(_common(mark, job) for mark in others) + 1}, where fine-tuning"
        " makes the two differ: training starts afresh"
    )
    return None


def _others(store: Store, job: TrainJob) -> list[Mark]:
    """The checkpoints of runs that differ in the number of steps alone."""
    name = job.folder.rsplit("-", 1)[0]
    others: list[Mark] = []
    for run in store.folders(RUNS):
        if run.rsplit("-", 1)[0] == name and run != job.folder:
            others += [mark for mark in marks(store, run) if _only_steps_differ(mark, job)]
    return others


def _best(job: TrainJob, others: list[Mark]) -> Mark | None:
    """The last of the checkpoints that training may begin with."""
    fitting = [mark for mark in others if mark.step <= _common(mark, job)]
    return max(fitting, key=lambda mark: mark.step, default=None)


def _only_steps_differ(mark: Mark, job: TrainJob) -> bool:
    differ = differences(mark.asked, job.asked)
    return bool(differ) and all(each.startswith(_STEPS) for each in differ)


def _common(mark: Mark, job: TrainJob) -> int:
    """The last step up to which both runs are the same."""
    s = job.settings
    other = s.model_copy(update={"steps": mark.asked["train"]["steps"]})
    common = min(s.constant_until, other.constant_until)
    # A run validates after its last step too, which a longer one need not do there.
    extra = min(s.steps, other.steps)
    return common - 1 if common == extra and extra % s.validate_every else common
