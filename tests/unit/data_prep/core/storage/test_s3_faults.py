"""The S3 store with faults: moto's server behind a proxy that injects them."""

import io
import pickle
import random
import time
from types import SimpleNamespace

import pytest
from botocore.exceptions import ClientError, ConnectionClosedError
from servers import Fault, fault_proxy

from data_prep.core.errors import StorageError
from data_prep.core.lease import Lease, is_claimed
from data_prep.core.storage import s3, s3_requests
from data_prep.core.storage.open import open_store

DATA = random.Random(0).randbytes(1_000_000)
LARGE = random.Random(1).randbytes((16 << 20) * 2 + 12_345)  # three parts


@pytest.fixture(scope="module")
def _proxy(moto):
    with fault_proxy(moto) as proxy:
        yield proxy


@pytest.fixture
def proxy(_proxy, monkeypatch):
    _proxy.server.use(monkeypatch)
    monkeypatch.setattr(s3_requests, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(s3_requests, "LONGEST_WAIT_S", 0.01)
    yield _proxy
    _proxy.reset()


@pytest.fixture
def store(proxy):
    store = open_store(proxy.server.fresh_root())
    store.write("a", DATA)
    proxy.requests.clear()
    return store


def message(act):
    """Return the message of the error that `act` raises. It may not chain another error."""
    with pytest.raises(StorageError) as caught:
        act()
    assert caught.value.__context__ is None
    assert caught.value.__cause__ is None
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


def warnings_of(caplog):
    """Return our own messages; moto's server logs in this process too."""
    ours = [record for record in caplog.records if record.name.startswith("data_prep.")]
    assert {record.levelname for record in ours} <= {"WARNING"}
    return [record.getMessage() for record in ours]


TRANSIENT = [
    Fault("answer", status=503, code="SlowDown", times=5),
    Fault("answer", status=429, code="TooManyRequests", times=3),
    Fault("answer", status=429, code="", times=3),
    Fault("answer", status=500, code="InternalError", times=3),
    Fault("answer", status=502, code="BadGateway", times=3),
    Fault("answer", status=400, code="RequestTimeout", times=3),
    Fault("reset", times=3),
    Fault("lose", times=3),
]


@pytest.mark.parametrize("fault", TRANSIENT, ids=lambda f: f"{f.kind} {f.status} {f.code}")
def test_every_request_survives_a_temporary_fault(store, proxy, fault, tmp_path):
    def again():
        proxy.reset()
        proxy.inject(Fault(**vars(fault)))

    again()
    assert store.read("a") == DATA
    assert proxy.count("GET") == fault.times + 1
    again()
    assert store.read_range("a", 5, 10) == DATA[5:15]
    if fault.status != 400:  # an answer to HEAD has no body, so its 400 has no code
        again()
        assert store.exists("a")
    again()
    store.write("b", b"1")
    again()
    assert {entry.key for entry in store.list()} == {"a", "b"}
    again()
    store.download("a", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == DATA
    again()
    store.delete("b")
    proxy.reset()
    assert not store.exists("b")


@pytest.mark.parametrize("kind", ["truncate", "stall"])
def test_a_read_resumes_where_the_connection_broke(store, proxy, kind, monkeypatch):
    if kind == "stall":
        monkeypatch.setattr(s3_requests, "READ_TIMEOUT_S", 0.2)
        store = pickle.loads(pickle.dumps(store))  # a client with that timeout
    fault = Fault(kind, method="GET", times=3, keep=0.7, seconds=0.5)
    proxy.inject(fault)
    assert store.read("a") == DATA
    assert fault.times == 0
    ranges = [headers["Range"] for m, _, headers in proxy.requests if "Range" in headers]
    begins = [int(span.removeprefix("bytes=").partition("-")[0]) for span in ranges]
    assert begins == sorted(begins)
    assert begins[0] >= 2 * s3.BLOCK  # not from the start
    assert all("If-Match" in headers for _, _, headers in proxy.requests if "Range" in headers)


@pytest.mark.parametrize("keep", [0.0, 0.5])
def test_an_incomplete_range_is_requested_again(store, proxy, keep):
    proxy.inject(Fault("truncate", method="GET", times=4, keep=keep))
    assert store.read_range("a", 100, 1000) == DATA[100:1100]
    assert proxy.count("GET") == 5


def test_an_answer_that_ends_early_without_an_error_is_requested_again(store, monkeypatch):
    real, cuts = store.client.get_object, [5, 300_000]

    def get_object(**request):
        answer = real(**request)
        if cuts:
            answer["Body"] = io.BytesIO(answer["Body"].read()[: cuts.pop()])
        return answer

    monkeypatch.setattr(store.client, "get_object", get_object)
    assert store.read("a") == DATA
    assert cuts == []


def test_an_incomplete_listing_is_requested_again(store, proxy):
    proxy.inject(Fault("truncate", method="GET", times=2))
    assert [entry.key for entry in store.list()] == ["a"]


def test_an_open_object_survives_faults_and_is_read_in_growing_blocks(proxy, store):
    store.write("large", LARGE)
    with store.open("large") as file:
        proxy.reset()
        proxy.inject(Fault("truncate", method="GET", times=2))
        proxy.inject(Fault("answer", method="GET", times=2))
        read = b"".join(iter(lambda: file.read(100_000), b""))
        assert read == LARGE
        assert proxy.count("GET") < 4 + 12  # 32 MiB in blocks of 256 KiB would be 128
        proxy.reset()
        file.seek(-50_000, io.SEEK_END)
        assert file.read() == LARGE[-50_000:]
        assert proxy.count("GET") == 0  # the last block is in memory
        file.seek(1_000_000)
        assert file.read(10) == LARGE[1_000_000:1_000_010]
        file.seek(1_200_000)
        assert file.read(10) == LARGE[1_200_000:1_200_010]
        assert proxy.count("GET") == 1


def test_a_read_starts_again_if_the_object_changes(store, proxy):
    other = DATA[::-1]
    client = s3_requests.new_client()

    class Changing:
        """A client with another writer that comes after the first answer."""

        def __getattr__(self, name):
            return getattr(client, name)

        def get_object(self, **request):
            answer = client.get_object(**request)
            if "IfMatch" not in request and not changed:
                changed.append(True)
                store.write("a", other)
            return answer

    changed = []
    reader = pickle.loads(pickle.dumps(store))
    reader._requests._client = Changing()
    proxy.inject(Fault("truncate", method="GET", times=1, keep=0.6))
    assert reader.read("a") == other
    assert changed


def test_a_change_of_an_open_object_is_an_error(store):
    with store.open("a") as file:
        file.read(10)
        store.write("a", DATA[::-1])
        assert file.read(10) == DATA[10:20]  # still in memory
        file.seek(-10, io.SEEK_END)
        assert "was changed while it was read" in message(file.read)


def test_a_lasting_fault_is_reported_after_a_fixed_number_of_attempts(store, proxy):
    proxy.inject(Fault("answer", times=1000))
    assert "overloaded (SlowDown). Use fewer workers or wait" in message(lambda: store.read("a"))
    assert proxy.count("GET") == s3_requests.ATTEMPTS
    for fault, text in [
        (Fault("answer", status=500, code="InternalError", times=1000), "the S3 server fails"),
        (Fault("reset", times=1000), "keeps breaking"),
        (Fault("truncate", keep=0.1, times=1000), "keeps breaking"),
    ]:
        proxy.reset()
        proxy.inject(fault)
        assert text in message(lambda: store.read("a"))
        assert proxy.count("GET") == s3_requests.ATTEMPTS


@pytest.mark.parametrize(
    ("status", "code", "text"),
    [
        (403, "AccessDenied", "access denied (AccessDenied): the AWS credentials need the rights"),
        (403, "InvalidAccessKeyId", "the server does not accept the AWS credentials"),
        (403, "SignatureDoesNotMatch", "Check the access key and its secret"),
        (400, "ExpiredToken", "the AWS credentials have expired (ExpiredToken). Renew them"),
        (403, "RequestTimeTooSkewed", "clocks of this machine and the server differ"),
        (404, "NoSuchBucket", "bucket 'dpnet-test' does not exist. Create it"),
        (400, "AuthorizationHeaderMalformed", "is in another region"),
        (403, "InvalidObjectState", "is archived. Restore it first"),
        (418, "Strange", "refuses the request (Strange)"),
    ],
)
def test_a_refusal_is_reported_without_a_retry(store, proxy, status, code, text):
    proxy.inject(Fault("answer", status=status, code=code, times=1000))
    for act in (
        lambda: store.read("a"),
        lambda: store.write("a", b""),
        lambda: [*store.list()],
        lambda: store.create("lease", b""),
    ):
        proxy.requests.clear()
        assert text in message(act)
        assert len(proxy.requests) == 1


def test_a_refusal_without_a_body_is_reported(store, proxy):
    proxy.inject(Fault("answer", status=403, times=1000))
    assert "access denied (403)" in message(lambda: store.exists("a"))
    proxy.reset()
    proxy.inject(Fault("answer", status=400, times=1000))
    assert "The AWS credentials may have expired" in message(lambda: store.exists("a"))


def test_a_server_that_never_answered_is_named_after_few_attempts(proxy, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:hush-hush@127.0.0.1:9")
    text = message(lambda: open_store("s3://b/x").read("a"))
    assert "cannot reach the S3 server 127.0.0.1:9. Check AWS_ENDPOINT_URL" in text
    assert "hush" not in text
    monkeypatch.setattr(s3_requests, "FIRST_WAIT_S", 0.2)
    begun = time.monotonic()
    message(lambda: open_store("s3://b/x").read("a"))
    assert time.monotonic() - begun < 5


def test_requests_wait_longer_for_a_server_that_answered_before(store, proxy, monkeypatch):
    begun = time.monotonic()
    waits = []
    monkeypatch.setattr(s3_requests.time, "sleep", waits.append)
    monkeypatch.setattr(s3_requests, "FIRST_WAIT_S", 0.2)
    monkeypatch.setattr(s3_requests, "LONGEST_WAIT_S", 20.0)
    assert store.exists("a")
    dead = open_store(store.uri)
    dead._requests._reached = True
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "cannot reach" in message(lambda: dead.read("a"))
    assert len(waits) == s3_requests.ATTEMPTS - 1
    longest = [min(20.0, 0.2 * 2**n) for n in range(len(waits))]
    assert all(0 <= wait <= most for wait, most in zip(waits, longest, strict=True))
    assert len(set(waits)) == len(waits)  # jitter
    assert time.monotonic() - begun < 10


def test_a_patient_store_warns_once_and_retries(store, proxy, caplog):
    patient = open_store(store.uri, patience=60)
    for _ in range(2):
        proxy.reset()
        proxy.inject(Fault("answer", status=503, times=25))
        assert patient.read("a") == DATA
        (warning,) = warnings_of(caplog)
        assert warning.startswith("s3://")
        assert warning.endswith("Retrying for up to 1 min.")
        caplog.clear()
    proxy.reset()
    proxy.inject(Fault("answer", status=403, code="AccessDenied", times=99))
    with pytest.raises(StorageError):
        patient.read("a")
    assert proxy.count("GET") == 1


@pytest.mark.parametrize("missing", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "both"])
def test_missing_credentials_are_reported(proxy, monkeypatch, missing):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        if missing in (name, "both"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    text = message(lambda: open_store("s3://b/x").read("a"))
    assert "credentials" in text
    assert "Credentials" in text  # the name of what is missing


@pytest.mark.parametrize(
    ("setting", "value"),
    [("AWS_ENDPOINT_URL", "localhost:9000"), ("AWS_PROFILE", "nobody")],
)
def test_unusable_aws_settings_are_reported(proxy, monkeypatch, setting, value):
    monkeypatch.setenv(setting, value)
    text = message(lambda: open_store("s3://b/x").read("a"))
    assert "cannot be used" in text
    assert setting in text
    assert "ValueError" not in text


def test_a_bundle_of_certificates_that_does_not_exist_is_reported(proxy, monkeypatch):
    monkeypatch.setenv("AWS_CA_BUNDLE", "/no/such/bundle.pem")
    text = message(lambda: open_store("s3://b/x").read("a"))
    assert text.startswith("AWS_CA_BUNDLE names /no/such/bundle.pem, which does not exist")


def test_an_impossible_bucket_name_is_reported(proxy):
    assert "a bucket or an object cannot have this name" in message(
        lambda: open_store("s3://a b!/x").read("a")
    )


def test_credentials_are_never_shown(store, proxy, monkeypatch, caplog, capfd):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIA-do-not-show")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-do-not-show")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token-do-not-show")
    shown = []
    for fault in [
        Fault("answer", status=403, code="SignatureDoesNotMatch", times=1000),
        Fault("answer", status=503, times=1000),
        Fault("reset", times=1000),
        Fault("ignore conditions", times=1000),
    ]:
        proxy.reset()
        proxy.inject(fault)
        other = open_store(store.uri)
        for act in (lambda s: s.read("a"), lambda s: s.create("x", b""), lambda s: [*s.list()]):
            try:
                act(other)
            except StorageError as error:
                at = error
                while at is not None:
                    shown += [str(at), repr(at), repr(vars(at))]
                    at = at.__cause__ or at.__context__
        shown.append(repr(pickle.dumps(other)))
    assert len(shown) > 10
    everything = "".join([*shown, caplog.text, *capfd.readouterr()])
    assert "do-not-show" not in everything


def test_the_server_is_named_without_the_password_of_its_address():
    requests = s3_requests.S3Requests("bucket", 0.0)
    url = "https://user:do-not-show@host:9000/path?token=do-not-show"
    requests._client = SimpleNamespace(meta=SimpleNamespace(endpoint_url=url))
    assert requests._server() == "host:9000"


# Conditional writes.


def test_conditions_are_probed_once_and_the_probe_leaves_nothing(store, proxy):
    assert store.create("x", b"1") is not None
    probes = proxy.count("PUT", ".probe-")
    assert probes == 4
    assert store.create("y", b"1") is not None
    assert pickle.loads(pickle.dumps(store)).create("y", b"2") is None
    assert proxy.count("PUT", ".probe-") == probes
    assert proxy.count("DELETE", ".probe-") == 1
    assert [entry.key for entry in store.list()] == ["a", "x", "y"]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("ignore conditions", times=1000),
        Fault("answer", method="PUT", path=".probe-", status=501, code="NotImplemented"),
    ],
    ids=["ignored", "refused"],
)
def test_a_server_without_conditional_writes_serves_one_runner_with_a_warning(
    store, proxy, fault, caplog, monkeypatch
):
    if fault.kind == "answer":

        def next_fault(method, path, headers, real=proxy.next_fault):
            real(method, path, headers)
            refuse = method == "PUT" and "If-None-Match" in headers
            return fault if refuse else None

        monkeypatch.setattr(proxy, "next_fault", next_fault)
    else:
        proxy.inject(fault)
    tag = store.create("x", b"1")
    assert tag is not None
    assert store.create("x", b"2") is None
    newer = store.replace("x", b"3", tag)
    assert newer is not None
    assert store.replace("x", b"4", tag) is None
    assert store.replace("absent", b"5", tag) is None
    assert store.read_tagged("x") == (b"3", newer)
    with Lease(store, "lease.json") as lease:
        lease.check()
    assert not is_claimed(store, "lease.json")
    (warning,) = warnings_of(caplog)
    assert "does not support conditional writes" in warning
    assert "Start only one" in warning


def test_a_server_that_compares_tags_only_without_quotes_gets_that_form(
    store, proxy, caplog, monkeypatch
):
    """Ceph 16 is such a server: it answers 412 to a write with the tag that it reported."""

    def next_fault(method, path, headers, real=proxy.next_fault):
        if method == "PUT" and headers.get("If-Match", "").startswith('"'):
            return Fault("answer", status=412, code="PreconditionFailed")
        return real(method, path, headers)

    monkeypatch.setattr(proxy, "next_fault", next_fault)
    tag = store.create("x", b"1")
    newer = store.replace("x", b"2", tag)
    assert newer is not None
    assert store.replace("x", b"3", tag) is None
    assert store.read_tagged("x") == (b"2", newer)
    assert "If-Match" in proxy.requests[-2][2]  # a conditional request, not a look-up
    assert warnings_of(caplog) == []


def test_there_is_no_warning_if_the_server_supports_conditions(store, caplog):
    store.create("x", b"1")
    assert warnings_of(caplog) == []


@pytest.mark.parametrize("kind", ["lose", "reset"])
def test_a_conditional_write_with_a_lost_answer_is_recognised_as_our_own(store, proxy, kind):
    store.create("warm", b"")  # the probe
    proxy.inject(Fault(kind, method="PUT"))
    tag = store.create("x", b"mine")
    assert tag == store.read_tagged("x")[1]
    proxy.inject(Fault(kind, method="PUT"))
    newer = store.replace("x", b"mine, newer", tag)
    assert newer == store.read_tagged("x")[1]
    proxy.inject(Fault(kind, method="PUT"))
    assert store.create("x", b"mine, newer") is None  # equal bytes do not make it our own
    assert store.replace("x", b"another's", tag) is None


def test_a_write_in_conflict_with_another_is_retried(store, proxy):
    store.create("warm", b"")
    proxy.inject(Fault("answer", method="PUT", status=409, code="ConditionalRequestConflict"))
    assert store.create("x", b"1") is not None
    proxy.inject(Fault("answer", method="PUT", status=409, code="ConditionalRequestConflict"))
    assert store.create("x", b"2") is None


# Multipart uploads.


@pytest.mark.parametrize("kind", ["answer", "reset", "lose"])
def test_a_large_upload_survives_faults_in_each_of_its_steps(store, proxy, kind, tmp_path):
    (tmp_path / "large").write_bytes(LARGE)
    for method, path in [("POST", "?uploads"), ("PUT", "partNumber=2"), ("POST", "?uploadId")]:
        proxy.inject(Fault(kind, method=method, path=path))
    store.upload("large", tmp_path / "large")
    assert all(fault.times == 0 for fault in proxy.faults)
    assert proxy.count("PUT", "partNumber=") >= 3
    assert store.read("large") == LARGE


def test_a_large_upload_is_whole_if_the_server_has_forgotten_its_id(store, monkeypatch):
    real, calls = store.client.complete_multipart_upload, []

    def complete(**request):
        calls.append(request)
        if len(calls) > 1:  # like Ceph; moto would do it again
            answer = {
                "Error": {"Code": "NoSuchUpload"},
                "ResponseMetadata": {"HTTPStatusCode": 404},
            }
            raise ClientError(answer, "CompleteMultipartUpload")
        real(**request)
        raise ConnectionClosedError(endpoint_url="http://host")

    monkeypatch.setattr(store.client, "complete_multipart_upload", complete)
    store.write("large", LARGE)
    assert store.read("large") == LARGE


def test_a_large_upload_that_fails_leaves_nothing_behind(store, proxy):
    proxy.inject(Fault("answer", method="PUT", path="partNumber=2", times=1000))
    message(lambda: store.write("large", LARGE))
    assert not store.exists("large")
    assert proxy.count("DELETE", "uploadId") == 1
    left = store.client.list_multipart_uploads(Bucket=store.bucket, Prefix=store.prefix)
    assert "Uploads" not in left


def test_a_download_that_fails_leaves_nothing_behind(store, proxy, tmp_path):
    proxy.inject(Fault("truncate", keep=0.1, times=1000))
    message(lambda: store.download("a", tmp_path / "a"))
    assert [*tmp_path.iterdir()] == []


def test_a_listing_is_requested_page_by_page(proxy, store):
    for number in range(5):
        store.write(f"many/{number}", b"")
    client = store.client

    class ShortPages:
        """A client with two names per page, so that five names need several pages."""

        def __getattr__(self, name):
            return getattr(client, name)

        def list_objects_v2(self, **request):
            return client.list_objects_v2(**request, MaxKeys=2)

    store._requests._client = ShortPages()
    proxy.reset()
    listing = store.list("many")
    assert [next(listing).key, next(listing).key] == ["many/0", "many/1"]
    assert proxy.count("GET") == 1
    proxy.inject(Fault("answer"))
    assert [entry.key for entry in listing] == ["many/2", "many/3", "many/4"]


def test_folder_markers_are_not_listed(store):
    for key in ("folder/", "folder/x", "folder/deep/"):
        store.client.put_object(Bucket=store.bucket, Key=f"{store.prefix}/{key}", Body=b"")
    assert [entry.key for entry in store.list()] == ["a", "folder/x"]


@pytest.mark.parametrize(
    "endpoint",
    [
        "https://server.example.com:9000/bucket",
        "https://server.example.com/bucket/",
        "https://bucket.s3.eu-west-1.amazonaws.com",
        "https://bucket.s3-eu-west-1.amazonaws.com",
        "https://Bucket.s3.example.com",
        "https://bucket.fra1.digitaloceanspaces.com",
        "https://account.r2.cloudflarestorage.com/bucket",
        "https://user:hush-hush@server.example.com/bucket",
    ],
)
def test_an_endpoint_with_the_bucket_in_it_is_refused_without_a_request(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(StorageError, match="AWS_ENDPOINT_URL has the bucket 'bucket' in it") as e:
        open_store("s3://bucket/a").exists("b")
    assert "hush" not in str(e.value)


@pytest.mark.parametrize(
    "endpoint",
    ["http://bucket:9000", "http://bucket.default.svc:9000", "https://x.supabase.co/storage/v1/s3"],
)
def test_a_server_with_the_name_of_the_bucket_or_a_path_is_accepted(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    assert s3_requests.S3Requests("bucket", 0.0).client.meta.endpoint_url == endpoint
