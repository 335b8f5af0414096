"""Stage, lease and digests: skip, resume, commit, and never two runners at once."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from data_prep.core import digest
from data_prep.core.errors import LeaseLostError, PipelineError
from data_prep.core.lease import Lease
from data_prep.core.manifest import load_reference
from data_prep.core.stage import Produced, Request, run_stage
from data_prep.core.storage.open import open_store
from data_prep.shards.shards import write_file


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path))


def request(**settings):
    return Request(stage="images", name="x", top="images/x", settings=settings or {"size": 64})


def build(text="hello", note=""):
    def run(work):
        files = [
            write_file(work, "a.txt", text.encode()),
            write_file(work, "time.txt", note.encode(), content=False),
        ]
        return Produced(files, {"n": 1})

    return run


def test_a_committed_stage_is_skipped(store):
    first = run_stage(store, request(), build())

    def never(work):
        raise AssertionError("built again")

    second = run_stage(store, request(), never)
    assert (first.skipped, second.skipped) == (False, True)
    assert second.content_digest == first.content_digest
    assert second.summary == {"n": 1}
    assert load_reference(store, first.folder).request_digest == first.request_digest


def test_an_unfinished_stage_is_built_again_in_the_same_folder(store):
    def fails(work):
        write_file(work, "part.txt", b"kept")
        raise PipelineError("no luck.")

    with pytest.raises(PipelineError, match="no luck"):
        run_stage(store, request(), fails)
    folder = request().folder
    assert not store.exists(f"{folder}/manifest.json")
    assert not store.exists(f"{folder}/lease.json")
    assert store.read(f"{folder}/part.txt") == b"kept"
    assert not run_stage(store, request(), build()).skipped


def test_the_content_digest_depends_on_files_and_not_on_times(tmp_path):
    def made(where, **kw):
        return run_stage(open_store(str(tmp_path / where)), request(), build(**kw))

    a, b, c = made("a"), made("b", note="later"), made("c", text="other")
    assert a.content_digest == b.content_digest != c.content_digest
    assert a.request_digest == b.request_digest == c.request_digest


def test_the_request_digest_follows_settings_and_the_content_of_inputs(store):
    upstream = run_stage(store, request(), build())
    other = run_stage(store, request(size=65), build(text="other"))

    def train(inputs, **settings):
        return Request("train", "y", "runs", settings, {"images": inputs}, slug="y-").digest

    assert train(upstream, lr=1) != train(upstream, lr=2)
    assert train(upstream, lr=1) != train(other, lr=1)
    assert Request("train", "z", "elsewhere", {"lr": 1}, {"images": upstream}).digest == train(
        upstream, lr=1
    )


def test_every_part_of_a_request_changes_its_digest_and_nothing_else_does(store):
    upstream = run_stage(store, request(), build())

    def digest_of(stage="train", inputs=upstream, **sources):
        return Request(stage, "y", "runs", {}, {"images": inputs}, sources).digest

    assert digest_of() != digest_of("evaluate")
    assert digest_of(raw="a") != digest_of(raw="b")
    assert digest_of() == digest_of(inputs=replace(upstream, request_digest="0" * 64))
    assert digest_of() != digest_of(inputs=replace(upstream, content_digest="0" * 64))


def test_the_content_digest_does_not_depend_on_the_order_of_files():
    files = [("a", "1" * 64), ("b", "2" * 64)]
    assert digest.content_digest(files) == digest.content_digest(reversed(files))


def test_a_manifest_of_another_request_is_refused(store):
    folder = run_stage(store, request(), build()).folder
    manifest = json.loads(store.read(f"{folder}/manifest.json"))
    manifest["request_digest"] = "0" * 64
    store.write(f"{folder}/manifest.json", json.dumps(manifest).encode())
    with pytest.raises(PipelineError, match="it has another request digest"):
        run_stage(store, request(), build())


def test_an_altered_manifest_is_named(store):
    folder = run_stage(store, request(), build()).folder
    store.write(f"{folder}/manifest.json", b"{")
    with pytest.raises(PipelineError, match="was altered"):
        run_stage(store, request(), build())


def test_a_second_runner_waits_and_finds_the_work_done(store, caplog):
    begun, go = threading.Event(), threading.Event()

    def slow(work):
        begun.set()
        assert go.wait(20)
        return build()(work)

    results = {}
    first = threading.Thread(target=lambda: results.update(first=run_stage(store, request(), slow)))
    first.start()
    assert begun.wait(20)
    second = threading.Thread(
        target=lambda: results.update(second=run_stage(store, request(), build(text="wrong")))
    )
    second.start()
    until = time.monotonic() + 20
    while not caplog.messages:
        assert time.monotonic() < until, "the second runner does not wait"
        time.sleep(0.01)
    go.set()
    first.join()
    second.join()
    assert results["second"].skipped
    assert results["second"].content_digest == results["first"].content_digest
    (message,) = caplog.messages
    assert message == (
        f"another runner ({socket.gethostname()}, process {os.getpid()}) is running"
        f" {request().folder}: waiting for it, or until it gives no sign for 30 s"
    )


def test_a_lease_of_a_dead_process_of_this_machine_is_taken_over_at_once(store):
    code = (
        "import os, sys\n"
        "from data_prep.core.lease import Lease\n"
        "from data_prep.core.storage.open import open_store\n"
        "Lease(open_store(sys.argv[1]), 'a/lease.json').__enter__()\n"
        "os._exit(9)\n"
    )
    subprocess.run([sys.executable, "-c", code, store.uri], check=False)
    assert store.exists("a/lease.json")
    start = time.monotonic()
    with Lease(store, "a/lease.json") as lease:
        assert lease.held
        assert lease.attempt == 2
    assert time.monotonic() - start < 5
    assert not store.exists("a/lease.json")


def foreign(store, beat=0):
    """Write a lease like a runner on another machine."""
    record = {"owner": "x", "host": "elsewhere", "pid": 1, "attempt": 1, "interval": 0.2}
    store.write("a/lease.json", json.dumps({**record, "heartbeat": beat}).encode())


def test_a_lease_that_is_not_renewed_is_taken_over(store):
    foreign(store)
    with Lease(store, "a/lease.json", interval=0.2) as lease:
        assert lease.attempt == 2


def test_a_lease_that_is_renewed_is_respected(store):
    stop = threading.Event()

    def renew():
        beat = 0
        while not stop.wait(0.1):
            beat += 1
            foreign(store, beat)

    foreign(store)
    other = threading.Thread(target=renew)
    other.start()
    waited_until = time.monotonic() + 1.5
    with Lease(
        store, "a/lease.json", interval=0.2, done=lambda: time.monotonic() > waited_until
    ) as lease:
        held = lease.held
    stop.set()
    other.join()
    assert not held


def test_a_runner_that_lost_its_lease_cannot_commit(store):
    def overtaken(work):
        foreign_key = f"{work.folder}/lease.json"
        store.write(foreign_key, b'{"owner": "other", "host": "elsewhere"}')
        return build()(work)

    with pytest.raises(LeaseLostError, match="taken over"):
        run_stage(store, request(), overtaken)
    assert not store.exists(f"{request().folder}/manifest.json")
    assert json.loads(store.read(f"{request().folder}/lease.json"))["owner"] == "other"


def test_canonical_json_does_not_depend_on_the_order_of_keys():
    assert digest.sha256_json({"b": 1, "a": "é"}) == digest.sha256_json({"a": "é", "b": 1})
    assert digest.canonical_json({"b": 1, "a": "é"}) == '{"a":"é","b":1}'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest.sha256_json({"a": float("nan")})
