"""Both stores behave alike. S3 here is moto's server in memory: it proves the calls, not auth."""

import os
import pickle
import subprocess
import sys

import pytest

from data_prep.errors import StorageError
from data_prep.storage import open_store


@pytest.fixture(scope="module")
def moto_endpoint():
    pytest.importorskip("moto.server")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["local", "moto"])
def store(request, tmp_path, monkeypatch):
    if request.param == "local":
        return open_store(str(tmp_path / "root"))
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("moto_endpoint"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    bucket = f"b{abs(hash(request.node.name)) % 10**8}"
    boto3.client("s3").create_bucket(Bucket=bucket)
    return open_store(f"s3://{bucket}/some/prefix")


def test_what_is_written_is_read(store, tmp_path):
    store.write("a/b.bin", b"0123456789")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read_range("a/b.bin", 3, 4) == b"3456"
    assert store.exists("a/b.bin")
    assert not store.exists("a")
    source = tmp_path / "up"
    source.write_bytes(b"large")
    store.upload("a/c.bin", source)
    store.download("a/c.bin", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == b"large"


def test_an_absent_object_is_file_not_found(store):
    store.write("there", b"")
    for read in (store.read, store.read_tagged, lambda key: store.read_range(key, 0, 1)):
        with pytest.raises(FileNotFoundError):
            read("not/there")
    store.delete("not/there")


def test_listing_is_sorted_and_keeps_to_the_folder(store):
    for key in ("a/2", "a/1", "a/b/3", "ab/4"):
        store.write(key, key.encode())
    assert [entry.key for entry in store.list("a")] == ["a/1", "a/2", "a/b/3"]
    assert [entry.key for entry in store.list()] == ["a/1", "a/2", "a/b/3", "ab/4"]
    assert {entry.size for entry in store.list("a/b")} == {5}
    before = next(iter(store.list("ab"))).fingerprint
    store.write("ab/4", b"changed")
    assert next(iter(store.list("ab"))).fingerprint != before


def test_create_writes_only_once(store):
    assert store.create("x/lock", b"mine") is not None
    assert store.create("x/lock", b"yours") is None
    assert store.read("x/lock") == b"mine"


def test_replace_compares_before_it_swaps(store):
    tag = store.create("lock", b"1")
    newer = store.replace("lock", b"2", tag)
    assert newer is not None
    assert store.replace("lock", b"3", tag) is None
    assert store.read_tagged("lock") == (b"2", newer)
    store.delete("lock")
    assert store.replace("lock", b"4", newer) is None


@pytest.mark.parametrize("key", ["../out", "/etc/passwd", "a/../../b", "", "a\\b", "a\0b"])
def test_a_key_cannot_leave_the_store(store, key):
    with pytest.raises(StorageError, match="not a key inside"):
        store.write(key, b"")


def test_a_store_can_be_sent_to_another_process(store):
    store.write("a", b"1")
    assert pickle.loads(pickle.dumps(store)).read("a") == b"1"


def test_a_failed_write_leaves_the_old_object_and_no_debris(tmp_path):
    store = open_store(str(tmp_path))
    store.write("a/b", b"old")
    with pytest.raises(StorageError, match="a folder stands where a file is needed"):
        store.write("a", b"new")
    with pytest.raises(StorageError, match="a file stands where a folder is needed"):
        store.write("a/b/c", b"new")
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "b"]
    assert store.read("a/b") == b"old"


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a tmpfs: root")
def test_a_full_disk_is_told_in_one_sentence(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "x", str(small)], check=False
    )
    if mounted.returncode:
        pytest.skip("this system does not let us mount a tmpfs")
    try:
        with pytest.raises(StorageError, match="the disk is full: free some space"):
            open_store(str(small)).write("a", bytes(1 << 20))
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_missing_bucket_and_a_dead_server_are_told_in_one_sentence(moto_endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-do-not-show")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", moto_endpoint)
    with pytest.raises(StorageError, match="bucket 'nowhere' does not exist"):
        open_store("s3://nowhere/x").read("a")


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("s3:///x", "names no bucket"),
        ("gs://b/x", "unknown scheme"),
        ("file://host/x", "not a local"),
    ],
)
def test_a_uri_that_cannot_be_a_store_is_refused(uri, message):
    with pytest.raises(StorageError, match=message):
        open_store(uri)
