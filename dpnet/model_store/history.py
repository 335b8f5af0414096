"""The history of a model: who was champion when, why, and from which data.

Each change of the champion writes one record, `registry/<model>/history/000001.json` and so on. A
record never changes. It holds its own digest and that of the record before it, so an altered,
missing or exchanged record is noticed. The history is written before `champion.json`. So a
promotion that was killed between the two is known, and the next command finishes it.

Roots of earlier versions have no history. Their first records are derived from the versions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from data_prep.core.digest import sha256_bytes, sha256_json
from data_prep.core.errors import PipelineError
from data_prep.core.manifest import read_head
from data_prep.core.paths import (
    champion_key,
    history_folder,
    history_key,
    manifest_key,
    parse_history_key,
    version_key,
)
from data_prep.core.record import known_fields, parse_json, refuse_newer
from data_prep.core.storage.store import Store
from dpnet.model_store.records import (
    CHAMPION,
    INPUTS,
    read_record,
    read_records,
    registration_folder,
)

FORMAT = 1
GATE, ALWAYS, PROMOTE, ROLLBACK = "gate", "always", "promote", "rollback"
MLFLOW, FOUND = "mlflow", "found"
_FOUND_WHY = "champion.json was replaced by hand."


@dataclass(frozen=True)
class Entry:
    """One change of the champion.

    Attributes:
        number: from 1.
        version: the champion from now on.
        former: the champion before, or None.
        how: gate, always, promote, rollback, mlflow (its alias was adopted) or found (champion.json
            was replaced by hand).
        why: one sentence.
        by: "gate", or user@host.
        at: time in UTC ("2026-01-31T12:00:00Z"), or "" if it is not known.
        record_sha256: SHA-256 of the version's record.
        made_from: digests, folders and names of the photos, masks, run and evaluation, by role.
            The request digest of the run is that of its settings.
        before: digest of the record before, or "".
        derived: whether it was derived from the versions of a root without history.
    """

    number: int
    version: int
    former: int | None
    how: str
    why: str
    by: str
    at: str
    record_sha256: str
    made_from: dict[str, dict[str, Any]] = field(default_factory=dict)
    before: str = ""
    derived: bool = False
    format: int = FORMAT

    @property
    def digest(self) -> str:
        """Return the digest of all fields."""
        return sha256_json(asdict(self))

    def to_json(self) -> dict[str, Any]:
        """Return the content of the record."""
        return {**asdict(self), "digest": self.digest}

    def to_bytes(self) -> bytes:
        """Return the bytes of the record."""
        return json.dumps(self.to_json(), indent=1, ensure_ascii=False).encode() + b"\n"


class Change(NamedTuple):
    """A change of the champion that the history does not have yet."""

    version: int
    how: str
    why: str


def read_history(store: Store, model: str) -> list[Entry]:
    """Read and check the history of a model, oldest record first.

    Raises:
        PipelineError: a record is missing or was altered.
    """
    entries = []
    for key, entry, problem in check_history(store, model):
        if entry is None:
            raise PipelineError(
                f"{store.label}/{key} {problem}: restore it from a backup. Until then the champion"
                f" of {model} stays as it is."
            )
        entries.append(entry)
    return entries


def check_history(store: Store, model: str) -> Iterator[tuple[str, Entry | None, str]]:
    """Yield the key of each record with its entry, or with None and what is wrong with it."""
    keys = [each.key for each in store.list(history_folder(model)) if parse_history_key(each.key)]
    if not keys:
        return
    there, before = set(keys), ""
    last = parse_history_key(max(keys))
    assert last is not None
    for number in range(1, last[1] + 1):
        key = history_key(model, number)
        if key not in there:
            yield key, None, "is missing"
            before = ""
            continue
        entry, problem = _parse(store, key, number)
        if entry is not None and number > 1 and before and entry.before != before:
            entry, problem = None, "was altered: it does not continue the record before it"
        yield key, entry, problem
        before = entry.digest if entry is not None else ""


def _parse(store: Store, key: str, number: int) -> tuple[Entry | None, str]:
    """Return the entry of a record, or None and the problem."""
    try:
        found = parse_json(store.read(key))
        refuse_newer(found, f"{store.label}/{key}", FORMAT)
        entry = Entry(**known_fields(Entry, found))
        # Unknown fields of a newer version are in its digest too.
        sound = sha256_json({k: v for k, v in found.items() if k != "digest"}) == found["digest"]
        if sound and entry.number == number and isinstance(entry.version, int):
            return entry, ""
    except PipelineError as error:
        return None, f"cannot be read ({str(error).rstrip('.')})"
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    return None, "was altered: it does not fit its digest"


def _version(value: Any) -> int | None:
    """Return the number of a version in a record, or None if it names none."""
    return value if isinstance(value, int) else None


def unrecorded(
    entries: Sequence[Entry],
    records: Mapping[int, Mapping[str, Any]],
    named: int | None,
    committed: Callable[[int], bool],
) -> list[Change]:
    """Return the changes that the history lacks, oldest first.

    These are promotions by an earlier version of dpnet, promotions that were killed before the
    history was written, and a `champion.json` that was replaced by hand.

    Args:
        entries: the history so far.
        records: the records of the versions, by number.
        named: the version that `champion.json` names, or None if it is missing.
        committed: returns whether the registration of a version was finished.
    """
    changes: list[Change] = []
    head = _head(entries, ())
    known = {entry.version for entry in entries}
    old = all(entry.derived for entry in entries)
    for number in sorted(records):
        record = records[number]
        if record.get("alias") != CHAMPION or number in known:
            continue
        before = _version(record.get("champion_before"))
        if before != head:
            if not old:  # another version became champion before this one could
                continue
            if before is not None and before in records:
                changes.append(Change(before, FOUND, _FOUND_WHY))
        how = ALWAYS if record.get("promote") == ALWAYS else GATE
        changes.append(Change(number, how, str(record.get("reason", ""))))
        head = number
    if named in (None, head) or named not in records or is_interrupted(entries, named):
        return changes
    if changes and named == _head(entries, changes[:-1]) and not committed(changes[-1].version):
        return changes  # this promotion was killed before it wrote champion.json
    return [*changes, Change(named, FOUND, _FOUND_WHY)]


def _head(entries: Sequence[Entry], changes: Sequence[Change]) -> int | None:
    """Return the champion after a history and further changes."""
    if changes:
        return changes[-1].version
    return entries[-1].version if entries else None


def is_interrupted(entries: Sequence[Entry], named: int | None) -> bool:
    """Return whether the last promotion was killed before it wrote `champion.json`."""
    if not entries or entries[-1].version == named:
        return False
    return named is None or (named == entries[-1].former and not entries[-1].derived)


def next_entry(
    store: Store,
    model: str,
    entries: Sequence[Entry],
    change: Change,
    by: str,
    at: str,
    *,
    derived: bool = False,
) -> Entry:
    """Return the entry of a change, which continues the history.

    Args:
        store: the root.
        model: name of the model.
        entries: the history so far.
        change: the new champion.
        by: who promoted it.
        at: the time in UTC.
        derived: whether it comes from a root without history.
    """
    key = version_key(model, change.version)
    record = read_record(store, key)
    return Entry(
        number=len(entries) + 1,
        version=change.version,
        former=entries[-1].version if entries else None,
        how=change.how,
        why=change.why,
        by=by,
        at=at,
        record_sha256=sha256_bytes(store.read(key)),
        made_from=made_from(store, record),
        before=entries[-1].digest if entries else "",
        derived=derived,
    )


def made_from(store: Store, record: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a version was made from. A deleted run leaves only what the record says."""
    found = {role: dict(record[role]) for role in INPUTS if isinstance(record.get(role), Mapping)}
    try:
        run = read_head(store, record["run"]["folder"])
        found["run"]["name"] = run.name
        for role in ("images", "masks"):
            ref = run.inputs[role]
            name = read_head(store, ref.folder).name
            found[role] = {
                "name": name, "folder": ref.folder, "content_digest": ref.content_digest
            }  # fmt: skip
    except (PipelineError, KeyError, TypeError):
        pass
    return found


def whole_history(store: Store, model: str, now: str = "") -> list[Entry]:
    """Return the history with the changes that it lacks. Nothing is written.

    Args:
        store: the root.
        model: name of the model.
        now: the time of changes whose own time is not known.
    """
    entries, records = read_history(store, model), read_records(store, model)
    named = named_champion(store, model)
    old = all(entry.derived for entry in entries)

    def committed(number: int) -> str:
        return _committed(store, records[number])

    for change in unrecorded(entries, records, named, lambda number: bool(committed(number))):
        at, by, derived = now, "unknown", old
        if change.how in (GATE, ALWAYS):
            by = GATE if change.how == GATE else "register.promote: always"
            finished = committed(change.version)
            at, derived = finished or now, old and bool(finished)
        entry = next_entry(store, model, entries, change, by, at, derived=derived)
        entries = [*entries, entry]
    return entries


def _committed(store: Store, record: Mapping[str, Any]) -> str:
    """Return when the registration of a version was committed, or "" if it was not."""
    try:
        folder = registration_folder(record)
        return read_head(store, folder).created if store.exists(manifest_key(folder)) else ""
    except (PipelineError, KeyError, TypeError):  # an altered record
        return ""


def named_champion(store: Store, model: str) -> int | None:
    """Return the version that `champion.json` names, or None if the file is missing."""
    key = champion_key(model)
    return int(read_record(store, key)["version"]) if store.exists(key) else None


def find_champion(store: Store, model: str) -> dict[str, Any] | None:
    """Return the record of a model's champion, or None if no version was promoted yet.

    `champion.json` is missing if it was lost, or if a promotion was killed before it wrote the
    file. Then the history says who is champion.
    """
    key = champion_key(model)
    if store.exists(key):
        return read_record(store, key)
    entries = read_history(store, model)
    records = read_records(store, model)
    changes = unrecorded(entries, records, None, lambda number: True)
    if changes:
        number: int | None = changes[-1].version
    elif entries:
        number = entries[-1].version
    else:  # the record of the champion of an old root may be lost
        number = _version(records[max(records)].get("champion_before")) if records else None
    if number is None:
        return None
    if number not in records:
        raise PipelineError(
            f"{store.label}/{key} is missing, and so is the record of version {number}, the"
            " champion: restore one of them from a backup."
        )
    return records[number]
