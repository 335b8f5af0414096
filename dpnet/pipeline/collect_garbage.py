"""Say what can be deleted from a root, and delete it.

Every deletion holds the leases of its folder, and first looks again under them. So a stage that
starts meanwhile either waits, or is seen. A kill at any moment leaves a root that `dpnet verify`
accepts, and the next call finishes: a folder that is being deleted has a mark (`garbage.json`),
which is written first and deleted last.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from data_prep.core.lease import Lease, check_leases
from data_prep.core.storage.local import remove_empty_folders
from data_prep.core.storage.store import Store
from data_prep.core.text import aligned_table, count_of, joined
from dpnet.pipeline.garbage import (
    KINDS,
    LEFTOVERS,
    MARK,
    PICTURES,
    Contents,
    Findings,
    Unit,
    find_garbage,
    names,
)
from dpnet.pipeline.root_contents import Reader

DAYS = 7.0  # age from which an unfinished stage is garbage
_BATCH = 16  # leases have a thread each, and each batch lists the root again
_NAMED = 10  # unknown files that the text names


@dataclass
class Collection:
    """The garbage of a root, and what was done about it.

    Attributes:
        root: URI of the root.
        label: the root as people write it.
        days: the age from which an unfinished stage is garbage.
        findings: garbage and kept things before anything was deleted.
        deleted: whether the garbage was deleted.
        gone: the deleted units, with what was really deleted.
        skipped: folders that came into use meanwhile, with their kinds.
    """

    root: str
    label: str
    days: float
    findings: Findings
    deleted: bool
    gone: list[Unit] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def units(self) -> list[Unit]:
        """Return what was deleted, or what would be."""
        return self.gone if self.deleted else self.findings.units

    @property
    def size(self) -> int:
        """Return the number of freed bytes, or of those that would be."""
        return sum(unit.size for unit in self.units)

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "ok": True,
            "root": self.root,
            "deleted": self.deleted,
            "bytes": self.size,
            "kinds": {
                kind: {"count": count, "objects": objects, "bytes": size}
                for kind, count, objects, size in _by_kind(self.units)
            },
            "garbage": [
                {
                    "kind": unit.kind,
                    "folder": unit.folder,
                    "objects": len(unit.keys),
                    "bytes": unit.size,
                    "why": unit.why,
                }
                for unit in self.units
            ],
            "kept": [
                {"kind": kind, "why": why, "count": count}
                for (kind, why), count in sorted(self.findings.kept.items())
            ],
            "unknown": self.findings.unknown,
            "skipped": [{"kind": kind, "folder": folder} for kind, folder in self.skipped],
        }

    def as_text(self) -> str:
        """Return a table by kind, what is kept and why, and the command that deletes."""
        lines = []
        if self.units:
            head = ("deleted" if self.deleted else "garbage", "count", "size")
            rows = [(kind, f"{count:,}", _size(size)) for kind, count, _, size in self._rows()]
            total = ("together", f"{len(self.units):,}", _size(self.size))
            lines += aligned_table([head, *rows, total], "<>>")
        elif not self.skipped:
            lines.append("There is no garbage.")
        if self.findings.kept:
            rows = [(kind, f"{n:,}", why) for (kind, why), n in sorted(self.findings.kept.items())]
            lines += ["", *aligned_table([("kept", "count", "why"), *rows], "<><"), ""]
        lines += [f"Not deleted, because it is in use now: {folder}" for _, folder in self.skipped]
        if unknown := self.findings.unknown:
            shown = ", ".join(unknown[:_NAMED]) + (", …" if len(unknown) > _NAMED else "")
            lines.append(f"{count_of(len(unknown), 'unknown file')}, never deleted: {shown}.")
        if self.units and not self.deleted:
            older = f" --older-than {self.days:g}" if self.days != DAYS else ""
            command = f"dpnet gc {shlex.quote(self.label)}{older} --delete"
            lines.append(f"Nothing was deleted. To delete the garbage: {command}")
        return joined(lines)

    def _rows(self) -> list[tuple[str, int, int, int]]:
        return list(_by_kind(self.units))


def collect_garbage(store: Store, days: float = DAYS, *, delete: bool = False) -> Collection:
    """Find the garbage of a root, and delete it if asked to.

    Args:
        store: the root.
        days: the age from which an unfinished stage is garbage.
        delete: delete it.

    Raises:
        PipelineError: a manifest or record is damaged, so it is not known what is in use.
    """
    reader = Reader(store, days)
    findings = find_garbage(reader.read())
    result = Collection(store.uri, store.label, days, findings, delete)
    if delete:
        for batch in _batches(findings.units):
            _delete_batch(reader, batch, result)
    return result


def _batches(units: Sequence[Unit]) -> Iterator[list[Unit]]:
    """Yield the units in order, some of one kind at a time."""
    for _, group in groupby(units, key=lambda unit: unit.kind):
        same = list(group)
        for start in range(0, len(same), _BATCH):
            yield same[start : start + _BATCH]


def _delete_batch(reader: Reader, units: Sequence[Unit], result: Collection) -> None:
    """Take the leases of some units, look again, and delete those that are still garbage."""
    store, ready = reader.store, list[Unit]()
    with ExitStack() as stack:
        held: dict[str, bool] = {}
        for unit in units:
            for key in unit.leases:
                if key not in held:
                    lease = stack.enter_context(Lease(store, key, done=_in_use(store, key)))
                    held[key] = lease.held
            if all(held[key] for key in unit.leases):
                ready.append(unit)
        contents = reader.read(key for key, ours in held.items() if ours)
        now = {(unit.kind, unit.folder, unit.keys[:1]): unit for unit in _still(contents)}
        gone: set[str] = set()
        for unit in units:
            fresh = now.get((unit.kind, unit.folder, unit.keys[:1])) if unit in ready else None
            # A user may have been skipped. Without this a manifest would name a missing stage.
            if fresh is None or (fresh.whole and names(contents, fresh.folder, gone)):
                result.skipped.append((unit.kind, unit.folder))
                continue
            _delete(store, fresh)
            gone.add(fresh.folder)
            result.gone.append(fresh)
    if (top := store.local_folder) is not None:
        for unit in units:
            if unit.leases or unit.kind == PICTURES:  # not the folders of single temporary files
                remove_empty_folders(top / unit.folder)


def _still(contents: Contents) -> Iterable[Unit]:
    return find_garbage(contents).units


def _delete(store: Store, unit: Unit) -> None:
    """Delete the objects of a unit in their order."""
    mark = f"{unit.folder}/{MARK}"
    if unit.whole:
        check_leases()
        store.write(mark, json.dumps({"by": "dpnet gc", "why": unit.why}).encode())
    delete = store.delete_leftover if unit.kind == LEFTOVERS else store.delete
    for key in unit.keys:
        check_leases()
        delete(key)
    if unit.whole:
        check_leases()
        store.delete(mark)


def _in_use(store: Store, key: str) -> Callable[[], bool]:
    """Return a function that says whether the lease at `key` was renewed since its first call.

    While the record stays the same, its owner may be dead: `Lease` waits until it has expired.
    """
    seen: list[str] = []

    def changed() -> bool:
        try:
            tag = store.read_tagged(key)[1]
        except FileNotFoundError:
            tag = ""
        seen.append(tag)
        return tag not in ("", seen[0])

    return changed


def _by_kind(units: Iterable[Unit]) -> Iterator[tuple[str, int, int, int]]:
    """Yield each kind with the numbers of its units, objects and bytes."""
    every = list(units)
    for kind in KINDS:
        own = [unit for unit in every if unit.kind == kind]
        if own:
            objects = sum(len(unit.keys) for unit in own)
            yield kind, len(own), objects, sum(unit.size for unit in own)


def _size(size: int) -> str:
    """Return a number of bytes in the largest unit that leaves at least 1."""
    for power, unit in ((4, "TB"), (3, "GB"), (2, "MB"), (1, "kB")):
        if size >= 1000**power:
            return f"{size / 1000**power:.1f} {unit}"
    return f"{size} B"
