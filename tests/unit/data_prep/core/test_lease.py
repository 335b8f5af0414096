"""The lease: who holds it, when it is lost, and who may write its record."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lease_holders import contend, killed_holder, stopped_holder
from servers import Fault, fault_proxy

from data_prep.core import lease as lease_module
from data_prep.core.errors import LeaseLostError, StorageError
from data_prep.core.lease import Follower, Lease, check_leases, confirm_leases, is_claimed
from data_prep.core.pool import run_tasks
from data_prep.core.process_identity import boot, process_start
from data_prep.core.stage import Produced, Request, Work, run_stage
from data_prep.core.storage.local import LocalStore
from data_prep.core.storage.open import open_store

KEY = "a/lease.json"


class Clock:
    """A clock that only sleeping moves. `then` runs after each sleep."""

    def __init__(self) -> None:
        self.time = 1000.0
        self.then: Callable[[], None] = lambda: None

    def sleep(self, seconds: float) -> None:
        self.time += seconds
        self.then()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lease_module, "now", lambda: clock.time)
    monkeypatch.setattr(lease_module, "time", SimpleNamespace(sleep=clock.sleep))
    return clock


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path)


def foreign(store: LocalStore, beat: int = 0, **more: Any) -> None:
    """Write a record like a runner on another machine does, in the form of earlier versions."""
    record = {"owner": "x", "host": "elsewhere", "boot": "", "pid": 1, "started": "1"}
    record |= {"attempt": 4, "heartbeat": beat, "interval": 10.0, **more}
    store.write(KEY, json.dumps(record, indent=1).encode())


def owner(store: LocalStore) -> str:
    return str(json.loads(store.read(KEY))["owner"])


def test_a_waiter_takes_over_after_three_intervals_without_a_change(
    store: LocalStore, clock: Clock
) -> None:
    foreign(store)
    begun = clock.time
    with Lease(store, KEY) as lease:
        assert lease.held
        assert lease.attempt == 5
        assert 30 < clock.time - begun < 33


def test_a_waiter_respects_a_lease_that_is_renewed_within_three_intervals(
    store: LocalStore, clock: Clock
) -> None:
    beats = 0

    def renew_late() -> None:
        nonlocal beats
        if clock.time - 1000 > 29 * (beats + 1):
            beats += 1
            foreign(store, beats)

    foreign(store)
    clock.then = renew_late
    with Lease(store, KEY, done=lambda: beats == 10) as lease:
        assert not lease.held
    assert json.loads(store.read(KEY))["heartbeat"] == 10


def test_the_owner_regards_the_lease_as_lost_after_three_intervals_without_renewal(
    store: LocalStore, clock: Clock
) -> None:
    with Lease(store, KEY, interval=10.0) as lease:
        clock.time += 29
        check_leases()
        clock.time += 1
        with pytest.raises(LeaseLostError, match=r"could not be renewed for 30 s, so .* resumes\."):
            check_leases()
        assert not lease.held
        clock.time -= 20  # what is lost stays lost
        with pytest.raises(LeaseLostError):
            lease.check()
    assert not store.exists(KEY)


class Slow(LocalStore):
    """A folder in which the answer to one kind of request takes long, once."""

    slow, seconds = "", 0.0
    clock: Clock

    def create(self, key: str, data: bytes) -> str | None:
        tag = super().create(key, data)
        self._wait("create")
        return tag

    def replace(self, key: str, data: bytes, tag: str) -> str | None:
        found = super().replace(key, data, tag)
        self._wait("replace")
        return found

    def _wait(self, act: str) -> None:
        if act == self.slow:
            self.slow = ""
            self.clock.time += self.seconds


@pytest.mark.parametrize("act", ["create", "replace"])
def test_the_owner_counts_from_before_its_request(tmp_path: Path, clock: Clock, act: str) -> None:
    store = Slow(tmp_path)
    store.slow, store.seconds, store.clock = act, 8.0, clock
    with Lease(store, KEY, interval=10.0) as lease:
        if act == "replace":
            lease.check()
        assert clock.time == 1008
        clock.time += 21
        assert lease.held
        clock.time += 1
        assert not lease.held


def test_a_lease_that_was_answered_late_is_written_once_more(tmp_path: Path, clock: Clock) -> None:
    store = Slow(tmp_path)
    store.slow, store.seconds, store.clock = "create", 15.0, clock
    with Lease(store, KEY, interval=10.0) as lease:
        assert json.loads(store.read(KEY))["heartbeat"] == 1
        clock.time += 29
        assert lease.held
        clock.time += 1
        assert not lease.held


def test_a_process_number_that_was_used_again_is_not_the_owner(store: LocalStore) -> None:
    if not boot():
        pytest.skip("this system has no /proc")
    me = {"host": lease_module._owner()["host"], "boot": boot(), "pid": os.getpid()}
    foreign(store, interval=1000.0, **{**me, "started": "1"})
    until = time.monotonic() + 10
    with Lease(store, KEY, done=lambda: time.monotonic() > until) as lease:
        assert lease.held
    foreign(store, interval=1000.0, **{**me, "started": process_start(os.getpid())})
    until = time.monotonic() + 0.5
    with Lease(store, KEY, interval=0.1, done=lambda: time.monotonic() > until) as lease:
        assert not lease.held
    assert owner(store) == "x"


def test_a_take_over_does_not_overwrite_a_renewal_at_the_last_moment(
    tmp_path: Path, clock: Clock
) -> None:
    class Renewed(LocalStore):
        """The owner renews between the waiter's read and its write."""

        beats = 0

        def read_tagged(self, key: str) -> tuple[bytes, str]:
            found = super().read_tagged(key)
            if clock.time > 1030 and not self.beats:
                self.beats = 1
                foreign(self, 1)
            return found

    store = Renewed(tmp_path)
    foreign(store)
    with Lease(store, KEY, done=lambda: store.beats == 1) as lease:
        assert not lease.held
    assert (store.beats, owner(store)) == (1, "x")


def test_a_record_of_no_sense_is_taken_over_like_an_old_one(
    store: LocalStore, clock: Clock
) -> None:
    huge = b"1" + b"0" * 400
    records = [b"{}", b"[]", b"\xff", b"[" * 9000, b'{"interval": "long", "pid": "x"}']
    records += [b'{"interval": 1e300, "attempt": null}', b'{"interval": NaN, "attempt": -1}']
    records += [b'{"interval": %b, "attempt": %b, "pid": %b}' % (huge, huge, huge)]
    for record in records:
        store.write(KEY, record)
        begun = clock.time
        with Lease(store, KEY) as lease:
            assert lease.held
        assert clock.time - begun < 4 * 3600


def test_a_record_with_a_huge_interval_is_not_waited_for_so_long(
    store: LocalStore, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "_LONGEST_INTERVAL_S", 20.0)
    store.write(KEY, b'{"interval": 200}')
    begun = clock.time
    with Lease(store, KEY) as lease:
        assert lease.held
    assert 60 <= clock.time - begun < 120


def test_real_heartbeats_keep_a_waiter_out_for_long(store: LocalStore) -> None:
    with Lease(store, KEY, interval=0.5) as lease:
        until = time.monotonic() + 4
        with Lease(store, KEY, interval=0.5, done=lambda: time.monotonic() > until) as other:
            assert not other.held
        assert lease.held
        assert json.loads(store.read(KEY))["heartbeat"] >= 2
        lease.check()
    assert not store.exists(KEY)


def test_many_waiters_take_over_an_expired_lease_one_after_another(tmp_path: Path) -> None:
    foreign(LocalStore(tmp_path), interval=0.2)
    assert contend(str(tmp_path), KEY, runners=4, interval=0.5) == 1


def test_waiters_get_the_lease_of_a_killed_process_at_once_and_one_after_another(
    tmp_path: Path,
) -> None:
    assert killed_holder(str(tmp_path), KEY) == 1


# Losing it.


@pytest.mark.parametrize(
    "problem",
    [OSError(errno.EIO, "Input/output error"), OSError(errno.ESTALE, "Stale"), StorageError("no.")],
    ids=["EIO", "ESTALE", "StorageError"],
)
def test_failed_renewals_neither_end_the_lease_nor_its_thread(
    tmp_path: Path, problem: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    class Failing(LocalStore):
        failures = 0

        def replace(self, key: str, data: bytes, tag: str) -> str | None:
            if self.failures < 3:
                self.failures += 1
                raise problem
            return super().replace(key, data, tag)

    store = Failing(tmp_path)
    with Lease(store, KEY, interval=0.8) as lease:
        deadline = time.monotonic() + 20
        while json.loads(store.read(KEY))["heartbeat"] < 5 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert lease.held
        lease.check()
    assert store.failures == 3
    assert len([m for m in caplog.messages if "cannot be renewed now" in m]) == 1


def test_a_commit_waits_for_a_renewal_that_fails_at_first(tmp_path: Path) -> None:
    class Failing(LocalStore):
        failures = 0

        def replace(self, key: str, data: bytes, tag: str) -> str | None:
            if self.failures < 2:
                self.failures += 1
                raise OSError(errno.EIO, "Input/output error")
            return super().replace(key, data, tag)

    store = Failing(tmp_path)
    with Lease(store, KEY) as lease:
        lease.check()
    assert store.failures == 2


def test_a_renewal_whose_answer_is_lost_does_not_lose_the_lease(tmp_path: Path) -> None:
    class Losing(LocalStore):
        lost = 0

        def replace(self, key: str, data: bytes, tag: str) -> str | None:
            found = super().replace(key, data, tag)
            if not self.lost:
                self.lost += 1
                raise StorageError("the answer was lost.")
            return found

    store = Losing(tmp_path)
    with Lease(store, KEY) as lease:
        lease.check()
        lease.check()
    assert store.lost == 1
    assert not store.exists(KEY)


def test_a_renewal_that_hangs_does_not_keep_the_owner_believing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()

    class Hanging(LocalStore):
        def replace(self, key: str, data: bytes, tag: str) -> str | None:
            go.wait(60)
            return super().replace(key, data, tag)

    monkeypatch.setattr(lease_module, "HEARTBEAT_S", 0.5)  # the wait for the thread at the end
    store = Hanging(tmp_path)
    begun = time.monotonic()

    def work() -> None:
        with Lease(store, KEY, interval=0.3):
            while time.monotonic() - begun < 20:
                time.sleep(0.05)
                check_leases()

    try:
        with pytest.raises(LeaseLostError, match="could not be renewed"):
            work()
    finally:
        go.set()


def test_a_lost_lease_stops_the_work_within_a_heartbeat(store: LocalStore) -> None:
    request = Request("images", "x", "a", {})
    key = f"{request.folder}/lease.json"

    def build(work: Work) -> Produced:
        store.write(key, b'{"owner": "other", "host": "elsewhere"}')
        for _ in range(400):
            time.sleep(0.05)
            check_leases()
        raise AssertionError("it was not stopped")

    with pytest.raises(LeaseLostError, match="was taken over by another runner"):
        run_stage(store, request, build, interval=0.3)
    assert json.loads(store.read(key))["owner"] == "other"
    assert not store.exists(f"{request.folder}/manifest.json")


def _slow(made: Path) -> None:
    time.sleep(10)
    made.touch()


def test_a_lost_lease_ends_tasks_in_worker_processes(tmp_path: Path, store: LocalStore) -> None:
    files = [tmp_path / f"made {number}" for number in range(2)]

    def work() -> None:
        with Lease(store, KEY, interval=0.3):
            foreign(store)
            list(run_tasks(_slow, files, 2))

    with pytest.raises(LeaseLostError):
        work()
    assert not any(file.exists() for file in files)


def test_leases_around_a_call_are_those_of_its_blocks(store: LocalStore) -> None:
    with Lease(store, KEY, interval=60), Lease(store, "b/lease.json", interval=60):
        confirm_leases()
        foreign(store)
        with pytest.raises(LeaseLostError, match=r"a/lease\.json"):
            confirm_leases()
        with pytest.raises(LeaseLostError, match=r"a/lease\.json"):
            check_leases()
    check_leases()
    assert owner(store) == "x"


# Giving it back.


def test_a_late_owner_leaves_its_successors_lease_alone(store: LocalStore) -> None:
    with Lease(store, KEY, interval=60):
        foreign(store)
    assert owner(store) == "x"


def test_a_release_after_expiry_removes_only_its_own_record(
    store: LocalStore, clock: Clock
) -> None:
    with Lease(store, KEY) as lease:
        clock.time += 100
        assert not lease.held
    assert not store.exists(KEY)


def test_a_released_record_is_taken_at_once(store: LocalStore, clock: Clock) -> None:
    foreign(store, released=True, interval=0.0)
    assert not is_claimed(store, KEY)
    begun = clock.time
    with Lease(store, KEY) as lease:
        assert lease.held
        assert clock.time == begun
        assert is_claimed(store, KEY)
    assert not is_claimed(store, KEY)


@pytest.mark.parametrize("act", ["replace", "delete_if"])
def test_of_two_conditional_writes_in_a_folder_one_succeeds(tmp_path: Path, act: str) -> None:
    class Slow(LocalStore):
        def read_tagged(self, key: str) -> tuple[bytes, str]:
            found = super().read_tagged(key)
            time.sleep(0.3)
            return found

    store = Slow(tmp_path)
    tag = store.create(KEY, b"0")
    assert tag is not None

    def write(number: int) -> bool:
        if act == "delete_if" and number == 0:
            return store.delete_if(KEY, tag)
        return store.replace(KEY, b"%d" % (number + 1), tag) is not None

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(write, range(2))) == [False, True]


def test_a_deletion_by_tag_needs_the_object_and_its_tag(store: LocalStore) -> None:
    assert not store.delete_if("a/b", "0")
    tag = store.create("a/b", b"1")
    assert tag is not None
    assert store.replace("a/b", b"2", tag) is not None
    assert not store.delete_if("a/b", tag)
    assert store.read("a/b") == b"2"


# Stages.


def test_a_stage_that_was_committed_before_the_lease_was_got_is_not_built(tmp_path: Path) -> None:
    request = Request("images", "x", "a", {})

    class Committed(LocalStore):
        """Another runner commits between the first look and the lease."""

        started = False

        def create(self, key: str, data: bytes) -> str | None:
            if not self.started:
                self.started = True
                run_stage(self, request, lambda work: Produced([], {"by": "other"}))
            return super().create(key, data)

    def never(work: Work) -> Produced:
        raise AssertionError("built again")

    assert run_stage(Committed(tmp_path), request, never).summary == {"by": "other"}


def test_the_manifest_of_another_runner_is_never_overwritten(tmp_path: Path) -> None:
    request = Request("images", "x", "a", {})
    other = LocalStore(tmp_path / "other")
    run_stage(other, request, lambda work: Produced([], {"by": "other"}))
    manifest = other.read(f"{request.folder}/manifest.json")

    class Paused(LocalStore):
        """This runner pauses after its last renewal, and another one commits."""

        def replace(self, key: str, data: bytes, tag: str) -> str | None:
            found = super().replace(key, data, tag)
            self.write(f"{request.folder}/manifest.json", manifest)
            return found

    store = Paused(tmp_path / "root")
    made = run_stage(store, request, lambda work: Produced([], {"by": "me"}))
    assert made.skipped
    assert store.read(f"{request.folder}/manifest.json") == manifest


# Workers of the owner.


def test_a_worker_stops_when_its_owner_has_lost_the_lease(store: LocalStore) -> None:
    with Lease(store, KEY, interval=2.0) as lease:
        with Follower(store, lease.reference()):
            time.sleep(6.5)  # longer than the lease lasts without renewals
            confirm_leases()
        worker = Follower(store, lease.reference())
        worker.check()
        foreign(store)
        with pytest.raises(LeaseLostError, match="was taken over"):
            worker.check()


def test_a_worker_notices_a_lost_lease_without_asking_storage(store: LocalStore) -> None:
    foreign(store, interval=0.2)
    with Follower(store, {"key": KEY, "owner": "x", "interval": 0.2}) as worker:
        check_leases()
        foreign(store, owner="other")
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            time.sleep(0.02)
            try:
                worker.raise_if_lost()
            except LeaseLostError:
                return
    raise AssertionError("it did not notice")


def test_a_worker_stops_when_its_owner_gives_no_sign(store: LocalStore, clock: Clock) -> None:
    foreign(store)
    worker = Follower(store, {"key": KEY, "owner": "x", "interval": 10.0})
    for look in range(12):
        worker.check()
        clock.time += 10
        foreign(store, 1 + look)
    worker.check()
    clock.time += 20
    with pytest.raises(LeaseLostError, match="could not be renewed for 30 s"):
        worker.check()


def test_a_look_that_finds_nothing_new_does_not_prolong_a_workers_belief(
    store: LocalStore, clock: Clock
) -> None:
    foreign(store)
    worker = Follower(store, {"key": KEY, "owner": "x", "interval": 10.0})
    for _ in range(2):
        clock.time += 10
        worker.check()
    clock.time += 10
    with pytest.raises(LeaseLostError, match="could not be renewed for 30 s"):
        worker.check()


# S3.


@pytest.fixture
def s3(moto: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with fault_proxy(moto) as proxy:
        proxy.server.use(monkeypatch)
        yield proxy


def test_a_stalled_answer_of_s3_does_not_lose_the_lease(s3: Any) -> None:
    store = open_store(s3.server.fresh_root())
    with Lease(store, "lease.json", interval=2.0) as lease:
        before = json.loads(store.read("lease.json"))["heartbeat"]
        s3.inject(Fault("hang", method="PUT", path="lease.json", seconds=9))
        deadline = time.monotonic() + 5.9
        while time.monotonic() < deadline:
            # The hanging request has written the first beat after `before`.
            if json.loads(store.read("lease.json"))["heartbeat"] > before + 1:
                break
            time.sleep(0.1)
        assert lease.held
        lease.check()
    assert json.loads(store.read("lease.json"))["released"]
    assert not is_claimed(store, "lease.json")


def test_a_late_owner_on_s3_leaves_its_successors_lease_alone(moto_root: str) -> None:
    store = open_store(moto_root)
    with Lease(store, KEY, interval=60):
        store.write(KEY, b'{"owner": "x"}')
    assert store.read(KEY) == b'{"owner": "x"}'


def test_a_released_lease_on_s3_is_taken_at_once(moto_root: str) -> None:
    store = open_store(moto_root)
    begun = time.monotonic()
    for _ in range(3):
        with Lease(store, KEY, interval=60):
            assert is_claimed(store, KEY)
        assert not is_claimed(store, KEY)
    assert time.monotonic() - begun < 20


# A process that is stopped for longer than the lease lasts.


def test_a_stopped_process_notices_its_loss_and_leaves_its_successor_alone(tmp_path: Path) -> None:
    stopped_holder(str(tmp_path), KEY)
