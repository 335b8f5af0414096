"""Whether a change of a dataset's source is to be announced: enough of it, at rest, and once.

`images/<name>/watch.json` remembers what was seen and what was announced. One watcher at a time
holds the lease beside it, from its look until the announcement is made and remembered, so of two at
once the second finds it announced. What could not be announced is not remembered as such.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass

from data_prep.core.errors import PipelineError
from data_prep.core.lease import Lease
from data_prep.core.paths import images_folder
from data_prep.core.storage.store import Store
from data_prep.images.next_version import Changes


@dataclass(frozen=True)
class Watched:
    """What is remembered: the digest seen last, since when (seconds, as `now` in `decide`), and the
    digest announced last."""

    digest: str = ""
    since: float = 0.0
    announced: str = ""


@dataclass(frozen=True)
class Decision:
    """Whether to announce, or in one sentence why not; and what was seen, to be remembered."""

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
    """Whether `changes` are to be announced at `now` (seconds of a clock that all watchers share).

    At least `min_new` images must be new or changed, the digest must have stood still for `quiet_s`
    seconds, and it must not have been announced before, unless `again`.
    """
    if watched.digest != changes.digest:
        watched = Watched(changes.digest, now, watched.announced)
    count, age = changes.new + changes.changed, max(0.0, now - watched.since)
    if not changes:
        reason = "Nothing is new."
    elif count < min_new:
        reason = f"{count} of {min_new} new images are there."
    elif watched.announced == changes.digest and not again:
        reason = "It was announced before."
    elif age < quiet_s:
        reason = f"It changed {age:.0f} s ago, and quiet for {quiet_s:.0f} s is asked."
    else:
        return Decision(True, f"{told(changes)}.", watched)
    return Decision(False, reason, watched)


def told(changes: Changes) -> str:
    """The counts in words."""
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
    """Look at dataset `name` once, and announce what `decide` says is to be announced.

    Raises what `look` and `announce` raise; the next call announces again what could not be.
    """
    key = f"{images_folder(name)}/watch.json"
    with Lease(store, f"{images_folder(name)}/watch-lease.json") as lease:
        before = read(store, key)
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
    """What is remembered under `key`; nothing where there is no such object."""
    try:
        record = json.loads(store.read(key))
        watched = Watched(str(record["digest"]), float(record["since"]), str(record["announced"]))
    except FileNotFoundError:
        return Watched()
    except (ValueError, KeyError, TypeError):
        raise PipelineError(
            f"{store.uri}/{key} was altered: delete it, and what is new is announced afresh."
        ) from None
    return watched
