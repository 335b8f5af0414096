"""The log and the status that a run publishes in its folder."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import pytest

from data_prep.core.storage.local import LocalStore
from dpnet.tracking.run_log import (
    Journal,
    decode_log,
    encode_log,
    hours_worked,
    read_log,
    read_status,
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
