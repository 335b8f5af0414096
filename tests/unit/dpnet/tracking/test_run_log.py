"""The log and the status that a run publishes in its folder."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from lease_thief import steal

from data_prep.core.errors import StorageError
from data_prep.core.lease import Lease
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from dpnet.tracking import run_log
from dpnet.tracking.run_log import (
    PART,
    Journal,
    LogReader,
    decode_log,
    encode_log,
    hours_worked,
    read_log,
    read_status,
    remove_parts,
)

RECORDS = [{"kind": "validation", "step": 0}, {"kind": "train", "step": 5, "seconds": 1.5}]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def test_a_log_is_one_record_a_line_and_reads_back_as_it_was() -> None:
    data = encode_log(RECORDS)
    assert data.splitlines()[0] == b'{"kind": "validation", "step": 0}'
    assert len(data.splitlines()) == 2
    assert decode_log(data) == RECORDS


def test_empty_lines_of_a_log_are_skipped() -> None:
    assert decode_log(b"\n" + encode_log(RECORDS) + b"\n  \n") == RECORDS


def test_a_damaged_log_is_an_error() -> None:
    with pytest.raises(ValueError, match="Unterminated string"):
        decode_log(b'{"kind": "train"}\n{"kin\n')


def test_a_run_without_a_log_has_no_records(store: LocalStore) -> None:
    assert read_log(store, "runs/none") == []
    assert read_status(store, "runs/none") == {}


def test_the_newest_log_and_status_are_published_when_the_journal_is_closed(
    store: LocalStore,
) -> None:
    with closing(Journal(store, "runs/a")) as journal:
        journal.log(RECORDS[:1])
        journal.log(RECORDS)
        journal.status({"step": 5})
        journal.picture(5, b"a PNG")
    assert read_log(store, "runs/a") == RECORDS
    status = read_status(store, "runs/a")
    assert status["step"] == 5
    assert status["time"] > 0
    assert store.read("runs/a/pictures/step-00000005.png") == b"a PNG"


def test_a_training_that_lost_its_lease_publishes_nothing(store: LocalStore) -> None:
    with Lease(store, "runs/a/lease.json"), closing(Journal(store, "runs/a")) as journal:
        journal.status({"step": 5})
        deadline = time.monotonic() + 60
        while not read_status(store, "runs/a"):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        steal(store, "runs/a/lease.json")
        journal.status({"step": 6})
        journal.log(RECORDS)
        journal.picture(6, b"a PNG")
    assert read_status(store, "runs/a")["step"] == 5
    assert [entry.key for entry in store.list("runs/a")] == [
        "runs/a/lease.json",
        "runs/a/status.json",
    ]


def records_of(count: int, attempt: str = "") -> list[dict[str, Any]]:
    """Return records like those of a training, of about 300 bytes."""
    losses = dict.fromkeys(("hole", "valid", "adversarial", "discriminator"), 0.123456)
    return [
        {"kind": "train", "step": 25 * number, "losses": losses, "note": f"{attempt}{'x' * 150}"}
        for number in range(1, count + 1)
    ]


def publish(store: Store, records: list[dict[str, Any]]) -> None:
    with closing(Journal(store, "runs/a")) as journal:
        journal.log(records)


def parts(store: Store) -> list[str]:
    return [entry.key.rpartition("/")[2] for entry in store.list("runs/a/log")]


@pytest.fixture(params=["folder", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return open_store(request.getfixturevalue("moto_root"))
    return LocalStore(tmp_path)


@pytest.mark.parametrize("count", [1, PART - 1, PART, PART + 1, 3 * PART + 5])
def test_a_log_in_parts_reads_back_whole(root: Store, count: int) -> None:
    publish(root, records_of(count))
    assert read_log(root, "runs/a") == records_of(count)
    assert len(parts(root)) == -(-count // PART)


def test_a_reader_gets_each_record_once(store: LocalStore) -> None:
    every, reader = records_of(3 * PART), LogReader(store, "runs/a")
    assert reader.read() == []
    with closing(Journal(store, "runs/a")) as journal:
        journal.log(every[:1])
    seen = reader.read()
    assert seen == every[:1]
    for count in (5, PART, PART, PART + 1, 3 * PART - 1, 3 * PART):
        publish(store, every[:count])
        seen += reader.read()
        assert (seen, reader.count) == (every[:count], count)
        assert reader.read() == []


@pytest.mark.parametrize("kept", [3, PART, PART + 3])
def test_a_resumed_run_repeats_no_record(root: Store, kept: int) -> None:
    publish(root, records_of(3 * PART, "first "))
    reader = LogReader(root, "runs/a")
    reader.read()
    log = records_of(3 * PART, "first ")[:kept]  # the checkpoint's
    log += records_of(kept + 2, "second ")[kept:]
    publish(root, log[: kept + 1])
    assert read_log(root, "runs/a") == log[: kept + 1]
    assert reader.read() == log[: kept + 1]  # from the first one again
    publish(root, log)
    assert reader.read() == log[kept + 1 :]


def test_a_last_line_that_was_cut_short_is_ignored(store: LocalStore) -> None:
    publish(store, records_of(3))
    key = "runs/a/log/000000.jsonl"
    whole = store.read(key)
    for cut in (1, 10, 100):
        store.write(key, whole[:-cut])
        assert read_log(store, "runs/a") == records_of(3 if cut == 1 else 2)
    store.write("runs/b/log.jsonl", whole[:-10])
    assert read_log(store, "runs/b") == records_of(2)


def test_a_log_of_an_earlier_version_is_read_and_replaced(store: LocalStore) -> None:
    store.write("runs/a/log.jsonl", encode_log(records_of(50)))
    reader = LogReader(store, "runs/a")
    assert reader.read() == read_log(store, "runs/a") == records_of(50)
    assert reader.read() == []
    publish(store, records_of(40))
    assert reader.read() == read_log(store, "runs/a") == records_of(40)


def test_the_merged_log_is_read_in_place_of_its_parts(root: Store) -> None:
    publish(root, records_of(70))
    root.write("runs/a/log.jsonl", encode_log(records_of(70)))
    remaining = parts(root)
    while remaining:  # a removal that is interrupted
        root.delete(f"runs/a/log/{remaining.pop(0)}")
        assert read_log(root, "runs/a") == records_of(70)
    publish(root, records_of(70))
    remove_parts(root, "runs/a")
    assert parts(root) == []
    assert read_log(root, "runs/a") == records_of(70)
    assert root.local_folder is None or not (root.local_folder / "runs/a/log").exists()


def test_a_part_that_storage_refused_is_written_later(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "LOCAL_S", 0.0)
    real, away = LocalStore.write, threading.Event()

    def write(self: LocalStore, key: str, data: bytes) -> None:
        if away.is_set():
            raise StorageError("not now")
        real(self, key, data)

    monkeypatch.setattr(LocalStore, "write", write)
    with closing(Journal(store, "runs/a")) as journal:
        away.set()
        journal.log(records_of(PART))
        wait_until(lambda: journal._wake.is_set() is False and journal._new != {})
        journal.log(records_of(PART + 1))
        away.clear()
        journal.status({"step": 1})
    assert read_log(store, "runs/a") == records_of(PART + 1)


def wait_until(reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


class Counting(LocalStore):
    """A folder that counts its operations and bytes."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.written = self.read_ = self.writes = self.reads = 0

    def write(self, key: str, data: bytes) -> None:
        super().write(key, data)
        self.written += len(data)
        self.writes += 1

    def read(self, key: str) -> bytes:
        self.reads += 1
        data = super().read(key)
        self.read_ += len(data)
        return data


def test_bytes_and_operations_grow_with_the_number_of_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_log, "LOCAL_S", 0.0)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # a thousand would take long
    every = records_of(1000)
    store, seen = Counting(tmp_path), list[dict[str, Any]]()
    reader, halfway = LogReader(store, "runs/a"), dict[str, int]()
    with closing(Journal(store, "runs/a")) as journal:
        for count in range(1, 1001):
            journal.log(every[:count])
            wait_until(lambda count=count: store.writes >= count)  # type: ignore[misc]
            seen += reader.read()
            if count == 500:
                halfway = {name: getattr(store, name) for name in ("written", "read_", "reads")}
    size = len(encode_log(every))
    assert seen == every
    assert store.writes == 1000
    assert store.reads <= 2.1 * 1000
    for name in ("written", "read_", "reads"):
        assert getattr(store, name) <= 2.05 * halfway[name], name
    assert store.written <= (PART + 1) / 2 * size * 1.05
    assert store.read_ <= (PART + 1) / 2 * size * 1.1


WRITER = """
import sys
from data_prep.core.storage.local import LocalStore
from dpnet.tracking import run_log
from test_run_log import records_of, wait_until

run_log.LOCAL_S = 0.0
store = LocalStore(__import__("pathlib").Path(sys.argv[1]))
journal, every = run_log.Journal(store, "runs/a"), records_of(10_000)
reader = run_log.LogReader(store, "runs/a")
for count in range(1, 10_001):
    journal.log(every[:count])
    wait_until(lambda: bool(reader.read()))
    print(count, flush=True)
"""


def test_a_kill_loses_at_most_the_last_record(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    for number in (1, PART, 3 * PART + 1):
        folder = tmp_path / str(number)
        command = [sys.executable, "-c", WRITER, str(folder)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
            assert child.stdout is not None
            while (line := child.stdout.readline()) and int(line) < number:
                pass
            child.kill()
            published = [number, *map(int, child.stdout.read().split())][-1]
        left = read_log(LocalStore(folder), "runs/a")
        assert len(left) in (published, published + 1)
        assert left == records_of(len(left))


def test_a_damaged_status_counts_as_none(store: LocalStore) -> None:
    store.write("runs/a/status.json", b"{")
    assert read_status(store, "runs/a") == {}
    store.write("runs/a/status.json", b"[]")
    assert read_status(store, "runs/a") == {}


def test_hours_are_counted_for_each_worker_with_a_gpu_and_without() -> None:
    log = [
        {"kind": "validation", "step": 0},
        {"kind": "train", "seconds": 1800.0},  # of an earlier version: one worker
        {"kind": "train", "seconds": 3000.0, "other_seconds": 600.0, "workers": 2},
        {"kind": "train", "seconds": 3600.0, "workers": 4, "gpu_memory_gb": 7.5},
    ]
    assert hours_worked(log) == (4.0, 2.5)
