"""The cache of shards: its limit, the order of deletion, shared use and killed processes."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from small_shards import Far

from data_prep.core.digest import sha256_bytes
from data_prep.core.errors import StorageError
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store
from dpnet.loading.shard_cache import ShardCache

SIZE = 1000
HASHES = {name: sha256_bytes(name.encode() * SIZE) for name in "abcdef"}


@pytest.fixture
def far(tmp_path: Path) -> Far:
    """Return a remote store with the shards a to f of SIZE bytes."""
    near = LocalStore(tmp_path / "far")
    for name in HASHES:
        near.write(name, name.encode() * SIZE)
    return Far(near)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def read_through(cache: ShardCache, store: Far, name: str) -> bytes | None:
    """Return a shard's bytes from the cache, or None if the cache does not keep it."""
    file = cache.open(store, name, HASHES[name], SIZE)
    if file is None:
        return None
    try:
        return os.pread(file, 2 * SIZE, 0)
    finally:
        os.close(file)


def kept(folder: Path) -> str:
    """Return the names of the shards in the folder."""
    return "".join(name for name in HASHES if (folder / f"{HASHES[name]}.tar").exists())


def wait_for(condition: Callable[[], object]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_shard_is_fetched_once_and_then_read_from_the_folder(far: Far, folder: Path) -> None:
    for _ in range(2):
        cache = ShardCache(folder, 10 * SIZE)
        assert read_through(cache, far, "a") == b"a" * SIZE
        assert read_through(cache, far, "b") == b"b" * SIZE
    assert far.downloads == ["a", "b"]
    assert kept(folder) == "ab"


def test_the_least_recently_used_shard_is_deleted(far: Far, folder: Path) -> None:
    cache = ShardCache(folder, 3 * SIZE)
    for age, name in ((30, "a"), (20, "b"), (10, "c")):
        read_through(cache, far, name)
        at = time.time() - age
        os.utime(folder / f"{HASHES[name]}.tar", (at, at))
    read_through(cache, far, "a")  # now it is the most recently used
    assert read_through(cache, far, "d") == b"d" * SIZE
    assert kept(folder) == "acd"
    read_through(cache, far, "e")
    assert kept(folder) == "ade"


def test_a_shard_larger_than_the_cache_is_not_kept_and_deletes_nothing(
    far: Far, folder: Path
) -> None:
    read_through(ShardCache(folder, 10 * SIZE), far, "a")
    assert read_through(ShardCache(folder, SIZE - 1), far, "b") is None
    assert kept(folder) == "a"
    assert far.downloads == ["a"]


def test_a_deleted_shard_that_is_open_can_still_be_read(far: Far, folder: Path) -> None:
    cache = ShardCache(folder, SIZE)
    file = cache.open(far, "a", HASHES["a"], SIZE)
    read_through(cache, far, "b")
    assert kept(folder) == "b"
    assert os.pread(file, SIZE, 0) == b"a" * SIZE
    os.close(file)


def test_only_shards_are_deleted(far: Far, folder: Path) -> None:
    folder.mkdir()
    others = ["mine.tar", "0" * 64, f"{'0' * 64}.parquet", "x.new-1"]
    for name in others:
        (folder / name).write_bytes(bytes(5 * SIZE))
    cache = ShardCache(folder, SIZE)
    read_through(cache, far, "a")
    read_through(cache, far, "b")
    assert kept(folder) == "b"
    assert all((folder / name).stat().st_size == 5 * SIZE for name in others)


def test_bytes_with_another_hash_are_not_kept(far: Far, folder: Path) -> None:
    far.near.write("a", b"x" * SIZE)
    assert read_through(ShardCache(folder, 10 * SIZE), far, "a") is None
    assert not [path for path in folder.iterdir() if not path.name.startswith(".lock")]


def test_a_shard_that_the_store_does_not_have_causes_no_warning(
    far: Far, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    far.near.delete("a")
    with pytest.raises(FileNotFoundError):
        read_through(ShardCache(folder, 10 * SIZE), far, "a")
    assert not caplog.text


def test_a_dropped_shard_is_fetched_again(far: Far, folder: Path) -> None:
    cache = ShardCache(folder, 10 * SIZE)
    read_through(cache, far, "a")
    cache.drop(HASHES["a"])
    cache.drop(HASHES["b"])  # a missing shard is not an error
    assert read_through(cache, far, "a") == b"a" * SIZE
    assert far.downloads == ["a", "a"]


# Several processes


def take_all(root: Path, folder: Path) -> None:
    """Fetch three shards with two threads, as a process of the tests below."""
    far = Far(LocalStore(root), seconds=0.1)
    with ThreadPoolExecutor(2) as pool:
        cache = ShardCache(folder, 10 * SIZE)
        for name, data in zip(
            "abc", pool.map(lambda n: read_through(cache, far, n), "abc"), strict=True
        ):
            assert data == name.encode() * SIZE


def started(target: Callable[..., None], *arguments: object) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=target, args=arguments)
    process.start()
    return process


def test_processes_that_share_the_folder_fetch_a_shard_once(far: Far, folder: Path) -> None:
    processes = [started(take_all, far.near.folder, folder) for _ in range(3)]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert sorted(far.downloads) == ["a", "b", "c"]
    assert kept(folder) == "abc"


def take_slowly(root: Path, folder: Path) -> None:
    read_through(ShardCache(folder, 2 * SIZE), Far(LocalStore(root), seconds=60), "a")


def test_the_file_of_a_killed_process_is_deleted_and_its_space_is_free(
    far: Far, folder: Path
) -> None:
    process = started(take_slowly, far.near.folder, folder)
    wait_for(lambda: list(folder.glob(".new-*.part")))
    process.kill()
    process.join()
    cache = ShardCache(folder, 2 * SIZE)
    for name in "bc":
        assert read_through(cache, far, name) == name.encode() * SIZE
    assert kept(folder) == "bc"
    assert not list(folder.glob(".new-*"))
    assert read_through(cache, far, "a") == b"a" * SIZE


def test_a_killed_fetch_is_repeated(far: Far, folder: Path) -> None:
    process = started(take_slowly, far.near.folder, folder)
    wait_for(lambda: list(folder.glob(".new-*.part")))
    process.kill()
    process.join()
    assert read_through(ShardCache(folder, SIZE), far, "a") == b"a" * SIZE
    assert not list(folder.glob(".new-*"))


def test_a_running_fetch_counts_against_the_limit_and_is_not_deleted(
    far: Far, folder: Path
) -> None:
    slow = Far(far.near, seconds=1)
    cache = ShardCache(folder, 2 * SIZE + 10)
    read_through(cache, far, "f")
    with ThreadPoolExecutor(1) as pool:
        under_way = pool.submit(read_through, cache, slow, "a")
        wait_for(lambda: list(folder.glob(".new-*.part")))
        assert read_through(cache, far, "b") == b"b" * SIZE  # in place of f
        assert (
            read_through(ShardCache(folder, SIZE + 10), far, "c") is None
        )  # a needs all the space
        assert kept(folder) == "b"
        assert under_way.result() == b"a" * SIZE
    assert kept(folder) == "ab"


def test_a_fetch_that_ends_during_a_deletion_counts_against_the_limit(
    far: Far, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, listed = ShardCache(folder, SIZE), threading.Event()
    download, iterdir = far.download, Path.iterdir

    def held_back(key: str, target: Path) -> None:
        download(key, target)
        if key == "a":
            assert listed.wait(20)

    def slow(path: Path) -> Iterator[Path]:
        found = list(iterdir(path))
        if path == folder and not listed.is_set() and far.downloads == ["a"]:
            listed.set()
            time.sleep(0.3)  # long enough for a rename
        yield from found

    monkeypatch.setattr(far, "download", held_back)
    monkeypatch.setattr(Path, "iterdir", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(read_through, cache, far, "a")
        wait_for(lambda: far.downloads == ["a"])
        assert read_through(cache, far, "b") is None
        assert first.result() == b"a" * SIZE
    assert kept(folder) == "a"


def test_a_cached_shard_can_be_read_while_another_is_fetched(far: Far, folder: Path) -> None:
    cache = ShardCache(folder, 10 * SIZE)
    read_through(cache, far, "a")
    lock = (
        folder / f".lock-{HASHES['a'][:2]}"
    )  # another shard with the same first digits is being fetched
    with ThreadPoolExecutor(1) as pool, lock.open("ab") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert pool.submit(read_through, cache, far, "a").result(timeout=20) == b"a" * SIZE


# Errors of the disk


def test_a_file_in_place_of_the_folder_is_an_error_at_once(far: Far, folder: Path) -> None:
    folder.write_bytes(b"")
    with pytest.raises(
        StorageError, match=r"cannot use train\.cache .*cache: there is a file where"
    ):
        ShardCache(folder, SIZE)


@pytest.mark.parametrize("instead", ["a file", "nothing"])
def test_a_deleted_folder_causes_one_warning(
    far: Far, folder: Path, instead: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(folder, 10 * SIZE)
    shutil.rmtree(folder)
    if instead == "a file":
        folder.write_bytes(b"")
    assert read_through(cache, far, "a") is None
    assert read_through(cache, far, "b") is None
    cache.drop(HASHES["a"])
    messages = caplog.text
    assert messages.count("cannot use train.cache") == 1
    assert "shards are fetched each time" in messages


@pytest.fixture
def small_disk(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_causes_one_warning_and_cached_shards_stay_in_use(
    far: Far, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(small_disk, 10**9)
    read_through(cache, far, "a")
    with pytest.raises(OSError, match="No space left"), (small_disk / "other").open("wb") as file:
        file.write(bytes(128 << 10))
    assert read_through(cache, far, "b") is None
    assert read_through(cache, far, "c") is None
    assert read_through(cache, far, "a") == b"a" * SIZE
    assert caplog.text.count("the disk is full. Free some space") == 1
    (small_disk / "other").unlink()
    assert read_through(cache, far, "b") == b"b" * SIZE
    assert far.downloads.count("a") == 1
    assert not list(small_disk.glob(".new-*"))


def test_cached_shards_on_a_read_only_disk_stay_in_use(
    far: Far, small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(small_disk, 10**9)
    read_through(cache, far, "a")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert read_through(cache, far, "a") == b"a" * SIZE
    assert not caplog.text
    assert read_through(cache, far, "b") is None
    cache.drop(HASHES["a"])
    assert "read-only file system" in caplog.text


def test_a_full_disk_causes_a_warning_for_a_store_on_s3(
    small_disk: Path, moto_root: str, caplog: pytest.LogCaptureFixture
) -> None:
    store, data = open_store(moto_root), bytes(128 << 10)
    store.write("a", data)
    assert ShardCache(small_disk, 10**9).open(store, "a", sha256_bytes(data), len(data)) is None
    assert "the disk is full" in caplog.text
    assert not list(small_disk.glob(".new-*"))
