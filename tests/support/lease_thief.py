"""Another runner that takes over the lease of the running test."""

from __future__ import annotations

import time

from data_prep.core.errors import LeaseLostError
from data_prep.core.lease import check_leases
from data_prep.core.storage.store import Store

OTHER = b'{"owner": "other", "host": "elsewhere"}'


def steal(store: Store, *keys: str) -> None:
    """Write another owner into the records of leases.

    As a real runner does it, with a compare-and-swap: a plain write can come between the two
    halves of a renewal, which then overwrites it.
    """
    assert keys
    for key in keys:
        while True:
            data, tag = store.read_tagged(key)
            assert b'"owner": ' in data
            if store.replace(key, OTHER, tag) is not None:
                break


def steal_and_wait(store: Store, *keys: str) -> None:
    """Take leases over, and wait until a heartbeat of this process has noticed it."""
    steal(store, *keys)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            check_leases()
        except LeaseLostError:
            return
        time.sleep(0.01)
    raise AssertionError("no heartbeat has noticed it")


def leases(store: Store, top: str) -> list[str]:
    """Return the keys of the leases below a folder."""
    return [entry.key for entry in store.list(top) if entry.key.endswith("lease.json")]
