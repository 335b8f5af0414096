"""The files that a running training publishes: `status.json`, `log.jsonl` and validation images.

A thread writes them, so training never waits for storage. A write that fails is skipped, since
each checkpoint holds the log too.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from data_prep.core.errors import StorageError
from data_prep.core.storage.store import Store

STATUS, LOG = "status.json", "log.jsonl"
LOCAL_S, REMOTE_S = 0.5, 5.0  # shortest time between two writes of the same object


class Journal:
    """Publishes the newest status and log of a run. Closing it writes the last ones."""

    def __init__(self, store: Store, run: str) -> None:
        self.store, self.run = store, run
        self._every = LOCAL_S if store.local_folder else REMOTE_S
        self._new: dict[str, bytes] = {}
        self._lock = threading.Lock()
        self._wake, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._work, name="dpnet-journal", daemon=True)
        self._thread.start()

    def status(self, record: Mapping[str, Any]) -> None:
        """Publish `record` with the present `time`, in seconds since 1970."""
        self._put(STATUS, json.dumps({**record, "time": round(time.time(), 3)}).encode())

    def log(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Publish the whole log."""
        self._put(LOG, encode_log(records))

    def picture(self, step: int, png: bytes) -> None:
        """Publish the strip of validation images at a step."""
        self._put(f"pictures/step-{step:08d}.png", png)

    def close(self) -> None:
        """Write the newest status and log, and stop the thread."""
        self._closed = True
        self._wake.set()
        self._thread.join()

    def _put(self, name: str, data: bytes) -> None:
        with self._lock:
            self._new[name] = data
        self._wake.set()

    def _work(self) -> None:
        while True:
            self._wake.wait()
            closed = self._closed
            self._wake.clear()
            with self._lock:
                new, self._new = self._new, {}
            begun = time.monotonic()
            for name, data in new.items():
                try:
                    self.store.write(f"{self.run}/{name}", data)
                except StorageError:
                    continue
            if closed:
                return
            while not self._closed and time.monotonic() - begun < self._every:
                time.sleep(0.05)


def read_status(store: Store, run: str) -> dict[str, Any]:
    """Return the newest status, or {} if there is none or it cannot be read now."""
    try:
        record = json.loads(store.read(f"{run}/{STATUS}"))
    except (OSError, ValueError, StorageError):
        return {}
    return record if isinstance(record, dict) else {}


def read_log(store: Store, folder: str) -> list[dict[str, Any]]:
    """Return the records of a run's log so far, or [] if there is no log."""
    try:
        data = store.read(f"{folder}/{LOG}")
    except FileNotFoundError:
        return []
    return decode_log(data)


def encode_log(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Return a log's file: one record of JSON a line."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def decode_log(data: bytes) -> list[dict[str, Any]]:
    """Return the records of a log's file.

    Raises:
        ValueError: a line is not JSON.
    """
    return [json.loads(line) for line in data.splitlines() if line.strip()]


def hours_worked(log: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """Return the hours of workers with a GPU and without one.

    Logs of earlier versions do not hold the number of workers, which was one then.
    """
    gpu = cpu = 0.0
    for record in log:
        if record.get("kind") != "train":
            continue
        seconds = record["seconds"] + record.get("other_seconds", 0.0)
        hours = seconds * record.get("workers", 1) / 3600
        if "gpu_memory_gb" in record:
            gpu += hours
        else:
            cpu += hours
    return gpu, cpu
