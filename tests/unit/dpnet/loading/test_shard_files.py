"""Shards as open files: found by the manifest, checked by hash, with one sentence an error."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import small_shards
from clusters import wait_until
from small_shards import Far, flip_byte, stage_of

from data_prep.core.errors import PipelineError
from data_prep.core.manifest import StageRef, read_manifest
from data_prep.core.paths import MANIFEST
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from data_prep.shards.shards import read_index
from dpnet.loading.shard_cache import ShardCache
from dpnet.loading.shard_files import OpenShard, ShardFiles, find_shards

PAYLOADS = [[b"first", b"second", b"third"], [b"fourth"], [b"fifth", b"a" * 3000]]


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


@pytest.fixture
def ref(store: LocalStore) -> StageRef:
    return stage_of(store, "images", PAYLOADS)


def change_manifest(store: LocalStore, ref: StageRef, **changes: Any) -> None:
    manifest = read_manifest(store, ref.folder).to_json() | changes
    store.write(f"{ref.folder}/{MANIFEST}", json.dumps(manifest).encode())


def contents(shard: OpenShard) -> list[bytes]:
    return [shard.read(at) for at in range(shard.shard.samples)]


def open_files(ending: str = ".tar") -> int:
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum(os.readlink(link).endswith(ending) for link in links if link.is_symlink())


# Finding shards


def test_the_manifest_names_the_shards_of_a_split(store: LocalStore, ref: StageRef) -> None:
    found = find_shards(store, ref, "train")
    assert (found.where, found.digest) == (f"{store.label}/{ref.folder}", ref.content_digest)
    assert [shard.samples for shard in found.shards] == [3, 1, 2]
    assert found.samples == 6
    names = [f"{ref.folder}/train-{number:06d}.tar" for number in range(3)]
    assert [shard.key for shard in found.shards] == names
    assert [shard.size for shard in found.shards] == [len(store.read(name)) for name in names]


def test_an_older_manifest_without_sample_counts_gives_the_same_shards(
    store: LocalStore, ref: StageRef
) -> None:
    found = find_shards(store, ref, "train")
    files = read_manifest(store, ref.folder).to_json()["files"]
    for file in files:
        file.pop("samples", None)
    change_manifest(store, ref, files=files)
    assert find_shards(store, ref, "train") == found
    index = store.path(found.shards[1].key).with_suffix(".parquet")
    index.write_bytes(index.read_bytes()[:-30])
    with pytest.raises(PipelineError, match=r"train-000001\.parquet was altered or cut short"):
        find_shards(store, ref, "train")
    index.unlink()
    with pytest.raises(
        PipelineError, match=r"train-000001\.parquet is missing: run `dpnet verify`"
    ):
        find_shards(store, ref, "train")


def test_shards_of_an_earlier_version_are_found_in_its_folder(
    store: LocalStore, ref: StageRef
) -> None:
    old = find_shards(store, ref, "train")
    folder = "images/small/later"
    files = read_manifest(store, ref.folder).to_json()["files"]
    name = ref.folder.rpartition("/")[2]
    for file in files:
        file["path"] = f"../{name}/{file['path']}"
    later = StageRef(**{**ref.to_json(), "folder": folder})
    manifest = read_manifest(store, ref.folder).to_json() | {"folder": folder, "files": files}
    store.write(f"{folder}/{MANIFEST}", json.dumps(manifest).encode())
    assert find_shards(store, later, "train").shards == old.shards


def test_other_splits_and_other_files_are_ignored(store: LocalStore, ref: StageRef) -> None:
    files = read_manifest(store, ref.folder).to_json()["files"]
    others = ["val-000000.tar", "val-000000.parquet", "train.urls", "xtrain-000000.tar"]
    added = [{"path": path, "size": 1, "sha256": "0" * 64, "samples": 1} for path in others]
    change_manifest(store, ref, files=files + added)
    assert len(find_shards(store, ref, "train").shards) == 3
    assert len(find_shards(store, ref, "val").shards) == 1


def test_a_stage_that_was_not_committed_is_named(store: LocalStore, ref: StageRef) -> None:
    store.delete(f"{ref.folder}/{MANIFEST}")
    with pytest.raises(PipelineError, match=f"{ref.folder}/{MANIFEST} is missing: that stage was"):
        find_shards(store, ref, "train")


def test_another_dataset_in_the_same_place_is_refused(store: LocalStore, ref: StageRef) -> None:
    change_manifest(store, ref, content_digest="f" * 64)
    with pytest.raises(PipelineError, match=f"{ref.folder} is another dataset than the one at"):
        find_shards(store, ref, "train")


def test_a_split_without_shards_is_an_error(store: LocalStore, ref: StageRef) -> None:
    with pytest.raises(PipelineError, match=r"the split 'test' of .* is empty"):
        find_shards(store, ref, "test")


# Reading


@pytest.mark.parametrize("far", [False, True])
def test_an_open_shard_gives_the_payload_at_any_position(
    store: LocalStore, ref: StageRef, far: bool
) -> None:
    files = ShardFiles(Far(store) if far else store, None)
    shards = [files.open(shard) for shard in find_shards(store, ref, "train").shards]
    assert [contents(shard) for shard in shards] == PAYLOADS
    assert shards[0].read(1) == b"second"
    assert [str(key) for key in shards[0].keys] == ["s0", "s1", "s2"]
    assert files.opened == 3


def test_a_shard_is_closed_when_nothing_refers_to_it(store: LocalStore, ref: StageRef) -> None:
    files = ShardFiles(store, None)
    shards = [files.open(shard) for shard in find_shards(store, ref, "train").shards]
    assert open_files() == 3
    del shards[1]
    assert open_files() == 2
    shards.clear()
    assert open_files() == 0


def test_a_downloaded_shard_has_no_file_name(
    store: LocalStore, ref: StageRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (shard, *_) = find_shards(store, ref, "train").shards
    opened = ShardFiles(Far(store), None).open(shard)
    assert not list((tmp_path / "tmp").iterdir())
    assert contents(opened) == PAYLOADS[0]


@pytest.mark.parametrize("far", [False, True])
def test_only_damaged_samples_of_a_shard_are_errors(
    store: LocalStore, ref: StageRef, far: bool
) -> None:
    shard = find_shards(store, ref, "train").shards[0]
    flip_byte(store.path(shard.key), read_index(store, shard.key)[1]["offset"])
    opened = ShardFiles(Far(store) if far else store, None).open(shard)
    assert (opened.read(0), opened.read(2)) == (b"first", b"third")
    with pytest.raises(ValueError, match="not those that were stored"):
        opened.read(1)


def test_the_first_samples_of_a_shard_that_was_cut_short_can_be_read(
    store: LocalStore, ref: StageRef
) -> None:
    shard = find_shards(store, ref, "train").shards[2]
    path = store.path(shard.key)
    path.write_bytes(path.read_bytes()[: read_index(store, shard.key)[1]["offset"] + 20])
    opened = ShardFiles(store, None).open(shard)
    assert opened.read(0) == b"fifth"
    with pytest.raises(ValueError, match="shorter than its index says"):
        opened.read(1)


@pytest.mark.parametrize("ending", ["tar", "parquet"])
def test_a_missing_file_is_named(store: LocalStore, ref: StageRef, ending: str) -> None:
    shard = find_shards(store, ref, "train").shards[1]
    store.path(shard.key).with_suffix(f".{ending}").unlink()
    with pytest.raises(
        PipelineError, match=rf"train-000001\.{ending} is missing: run `dpnet verify`"
    ):
        ShardFiles(store, None).open(shard)


def test_an_altered_index_is_refused(store: LocalStore, ref: StageRef) -> None:
    shard = find_shards(store, ref, "train").shards[0]
    flip_byte(store.path(shard.key).with_suffix(".parquet"), 20)
    with pytest.raises(PipelineError, match=r"train-000000\.parquet was altered or cut short"):
        ShardFiles(store, None).open(shard)


def test_an_index_with_another_number_of_samples_than_the_manifest_is_refused(
    store: LocalStore, ref: StageRef
) -> None:
    files = read_manifest(store, ref.folder).to_json()["files"]
    change_manifest(store, ref, files=[{**f, "samples": 4} for f in files])
    (shard, *_) = find_shards(store, ref, "train").shards
    with pytest.raises(
        PipelineError, match=r"train-000000\.tar has 3 samples, not the 4 of the man"
    ):
        ShardFiles(store, None).open(shard)


def test_the_error_for_too_many_open_files_names_the_option(
    store: LocalStore, ref: StageRef
) -> None:
    (shard, *_) = find_shards(store, ref, "train").shards
    files = ShardFiles(store, None)
    opened = files.open(shard)  # this also imports the modules that opening needs
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, hard))
    try:
        with pytest.raises(PipelineError, match=r"too many files open: lower train\.lanes"):
            _ = [files.open(shard) for _ in range(highest + 1)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert opened.read(0) == b"first"


def test_a_shard_that_may_not_be_read_is_named(store: LocalStore, ref: StageRef) -> None:
    (shard, *_) = find_shards(store, ref, "train").shards
    path = store.path(shard.key)
    path.unlink()
    path.symlink_to(path)  # this fails for root too
    with pytest.raises(PipelineError, match=r"cannot use .*train-000000\.tar"):
        ShardFiles(store, None).open(shard)


# With a cache


def test_shards_are_fetched_once_and_then_read_from_the_cache(
    store: LocalStore, ref: StageRef, tmp_path: Path
) -> None:
    far = Far(store)
    for _ in range(2):  # the second is like another process
        files = ShardFiles(far, ShardCache(tmp_path / "cache", 10**6))
        shards = [files.open(shard) for shard in find_shards(store, ref, "train").shards]
        assert [contents(shard) for shard in shards] == PAYLOADS
    assert len(far.downloads) == 3


def test_a_cached_shard_that_the_disk_altered_is_fetched_again(
    store: LocalStore, ref: StageRef, tmp_path: Path
) -> None:
    (shard, *_) = find_shards(store, ref, "train").shards
    far, cache = Far(store), ShardCache(tmp_path / "cache", 10**6)
    ShardFiles(far, cache).open(shard)
    flip_byte(tmp_path / "cache" / f"{shard.sha256}.tar", 700)
    files = ShardFiles(far, cache)
    assert contents(files.open(shard)) == PAYLOADS[0]
    assert not list((tmp_path / "cache").glob("*.tar"))
    assert contents(files.open(shard)) == PAYLOADS[0]
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 1
    assert len(far.downloads) == 3


def test_a_shard_that_is_damaged_in_the_store_is_not_kept(
    store: LocalStore, ref: StageRef, tmp_path: Path
) -> None:
    (shard, *_) = find_shards(store, ref, "train").shards
    flip_byte(store.path(shard.key), read_index(store, shard.key)[0]["offset"])
    files = ShardFiles(Far(store), ShardCache(tmp_path / "cache", 10**6))
    with pytest.raises(ValueError, match="not those that were stored"):
        contents(files.open(shard))
    assert not list((tmp_path / "cache").glob("*.tar"))


def test_shards_on_s3_are_read_with_and_without_a_cache(moto_root: str, tmp_path: Path) -> None:
    store = open_store(moto_root)
    ref = stage_of(store, "images", PAYLOADS)
    found = find_shards(store, ref, "train")
    for cache in (None, ShardCache(tmp_path, 10**6)):
        files = ShardFiles(store, cache)
        assert [contents(files.open(shard)) for shard in found.shards] == PAYLOADS
    assert len(list(tmp_path.glob("*.tar"))) == 3
    store.delete(found.shards[1].key)
    with pytest.raises(PipelineError, match=r"train-000001\.tar is missing"):
        ShardFiles(store, None).open(found.shards[1])


# Kills

DOWNLOAD = """
import json, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from small_shards import Far
from data_prep.core.manifest import StageRef
from data_prep.core.storage.local import LocalStore
from dpnet.loading.shard_files import ShardFiles, find_shards
store = LocalStore(Path(sys.argv[2]))
shard = find_shards(store, StageRef(**json.loads(sys.argv[3])), "train").shards[0]
ShardFiles(Far(store, 600.0), None).open(shard)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_kill_during_the_download_of_a_shard_leaves_no_file_behind(
    store: LocalStore, ref: StageRef, tmp_path: Path, number: signal.Signals
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [sys.executable, "-c", DOWNLOAD, str(Path(small_shards.__file__).parent)]
    command += [str(store.folder), json.dumps(ref.to_json())]
    process = subprocess.Popen(command, env={**os.environ, "TMPDIR": str(temporary)})
    wait_until(Far(store).log.exists, "no download")
    wait_until(lambda: received(process.pid, temporary), "nothing is received")
    process.send_signal(number)
    assert process.wait(60) != 0
    assert list(temporary.iterdir()) == []


def received(pid: int, folder: Path) -> bool:
    """Return whether the process holds a file of the folder that has content."""
    for file in Path(f"/proc/{pid}/fd").iterdir():
        if os.path.realpath(file).startswith(f"{folder}/") and file.stat().st_size:
            return True
    return False
