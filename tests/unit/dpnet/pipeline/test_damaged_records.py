"""Damaged records of a root: one sentence that names the file, whatever the damage is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_root

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import PipelineError
from data_prep.core.lease import Lease
from data_prep.core.manifest import StageRef, read_manifest
from data_prep.core.record import parse_json
from data_prep.core.storage.local import LocalStore
from data_prep.images import watch
from data_prep.shards.shards import split_shards
from dpnet.model_store.records import read_record
from dpnet.model_store.weights import load_generator, read_config
from dpnet.pipeline.summary import as_markdown, summarize
from dpnet.pipeline.verify import verify
from dpnet.registry.settings import RegisterSettings
from dpnet.registry.stage import register
from dpnet.tracking.run_log import read_status

DEEP = (b"[" * 100_000, b'{"format": 1, "a":' * 50_000)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


@pytest.mark.parametrize("deep", DEEP)
def test_json_that_is_nested_too_deeply_is_no_json(deep: bytes) -> None:
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(deep)


@pytest.mark.parametrize("deep", DEEP)
@pytest.mark.parametrize(
    ("key", "read"),
    [
        ("a/b/manifest.json", lambda store: read_manifest(store, "a/b")),
        ("registry/m/v1.json", lambda store: read_record(store, "registry/m/v1.json")),
        ("images/m/watch.json", lambda store: watch.read(store, "images/m/watch.json")),
        ("x/config.json", lambda store: read_config(store, "x")),
    ],
)
def test_a_record_that_is_nested_too_deeply_is_named(
    store: LocalStore, key: str, read: Callable[[LocalStore], Any], deep: bytes
) -> None:
    store.write(key, deep)
    with pytest.raises(PipelineError, match=key):
        read(store)


@pytest.mark.parametrize("deep", DEEP)
def test_readers_that_go_on_without_a_record_go_on(store: LocalStore, deep: bytes) -> None:
    store.write("runs/x/status.json", deep)
    assert read_status(store, "runs/x") == {}
    store.write("a/lease.json", deep)
    with Lease(store, "a/lease.json", interval=0.5):
        assert parse_json(store.read("a/lease.json"))["pid"]
    small_root.commit(store, "data", "data/a", {"file": b"x"})
    store.write("data/a/b/manifest.json", deep)
    assert any("data/a/b/manifest.json" in str(each) for each in verify(store).problems)


def test_a_list_of_shards_that_is_not_text_is_named(store: LocalStore) -> None:
    store.write("images/a/b/train.urls", b"\xff\xfe\x88")
    with pytest.raises(PipelineError, match=r"images/a/b/train\.urls was altered: it is not text"):
        split_shards(store, "images/a/b", "train")


@pytest.mark.parametrize("part", ["summary", "settings"])
def test_a_manifest_without_a_needed_field_is_named_when_the_field_is_used(
    store: LocalStore, part: str
) -> None:
    nested = {"there": {"a": 1}, "list": [{"a": 1}]}
    ref = small_root.commit(store, "data", "data/a", {"f": b"x"}, settings=nested, summary=nested)
    found = getattr(read_manifest(store, ref.folder), part)
    assert found == nested
    for mapping in (found, found["there"], found["list"][0]):
        with pytest.raises(PipelineError, match="a manifest was altered: it has no gone"):
            mapping["gone"]
        with pytest.raises(KeyError, match=r"^a manifest was altered"):  # as some readers expect
            mapping["gone"]


@pytest.mark.parametrize("weights", [b"", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0{]", b"\0" * 8])
def test_weights_with_the_right_hash_that_are_no_weights_are_refused(
    store: LocalStore, weights: bytes
) -> None:
    config = {"format": 1, "model": {}, "weights_sha256": sha256_bytes(weights)}
    store.write("x/config.json", json.dumps(config).encode())
    store.write("x/model.safetensors", weights)
    with pytest.raises(PipelineError, match="it is not a complete safetensors file"):
        load_generator(store, "x")


@pytest.mark.parametrize("report", [b"", b"{}", b"[]", b'{"figures": {"bins": 1}}', *DEEP])
def test_an_altered_report_is_named_in_the_summary(store: LocalStore, report: bytes) -> None:
    store.write("evaluations/e/report.json", report)
    refs = [StageRef("evaluate", "x", "evaluations/e", "1", "2", 1.0, True, {"pairs": 4})]
    with pytest.raises(PipelineError, match=r"evaluations/e/report\.json was altered: restore it"):
        summarize("x", store, refs, 1.0)
    with pytest.raises(PipelineError, match=r"evaluations/e/report\.json was altered: restore it"):
        as_markdown("x", store, refs, "", {})
    store.delete("evaluations/e/report.json")
    with pytest.raises(PipelineError, match=r"evaluations/e/report\.json is missing"):
        summarize("x", store, refs, 1.0)


@pytest.mark.parametrize("log", [b"{", b"[]\n", b'{"kind": "train"}\n', b'{"kind": "x"}\n'])
def test_an_altered_log_is_named_by_the_registration(tmp_path: Path, log: bytes) -> None:
    store = small_root.new_store(tmp_path / "root")
    run, evaluation = small_root.run_and_evaluation(store, 20.0)
    store.write(f"{run.folder}/log.jsonl", log)
    with pytest.raises(PipelineError, match=f"the log in .*{run.folder} was altered"):
        register(RegisterSettings(), run, evaluation, store)
