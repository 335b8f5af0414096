"""Items that cannot be used: the number that is accepted, the list of them, the messages."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from data_prep.core.errors import PipelineError
from data_prep.core.stage import Work
from data_prep.core.text import count_of, printable
from data_prep.images.findings import DUPLICATE, FAILED, IGNORED, SAMPLE
from data_prep.images.outcomes import Outcomes
from data_prep.pictures.limits import TOO_SMALL
from data_prep.raw.lists import MISSING
from data_prep.raw.tables import RENAME, SEVERAL_COLUMNS

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
            f" {_first(outcomes)}. To use them, {what_to_do(settings, _reasons(outcomes))}."
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
        f" To use them, {what_to_do(settings, _reasons(outcomes))}. To do without them, remove them"
        " from the source, or raise images.max_failure_ratio, which is"
        f" {settings.max_failure_ratio:g}. Finished shards are kept."
    )


def what_to_do(settings: ImagesSettings, reasons: Iterable[str]) -> str:
    """Return what to do about items that failed, in words that follow "To use them,".

    The most frequent kind of reason decides.
    """
    advice = {
        TOO_SMALL: settings.smaller_photos,
        MISSING: "correct their paths in the list; relative ones start at its folder",
        SEVERAL_COLUMNS: f"{RENAME[0].lower()}{RENAME[1:]} in each table",
    }
    other = "replace them with complete photos"
    kinds = Counter(
        next((advice[kind] for kind in advice if kind in reason), other) for reason in reasons
    )
    return kinds.most_common(1)[0][0] if kinds else other


def log_unused(settings: ImagesSettings, outcomes: Outcomes) -> None:
    """Log how many items failed and how many are ignored, with the first of each."""
    for kind in (FAILED, IGNORED):
        if count := outcomes.count(kind):
            row = int(outcomes.are(kind).argmax())
            first = printable(f"{outcomes.key(row)}: {outcomes.reason(row)}")
            advice = ""
            if kind == FAILED:
                advice = f". To use them, {what_to_do(settings, _reasons(outcomes))}"
            log.info("images: %s %s, first %s%s", count_of(count, "file"), kind, first, advice)


def _reasons(outcomes: Outcomes) -> Iterator[str]:
    """Yield why each failed item failed."""
    return map(outcomes.reason, outcomes.are(FAILED).nonzero()[0].tolist())


def _first(outcomes: Outcomes) -> str:
    """Return the first two failed items, with their reasons."""
    rows = outcomes.are(FAILED).nonzero()[0][:2].tolist()
    return "; ".join(printable(f"{outcomes.key(row)}: {outcomes.reason(row)}") for row in rows)
