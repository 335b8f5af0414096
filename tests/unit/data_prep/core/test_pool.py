"""Worker processes: order, errors, deaths, and their end with the parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from data_prep.core.errors import PipelineError
from data_prep.core.pool import cores, run_tasks


def slow_square(number: int) -> int:
    time.sleep(0.05 if number == 0 else 0)
    return number * number


def process(task: object) -> int:
    return os.getpid()


def fail_at_three(number: int) -> int:
    if number == 3:
        raise PipelineError("three is broken")
    return number


@dataclass(frozen=True)
class Visit:
    """A task that writes a line when it starts and when it ends, and may end its worker."""

    name: str
    book: Path
    deaths: int = 0  # the number of workers it ends before it succeeds
    seconds: float = 0.0


def visit(task: Visit) -> str:
    write(task.book, task.name)
    time.sleep(task.seconds)
    if task.book.read_text().split().count(task.name) <= task.deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    write(task.book, f"{task.name}-done")
    return task.name


def write(book: Path, line: str) -> None:
    with book.open("a") as file:
        file.write(f"{line}\n")


def visits(tmp_path: Path, deaths: dict[int, int]) -> tuple[list[Visit], Path]:
    book = tmp_path / "book"
    tasks = [Visit(f"shard-{n}", book, deaths.get(n, 0), 0.01) for n in range(9)]
    return tasks, book


class Odd(Exception):
    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def fail_oddly(number: int) -> int:
    raise Odd(number, 2)


def unpicklable(number: int) -> object:
    return (n for n in range(number))


def sleep_for_ever(number: int) -> int:
    time.sleep(600 if number else 0)
    return os.getpid()


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_tasks(workers: int) -> None:
    assert list(run_tasks(slow_square, range(20), workers)) == [n * n for n in range(20)]


def test_one_worker_or_one_task_needs_no_other_process() -> None:
    assert set(run_tasks(process, [1, 2], 1)) == {os.getpid()}
    assert list(run_tasks(process, [1], 8)) == [os.getpid()]
    assert os.getpid() not in set(run_tasks(process, [1, 2], 2))


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_task_is_raised_here(workers: int) -> None:
    with pytest.raises(PipelineError, match="three is broken"):
        list(run_tasks(fail_at_three, range(9), workers))


def test_an_error_that_cannot_be_pickled_is_still_reported() -> None:
    with pytest.raises(RuntimeError, match="Odd: 0 and 2"):
        list(run_tasks(fail_oddly, range(9), 2))
    with pytest.raises(TypeError, match="pickle"):
        list(run_tasks(unpicklable, range(9), 2))


def test_an_error_has_the_traceback_of_the_worker() -> None:
    with pytest.raises(PipelineError) as caught:
        list(run_tasks(fail_at_three, range(9), 2))
    assert "in fail_at_three" in caught.value.__notes__[0]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_tasks_may_be_endless_because_they_are_taken_only_as_results_are(workers: int) -> None:
    taken = 0

    def numbers() -> Iterator[int]:
        nonlocal taken
        for taken in count(1):
            yield taken - 1

    with closing(run_tasks(slow_square, numbers(), workers)) as results:
        for number in range(40):
            assert next(results) == number * number
            assert taken <= number + 1 + 2 * workers


def test_an_error_while_tasks_are_listed_is_raised_after_the_results_before_it() -> None:
    def numbers() -> Iterator[int]:
        yield from range(10)
        raise PipelineError("the listing broke off")

    seen: list[int] = []
    with pytest.raises(PipelineError, match="broke off"):
        seen.extend(run_tasks(slow_square, numbers(), 2))
    assert seen == [n * n for n in range(len(seen))]
    assert len(seen) >= 6


def test_the_task_of_a_dead_worker_runs_again_and_no_task_is_lost_or_repeated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tasks, book = visits(tmp_path, {0: 1, 4: 2, 5: 1, 8: 2})
    assert list(run_tasks(visit, tasks, 2)) == [task.name for task in tasks]
    begun = book.read_text().split()
    assert {task.name: begun.count(task.name) for task in tasks} == {
        task.name: task.deaths + 1 for task in tasks
    }  # a death does not disturb the other running tasks
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warnings) == 6
    died = "a worker process died (signal 9) while it ran shard-0"
    assert f"{died}: this task runs again, without others" in warnings


def test_a_task_that_ends_its_worker_three_times_is_named(tmp_path: Path) -> None:
    tasks, book = visits(tmp_path, {0: 1, 3: 99})
    seen: list[str] = []
    with pytest.raises(PipelineError, match="shard-3 ended its worker process 3 times"):
        seen.extend(run_tasks(visit, tasks, 2))
    assert seen == ["shard-0", "shard-1", "shard-2"]
    assert book.read_text().split().count("shard-3") == 3


def test_the_task_of_a_dead_worker_runs_again_without_others(tmp_path: Path) -> None:
    book = tmp_path / "book"
    names = [f"shard-{n}" for n in range(8)]
    tasks = [Visit(name, book, int(name == "shard-1"), 0.2) for name in names]
    with closing(run_tasks(visit, tasks, 2)) as results:
        assert list(results) == names
    lines = book.read_text().split()
    again = lines.index("shard-1", lines.index("shard-1") + 1)
    assert lines[again + 1] == "shard-1-done"
    before = lines[:again]
    others = {line for line in before if not line.endswith("-done")} - {"shard-1"}
    assert all(f"{name}-done" in before for name in others)


def test_an_idle_worker_that_dies_is_replaced() -> None:
    with closing(run_tasks(process, range(20), 2)) as results:
        workers = {next(results) for _ in range(3)}
        time.sleep(0.3)  # all submitted tasks are done, so the workers are idle
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        wait_until_gone(workers)
        time.sleep(0.2)
        assert len([*results]) == 17


def test_an_error_in_the_loops_body_ends_the_workers_at_once() -> None:
    start = time.monotonic()
    worker = 0
    try:
        with closing(run_tasks(sleep_for_ever, range(6), 2)) as results:
            worker = next(results)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert time.monotonic() - start < 20
    assert not running(worker)


def test_there_is_at_least_one_core() -> None:
    assert cores() >= 1


SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
from contextlib import closing
sys.path.insert(0, {tests!r})
from data_prep.core.pool import run_tasks
from test_pool import process, sleep_for_ever
print("main runs", flush=True)
function = process if sys.argv[1] == "quick" else sleep_for_ever
with closing(run_tasks(function, range(6), 2)) as results:
    for worker in results:
        print(worker, flush=True)
"""


def start(tmp_path: Path, mode: str) -> subprocess.Popen[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    pipe = subprocess.PIPE
    command = [sys.executable, str(script), mode]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


def wait_until_gone(pids: set[int]) -> None:
    deadline = time.monotonic() + 10
    while any(map(running, pids)):
        assert time.monotonic() < deadline, f"of {pids} some still run"
        time.sleep(0.05)


def children(pid: int) -> set[int]:
    lists = Path(f"/proc/{pid}/task").glob("*/children")  # each thread has its own
    return {int(child) for listed in lists for child in listed.read_text().split()}


def test_a_script_without_a_main_guard_runs_once(tmp_path: Path) -> None:
    out, err = start(tmp_path, "quick").communicate(timeout=60)
    assert out.count("main runs") == 1
    assert len(out.split("\n")) == 8
    assert not err


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGINT])
def test_the_workers_end_with_their_parent(tmp_path: Path, ending: signal.Signals) -> None:
    parent = start(tmp_path, "slow")
    assert parent.stdout is not None
    assert parent.stdout.readline() == "main runs\n"
    parent.stdout.readline()  # a worker has answered, others are running
    family = children(parent.pid)
    assert len(family) >= 2
    if ending == signal.SIGINT:
        os.killpg(parent.pid, ending)  # as a terminal does
    else:
        os.kill(parent.pid, ending)
    _, err = parent.communicate(timeout=20)
    wait_until_gone(family)
    if ending == signal.SIGINT:
        assert err.count("KeyboardInterrupt") == 1  # of the parent; workers ignore it
