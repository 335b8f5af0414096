"""A lease: only one runner works in a folder at a time.

1. `lease.json` names its owner, with a counter. It is free, held, released, or expired.
2. Every write of it is a compare-and-swap by tag. So of two runners, one succeeds.
3. Free: anybody creates it. Released, or its owner has ended on this machine: anybody replaces it.
4. Held: only the owner raises the counter, every `HEARTBEAT_S`, with short timeouts.
5. A waiter sees the same tag for three intervals of its own clock: expired. It replaces the record.
6. The owner counts three intervals from the moment before its last renewal was sent. So it regards
   the lease as lost before any waiter takes it over. No two clocks are compared.
7. A renewal that fails says nothing. Another owner's record, or no record, says: lost, for good.
8. A hung renewal cannot keep the owner believing: whoever asks, asks the clock.
9. Release deletes or replaces the record by its tag. So a late owner never touches its successor's.
10. Workers in other processes follow the record (`Follower`) and stop when its owner has lost it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import posixpath
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any, Protocol

from data_prep.core.errors import LeaseLostError, PipelineError, StorageError, storage_error
from data_prep.core.process_identity import boot, process_start
from data_prep.core.record import parse_json
from data_prep.core.storage.store import Store
from data_prep.core.text import printable

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
MISSED = 3
LEAST_TIMEOUT_S = 1.0  # of a renewal, however short the interval is
# What a record may say. With a damaged one, others must neither fail nor wait for ever.
_LONGEST_INTERVAL_S = 3600.0
_LARGEST_NUMBER = 1e15


class _Surrounding(Protocol):
    def raise_if_lost(self) -> None: ...

    def check(self) -> None: ...


_around: ContextVar[tuple[_Surrounding, ...]] = ContextVar("leases", default=())


def check_leases() -> None:
    """Raise LeaseLostError if a lease around this call is lost. It only reads a clock.

    Call it in the loops of a stage. Threads see the leases of the context that they run in.
    """
    for lease in _around.get():
        lease.raise_if_lost()


def confirm_leases() -> None:
    """Ask storage whether every lease around this call is held, before a write that matters.

    Raises:
        LeaseLostError: another runner has taken one over, or may have done so.
        StorageError: storage does not answer now.
    """
    for lease in _around.get():
        lease.check()


class _Belief:
    """The state of a lease as one process knows it: held until a time, or lost for a reason."""

    def __init__(self, where: str, span: float) -> None:
        self.where, self.span = where, span
        self.until = -math.inf
        self.lost = ""
        self.problem = ""  # the reason of the last failed request

    def valid(self) -> bool:
        """Return whether the lease is held. Once it is not, it never is again."""
        if not self.lost and now() >= self.until:
            why = f" ({self.problem.rstrip('.')})" if self.problem else ""
            self.lost = (
                f"{self.where} could not be renewed for {self.span:.0f} s{why}, so another runner"
                " may take over and this one stops. Check that the storage answers and run the same"
                " command again. It resumes."
            )
        return not self.lost

    def renewed(self, since: float) -> None:
        self.until, self.problem = since + self.span, ""

    def taken(self) -> None:
        self.lost = self.lost or (
            f"{self.where} was taken over by another runner, so this one stops. Run the same"
            " command again to wait for the other's result."
        )

    def failed(self, error: Exception) -> None:
        """Note a failed request. The first one in a row is logged."""
        if not self.problem:
            log.warning(
                "%s cannot be renewed now (%s): trying again for up to %.0f s",
                self.where,
                str(error).rstrip("."),
                max(0.0, self.until - now()),
            )
        self.problem = str(error) or type(error).__name__

    def raise_if_lost(self) -> None:
        if not self.valid():
            raise LeaseLostError(self.lost)


class Lease:
    """A lease that is held in a `with` block; a thread renews it.

    While another runner holds the lease, this one waits. If `done` returns True between two polls,
    the other runner has finished the work, and the wait ends with `held` False.

    Args:
        store: the root.
        key: key of the lease file.
        done: returns whether the work is finished.
        interval: a third of the seconds after which a lease without renewals is taken over.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        *,
        done: Callable[[], bool] = lambda: False,
        interval: float = HEARTBEAT_S,
    ) -> None:
        self.store, self.key, self.interval = store, key, interval
        self.attempt = 1
        self.waited = False
        self._done = done
        self._me = _owner()
        self._belief = _Belief(f"{store.label}/{key}", MISSED * interval)
        self._heartbeat = min(interval, HEARTBEAT_S)
        self._quick = store
        self._tag = ""
        self._beat = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._renew_regularly, daemon=True)
        self._before: Token[tuple[_Surrounding, ...]] | None = None

    @property
    def held(self) -> bool:
        """Return whether this runner holds the lease, by its own clock."""
        return bool(self._tag) and self._belief.valid()

    def __enter__(self) -> Lease:
        self._acquire()
        if self._tag:
            # With short timeouts, several renewals fit into the time before the lease expires.
            self._quick = self.store.hurried(max(LEAST_TIMEOUT_S, self._heartbeat / 2))
            self._before = _around.set((*_around.get(), self))
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._before is not None:
            _around.reset(self._before)
            self._before = None
            self._stop.set()
            self._thread.join(HEARTBEAT_S)
        if not self._thread.is_alive():  # a hung renewal may still write: the lease expires
            self._release()

    def raise_if_lost(self) -> None:
        """Raise LeaseLostError if the lease is lost, as far as this process knows."""
        self._belief.raise_if_lost()

    def check(self) -> None:
        """Renew the lease now. Raise LeaseLostError if another runner has, or may have, taken it.

        While storage does not answer, it tries again until the lease expires.
        """
        while True:
            self.raise_if_lost()
            if self._lock.acquire(timeout=min(1.0, self._heartbeat)):
                try:
                    if self._renew():
                        return
                finally:
                    self._lock.release()
                if self._belief.valid():
                    time.sleep(self._heartbeat / 8)

    def reference(self) -> dict[str, Any]:
        """Return what a `Follower` in another process needs, as JSON."""
        return {"key": self.key, "owner": self._me["owner"], "interval": self.interval}

    def _acquire(self) -> None:
        seen: tuple[str, float] | None = None  # a tag, and when it was seen first
        while not self._done():
            begun = now()
            tag = self.store.create(self.key, self._body())
            if tag is None:
                looked = now()
                try:
                    data, found = self.store.read_tagged(self.key)
                except FileNotFoundError:
                    continue
                other = _parse(data)
                if seen is None or seen[0] != found:
                    seen = (found, now())
                if not self._may_take(other, looked - seen[1]):
                    check_leases()  # those around this one
                    self._log_wait(other)
                    time.sleep(min(1.0, self._heartbeat / 4))
                    continue
                if not self._is_mine(other):
                    self.attempt = int(_number(other, "attempt", 0)) + 1
                begun = now()
                tag = self.store.replace(self.key, self._body(), found)
            if tag is not None:
                self._tag = tag
                self._belief.renewed(begun)
                if now() - begun <= self._heartbeat:
                    return
                self._beat += 1  # the answer came late: write once more, to hold it for certain
        self._release()

    def _may_take(self, other: Mapping[str, Any], unchanged: float) -> bool:
        return (
            bool(other.get("released"))
            or self._is_mine(other)  # written by a request whose answer was lost
            or _is_dead_here(other, self._me)
            or unchanged > self._patience(other)
        )

    def _patience(self, other: Mapping[str, Any]) -> float:
        """Return the seconds without a sign after which another's record has expired."""
        interval = _number(other, "interval", self.interval)
        return MISSED * min(interval, _LONGEST_INTERVAL_S)

    def _is_mine(self, record: Mapping[str, Any]) -> bool:
        return bool(record.get("owner") == self._me["owner"])

    def _log_wait(self, other: Mapping[str, Any]) -> None:
        if not self.waited:
            self.waited = True
            log.info(
                "another runner (%s, process %s) is running %s: waiting for it, or until it gives"
                " no sign for %.0f s",
                printable(str(other.get("host", "?"))),
                printable(str(other.get("pid", "?"))),
                posixpath.dirname(self.key),
                self._patience(other),
            )

    def _renew_regularly(self) -> None:
        pause = self._heartbeat
        while not self._stop.wait(pause) and self._belief.valid():
            with self._lock:
                pause = self._heartbeat if self._renew() else self._heartbeat / 4

    def _renew(self) -> bool:
        """Raise the counter. Return False if that failed or the lease is lost."""
        if not self._belief.valid():
            return False
        begun = now()
        self._beat += 1
        try:
            tag = self._quick.replace(self.key, self._body(), self._tag)
            if tag is None and (mine := self._stored_tag()):
                tag = self._quick.replace(self.key, self._body(), mine)
        except Exception as error:  # whatever it is, the thread goes on and the clock decides
            self._belief.failed(error)
            return False
        if tag is None:
            self._belief.taken()
            return False
        self._tag = tag
        self._belief.renewed(begun)
        return self._belief.valid()

    def _stored_tag(self) -> str | None:
        """Return the tag of a record that is ours after all, because an answer was lost."""
        try:
            data, tag = self._quick.read_tagged(self.key)
        except FileNotFoundError:
            return None
        return tag if self._is_mine(_parse(data)) else None

    def _release(self) -> None:
        """Give the lease back, unless the record is another runner's by now."""
        tag, self._tag = self._tag, ""
        if not tag:
            return
        try:
            if not self._give_back(tag) and (mine := self._stored_tag()):
                self._give_back(mine)
        except (OSError, PipelineError):
            # An unreachable store must not hide the outcome of the block. The lease expires
            # without renewals.
            pass

    def _give_back(self, tag: str) -> bool:
        if self._quick.delete_if(self.key, tag):
            return True
        # S3 cannot delete by tag everywhere, so the record stays, with a mark. Programs of earlier
        # versions do not know the mark, and wait three intervals of 0 s.
        released = self._body(released=True, interval=0.0)
        return self._quick.replace(self.key, released, tag) is not None

    def _body(self, **more: Any) -> bytes:
        record = {
            **self._me,
            "attempt": self.attempt,
            "heartbeat": self._beat,
            "interval": self.interval,
            **more,
        }
        return json.dumps(record, indent=1).encode()


class Follower:
    """The lease of another process, for a worker of it. A thread reads the record regularly.

    In a `with` block, `check_leases` and `confirm_leases` ask about this lease too.

    Args:
        store: the root.
        reference: of the lease: `Lease.reference`.
    """

    def __init__(self, store: Store, reference: Mapping[str, Any]) -> None:
        self.key, self._owner = reference["key"], reference["owner"]
        interval = float(reference["interval"])
        self._belief = _Belief(f"{store.label}/{self.key}", MISSED * interval)
        self._heartbeat = min(interval, HEARTBEAT_S)
        self._quick = store.hurried(max(LEAST_TIMEOUT_S, self._heartbeat / 2))
        self._belief.renewed(now())  # its owner has just started this process
        self._seen = ("", now())  # the last tag, and when a look began that still found it
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._look_regularly, daemon=True)
        self._before: Token[tuple[_Surrounding, ...]] | None = None

    def __enter__(self) -> Follower:
        self._before = _around.set((*_around.get(), self))
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            _around.reset(self._before)
        self._stop.set()

    def raise_if_lost(self) -> None:
        """Raise LeaseLostError if the lease is lost, as far as this process knows."""
        self._belief.raise_if_lost()

    def check(self) -> None:
        """Read the record now. Raise LeaseLostError if its owner has lost it, or StorageError."""
        self.raise_if_lost()
        try:
            self._look()
        except StorageError:
            self.raise_if_lost()
            raise
        except OSError as error:
            self.raise_if_lost()
            raise storage_error(error, self._belief.where) from error
        self.raise_if_lost()

    def _look_regularly(self) -> None:
        while self._belief.valid():
            try:
                self._look()
            except Exception as error:  # whatever it is, the thread goes on and the clock decides
                self._belief.failed(error)
            if self._stop.wait(self._heartbeat):
                return

    def _look(self) -> None:
        with self._lock:
            begun = now()
            try:
                data, tag = self._quick.read_tagged(self.key)
            except FileNotFoundError:
                data, tag = b"", ""
            record = _parse(data)
            if record.get("owner") != self._owner or record.get("released"):
                self._belief.taken()
            elif tag != self._seen[0]:  # written after the last look that found another tag
                self._belief.renewed(self._seen[1])
            self._seen = (tag, begun)


def is_claimed(store: Store, key: str) -> bool:
    """Return whether a runner holds a lease, or was killed while it held it."""
    try:
        return not _parse(store.read(key)).get("released")
    except FileNotFoundError:
        return False


def is_running(store: Store, key: str) -> bool:
    """Return whether a lease is claimed, and not by a process of this machine that has ended."""
    try:
        record = _parse(store.read(key))
    except FileNotFoundError:
        return False
    return not record.get("released") and not _is_dead_here(record, _owner())


def now() -> float:
    """Return seconds of a clock that also runs while the machine sleeps."""
    if hasattr(time, "CLOCK_BOOTTIME"):
        return time.clock_gettime(time.CLOCK_BOOTTIME)
    return time.monotonic()


def _owner() -> dict[str, Any]:
    return {
        "owner": secrets.token_hex(8),
        "host": socket.gethostname(),
        "boot": boot(),
        "pid": os.getpid(),
        "started": process_start(os.getpid()),
    }


def _parse(data: bytes) -> dict[str, Any]:
    try:
        record = parse_json(data)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _number(record: Mapping[str, Any], name: str, otherwise: float) -> float:
    """Return a number of a record, or `otherwise` if it has no such number."""
    value = record.get(name)
    sound = isinstance(value, int | float) and 0 <= value < _LARGEST_NUMBER
    return float(value) if sound and value is not None else otherwise


def _is_dead_here(other: Mapping[str, Any], me: Mapping[str, Any]) -> bool:
    """Return whether the owner was a process of this machine, since its boot, that has ended."""
    if not me["boot"] or other.get("boot") != me["boot"] or other.get("host") != me["host"]:
        return False
    return process_start(int(_number(other, "pid", 0))) != other.get("started")
