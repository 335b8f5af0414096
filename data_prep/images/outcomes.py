"""The outcomes of all listed items, and the checks before a version is committed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from data_prep.core.errors import PipelineError
from data_prep.images.findings import FAILED, IGNORED, OUTCOMES, SAMPLE, Finding
from data_prep.images.keys import OTHER, PROBLEM
from data_prep.images.plan import Plan, PlannedShard
from data_prep.images.versions import Version
from data_prep.raw.layouts import IGNORED as IGNORED_PROBLEM
from data_prep.raw.listing import SPLITS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PENDING = -1


class Outcomes:
    """The outcome of every listed item, as columns in the order of the listing.

    Attributes:
        sha256: uint8 [n, 32]; `hashed` marks the items that have one.
        code: place in OUTCOMES; -1 while the item is pending.
        shard: place of the item's shard in `numbers`; -1 for none.
        format: place of the file's format in `formats`; -1 for none.
        numbers: the number of each shard, by name.
        reasons: why items failed or are ignored, by row.
        dropped: rows of the items that an earlier attempt already removed from their shards.
    """

    def __init__(self, plan: Plan) -> None:
        import numpy as np

        number = len(plan.listing)
        self.plan = plan
        self.sha256 = np.zeros((number, 32), np.uint8)
        self.hashed = np.zeros(number, np.bool_)
        self.width = np.zeros(number, np.int32)
        self.height = np.zeros(number, np.int32)
        self.phash = np.zeros(number, np.uint64)
        self.samples = np.zeros(number, np.int32)
        self.code = np.full(number, _PENDING, np.int8)
        self.shard = np.full(number, -1, np.int32)
        self.format = np.full(number, -1, np.int8)
        self.numbers: dict[str, int] = {}
        self.formats: list[str] = []
        self.reasons: dict[int, str] = {}
        self.dropped: set[int] = set()

    def ignore_others(self) -> None:
        """Set the outcome of items that are not prepared: other files, and items with a problem."""
        import numpy as np
        import pyarrow as pa

        plan, keys = self.plan, self.plan.listing.table["key"]
        self.code[plan.kind == OTHER] = OUTCOMES.index(IGNORED)
        rows = np.flatnonzero(plan.kind == PROBLEM)
        for row, key in zip(rows.tolist(), keys.take(pa.array(rows)).to_pylist(), strict=True):
            problem = plan.listing.problems[key]
            ignored = problem.startswith(IGNORED_PROBLEM)
            self.code[row] = OUTCOMES.index(IGNORED if ignored else FAILED)
            self.reasons[row] = problem.removeprefix(IGNORED_PROBLEM)

    def copy_from_parent(self, parent: Version) -> None:
        """Copy the parent's outcomes that still hold."""
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        rows = np.flatnonzero(self.plan.before >= 0)
        at = self.plan.before[rows]
        table = parent.table
        sha256, hashed = parent.sha256()
        self.sha256[rows], self.hashed[rows] = sha256[at], hashed[at]
        for name in ("width", "height", "phash", "samples"):
            getattr(self, name)[rows] = table[name].to_numpy()[at]
        self.code[rows] = parent.outcomes()[at]
        names = parent.names()
        self.numbers = {name: number for number, name in enumerate(names)}
        shard = pc.index_in(table["shard"], pa.array(names, pa.string()))
        self.shard[rows] = shard.fill_null(-1).to_numpy()[at]
        self.formats = [f for f in pc.unique(table["format"]).to_pylist() if f]
        format = pc.index_in(table["format"], pa.array(self.formats, pa.string()))
        self.format[rows] = format.fill_null(-1).to_numpy()[at]
        with_reason = rows[self.are(FAILED, IGNORED)[rows]]
        texts = table["reason"].take(pa.array(self.plan.before[with_reason])).to_pylist()
        self.reasons.update(zip(with_reason.tolist(), texts, strict=True))

    def add_findings(
        self, shard: PlannedShard, rows: Sequence[int], findings: Sequence[Finding]
    ) -> None:
        """Set the outcomes of the items that were prepared for a shard.

        Args:
            shard: that now holds the samples.
            rows: of the prepared items.
            findings: of the same items.
        """
        import numpy as np

        number = self.numbers.setdefault(shard.name, len(self.numbers))
        for row, finding in zip(rows, findings, strict=True):
            if finding.sha256:
                self.sha256[row] = np.frombuffer(bytes.fromhex(finding.sha256), np.uint8)
                self.hashed[row] = True
            self.width[row], self.height[row] = finding.width, finding.height
            self.phash[row], self.samples[row] = finding.phash, finding.samples
            self.code[row] = OUTCOMES.index(finding.outcome)
            if finding.outcome == SAMPLE:
                self.shard[row] = number
            if finding.format:
                if finding.format not in self.formats:
                    self.formats.append(finding.format)
                self.format[row] = self.formats.index(finding.format)
            if finding.reason:
                self.reasons[row] = finding.reason

    def are(self, *names: str) -> NDArray[np.bool_]:
        """Return which items have one of these outcomes."""
        import numpy as np

        return np.isin(self.code, [OUTCOMES.index(name) for name in names])

    def count(self, outcome: str) -> int:
        """Return the number of items with this outcome."""
        return int((self.code == OUTCOMES.index(outcome)).sum())

    def key(self, row: int) -> str:
        """Return the key of the item in a row."""
        return str(self.plan.listing.table["key"][int(row)].as_py())

    def reason(self, row: int) -> str:
        """Return why the item in a row failed or is ignored; empty for other items."""
        if row in self.reasons:
            return self.reasons[row]
        if self.plan.kind[row] == OTHER:
            extension = self.key(row).rpartition(".")[2].lower()
            return f"not an image: extension .{extension}"
        return ""


def check_splits(outcomes: Outcomes, source: str) -> None:
    """Check that every split has a usable photo. Raises PipelineError."""
    for code, split in enumerate(SPLITS):
        if not (outcomes.are(SAMPLE) & (outcomes.plan.split == code)).any():
            raise PipelineError(
                f"{source} has no usable photo for the split {split}. Add photos, or raise"
                " images.val and images.test."
            )


def check_every_item_counted(outcomes: Outcomes) -> None:
    """Check that every item has one outcome, and every sample one shard. Raises PipelineError."""
    listed = len(outcomes.plan.listing)
    lost = listed - sum(outcomes.count(kind) for kind in OUTCOMES)
    misplaced = int((outcomes.are(SAMPLE) != (outcomes.shard >= 0)).sum())
    if lost or misplaced:
        raise PipelineError(
            f"the accounts do not add up: of {listed} listed items {lost} have no outcome and"
            f" {misplaced} are in no shard or in one too many. Nothing is committed. This is a"
            " fault of the program: please report it."
        )
