"""Items that cannot be used: the number that is accepted, the list of them, the messages."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

from data_prep.core.errors import PipelineError
from data_prep.core.stage import Work
from data_prep.core.text import printable
from data_prep.images.findings import DUPLICATE, FAILED, IGNORED, SAMPLE
from data_prep.images.outcomes import Outcomes

if TYPE_CHECKING:
    from data_prep.images.settings import ImagesSettings

log = logging.getLogger(__name__)

_LIST = "work/failures.jsonl"


def accepted_failures(settings: ImagesSettings, items: int) -> float:
    """Return the number of failures that a build accepts; one is always accepted."""
    return max(1.0, settings.max_failure_ratio * items)


def check_failures(work: Work, settings: ImagesSettings, outcomes: Outcomes) -> None:
    """Check that some items are usable, and not too many failed. Raises PipelineError."""
    failed = outcomes.count(FAILED)
    usable = int(outcomes.are(SAMPLE, DUPLICATE).sum())
    if not usable and not failed:
        raise PipelineError(f"{settings.source} holds no image file: give a folder of photos.")
    if not usable:
        raise PipelineError(
            f"none of the {failed} image files in {settings.source} is usable:"
            f" {_first(outcomes)}. Give complete photos that are large enough."
        )
    if failed > accepted_failures(settings, usable + failed):
        raise too_many_failures(work, settings, outcomes)


def too_many_failures(
    work: Work, settings: ImagesSettings, outcomes: Outcomes, *, so_far: bool = False
) -> PipelineError:
    """List the failed items in a file, and return the error that names it.

    Args:
        work: the stage's folder.
        settings: of the dataset.
        outcomes: of the items.
        so_far: the build stops before all items were tried.
    """
    failed = outcomes.count(FAILED)
    number = failed + int(outcomes.are(SAMPLE, DUPLICATE).sum())
    tried = " that were tried" if so_far else ""
    rows = outcomes.are(FAILED).nonzero()[0].tolist()
    lines = [json.dumps({"key": outcomes.key(r), "reason": outcomes.reason(r)}) for r in rows]
    work.store.write(work.key(_LIST), "".join(f"{line}\n" for line in lines).encode())
    return PipelineError(
        f"{failed} of the {number} image files in {settings.source}{tried} cannot be used"
        f" ({_first(outcomes)}; all are listed in {work.store.label}/{work.key(_LIST)})."
        " Repair or remove them, or raise images.max_failure_ratio, which is"
        f" {settings.max_failure_ratio:g}. Finished shards are kept."
    )


def log_unused(outcomes: Outcomes) -> None:
    """Log how many items failed and how many are ignored, with the first of each."""
    for kind in (FAILED, IGNORED):
        if count := outcomes.count(kind):
            row = int(outcomes.are(kind).argmax())
            first = printable(f"{outcomes.key(row)}: {outcomes.reason(row)}")
            files = "1 file" if count == 1 else f"{count} files"
            log.info("images: %s %s, first %s", files, kind, first)


def _first(outcomes: Outcomes) -> str:
    """Return the first two failed items, with their reasons."""
    rows = outcomes.are(FAILED).nonzero()[0][:2].tolist()
    return "; ".join(printable(f"{outcomes.key(row)}: {outcomes.reason(row)}") for row in rows)
