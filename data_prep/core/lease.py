"""A lease: only one runner builds a stage at a time.

`lease.json` holds the owner, the attempt and a heartbeat counter. It is created and renewed by
compare-and-swap, so two runners never hold it together. A waiting runner takes it over if the
counter has not changed for three intervals of its own monotonic clock, so the clocks of machines
need not agree. If the owner was a process of this machine and has ended, it takes over at once.
"""

from __future__ import annotations

import json
import logging
import os
import posixpath
import secrets
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from data_prep.core.errors import LeaseLostError, PipelineError
from data_prep.core.process_identity import boot, process_start
from data_prep.core.storage.store import Store
from data_prep.core.text import printable

log = logging.getLogger(__name__)

HEARTBEAT_S = 10.0
MISSED = 3


class Lease:
    """A lease that is held in a `with` block; a thread renews it.

    While another runner holds the lease, this one waits. If `done` returns True between two polls,
    the other runner has finished the work, and the wait ends with `held` False.

    Args:
        store: the root.
        key: key of the lease file.
        done: returns whether the work is finished.
        interval: seconds between two renewals.
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
        self.held = False
        self.attempt = 1
        self._done = done
        self._me = _owner()
        self._tag = ""
        self._beat = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._renew_regularly, daemon=True)

    def __enter__(self) -> Lease:
        self._acquire()
        if self.held:
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._thread.is_alive():
            self._stop.set()
            self._thread.join()
        with self._lock:
            if self.held:
                self.held = False
                try:
                    self.store.delete(self.key)
                except PipelineError:
                    # An unreachable store must not hide the outcome of the block. The lease
                    # expires without renewals.
                    pass

    def check(self) -> None:
        """Renew the lease now. Raise LeaseLostError if another runner has taken it over."""
        with self._lock:
            self._renew()
            if not self.held:
                raise LeaseLostError(
                    f"{self.store.uri}/{self.key} was taken over by another runner, so this one"
                    " stops. Run the same command again to wait for the other's result."
                )

    def _acquire(self) -> None:
        seen: tuple[str, float] | None = None
        logged = False
        while not self._done():
            tag = self.store.create(self.key, self._body())
            if tag is not None:
                self._tag, self.held = tag, True
                return
            try:
                data, tag = self.store.read_tagged(self.key)
            except FileNotFoundError:
                continue
            other = _parse(data)
            now = time.monotonic()
            if seen is None or seen[0] != tag:
                seen = (tag, now)
            patience = MISSED * float(other.get("interval", self.interval))
            if _is_dead_here(other, self._me) or now - seen[1] > patience:
                self.attempt = int(other.get("attempt", 0)) + 1
                taken = self.store.replace(self.key, self._body(), tag)
                if taken is not None:
                    self._tag, self.held = taken, True
                    return
                continue
            if not logged:
                logged = True
                log.info(
                    "another runner (%s, process %s) is running %s: waiting for it",
                    printable(str(other.get("host", "?"))),
                    printable(str(other.get("pid", "?"))),
                    posixpath.dirname(self.key),
                )
            time.sleep(min(1.0, self.interval / 4))

    def _renew_regularly(self) -> None:
        while not self._stop.wait(self.interval):
            with self._lock:
                try:
                    self._renew()
                except PipelineError:
                    continue  # unreachable now; the next renewal or check() decides
            if not self.held:
                return

    def _renew(self) -> None:
        if self.held:
            self._beat += 1
            tag = self.store.replace(self.key, self._body(), self._tag)
            if tag is None:
                self.held = False
            else:
                self._tag = tag

    def _body(self) -> bytes:
        record = {
            **self._me,
            "attempt": self.attempt,
            "heartbeat": self._beat,
            "interval": self.interval,
        }
        return json.dumps(record, indent=1).encode()


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
        record = json.loads(data)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _is_dead_here(other: dict[str, Any], me: dict[str, Any]) -> bool:
    """Return whether the owner was a process of this machine, since its boot, that has ended."""
    if not me["boot"] or other.get("boot") != me["boot"] or other.get("host") != me["host"]:
        return False
    return process_start(int(other.get("pid", -1))) != other.get("started")
