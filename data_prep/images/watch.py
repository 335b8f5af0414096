"""Decide whether to announce new photos: enough, unchanged for long enough, and not yet announced.

`images/<name>/watch.json` stores the changes that were seen and those that were announced. A
watcher holds the lease next to it from its look until the announcement is stored. So the second of
two watchers finds the changes announced. A failed announcement is not stored. The look waits for a
version that is being built: its photos are not new any more.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from data_prep.core.errors import PipelineError
from data_prep.core.lease import Lease
from data_prep.core.paths import images_folder, lease_key
from data_prep.core.record import parse_json, refuse_newer
from data_prep.core.storage.store import Store
from data_prep.images.next_version import Changes


@dataclass(frozen=True)
class Watched:
    """The stored state of a watch.

    Attributes:
        digest: of the changes seen last.
        since: when they were first seen, in seconds of the watchers' clock.
        announced: the digest announced last.
    """

    digest: str = ""
    since: float = 0.0
    announced: str = ""


@dataclass(frozen=True)
class Decision:
    """The decision to announce or not, its reason in one sentence, and the state to store."""

    announce: bool
    reason: str
    watched: Watched


def decide(
    changes: Changes,
    watched: Watched,
    now: float,
    *,
    min_new: int = 1,
    quiet_s: float = 0.0,
    again: bool = False,
) -> Decision:
    """Decide whether to announce `changes`.

    Args:
        changes: since the newest version.
        watched: the stored state.
        now: seconds of a clock that all watchers share.
        min_new: least number of new and changed photos.
        quiet_s: seconds for which the digest must not have changed.
        again: announce changes even if they were announced before.
    """
    if watched.digest != changes.digest:
        watched = Watched(changes.digest, now, watched.announced)
    count, age = changes.new + changes.changed, max(0.0, now - watched.since)
    if not changes:
        reason = "Nothing is new."
    elif count < min_new:
        reason = f"{count} of {min_new} new images have arrived."
    elif watched.announced == changes.digest and not again:
        reason = "It was announced before."
    elif age < quiet_s:
        reason = f"The last change was {age:.0f} s ago, less than the required {quiet_s:.0f} s."
    else:
        return Decision(True, f"{describe(changes)}.", watched)
    return Decision(False, reason, watched)


def describe(changes: Changes) -> str:
    """Return the counts in words."""
    since = "in all" if changes.version is None else f"since version {changes.version}"
    return (
        f"{changes.new} new, {changes.changed} changed and {changes.removed} removed images {since}"
    )


def watch(
    store: Store,
    name: str,
    look: Callable[[], Changes],
    announce: Callable[[Changes], None],
    clock: Callable[[], float],
    *,
    min_new: int = 1,
    quiet_s: float = 0.0,
    again: bool = False,
) -> tuple[Changes, Decision]:
    """Look at a dataset's source once, and announce its changes if `decide` says so.

    Raises what `look` and `announce` raise. After a failed announcement the next call tries again.

    Args:
        store: the root.
        name: of the dataset.
        look: counts the changes.
        announce: announces them.
        clock: returns seconds, on a clock that all watchers share.
        min_new: see `decide`, also for `quiet_s` and `again`.
    """
    key = f"{images_folder(name)}/watch.json"
    with Lease(store, f"{images_folder(name)}/watch-lease.json") as lease:
        before = read(store, key)
        with Lease(store, lease_key(images_folder(name))):  # no version is made meanwhile
            changes = look()
        decision = decide(changes, before, clock(), min_new=min_new, quiet_s=quiet_s, again=again)
        after = decision.watched
        lease.check()
        if decision.announce:
            announce(changes)
            after = Watched(after.digest, after.since, changes.digest)
        if after != before:
            store.write(key, json.dumps(asdict(after), indent=1).encode())
    return changes, decision


def read(store: Store, key: str) -> Watched:
    """Read the stored state of a watch; return an empty one if there is none."""
    try:
        record = parse_json(store.read(key))
        refuse_newer(record, f"{store.label}/{key}")
        watched = Watched(str(record["digest"]), float(record["since"]), str(record["announced"]))
    except FileNotFoundError:
        return Watched()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise PipelineError(
            f"{store.label}/{key} was altered. Delete it; the changes are then announced again."
        ) from None
    return watched
