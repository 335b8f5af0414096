"""The queue and its one thread: order, progress, cancelling, time, and errors of the model."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import torch

from dpnet.inpainting.api import Hole, find_hole
from dpnet.model import build_generator
from dpnet.serving.batches import is_quick
from dpnet.serving.limits import RequestError, ServeLimits
from dpnet.serving.models import Models, Version
from dpnet.serving.work import CancelledError, Filled, Job, Work

DEFAULT = ServeLimits()
VERSION = Version("dpnet@1", "dpnet version 1", "a" * 64, None, "runs/x")  # type: ignore[arg-type]


class OneVersion:
    """A source with one version."""

    follows = False

    def default(self) -> Version:
        return VERSION

    def find(self, id: str) -> Version | None:
        return None

    def facts(self) -> list[dict[str, Any]]:
        return []


def hole_of(height: int, width: int) -> Hole:
    """Return a random image that is nearly all hole."""
    made = np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)
    mask = np.ones((height, width), bool)
    mask[:4] = False
    hole = find_hole(made, mask, "i", "m", lambda sentence: None)
    assert hole is not None
    return hole


class Gate:
    """A generator that waits in each call until it is let through."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.inner = build_generator("tiny").eval()
        self.calls = 0
        self.entered = threading.Semaphore(0)
        self.let = threading.Semaphore(0)
        self.inner.register_forward_pre_hook(self._wait)

    def _wait(self, *_: Any) -> None:
        self.calls += 1
        self.entered.release()
        assert self.let.acquire(timeout=60)

    def open(self) -> None:
        """Let everything through."""
        for _ in range(1000):
            self.let.release()


@pytest.fixture
def gate() -> Gate:
    return Gate()


Start = Callable[..., Work]


@pytest.fixture
def start(gate: Gate) -> Iterator[Start]:
    started: list[Work] = []

    def starting(limits: ServeLimits = DEFAULT, **options: Any) -> Work:
        work = Work(
            Models(OneVersion(), load=lambda version: gate.inner), limits, tile=64, **options
        )
        work.start()
        started.append(work)
        return work

    yield starting
    gate.open()
    for each in started:
        each.stop()


def put(work: Work, id: str, hole: Hole | None = None) -> tuple[Job, Future[Filled]]:
    job = work.begin(id, "")
    return job, work.put(job, hole or hole_of(32, 32))


def entered(gate: Gate) -> None:
    """Wait until the thread is in a call."""
    assert gate.entered.acquire(timeout=60)


def test_jobs_are_computed_one_after_another_in_their_order(gate: Gate, start: Start) -> None:
    work = start()
    jobs = [put(work, f"job-{n:05}") for n in range(3)]
    entered(gate)
    assert [job.state for job, _ in jobs] == ["running", "waiting", "waiting"]
    assert [work.position(job) for job, _ in jobs] == [0, 1, 2]
    assert work.waiting == 2
    gate.open()
    for job, result in jobs:
        filled = result.result(60)
        assert filled.version == VERSION
        assert filled.colours.shape == (1, 3, 32, 32)
        assert (job.done, job.total) == (1, 1)
    assert gate.calls == 3


def test_a_job_that_waits_is_cancelled_without_being_computed(gate: Gate, start: Start) -> None:
    work = start()
    _, first = put(work, "job-00001")
    waiting, result = put(work, "job-00002")
    entered(gate)
    work.cancel(waiting)
    assert (waiting.state, work.waiting) == ("cancelled", 0)
    with pytest.raises(CancelledError):
        result.result(60)
    gate.open()
    first.result(60)
    assert gate.calls == 1


def test_a_job_that_is_cancelled_before_it_is_queued_is_never_computed(
    gate: Gate, start: Start
) -> None:
    gate.open()
    work = start()
    job = work.begin("job-00001", "")
    work.cancel(job)
    with pytest.raises(CancelledError):
        work.put(job, hole_of(32, 32)).result(60)
    put(work, "job-00002")[1].result(60)
    work.stop()
    with pytest.raises(RequestError, match="the server is stopping"):
        put(work, "job-00003")[1].result(60)
    assert gate.calls == 1


def test_a_job_that_runs_ends_at_its_next_tile(gate: Gate, start: Start) -> None:
    work = start()
    job, result = put(work, "job-00001", hole_of(64, 160))
    entered(gate)
    work.cancel(job)
    gate.let.release()
    with pytest.raises(CancelledError):
        result.result(60)
    assert job.state == "cancelled"
    assert gate.calls == 1  # of several


def test_a_large_photo_reports_its_tiles(gate: Gate, start: Start) -> None:
    work = start()
    job, result = put(work, "job-00001", hole_of(80, 80))
    seen = []
    for _ in range(8):  # four tiles, twice
        entered(gate)
        seen.append((job.done, job.total))
        gate.let.release()
    result.result(60)
    assert seen == [(n, 8) for n in range(8)]
    assert (job.done, job.total) == (8, 8)


def test_a_job_that_takes_too_long_ends_at_its_next_tile(gate: Gate, start: Start) -> None:
    now = [0.0]
    work = start(ServeLimits(seconds=5), clock=lambda: now[0])
    job, result = put(work, "job-00001", hole_of(64, 160))
    entered(gate)
    now[0] = 6.0
    gate.let.release()
    with pytest.raises(RequestError, match="not filled within 5 s") as error:
        result.result(60)
    assert (error.value.status, job.state, gate.calls) == (504, "failed", 1)


def test_small_photos_are_filled_between_the_tiles_of_a_large_one_with_the_same_pixels(
    gate: Gate, start: Start
) -> None:
    with torch.no_grad():  # a new network adds nothing to the smooth fill
        for each in gate.inner.parameters():
            each.add_(torch.randn_like(each) / 4)
    gate.open()
    expected = [
        put(start(), "job-00001", hole)[1].result(60).colours
        for hole in (hole_of(80, 80), hole_of(32, 32))
    ]
    while gate.let.acquire(blocking=False):
        pass
    while gate.entered.acquire(blocking=False):
        pass
    work = start()
    (large, first), (small, second) = (
        put(work, "job-00001", hole_of(80, 80)), put(work, "job-00002")
    )  # fmt: skip
    other, third = put(work, "job-00003", hole_of(80, 96))
    for _ in range(5):  # four tiles for the statistics, and the small photo after the first
        entered(gate)
        gate.let.release()
    assert torch.equal(second.result(60).colours, expected[1])
    assert (large.state, other.state, large.done < large.total) == ("running", "waiting", True)
    assert small.total == 1
    gate.open()
    assert torch.equal(first.result(60).colours, expected[0])
    third.result(60)


def test_a_large_photo_with_a_small_hole_is_quick() -> None:
    made = np.zeros((300, 300, 3), np.uint8)
    mask = np.zeros((300, 300), bool)
    mask[100:110, 280:290] = True
    assert is_quick(find_hole(made, mask, "i", "m", print), 64)  # type: ignore[arg-type]
    mask[100:160, 280:290] = True
    assert not is_quick(find_hole(made, mask, "i", "m", print), 64)  # type: ignore[arg-type]


def test_a_job_that_will_take_too_long_ends_after_some_tiles(gate: Gate, start: Start) -> None:
    now = [0.0]
    work = start(ServeLimits(seconds=600), clock=lambda: now[0])
    job, result = put(work, "job-00001", hole_of(200, 200))
    lefts = []
    for _ in range(4):
        entered(gate)
        lefts.append(job.seconds_left)
        now[0] += 60
        gate.let.release()
    with pytest.raises(RequestError, match=r"needs about \d+ minutes, and the limit is 10 min"):
        result.result(60)
    assert (gate.calls, lefts[:2]) == (4, [None, None])
    assert lefts[2] == 60 * (job.total - 2)
    assert job.seconds_left is None


def test_an_error_of_one_job_leaves_the_thread_for_the_next(gate: Gate, start: Start) -> None:
    gate.open()
    work = start()
    job = work.begin("job-00001", "unknown@1")
    with pytest.raises(RequestError, match="no such model"):
        work.put(job, hole_of(32, 32)).result(60)
    assert job.state == "failed"
    assert put(work, "job-00002")[1].result(60).version == VERSION


def test_an_id_in_use_is_refused_and_may_be_used_again_later(gate: Gate, start: Start) -> None:
    work = start()
    _, result = put(work, "job-00001")
    with pytest.raises(RequestError, match="choose a new id") as error:
        work.begin("job-00001", "")
    assert error.value.status == 409
    gate.open()
    result.result(60)
    work.find("job-00001").finish("done")  # type: ignore[union-attr]
    put(work, "job-00001")[1].result(60)


def test_a_job_whose_state_is_remembered_keeps_no_pixels(gate: Gate, start: Start) -> None:
    gate.open()
    work = start()
    job, result = put(work, "job-00001")
    filled = weakref.ref(result.result(60).colours)
    job.finish("done")
    del result
    wait = time.monotonic() + 60
    while filled() is not None and time.monotonic() < wait:
        gc.collect()  # the thread may hold it for a moment
        time.sleep(0.01)
    assert filled() is None
    assert job.hole is None
    assert work.find("job-00001") is job


def test_only_the_newest_finished_jobs_are_remembered(gate: Gate, start: Start) -> None:
    work = start()
    waiting, _ = put(work, "waiting-01")
    for number in range(600):
        work.begin(f"job-{number:05}", "").finish("done")
    assert work.find("waiting-01") is waiting
    assert work.find("job-00599") is not None
    assert work.find("job-00000") is None


def test_small_jobs_of_one_size_run_together_where_batches_are_on(gate: Gate, start: Start) -> None:
    work = start(batches=True)
    put(work, "job-00000")
    entered(gate)  # the others wait meanwhile
    jobs = [put(work, f"job-{n:05}") for n in range(1, 4)]
    other, _ = put(work, "other-001", hole_of(48, 32))
    gate.let.release()
    entered(gate)
    assert [job.state for job, _ in jobs] == ["running"] * 3
    assert other.state == "waiting"
    gate.open()
    results = [result.result(60).colours for _, result in jobs]
    assert all(torch.equal(results[0], each) for each in results)  # they are the same photo


def test_stopping_answers_everything_at_once_and_ends_the_thread(gate: Gate, start: Start) -> None:
    work = start()
    running, waiting = put(work, "job-00001", hole_of(64, 160)), put(work, "job-00002")
    entered(gate)
    work.end()
    for _, result in (running, waiting):
        with pytest.raises(RequestError, match="the server is stopping") as error:
            result.result(1)  # the tile is still being computed
        assert error.value.status == 503
    gate.let.release()
    work.stop()
    assert gate.calls == 1
