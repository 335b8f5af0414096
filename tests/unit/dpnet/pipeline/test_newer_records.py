"""Records of a newer version: an unknown field is ignored, a newer format number is refused."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small_root

from data_prep.core.errors import PipelineError
from data_prep.core.lease import Lease, is_claimed
from data_prep.core.manifest import FileRecord, StageRef, read_manifest
from data_prep.core.storage.local import LocalStore
from data_prep.images import watch
from data_prep.images.findings import (
    FAILED,
    Finding,
    ShardRecord,
    read_record,
    record_path,
    write_record,
)
from data_prep.shards.shards import Folder, read_index, write_shard
from dpnet.model_store import records
from dpnet.pipeline.config import load_config
from dpnet.pipeline.verify import verify
from dpnet.tracking.run_log import read_status
from dpnet.training.checkpoints import FORMAT, marks
from dpnet.training.job import TrainJob
from flows.local_server import up


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


def add_column(store: LocalStore, key: str) -> None:
    """Give a table one column more, as a newer version might."""
    table = pq.read_table(pa.BufferReader(store.read(key)))
    table = table.append_column("newer", pa.array(["x"] * len(table), pa.string()))
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    store.write(key, sink.getvalue().to_pybytes())


def add_fields(store: LocalStore, key: str, **fields: Any) -> None:
    store.write(key, json.dumps(json.loads(store.read(key)) | {"newer": 1, **fields}).encode())


def test_a_shards_record_with_one_column_more_still_spares_the_work(store: LocalStore) -> None:
    place = Folder(store, "images/a/b")
    file = FileRecord("train-000000.tar", 5, "0" * 64, samples=2)
    record = ShardRecord("task", [file], [Finding("1" * 64), Finding(outcome=FAILED, reason="x")])
    write_record(place, "train-000000", record)
    key = place.key(record_path("train-000000"))
    add_column(store, key)
    assert read_record(place, "train-000000") == record
    table = pq.read_table(pa.BufferReader(store.read(key)))
    files = json.dumps([{**file.to_json(), "newer": 1}]).encode()
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({b"task": b"task", b"files": files}), sink)
    store.write(key, sink.getvalue().to_pybytes())
    assert read_record(place, "train-000000") == record


def test_an_index_with_one_column_more_is_read(store: LocalStore) -> None:
    place = Folder(store, "images/a/b")
    write_shard(place, "train-000000", iter([("k", {"png": b"x"}, {"split": "train"})]))
    before = read_index(store, place.key("train-000000.tar"))
    add_column(store, place.key("train-000000.parquet"))
    assert read_index(store, place.key("train-000000.tar")) == [{**before[0], "newer": "x"}]


def test_a_manifest_with_one_field_more_verifies_with_a_note(store: LocalStore) -> None:
    ref = small_root.commit(store, "data", "data/a", {"file": b"x"})
    key = f"{ref.folder}/manifest.json"
    add_fields(store, key)
    found = json.loads(store.read(key))
    found["files"][0]["codec"] = "y"
    store.write(key, json.dumps(found).encode())
    assert read_manifest(store, ref.folder).files[0].path == "file"
    result = verify(store)
    assert result.problems == []
    assert result.notes == [
        f"{key} has fields that this version does not know (codec, newer): a newer version of dpnet"
        " wrote it, or it was altered."
    ]


def test_a_checkpoints_mark_with_one_field_more_is_read(store: LocalStore) -> None:
    mark = {"format": FORMAT, "step": 5, "score": None, "asked": {}, "finished": "", "newer": 1}
    mark["files"] = {name: {"sha256": "0", "newer": 1} for name in ("state.pt", "log.jsonl")}
    store.write("runs/a/step-00000005/checkpoint.json", json.dumps(mark).encode())
    assert [each.step for each in marks(store, "runs/a")] == [5]
    mark["asked"] = []
    store.write("runs/a/step-00000005/checkpoint.json", json.dumps(mark).encode())
    with pytest.raises(PipelineError, match=r"checkpoint\.json is damaged"):
        marks(store, "runs/a")


def registry_record(store: LocalStore) -> tuple[str, Callable[[], Any]]:
    key = "registry/dpnet/v1.json"
    store.write(key, json.dumps({"version": 1, "model": "dpnet", "run": {"folder": "r"}}).encode())
    return key, lambda: records.read_record(store, key)["version"]


def watched(store: LocalStore) -> tuple[str, Callable[[], Any]]:
    key = "images/a/watch.json"
    store.write(key, json.dumps(asdict(watch.Watched("d", 1.0, "e"))).encode())
    return key, lambda: watch.read(store, key)


@pytest.mark.parametrize("make", [registry_record, watched])
def test_a_record_ignores_one_field_more_and_refuses_a_newer_format(
    store: LocalStore, make: Callable[[LocalStore], tuple[str, Callable[[], Any]]]
) -> None:
    key, read = make(store)
    before = read()
    add_fields(store, key, format=1)
    assert read() == before
    add_fields(store, key, format=2)
    with pytest.raises(PipelineError, match=rf"{key} has format 2, this version reads 1: use the"):
        read()


@pytest.mark.parametrize("data", [b"[]", b"3", b'"x"', b"null"])
def test_a_record_that_is_no_mapping_was_altered(store: LocalStore, data: bytes) -> None:
    for make in (registry_record, watched):
        key, read = make(store)
        store.write(key, data)
        with pytest.raises(PipelineError, match="was altered"):
            read()


def test_verify_names_a_registry_record_of_a_newer_format(store: LocalStore) -> None:
    small_root.commit(store, "data", "data/a", {"file": b"x"})
    key, _ = registry_record(store)
    add_fields(store, key, format=2)
    (problem,) = verify(store).problems
    assert problem.where == key
    assert "has format 2" in problem.problem


def test_a_status_and_a_lease_with_one_field_more_are_read(store: LocalStore) -> None:
    store.write("runs/a/status.json", b'{"step": 1}')
    add_fields(store, "runs/a/status.json", format=2)
    assert read_status(store, "runs/a")["step"] == 1
    with Lease(store, "runs/a/lease.json") as lease:
        add_fields(store, "runs/a/lease.json", format=2)
        assert is_claimed(store, "runs/a/lease.json")
        lease.check()


def test_a_running_dpnet_up_of_a_newer_version_is_found(tmp_path: Path) -> None:
    running = up.Running(1, "r", "a", "u", "m", "x", None)
    home = up.home_of(LocalStore(tmp_path))
    home.mkdir(parents=True)
    (home / up.STATE).write_text(json.dumps({**running.to_json(), "newer": 1}))
    with (home / up.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert up.find_running(str(tmp_path)) == running


@pytest.mark.parametrize(
    "damage",
    [{"api_url": 5}, {"api_url": "a\0b"}, {"ray_url": ["x"]}, {"pid": "1"}, {"root": None}],
)
def test_a_damaged_state_of_dpnet_up_is_no_running_one(
    tmp_path: Path, damage: dict[str, Any]
) -> None:
    home = up.home_of(LocalStore(tmp_path))
    home.mkdir(parents=True)
    found = up.Running(1, "r", "a", "u", "m", "x", None).to_json()
    (home / up.STATE).write_text(json.dumps(found | damage))
    with (home / up.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert up.find_running(str(tmp_path)) is None


def job() -> TrainJob:
    config = load_config("demo")
    ref = StageRef("images", "a", "images/a/b", "0" * 64, "1" * 64, 0.0, skipped=True)
    return TrainJob("r", "f", ref, ref, config.model, config.losses, config.train, {})


def test_a_job_of_a_newer_version_is_read_if_it_is_the_same_training() -> None:
    record = json.loads(json.dumps(job().to_json()))
    record["images"]["newer"] = 1
    record["newer"] = None
    assert TrainJob.from_json(record) == job()


@pytest.mark.parametrize("section", ["model", "losses", "settings", ""])
def test_a_job_with_an_unknown_setting_is_refused_in_a_sentence(section: str) -> None:
    record = json.loads(json.dumps(job().to_json()))
    (record[section] if section else record)["newer"] = 1
    with pytest.raises(PipelineError, match=r"another version of dpnet \(.*newer.*\): install"):
        TrainJob.from_json(record)
    assert replace(job(), folder="g") != job()
