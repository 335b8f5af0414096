"""The manifest: its bytes, ignored fields, and refused files."""

from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO, cast

import pytest

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import (
    FileRecord,
    InputRef,
    Manifest,
    content_digest,
    load_reference,
    read_head,
    read_manifest,
)
from data_prep.core.stage import Produced, Request, run_stage
from data_prep.core.storage.local import LocalStore
from data_prep.shards.shards import write_shard

FOLDER = "masks/demo/0123456789ab"
KEY = f"{FOLDER}/manifest.json"
# The bytes that version 0.1.0 wrote, before manifests were typed.
OLD = (
    b'{\n "format": 1,\n "stage": "masks",\n "name": "demo",\n'
    b' "folder": "masks/demo/0123456789ab",\n'
    b' "request_digest": "' + b"a" * 64 + b'",\n "content_digest": "' + b"b" * 64 + b'",\n'
    b' "settings": {\n  "size": 64\n },\n "inputs": {\n  "images": {\n   "stage": "images",\n'
    b'   "folder": "images/demo/ba9876543210",\n   "request_digest": "' + b"c" * 64 + b'",\n'
    b'   "content_digest": "' + b"d" * 64 + b'"\n  }\n },\n "sources": {\n  "listing": "e"\n },\n'
    b' "files": [\n  {\n   "path": "train-000000.parquet",\n   "size": 7,\n   "sha256": "'
    + b"f"
    * 64
    + b'",\n   "content": true\n  },\n  {\n   "path": "train-000000.tar",\n   "size": 10240,\n'
    b'   "sha256": "' + b"0" * 64 + b'",\n   "content": true,\n   "samples": 3\n  }\n ],\n'
    b' "summary": {\n  "splits": {\n   "train": {\n    "samples": 3,\n    "shards": 1\n   }\n  }\n'
    b' },\n "created": "2026-01-31T12:00:00Z",\n "seconds": 1.25\n}'
)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def changed(store: LocalStore, **changes: Any) -> None:
    store.write(KEY, json.dumps(json.loads(OLD) | changes).encode())


def test_an_old_manifest_is_read_and_written_with_the_same_bytes(store: LocalStore) -> None:
    store.write(KEY, OLD)
    manifest = read_manifest(store, FOLDER)
    assert (manifest.stage, manifest.name, manifest.seconds) == ("masks", "demo", 1.25)
    assert manifest.inputs["images"] == InputRef(
        "images", "images/demo/ba9876543210", "c" * 64, "d" * 64
    )
    assert manifest.files[1] == FileRecord("train-000000.tar", 10240, "0" * 64, samples=3)
    assert manifest.to_bytes() == OLD


def test_run_stage_writes_the_bytes_of_the_manifest(store: LocalStore) -> None:
    upstream = load_reference_of(store)
    request = Request("train", "x", "runs", {"lr": 0.1}, {"images": upstream}, {"vgg": "1"})
    ref = run_stage(store, request, lambda work: Produced([], {"n": 1}))
    manifest = read_manifest(store, ref.folder)
    assert store.read(f"{ref.folder}/manifest.json") == manifest.to_bytes()
    draft = request.draft()
    assert draft == replace(
        manifest, content_digest="", summary={}, created="", seconds=0.0, files=[]
    )


def load_reference_of(store: LocalStore) -> Any:
    store.write(KEY, OLD)
    return load_reference(store, FOLDER)


def test_fields_of_a_newer_version_are_ignored(store: LocalStore) -> None:
    old = json.loads(OLD)
    files = [{**file, "codec": "new"} for file in old["files"]]
    inputs = {"images": {**old["inputs"]["images"], "version": 7}}
    changed(store, host="new", files=files, inputs=inputs)
    assert read_manifest(store, FOLDER) == Manifest.from_json(old)


def test_a_manifest_of_another_format_is_refused(store: LocalStore) -> None:
    changed(store, format=2, files="in another form")
    with pytest.raises(PipelineError) as refused:
        read_manifest(store, FOLDER)
    assert str(refused.value) == (
        f"{store.label}/{KEY} has format 2, this version reads 1. Use the version of dpnet that"
        " wrote it, or build the stage again."
    )


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"{}", OLD[:-20]])
def test_a_manifest_that_is_not_whole_json_is_refused(store: LocalStore, data: bytes) -> None:
    store.write(KEY, data)
    with pytest.raises(PipelineError, match=r"manifest\.json was altered: it is not a whole man"):
        read_manifest(store, FOLDER)


@pytest.mark.parametrize("name", sorted(json.loads(OLD)))
def test_a_manifest_without_one_of_its_fields_is_refused(store: LocalStore, name: str) -> None:
    manifest = json.loads(OLD)
    del manifest[name]
    store.write(KEY, json.dumps(manifest).encode())
    with pytest.raises(PipelineError, match="was altered: it is not a whole manifest"):
        read_manifest(store, FOLDER)


@pytest.mark.parametrize(
    "change",
    [
        {"stage": None},
        {"created": 5},
        {"seconds": "long"},
        {"summary": []},
        {"settings": None},
        {"sources": "x"},
        {"inputs": {"images": {"stage": "images"}}},
        {"inputs": {"images": None}},
        {"files": {}, "inputs": []},
        {"files": [{"path": 1, "size": 1, "sha256": "0" * 64}]},
        {"files": [{"path": "a", "size": True, "sha256": "0" * 64}]},
        {"files": [{"path": "a", "size": 1, "sha256": "../x"}]},
        {"files": [{"path": "a", "size": 1, "sha256": "0" * 64, "content": 1}]},
        {"files": [{"path": "a", "size": 1, "sha256": "0" * 64, "samples": "3"}]},
        {"files": [{"path": "a", "size": 1}]},
    ],
)
def test_a_field_of_another_type_is_refused(store: LocalStore, change: dict[str, Any]) -> None:
    changed(store, **change)
    with pytest.raises(PipelineError, match="was altered: it is not a whole manifest"):
        read_manifest(store, FOLDER)


def test_a_manifest_in_another_folder_is_refused(store: LocalStore) -> None:
    store.write("masks/other/0123456789ab/manifest.json", OLD)
    with pytest.raises(PipelineError, match=f"it names the folder {FOLDER}. Delete"):
        read_manifest(store, "masks/other/0123456789ab")


def test_a_missing_manifest_is_named(store: LocalStore) -> None:
    with pytest.raises(PipelineError, match=f"{KEY} is missing"):
        read_manifest(store, FOLDER)


def test_a_reference_has_the_digests_of_the_manifest(store: LocalStore) -> None:
    ref = load_reference_of(store)
    assert (ref.request_digest, ref.content_digest) == ("a" * 64, "b" * 64)
    assert (ref.seconds, ref.skipped) == (0.0, True)


def test_the_manifest_has_the_number_of_samples_of_a_tar_only(store: LocalStore) -> None:
    def shard(work: Any) -> Produced:
        samples: Any = [(key, {"png": b"x"}, {}) for key in "abc"]
        return Produced([*write_shard(work, "train-000000", samples)], {})

    folder = run_stage(store, Request("images", "x", "images/x", {}), shard).folder
    index, tar = json.loads(store.read(f"{folder}/manifest.json"))["files"]
    assert (tar["path"], tar["samples"]) == ("train-000000.tar", 3)
    assert index.keys() == {"path", "size", "sha256", "content"}
    assert [FileRecord.from_json(file).samples for file in (index, tar)] == [None, 3]


def test_the_number_of_samples_does_not_change_the_content_digest() -> None:
    files = [FileRecord("a.tar", 1, "0" * 64), FileRecord("a.parquet", 1, "1" * 64)]
    counted = [replace(file, samples=3) for file in files]
    assert content_digest(counted) == content_digest(files)


class CountingStore(LocalStore):
    """A store that counts the bytes that are read of each object."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.bytes: Counter[str] = Counter()

    def open(self, key: str) -> BinaryIO:
        file, counts = super().open(key), self.bytes

        class Counted(io.BufferedReader):
            def read(self, size: int | None = -1, /) -> bytes:
                data = super().read(size)
                counts[key] += len(data)
                return data

        return cast(BinaryIO, Counted(cast(io.RawIOBase, file)))


def large(files: int = 10_000) -> Manifest:
    """Return a manifest as that of a large dataset, with texts that look like its own marks."""
    records = [FileRecord(f"train-{n:06d}.tar", n, f"{n:064x}", samples=n) for n in range(files)]
    summary = {"version": 3, 'odd\n "files": [': '\n ],\n "summary": {', "splits": {}}
    settings = {"size": 64, 'odd\n "files": [': '\n ],\n "summary": '}
    old = Manifest.from_json(json.loads(OLD))
    return replace(old, files=records, summary=summary, settings=settings)


def test_the_head_of_a_large_manifest_is_read_without_its_files(tmp_path: Path) -> None:
    store = CountingStore(tmp_path)
    manifest = large()
    store.write(KEY, manifest.to_bytes())
    assert read_head(store, FOLDER) == manifest.head()
    assert len(manifest.to_bytes()) > 1_500_000
    assert store.bytes[KEY] == 512 << 10
    assert read_manifest(store, FOLDER) == manifest


@pytest.mark.parametrize("files", [0, 1, 2_000, 3_000, 4_000, 5_000])
def test_the_head_of_a_manifest_of_any_size_is_that_of_the_whole(
    store: LocalStore, files: int
) -> None:
    manifest = large(files)
    store.write(KEY, manifest.to_bytes())
    assert read_head(store, FOLDER) == manifest.head()


def test_a_large_manifest_in_another_form_of_json_has_the_same_head(store: LocalStore) -> None:
    manifest = large()
    for options in ({}, {"indent": 2}, {"sort_keys": True, "indent": 1}):
        store.write(KEY, json.dumps(manifest.to_json(), **options).encode())  # type: ignore[arg-type]
        assert read_head(store, FOLDER) == manifest.head()


def test_a_large_manifest_that_is_cut_short_or_of_another_format_is_refused(
    store: LocalStore,
) -> None:
    data = large().to_bytes()
    store.write(KEY, data[: len(data) * 2 // 3])
    with pytest.raises(PipelineError, match=r"manifest\.json was altered: it is not a whole man"):
        read_head(store, FOLDER)
    store.write(KEY, replace(large(), format=2).to_bytes())
    with pytest.raises(PipelineError, match="has format 2, this version reads 1"):
        read_head(store, FOLDER)
    store.write(KEY, replace(large(), folder="masks/other/0123456789ab").to_bytes())
    with pytest.raises(PipelineError, match="it names the folder masks/other"):
        read_head(store, FOLDER)
    with pytest.raises(PipelineError, match="is missing"):
        read_head(store, "masks/none/0123456789ab")
