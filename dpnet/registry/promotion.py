"""Change the champion: finish an interrupted promotion, promote a version, roll back.

Storage is the truth, and MLflow follows it. A change is written in this order: the record of the
history, `champion.json`, MLflow's alias. The first write decides, and each of the others is
repeated by the next command if it was killed. One change at a time holds the model's lease.
"""

from __future__ import annotations

import getpass
import logging
import socket
import time
from collections.abc import Sequence
from typing import NamedTuple

from data_prep.core.errors import ConfigError, PipelineError
from data_prep.core.lease import Lease, confirm_leases
from data_prep.core.paths import (
    champion_key,
    history_key,
    lease_key,
    registry_folder,
    version_key,
)
from data_prep.core.storage.store import Store
from data_prep.core.text import printable
from dpnet.model_store.history import (
    PROMOTE,
    ROLLBACK,
    Change,
    Entry,
    find_champion,
    is_interrupted,
    named_champion,
    next_entry,
    read_history,
    whole_history,
)
from dpnet.model_store.layout import has_model
from dpnet.model_store.records import read_record, read_records

log = logging.getLogger(__name__)


class Promoted(NamedTuple):
    """The champion after a command, and the one before it.

    Attributes:
        entry: the newest record of the history.
        changed: whether this command changed the champion.
    """

    entry: Entry
    changed: bool


def settle(store: Store, model: str) -> list[Entry]:
    """Write what the history lacks, and finish an interrupted promotion. Return the history.

    The caller holds the model's lease.

    Raises:
        PipelineError: a record of the history or of the champion is missing or was altered.
    """
    stored = len(read_history(store, model))
    _restore_record(store, model)
    entries = whole_history(store, model, _now())
    if not entries:
        find_champion(store, model)  # raises if the champion's record was lost
        return entries
    for entry in entries[stored:]:
        _write_entry(store, model, entry)
    named = named_champion(store, model)
    if named != entries[-1].version:
        _write_champion(store, model, entries[-1])
        if stored == len(entries):
            log.warning(
                "registry: %s/%s %s: version %d is champion again, as the history says.",
                store.label,
                champion_key(model),
                "was missing" if named is None else f"named version {named}",
                entries[-1].version,
            )
    return entries


def _restore_record(store: Store, model: str) -> None:
    """Write the record of the champion again if only `champion.json`, its copy, is left."""
    number = named_champion(store, model)
    if number is not None and not store.exists(key := version_key(model, number)):
        confirm_leases()
        store.create(key, store.read(champion_key(model)))
        log.warning("registry: %s/%s was missing: restored from its copy.", store.label, key)


def make_champion(
    store: Store, model: str, entries: Sequence[Entry], change: Change, by: str
) -> list[Entry]:
    """Make a version champion. Return the new history. The caller holds the model's lease.

    Args:
        store: the root.
        model: name of the model.
        entries: the settled history.
        change: the version, and why.
        by: who promotes it.
    """
    entry = next_entry(store, model, entries, change, by, _now())
    _write_entry(store, model, entry)
    _write_champion(store, model, entry)
    return [*entries, entry]


def promote(store: Store, model: str, version: int, why: str) -> Promoted:
    """Make a version the champion by hand.

    Raises:
        PipelineError: there is no such version, or its files are gone.
    """
    with Lease(store, lease_key(registry_folder(model))):
        entries = settle(store, model)
        if entries and entries[-1].version == version:
            return Promoted(entries[-1], changed=False)
        _check_version(store, model, version)
        entries = make_champion(store, model, entries, Change(version, PROMOTE, why), person())
    return Promoted(entries[-1], changed=True)


def rollback(store: Store, model: str, why: str = "") -> Promoted:
    """Make the former champion champion again. A second rollback goes one champion further back.

    Raises:
        PipelineError: there is no former champion, or its files are gone.
    """
    with Lease(store, lease_key(registry_folder(model))):
        entries = settle(store, model)
        line = succession(entries)
        if len(line) < 2:
            first = (
                f"{model} version {line[0]} is the first champion" if line else f"{model} has none"
            )
            raise PipelineError(
                f"{first}, so there is no former champion to roll back to: `dpnet registry promote"
                " VERSION --why TEXT` makes another version champion."
            )
        _check_version(store, model, line[-2])
        why = why or f"Rolled back from version {line[-1]}."
        entries = make_champion(store, model, entries, Change(line[-2], ROLLBACK, why), person())
    return Promoted(entries[-1], changed=True)


def succession(entries: Sequence[Entry]) -> list[int]:
    """Return the champions in their order, without those that a rollback took back."""
    line: list[int] = []
    for entry in entries:
        if entry.how == ROLLBACK and entry.version in line:
            while line[-1] != entry.version:
                line.pop()
        else:
            line.append(entry.version)
    return line


def _check_version(store: Store, model: str, version: int) -> None:
    """Raise PipelineError if a version does not exist, or its model is gone."""
    records = read_records(store, model)
    if version not in records:
        known = ", ".join(map(str, sorted(records))) or "none"
        raise ConfigError(
            f"{store.label} has no version {version} of {model}: its versions are {known}. Choose"
            " one of them."
        )
    folder = records[version]["run"]["folder"]
    if not has_model(store, folder):
        raise PipelineError(
            f"version {version} of {model} cannot become champion, because its model in"
            f" {store.label}/{folder} is gone: restore it, or promote another version."
        )


def _write_entry(store: Store, model: str, entry: Entry) -> None:
    """Write a record of the history, which never changes afterwards."""
    key, data = history_key(model, entry.number), entry.to_bytes()
    confirm_leases()
    # A write that is repeated after a lost answer finds its own bytes.
    if store.create(key, data) is None and store.read(key) != data:
        raise PipelineError(
            f"the champion of {model} was changed at the same time: look at `dpnet registry"
            " history`, and run the same command again."
        )


def _write_champion(store: Store, model: str, entry: Entry) -> None:
    """Write `champion.json`, a copy of the version's record."""
    key = version_key(model, entry.version)
    if not store.exists(key):
        raise PipelineError(
            f"{store.label}/{key}, the record of the champion, is missing: restore it from a"
            " backup."
        )
    read_record(store, key)
    confirm_leases()
    store.write(champion_key(model), store.read(key))


def interrupted(store: Store, model: str, entries: Sequence[Entry]) -> bool:
    """Return whether the last promotion of a history was killed before it was complete."""
    return is_interrupted(entries, named_champion(store, model))


def person() -> str:
    """Return who runs this command, as user@host."""
    try:
        user = getpass.getuser()
    except (OSError, KeyError):  # in a container, a user may have no name
        user = "unknown"
    return printable(f"{user}@{socket.gethostname()}")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
