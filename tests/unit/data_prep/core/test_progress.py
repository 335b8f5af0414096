"""Progress of a task: what watchers receive."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace

import pytest

from data_prep.core import progress
from data_prep.core.logs import start_logging
from data_prep.core.progress import Moment, Progress


@pytest.fixture
def seen() -> Iterator[list[Moment]]:
    moments: list[Moment] = []
    progress.watchers.append(moments.append)
    yield moments
    progress.watchers.remove(moments.append)


def test_watchers_receive_the_start_every_count_and_the_end(seen: list[Moment]) -> None:
    with Progress("masks", 4, "masks") as task:
        task.update(1, "the first")
        task.update(4)
    assert [(m.state, m.count, m.note) for m in seen] == [
        ("started", 0, ""),
        ("running", 1, "the first"),
        ("running", 4, ""),
        ("done", 4, ""),
    ]
    assert {(m.title, m.total, m.unit) for m in seen} == {("masks", 4, "masks")}


def test_the_last_moment_of_a_failed_task_has_its_count_and_note(
    seen: list[Moment],
) -> None:
    def fail() -> None:
        with Progress("train", 9, "steps") as task:
            task.update(3, "loss 0.1")
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        fail()
    assert (seen[-1].state, seen[-1].count, seen[-1].note) == (
        "failed",
        3,
        "loss 0.1",
    )


def test_speed_and_remaining_time_are_measured_from_the_first_count(
    seen: list[Moment], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    with Progress("train", 1000, "steps") as task:
        now = 100.0
        task.update(500)  # resumed there
        now = 110.0
        task.update(520)
    resumed, later = seen[1:3]
    assert (resumed.per_second, resumed.seconds_left) == (None, None)
    assert later.per_second == pytest.approx(2.0)
    assert later.seconds_left == pytest.approx(240.0)


def test_what_an_earlier_run_had_finished_is_not_in_the_speed(
    seen: list[Moment], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: now))
    with Progress("masks", 1000, "masks") as task:
        for count in (200, 400, 600):
            now += 1.0
            task.update(count, resumed=200)
        now += 10.0
        task.update(620)
        task.update(720, resumed=100)
        now += 10.0
        task.update(740)
    speeds = [moment.per_second for moment in seen[1:-1]]
    assert speeds == [None, None, None, 2.0, 2.0, 2.0]


def test_a_failing_watcher_stops_neither_the_task_nor_the_other_watchers(
    seen: list[Moment],
) -> None:
    def fails(moment: Moment) -> None:
        raise RuntimeError("the server is away")

    progress.watchers.insert(0, fails)
    try:
        with Progress("evaluate", 1, "pairs") as task:
            task.update(1)
    finally:
        progress.watchers.remove(fails)
    assert [m.count for m in seen] == [0, 1, 1]


def test_progress_continues_after_the_reader_of_its_lines_has_ended(
    seen: list[Moment], monkeypatch: pytest.MonkeyPatch
) -> None:
    start_logging()
    reader, writer = os.pipe()
    os.close(reader)
    with suppress(BrokenPipeError), os.fdopen(writer, "w") as nobody:  # closing it raises the error
        monkeypatch.setattr("sys.stderr", nobody)
        with Progress("masks", 4, "masks") as task:
            task.update(1)
            task.update(4)
    assert [m.state for m in seen] == ["started", "running", "running", "done"]
