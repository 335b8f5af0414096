"""Worker processes: order, errors, and that none outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from data_prep.errors import PipelineError
from data_prep.pool import cores, run_tasks


def slow_square(number: int) -> int:
    time.sleep(0.05 if number == 0 else 0)
    return number * number


def process(task: object) -> int:
    return os.getpid()


def fail_at_three(number: int) -> int:
    if number == 3:
        raise PipelineError("three is broken")
    return number


def end_at_three(number: int) -> int:
    if number == 3:
        os._exit(9)
    return number


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


def test_a_worker_that_is_killed_is_told_in_one_sentence() -> None:
    with pytest.raises(PipelineError, match="a worker process was ended from outside"):
        list(run_tasks(end_at_three, range(9), 2))


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
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in background
from contextlib import closing
sys.path.insert(0, {tests!r})
from data_prep.pool import run_tasks
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
    parent.stdout.readline()  # a worker has answered, others are at work
    family = children(parent.pid)
    assert len(family) >= 2
    if ending == signal.SIGINT:
        os.killpg(parent.pid, ending)  # as a terminal does
    else:
        os.kill(parent.pid, ending)
    _, err = parent.communicate(timeout=20)
    wait_until_gone(family)
    if ending == signal.SIGINT:
        assert err.count("KeyboardInterrupt") == 1  # the parent's own, no worker's
