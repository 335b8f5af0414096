"""The files that a running training publishes: `status.json`, its log and validation images.

While training runs, the log is a folder of parts: `log/000000.jsonl` has the first PART records,
`log/000001.jsonl` the next ones. Only the newest part is written again. So the bytes of all writes,
and those of a reader that follows, grow with the number of records and not with its square. At the
end the train stage writes all records to `log.jsonl` and removes the parts.

A thread writes the files, so training never waits for storage. A write that fails is skipped, and
that of a part is tried again with the next status. Each checkpoint holds the log too.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from contextvars import copy_context
from typing import Any

from data_prep.core.errors import LeaseLostError, StorageError
from data_prep.core.lease import confirm_leases
from data_prep.core.paths import manifest_key
from data_prep.core.record import parse_json
from data_prep.core.storage.store import Store

STATUS, LOG, PARTS = "status.json", "log.jsonl", "log"
PART = 32  # most records in a part
LOCAL_S, REMOTE_S = 0.5, 5.0  # shortest time between two writes of the same object


class Journal:
    """Publishes the newest status and log of a run. Closing it writes the last ones."""

    def __init__(self, store: Store, run: str) -> None:
        self.store, self.run = store, run
        self._every = LOCAL_S if store.local_folder else REMOTE_S
        self._new: dict[str, bytes] = {}
        self._logged = 0  # records given so far
        self._swept = False  # whether the parts of an earlier attempt are removed
        self._lock = threading.Lock()
        self._wake, self._closed = threading.Event(), False
        context = copy_context()  # with the leases around this call
        self._thread = threading.Thread(
            target=context.run, args=(self._work,), name="dpnet-journal", daemon=True
        )
        self._thread.start()

    def status(self, record: Mapping[str, Any]) -> None:
        """Publish `record` with the present `time`, in seconds since 1970."""
        self._put(STATUS, json.dumps({**record, "time": round(time.time(), 3)}).encode())

    def log(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Publish the log. After the first call, only the records since the last call are new.

        Args:
            records: All records so far.
        """
        if len(records) == self._logged:
            return
        for start in range(self._logged // PART * PART, len(records), PART):
            self._put(_part(start // PART), encode_log(records[start : start + PART]))
        self._logged = len(records)

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
            failed = {name: data for name, data in new.items() if not self._publish(name, data)}
            with self._lock:  # a part that is complete is not given again
                parts = {
                    name: data for name, data in failed.items() if name.startswith(f"{PARTS}/")
                }
                self._new = {**parts, **self._new}
            if closed:
                return
            while not self._closed and time.monotonic() - begun < self._every:
                time.sleep(0.05)

    def _publish(self, name: str, data: bytes) -> bool:
        """Write a file. Return whether storage took it."""
        try:
            confirm_leases()  # two trainings must never write one run
            if _is_part(name) and not self._swept:
                self._remove_parts_after(name)
                self._swept = True
            self.store.write(f"{self.run}/{name}", data)
        except (StorageError, LeaseLostError, OSError):
            return False
        return True

    def _remove_parts_after(self, name: str) -> None:
        """Remove later parts, which an earlier attempt wrote after the present checkpoint."""
        keys = [entry.key for entry in self.store.list(f"{self.run}/{PARTS}")]
        for key in reversed(keys):  # so that the remaining parts have no gap
            if key > f"{self.run}/{name}":
                self.store.delete(key)


class LogReader:
    """A reader that follows a run's log and reads only what is new.

    Attributes:
        count: Number of records in the log at the last read.
    """

    def __init__(self, store: Store, folder: str) -> None:
        self.store, self.folder = store, folder
        self.count = 0
        self._part, self._seen = 0, list[bytes]()  # the newest part, and its lines at the last read
        self._whole = b""  # log.jsonl at the last read

    def read(self) -> list[dict[str, Any]]:
        """Return the records since the last call.

        The whole log is returned again after training resumed from an earlier record, and when the
        parts became `log.jsonl`.

        Raises:
            ValueError: A line is not JSON.
        """
        lines = self._lines(self._part)
        if self._seen and lines[: len(self._seen)] != self._seen:
            self._part, self._seen = 0, []
            lines = self._lines(0)
        if not lines:
            return self._read_whole()
        new = lines[len(self._seen) :]
        while len(lines) == PART and (following := self._lines(self._part + 1)):
            self._part += 1
            lines = following
            new += lines
        self._seen = lines
        self.count = self._part * PART + len(lines)
        return [parse_json(line) for line in new]

    def _lines(self, number: int) -> list[bytes]:
        """Return the lines of a part, or [] if there is no such part."""
        try:
            return _whole_lines(self.store.read(f"{self.folder}/{_part(number)}"))
        except FileNotFoundError:
            return []

    def _read_whole(self) -> list[dict[str, Any]]:
        """Return the records of `log.jsonl` if it is new, as it is in runs of earlier versions."""
        try:
            data = self.store.read(f"{self.folder}/{LOG}")
        except FileNotFoundError:
            data = b""
        if data == self._whole:
            return []
        self._whole = data
        records = [parse_json(line) for line in _whole_lines(data)]
        self.count = len(records)
        return records


def _part(number: int) -> str:
    return f"{PARTS}/{number:06d}.jsonl"


def _is_part(name: str) -> bool:
    return name.startswith(f"{PARTS}/")


def _whole_lines(data: bytes) -> list[bytes]:
    """Return the lines that are not empty, without a last one that was cut short."""
    lines = [line for line in data.splitlines() if line.strip()]
    if lines and not data.endswith(b"\n"):
        try:
            parse_json(lines[-1])
        except ValueError:
            del lines[-1]
    return lines


def read_status(store: Store, run: str) -> dict[str, Any]:
    """Return the newest status, or {} if there is none or it cannot be read now."""
    try:
        record = parse_json(store.read(f"{run}/{STATUS}"))
    except (OSError, ValueError, StorageError):
        return {}
    return record if isinstance(record, dict) else {}


def read_log(store: Store, folder: str) -> list[dict[str, Any]]:
    """Return the records of a run's log so far, or [] if there is no log.

    Raises:
        ValueError: A line is not JSON.
    """
    if not store.exists(manifest_key(folder)):
        return LogReader(store, folder).read()
    try:
        return decode_log(store.read(f"{folder}/{LOG}"))
    except FileNotFoundError:
        return []


def remove_parts(store: Store, folder: str) -> None:
    """Remove the parts of a log whose records are in `log.jsonl`."""
    # The first part first: without it, a reader takes log.jsonl.
    for entry in list(store.list(f"{folder}/{PARTS}")):
        store.delete(entry.key)
    if top := store.local_folder:
        with suppress(OSError):
            (top / folder / PARTS).rmdir()


def encode_log(records: Iterable[Mapping[str, Any]]) -> bytes:
    """Return a log's file: one record of JSON a line."""
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def decode_log(data: bytes) -> list[dict[str, Any]]:
    """Return the records of a log's file.

    Raises:
        ValueError: a line is not JSON.
    """
    return [parse_json(line) for line in data.splitlines() if line.strip()]


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
