"""The S3 store with a real server (Ceph): rights, races and multipart uploads."""

import multiprocessing
import random
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from lease_holders import contend, killed_holder, stopped_holder
from servers import Fault, fault_proxy

from data_prep.core.errors import LeaseLostError, StorageError
from data_prep.core.lease import Lease, is_claimed
from data_prep.core.stage import Produced, Request, run_stage
from data_prep.core.storage import s3_requests
from data_prep.core.storage.open import open_store

pytestmark = [pytest.mark.integration, pytest.mark.slow]


@pytest.fixture
def store(s3_root):
    return open_store(s3_root)


def test_every_operation_works(store, tmp_path):
    store.write("a/b.bin", b"0123456789")
    assert store.read("a/b.bin") == b"0123456789"
    assert store.read_range("a/b.bin", 3, 4) == b"3456"
    assert store.read_range("a/b.bin", 8, 100) == b"89"
    assert store.read_range("a/b.bin", 10, 5) == b""
    store.write("empty", b"")
    assert store.read("empty") == store.read_range("empty", 0, 5) == b""
    assert store.exists("a/b.bin")
    assert not store.exists("a")
    (tmp_path / "up").write_bytes(b"file")
    store.upload("a/c.bin", tmp_path / "up")
    store.download("a/c.bin", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == b"file"
    for read in (store.read, store.read_tagged, store.open):
        with pytest.raises(FileNotFoundError):
            read("not/there")
    assert [(entry.key, entry.size) for entry in store.list()] == [
        ("a/b.bin", 10),
        ("a/c.bin", 4),
        ("empty", 0),
    ]
    assert [entry.key for entry in store.list("a")] == ["a/b.bin", "a/c.bin"]
    store.delete("a/b.bin")
    store.delete("a/b.bin")
    assert not store.exists("a/b.bin")


def test_names_with_special_characters_are_listed_unchanged(store):
    names = ["a b", "a+b", "a%20b", "new\nline", "tab\tx", "\x01", "é漢😀", "q?x#y&z=1", "a'\"<&>"]
    names += [" first", "last ", "a//b", "dot/./x"]
    for name in names:
        store.write(f"odd/{name}", name.encode())
    listed = [entry.key.removeprefix("odd/") for entry in store.list("odd")]
    assert listed == sorted(names)
    assert all(store.read(f"odd/{name}") == name.encode() for name in names)


def test_a_listing_of_several_pages_is_complete_and_sorted(store):
    keys = [f"many/{number:04d}" for number in range(1100)]
    with ThreadPoolExecutor(8) as pool:
        [*pool.map(lambda key: store.write(key, b""), reversed(keys))]
    assert [entry.key for entry in store.list("many")] == keys


def test_one_of_many_creators_succeeds_and_no_warning_is_logged(store, caplog):
    assert store.create("warm", b"") is not None
    for round_ in range(10):
        with ThreadPoolExecutor(8) as pool:
            tags = [*pool.map(lambda n, k=f"{round_}": store.create(k, b"%d" % n), range(8))]
        (won,) = [n for n, tag in enumerate(tags) if tag is not None]
        assert store.read_tagged(f"{round_}") == (b"%d" % won, tags[won])
    assert not [r for r in caplog.records if r.name.startswith("data_prep.")]


def test_no_replacement_is_lost_among_many(store):
    tag = store.create("counter", b"0")
    assert store.replace("counter", b"x", f'"{"0" * 32}"') is None
    assert store.replace("absent", b"x", tag) is None

    def count_up(_):
        while True:
            data, tag = store.read_tagged("counter")
            if store.replace("counter", b"%d" % (int(data) + 1), tag) is not None:
                return

    with ThreadPoolExecutor(8) as pool:
        [*pool.map(count_up, range(40))]
    assert store.read("counter") == b"40"


def test_a_lease_lets_one_runner_in_at_a_time(store):
    inside, most = 0, 0
    lock = threading.Lock()

    def work(_):
        nonlocal inside, most
        with Lease(store, "stage/lease.json", interval=2.0) as lease:
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.1)
            lease.check()
            with lock:
                inside -= 1

    with ThreadPoolExecutor(4) as pool:
        [*pool.map(work, range(4))]
    assert most == 1
    assert not is_claimed(store, "stage/lease.json")


def test_many_waiters_take_over_an_expired_lease_one_after_another(store):
    store.write("old/lease.json", b'{"owner": "x", "interval": 0.2}')
    assert contend(store.uri, "old/lease.json", runners=3, interval=1.0) == 1


def test_waiters_get_the_lease_of_a_killed_process_at_once_and_one_after_another(store):
    assert killed_holder(store.uri, "killed/lease.json") == 1


def test_real_heartbeats_keep_a_waiter_out_for_long(store):
    with Lease(store, "beats/lease.json", interval=1.0) as lease:
        until = time.monotonic() + 5
        with Lease(
            store, "beats/lease.json", interval=1.0, done=lambda: time.monotonic() > until
        ) as other:
            assert not other.held
        assert lease.held
        lease.check()


def test_a_stopped_process_notices_its_loss_and_leaves_its_successor_alone(store):
    stopped_holder(store.uri, "stopped/lease.json")


def test_a_runner_without_its_lease_gets_an_error(store):
    with Lease(store, "lease.json", interval=60) as lease:
        store.write("lease.json", b"{}")  # of another runner
        with pytest.raises(LeaseLostError):
            lease.check()


def _run(uri, results):
    def build(work):
        time.sleep(0.5)
        work.store.write(work.key("made"), b"1")
        return Produced([], {})

    reference = run_stage(open_store(uri), Request("test", "x", "tests", {}), build)
    results.put(reference.skipped)


def test_of_two_runners_of_a_stage_one_builds_and_the_other_finds_it_done(s3_root):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    runners = [context.Process(target=_run, args=(s3_root, results)) for _ in range(2)]
    for runner in runners:
        runner.start()
    assert sorted(results.get(timeout=60) for _ in runners) == [False, True]
    for runner in runners:
        runner.join(timeout=30)


@pytest.fixture(scope="module")
def large():
    return random.Random(0).randbytes(40 << 20)


def test_a_large_object_is_uploaded_in_parts_and_read_in_ranges(store, large, tmp_path):
    (tmp_path / "up").write_bytes(large)
    store.upload("large", tmp_path / "up")
    assert store.read_tagged("large")[1].endswith('-3"')  # three parts
    for offset in (0, (16 << 20) - 3, (32 << 20) - 1, len(large) - 5):
        assert store.read_range("large", offset, 10) == large[offset : offset + 10]
    store.download("large", tmp_path / "down")
    assert (tmp_path / "down").read_bytes() == large
    store.write("bytes", large)
    assert store.read("bytes") == large
    tag = store.read_tagged("large")[1]
    assert store.replace("large", b"small", tag) is not None
    assert store.read("large") == b"small"


def test_zip_and_tar_readers_work_on_an_open_object(store, large, tmp_path):
    members = {f"{n:02d}.bin": large[n << 20 : (n + 1) << 20] for n in range(40)}
    with (
        zipfile.ZipFile(tmp_path / "a.zip", "w") as zipped,
        tarfile.open(tmp_path / "a.tar", "w") as tar,
    ):
        for name, data in members.items():
            zipped.writestr(name, data)
            (tmp_path / "member").write_bytes(data)
            tar.add(tmp_path / "member", name)
    store.upload("a.zip", tmp_path / "a.zip")
    store.upload("a.tar", tmp_path / "a.tar")
    with store.open("a.zip") as file, zipfile.ZipFile(file) as zipped:
        assert zipped.testzip() is None
        assert zipped.read("31.bin") == members["31.bin"]
        assert zipped.read("07.bin") == members["07.bin"]
    with store.open("a.tar") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        assert {m.name: tar.extractfile(m).read() for m in tar} == members


def test_requests_survive_faults_before_a_real_server(ceph, monkeypatch, large, tmp_path):
    monkeypatch.setattr(s3_requests, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(s3_requests, "LONGEST_WAIT_S", 0.05)
    with fault_proxy(ceph) as proxy:
        proxy.server.use(monkeypatch)
        store = open_store(proxy.server.fresh_root())
        (tmp_path / "up").write_bytes(large)
        for fault in (
            Fault("answer", method="PUT", path="partNumber=1", times=3),
            Fault("lose", method="PUT", path="partNumber=2"),
            Fault("reset", method="PUT", path="partNumber=3", times=2),
            Fault("lose", method="POST", path="uploadId"),
            Fault("truncate", method="GET", times=4),
            Fault("answer", method="GET", times=2, status=500, code="InternalError"),
        ):
            proxy.inject(fault)
        store.upload("large", tmp_path / "up")
        assert store.read("large") == large
        assert all(fault.times == 0 for fault in proxy.faults)
        proxy.reset()
        assert store.create("warm", b"") is not None
        proxy.inject(Fault("lose", method="PUT"))
        tag = store.create("mine", b"1")
        assert tag == store.read_tagged("mine")[1]


@pytest.mark.parametrize(
    ("setting", "text"),
    [
        ("AWS_ACCESS_KEY_ID", "does not accept the AWS credentials (InvalidAccessKeyId)"),
        ("AWS_SECRET_ACCESS_KEY", "does not accept the AWS credentials (SignatureDoesNotMatch)"),
    ],
)
def test_a_wrong_key_is_reported_without_showing_it(s3_root, monkeypatch, setting, text):
    monkeypatch.setenv(setting, "wrong-and-secret")
    store = open_store(s3_root)
    for act in (
        lambda: store.read("a"),
        lambda: store.write("a", b""),
        lambda: store.create("a", b""),
        lambda: [*store.list()],
    ):
        with pytest.raises(StorageError) as caught:
            act()
        assert text in str(caught.value)
        assert "wrong-and-secret" not in repr(caught.value) + str(caught.value.__context__)
    with pytest.raises(StorageError, match="access denied"):
        store.exists("a")


def test_a_bucket_without_access_rights_is_reported(ceph, s3_root, monkeypatch):
    """A request without a key is anonymous, and the server answers `AccessDenied`."""
    import boto3
    from botocore import UNSIGNED
    from botocore.config import Config

    store = open_store(s3_root)
    store._requests._client = boto3.client("s3", config=Config(signature_version=UNSIGNED))
    with pytest.raises(StorageError, match=r"access denied \(AccessDenied\): .* need the rights"):
        store.read("a")


def test_a_missing_bucket_is_reported(s3_root):
    store = open_store("s3://nowhere-at-all/x")
    for act in (
        lambda: store.read("a"),
        lambda: store.write("a", b""),
        lambda: store.create("a", b""),
        lambda: [*store.list()],
    ):
        with pytest.raises(StorageError, match="bucket 'nowhere-at-all' does not exist"):
            act()


def test_unfinished_uploads_are_leftovers_until_they_are_deleted(store, s3_root):
    at = {"Bucket": store.bucket, "Key": f"{store.prefix}/images/x/train-000000.tar"}
    parts = {"first": [b"a" * 6_000_000, b"b" * 1000], "second": []}
    ids = {}
    for name, bodies in parts.items():
        ids[name] = store.client.create_multipart_upload(**at)["UploadId"]
        for number, body in enumerate(bodies, 1):
            store.client.upload_part(**at, UploadId=ids[name], PartNumber=number, Body=body)
    beside = {**at, "Key": f"{store.prefix}-other/x"}
    other = store.client.create_multipart_upload(**beside)["UploadId"]
    assert list(store.leftovers(time.time() - 3600)) == []
    found = {entry.key: entry.size for entry in store.leftovers(time.time() + 60)}
    assert sorted(found.values()) == [0, 6_001_000]
    assert {key.partition("?")[0] for key in found} == {"images/x/train-000000.tar"}
    assert list(store.list()) == []
    first = next(key for key, size in found.items() if size)
    store.delete_leftover(first)
    store.delete_leftover(first)
    left = store.client.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix)
    assert {each["UploadId"] for each in left["Uploads"]} == {ids["second"], other}
    store.client.abort_multipart_upload(**beside, UploadId=other)
