"""The split of every item: as the source gives it, or drawn by the hash of its key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from data_prep.core.errors import PipelineError
from data_prep.raw.listing import SPLITS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def assign_splits(
    given: NDArray[np.int8],
    photos: NDArray[np.bool_],
    draw: NDArray[np.uint64],
    val: float,
    test: float,
    before: NDArray[np.int8] | None = None,
) -> tuple[NDArray[np.int8], list[str]]:
    """Assign a split to every item.

    If the source gives splits, a missing one is drawn from train. If it gives none, all three are
    drawn. The draw depends on the key only, so an item keeps its split when other items arrive.

    A small set may leave a split without photos. That split gets the photo with the lowest hash
    from the largest split (our choice).

    Args:
        given: the split that the source gives, as its place in SPLITS; -1 for none.
        photos: which items look usable.
        draw: a hash of each key.
        val: share of the drawn items for validation, in [0, 1).
        test: share of the drawn items for the test, in [0, 1).
        before: the split in the parent version, -1 for new items. A drawn split never changes.

    Returns:
        Each item's split as its place in SPLITS, and sentences that explain special cases.

    Raises:
        PipelineError: there are fewer photos than splits to fill.
    """
    import numpy as np

    fixed = bool((given >= 0).any())
    splits = np.where(given >= 0, given, 0).astype(np.int8)
    missing = [code for code in (1, 2) if not (given == code).any()]
    free = splits == 0
    candidates = np.flatnonzero(free & photos)
    if len(candidates) < 1 + len(missing):
        where = " in train" if fixed else ""
        names = ", ".join(["train", *(SPLITS[code] for code in missing)])
        raise PipelineError(
            f"the source has too few photos: {len(candidates)}{where}, but at least"
            f" {1 + len(missing)} are needed, one each for {names}. Add photos."
        )
    bounds = [_bound(val), _bound(val + test)]
    drawn = np.where(draw < bounds[0], 1, np.where(draw < bounds[1], 2, 0)).astype(np.int8)
    drawn[~np.isin(drawn, missing)] = 0
    if before is not None:
        drawn = np.where(before >= 0, before, drawn)
        drawn[~np.isin(drawn, missing)] = 0
    splits = np.where(free, drawn, splits)
    notes = []
    if fixed and missing:
        names = " and ".join(SPLITS[code] for code in missing)
        notes.append(f"the source has no split {names}: a part of train is used instead")
    for code in (0, *missing):
        counts = np.bincount(splits[candidates], minlength=3)
        if not counts[code]:
            donors = candidates[splits[candidates] == counts.argmax()]
            splits[donors[draw[donors].argmin()]] = code
            notes.append(f"the draw left {SPLITS[code]} empty in this small set: it gets one photo")
    return splits, notes


def _bound(share: float) -> int:
    """Return the bound: the share `share` of all 64-bit numbers is below it."""
    return min(int(share * 2**64), 2**64 - 1)
