"""The result of `verify`: what was read, and what is missing or altered."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from data_prep.core.text import count_of, joined
from data_prep.shards.check_set import Depth

EVERYTHING = Depth()


@dataclass(frozen=True)
class Problem:
    """Something missing or altered; `where` is a key under the root."""

    where: str
    problem: str


@dataclass
class Verification:
    """The result of a check: what was read, and the problems that were found.

    Attributes:
        root: URI of the root.
        target: the checked folder or model; "" for the whole root.
        depth: how much of the shards was read.
        stages: stages with a sound manifest.
        records: records of the registry.
        files: files that were read completely.
        bytes: bytes of those files.
        shards: shards of images and masks.
        tars: tars of shards that were read.
        indexes: indexes of shards that were read.
        unread: files that were not read; only their presence and size were checked.
        notes: sentences about what could not be checked.
        problems: the problems, sorted by `where`.
    """

    root: str
    target: str
    depth: Depth = EVERYTHING
    stages: int = 0
    records: int = 0
    files: int = 0
    bytes: int = 0
    shards: int = 0
    tars: int = 0
    indexes: int = 0
    unread: int = 0
    notes: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Return whether there is no problem."""
        return not self.problems

    def add(self, where: str, problem: str) -> None:
        """Add a problem."""
        self.problems.append(Problem(where, problem))

    def as_text(self) -> str:
        """Return notes, a line for each file with problems, and a last line that sums them up.

        One altered byte can show in several ways, so the line has the first problem of the file and
        the number of the others. `to_json` has all of them.
        """
        by_file: dict[str, list[str]] = {}
        for each in self.problems:
            by_file.setdefault(each.where, []).append(each.problem)
        lines = [
            f"{where}: {first}" + (f" ({len(more)} more about it with --json)" if more else "")
            for where, (first, *more) in by_file.items()
        ]
        found = f"problems in {count_of(len(by_file), 'file')}" if by_file else "no problems"
        return joined([*self.notes, *lines, f"{self._covered()}: {found}"])

    def _covered(self) -> str:
        """Return in words what was read and what was not."""
        stages = count_of(self.stages, "stage")
        text = f"read {self.files} files ({self.bytes / 1e6:.1f} MB) of {stages}"
        if self.depth.everything:
            return text
        return (
            f"{text}, with the indexes of {self.indexes} and the tars of {self.tars} of"
            f" {count_of(self.shards, 'shard')}; the other {count_of(self.unread, 'file')} were not"
            " read, only their presence and size checked"
        )

    def to_json(self) -> dict[str, Any]:
        """Return all fields as JSON values, and `ok`."""
        return {"ok": self.ok, **asdict(self)}
