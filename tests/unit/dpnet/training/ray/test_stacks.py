"""The stacks of a worker: read by its signal from a file without a name."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpnet.training.ray.stacks import _dump

WORKER = """
import sys
from dpnet.training.ray.stacks import stacks_on_signal

def at_work():
    print("ready", flush=True)
    sys.stdin.read()

with stacks_on_signal():
    at_work()
"""


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
        yield process


def test_the_stacks_of_a_worker_are_read_twice_and_are_in_no_file_with_a_name(
    worker: subprocess.Popen[str],
) -> None:
    for _ in range(2):
        assert _dump(worker.pid).count(" in at_work") == 1
    (file,) = [
        each
        for each in Path(f"/proc/{worker.pid}/fd").iterdir()
        if "dpnet-stacks" in str(each.readlink())
    ]
    assert str(file.readlink()).startswith("/memfd:")
    assert not list(Path("/tmp").glob(f"dpnet-stacks*{worker.pid}*"))


def test_another_process_gets_no_signal() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        assert _dump(other.pid) == ""
        other.communicate(b"\n")
    assert other.returncode == 0
