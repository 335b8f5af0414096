"""Both stores behave in the same way. S3 is moto's server, which does not check credentials."""

import io
import os
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile

import pytest

from data_prep.core.errors import StorageError
from data_prep.core.storage import local
from data_prep.core.storage.local import LocalStore, remove_empty_folders
from data_prep.core.storage.open import open_store


@pytest.fixture(params=["local", "moto"])
def store(request, tmp_path):
    if request.param == "local":
        return open_store(str(tmp_path / "root"))
    return open_store(request.getfixturevalue("moto_root"))


def test_a_folder_store_names_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for uri in ("root", str(tmp_path / "root"), (tmp_path / "root").as_uri()):
        store = open_store(uri)
        assert store.local_folder == tmp_path / "root"
        assert store.label == str(tmp_path / "root")


def test_an_s3_store_has_no_folder_and_is_labelled_by_its_uri():
    store = open_store("s3://bucket/a/prefix/")
    assert store.local_folder is None
    assert store.label == store.uri == "s3://bucket/a/prefix"


def test_a_written_object_is_read_back(store, tmp_path):
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


def test_reading_an_absent_object_raises_file_not_found(store):
    store.write("there", b"")
    for read in (store.read, store.read_tagged, lambda key: store.read_range(key, 0, 1)):
        with pytest.raises(FileNotFoundError):
            read("not/there")
    store.delete("not/there")


def test_a_folder_is_not_an_object(store):
    store.write("a/b", b"1")
    for key in ("a", "a/b/c"):
        assert not store.exists(key)
        for read in (store.read, store.open, lambda key: store.read_range(key, 0, 1)):
            with pytest.raises(FileNotFoundError):
                read(key)


def test_a_range_beyond_the_end_gives_fewer_bytes(store):
    store.write("a", b"0123456789")
    assert store.read_range("a", 8, 100) == b"89"
    assert store.read_range("a", 10, 5) == b""
    assert store.read_range("a", 1000, 5) == b""
    assert store.read_range("a", 3, 0) == b""
    store.write("empty", b"")
    assert store.read_range("empty", 0, 5) == b""
    assert store.read("empty") == b""


def test_an_open_object_reads_and_seeks_like_a_file(store, tmp_path):
    data = random.Random(0).randbytes(700_000)
    store.write("a", data)
    with store.open("a") as file:
        assert file.read(10) == data[:10]
        assert file.seek(-5, io.SEEK_END) == len(data) - 5
        assert file.read() == data[-5:]
        assert file.read(1) == b""
        assert file.seek(300_000) == 300_000
        assert file.read(300_000) == data[300_000:600_000]
        assert file.seek(10, io.SEEK_CUR) == file.tell() == 600_010
        assert file.seek(800_000) == 800_000
        assert file.read() == b""
        with pytest.raises((ValueError, OSError)):
            file.seek(-1)
        file.seek(0)
        assert file.read() == data
    with pytest.raises(ValueError, match="closed"):
        file.read()


def test_zip_tar_and_parquet_readers_work_on_an_open_object(store):
    import pyarrow as pa
    import pyarrow.parquet as pq

    members = {f"folder/{n}.bin": random.Random(n).randbytes(50_000) for n in range(20)}
    archive, tape, table = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, data in members.items():
            zipped.writestr(name, data)
    with tarfile.open(fileobj=tape, mode="w:gz") as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    pq.write_table(pa.table({"name": [*members], "data": [*members.values()]}), table)
    store.write("a.zip", archive.getvalue())
    store.write("a.tar.gz", tape.getvalue())
    store.write("a.parquet", table.getvalue())

    with store.open("a.zip") as file, zipfile.ZipFile(file) as zipped:
        assert {name: zipped.read(name) for name in reversed(zipped.namelist())} == members
    with store.open("a.tar.gz") as file, tarfile.open(fileobj=file) as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar} == members
    with store.open("a.parquet") as file:
        rows = pq.ParquetFile(file).read().to_pylist()
    assert {row["name"]: row["data"] for row in rows} == members


def test_a_large_object_is_uploaded_and_downloaded_whole(store, tmp_path):
    data = random.Random(0).randbytes(40 << 20)
    (tmp_path / "up").write_bytes(data)
    store.upload("file", tmp_path / "up")
    store.write("bytes", data)
    for key in ("file", "bytes"):
        store.download(key, tmp_path / "down")
        assert (tmp_path / "down").read_bytes() == data
        assert store.read_range(key, (16 << 20) - 3, 6) == data[(16 << 20) - 3 :][:6]


def test_names_with_special_characters_are_listed_unchanged(store):
    names = ["a b", "a+b", "a%20b", "tab\tx", "é漢😀", "q?x#y&z=1", "a'\"<&>"]
    if isinstance(store, LocalStore):
        names.append("new\nline")  # moto refuses it; Ceph accepts it, in tests/integration
    for name in names:
        store.write(f"odd/{name}", name.encode())
    assert [entry.key for entry in store.list("odd")] == sorted(f"odd/{name}" for name in names)
    assert all(store.read(f"odd/{name}") == name.encode() for name in names)


def test_folders_lists_only_the_folders_directly_below(store):
    for key in ("runs/b/x/y", "runs/a b?/x", "runs/a b?/z", "runs/file", "runs-2/c/x", "top"):
        store.write(key, b"")
    assert list(store.folders("runs")) == ["runs/a b?", "runs/b"]
    assert set(store.folders()) == {"runs", "runs-2"}
    assert list(store.folders("absent")) == []


def test_a_listing_is_in_the_order_of_its_keys(store):
    keys = ["a", "a-b/1", "a.b", "b!/x", "b/c/d", "b/c.d", "b0"]
    for key in keys:
        store.write(key, b"")
    assert [entry.key for entry in store.list()] == sorted(keys)


def test_a_listing_of_a_folder_contains_only_its_objects(store):
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


def test_replace_writes_only_if_the_tag_is_unchanged(store):
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
    tag = store.create("b", b"1")
    sent = pickle.loads(pickle.dumps(store))
    assert sent.read("a") == b"1"
    assert sent.create("b", b"2") is None
    assert sent.replace("b", b"2", tag) is not None


def test_a_failed_write_leaves_the_old_object_and_no_temporary_file(tmp_path):
    store = open_store(str(tmp_path))
    store.write("a/b", b"old")
    with pytest.raises(StorageError, match="there is a folder where a file is needed"):
        store.write("a", b"new")
    with pytest.raises(StorageError, match="there is a file where a folder is needed"):
        store.write("a/b/c", b"new")
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "b"]
    assert store.read("a/b") == b"old"


def test_the_next_write_removes_the_temporary_file_of_a_killed_writer(tmp_path):
    store = open_store(str(tmp_path))
    code = (
        "import os, signal, sys; from data_prep.core.storage.local import LocalStore\n"
        "from data_prep.core.storage.open import open_store\n"
        "with open_store(sys.argv[1])._staged('a/b') as (file, path):\n"
        "    file.write(b'half'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = (tmp_path / "a").iterdir()
    assert [*store.list()] == []
    with store._staged("a/mine") as (_, mine):  # of a running process, so it stays
        open_store(str(tmp_path)).write("a/c", b"1")
        assert mine.exists()
    assert not left.exists()
    assert [entry.key for entry in store.list()] == ["a/c"]


def test_a_file_removed_during_a_listing_is_not_listed(tmp_path):
    store = open_store(str(tmp_path))
    for key in ("a", "b", "c"):
        store.write(key, b"")
    listing = store.list()
    assert next(listing).key == "a"
    store.delete("b")
    assert [entry.key for entry in listing] == ["c"]


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a tmpfs: root")
def test_a_full_disk_is_reported_with_advice(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "x", str(small)], check=False
    )
    if mounted.returncode:
        pytest.skip("this system does not let us mount a tmpfs")
    try:
        with pytest.raises(StorageError, match=r"the disk is full\. Free some space"):
            open_store(str(small)).write("a", bytes(1 << 20))
        assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_listing_has_the_time_of_the_last_write(store):
    store.write("a", b"1")
    (entry,) = store.list()
    assert abs(entry.modified - time.time()) < 60


def test_leftovers_of_s3_are_old_probes(moto_root):
    store = open_store(moto_root)
    store.write("a/.probe-1", b"")
    store.write("a/b", b"")
    assert [entry.key for entry in store.leftovers(time.time() + 60)] == ["a/.probe-1"]
    assert list(store.leftovers(time.time() - 60)) == []
    assert [entry.key for entry in store.list()] == ["a/b"]


def test_leftovers_are_old_temporary_files_and_those_of_ended_writers(tmp_path):
    store = LocalStore(tmp_path / "root")
    store.write("a/b", b"")
    ended = local._temporary_name().replace(f"-{os.getpid()}-", f"-{2**22 + 1}-")
    names = [".staged-x-1-2-old", ".staged-x-1-2-new", ".probe-old", ended, local._temporary_name()]
    for name in names:
        (tmp_path / "root/a" / name).write_bytes(b"123")
        if name.endswith("old"):
            os.utime(tmp_path / "root/a" / name, (0, 0))
    found = list(store.leftovers(time.time() - 60))
    assert {entry.key for entry in found} == {f"a/{names[n]}" for n in (0, 2, 3)}
    assert [entry.key for entry in store.list()] == ["a/b"]


def test_empty_folders_are_removed_with_their_locks(tmp_path):
    store = LocalStore(tmp_path / "root")
    for key in ("a/b/c", "a/d/e"):
        tag = store.create(key, b"1")
        store.replace(key, b"2", tag)  # leaves a lock file
    store.delete("a/b/c")
    remove_empty_folders(tmp_path / "root/a")
    assert sorted(path.name for path in (tmp_path / "root/a").iterdir()) == ["d"]
    assert store.read("a/d/e") == b"2"


def test_a_lock_file_that_was_removed_meanwhile_does_not_count(tmp_path):
    """Else two processes could hold two locks of one folder."""
    held = []

    def wait():
        with local._lock(tmp_path):
            held.append((tmp_path / ".lock").exists())

    with local._lock(tmp_path):
        waiter = threading.Thread(target=wait)
        waiter.start()
        time.sleep(0.2)
        (tmp_path / ".lock").unlink()
    waiter.join(10)
    assert held == [True]
