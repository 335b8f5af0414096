"""Tasks on a real Ray cluster: a head and a worker node, each with processes of its own."""

from __future__ import annotations

import os
import signal
import socket
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
from data_prep.core.pool import run_tasks
from dpnet.pipeline.ray_map import ray_map
from dpnet.training.ray.start import RayStart, prepare_start

pytestmark = [pytest.mark.integration, pytest.mark.slow]
# Other processes import this file and the packages next to it.
PYTHONPATH = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[2])))


def square(number: int) -> int:
    time.sleep(0.3 if number == 0 else 0)
    return number * number


def process(number: int) -> tuple[int, str]:
    import ray

    time.sleep(0.3)
    return os.getpid(), ray.get_runtime_context().get_node_id()


def threads(number: int) -> str:
    return os.environ["OMP_NUM_THREADS"]


def fail_at_three(number: int) -> int:
    if number == 3:
        raise PipelineError("three is broken")
    return number


@dataclass(frozen=True)
class Visit:
    """A task that writes a line at each start, and may kill its worker."""

    name: str
    book: Path
    deaths: int
    seconds: float = 0.0


def visit(task: Visit) -> str:
    with task.book.open("a") as book:
        book.write(f"{task.name} {os.getpid()}\n")
    time.sleep(task.seconds)
    if task.book.read_text().split().count(task.name) <= task.deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return task.name


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def start() -> Iterator[RayStart]:
    with (
        prepare_start("test-") as start,
        start.in_this_process(),
        pytest.MonkeyPatch.context() as patch,
    ):
        # Ray accepts further nodes only if it is not on loopback alone.
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "1")
        patch.setattr("ray._private.ray_constants.ENABLE_RAY_CLUSTER", True)
        yield start


@pytest.fixture(scope="module")
def cluster(start: RayStart) -> Iterator[str]:
    """Start a Ray cluster of two nodes with one core each, and return its address."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    common = ["--block", "--num-cpus=1", "--node-ip-address=127.0.0.1"]
    common += [f"--object-store-memory={100 << 20}", "--disable-usage-stats"]
    common += ["--metrics-export-port=0", "--dashboard-agent-listen-port=0"]
    head = ["--head", f"--port={port}", f"--temp-dir={start.files}", "--include-dashboard=false"]
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    environment.pop("OMP_NUM_THREADS", None)
    ray = [sys.executable, "-m", "dpnet.training.ray.head", "start"]
    nodes: list[subprocess.Popen[bytes]] = []
    log = start.folder / "nodes.log"
    try:
        with log.open("wb") as out:
            for options in (head, [f"--address={address}"]):
                command = [*ray, *options, *common]
                node = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
                nodes.append(node)
                wait_for_lines(log, "Ray runtime started", len(nodes), node)
        yield address
    finally:
        for node in reversed(nodes):
            node.terminate()
        for node in nodes:
            node.wait(30)


def wait_for_lines(log: Path, line: str, times: int, node: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while log.read_text("utf-8", "replace").count(line) < times:
        assert node.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@pytest.fixture(scope="module")
def connected(cluster: str) -> Iterator[str]:
    """Keep this process connected to the cluster for several tests."""
    import ray

    ray.init(address=cluster, log_to_driver=False)
    yield cluster
    ray.shutdown()


@pytest.mark.parametrize("by_environment", [False, True])
def test_an_address_without_a_cluster_gives_one_sentence(
    by_environment: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"127.0.0.1:{free_port()}"
    if by_environment:
        monkeypatch.setenv("RAY_ADDRESS", address)
        address = "auto"
    with pytest.raises(PipelineError, match=f"cannot reach a Ray cluster at '{address}' .*refused"):
        list(ray_map(address)(square, range(3), 0))


def test_a_cluster_is_joined_and_left_by_the_call(cluster: str) -> None:
    import ray

    terminate = signal.getsignal(signal.SIGTERM)
    with closing(ray_map(cluster)(square, range(4), 0)) as results:
        assert next(results) == 0
        assert ray.is_initialized()
    assert not ray.is_initialized()
    assert signal.getsignal(signal.SIGTERM) == terminate


def test_results_are_those_of_the_pool_in_the_order_of_the_tasks(connected: str) -> None:
    on_ray = list(ray_map(connected)(square, range(20), 0))
    assert on_ray == list(run_tasks(square, range(20), 2)) == [n * n for n in range(20)]


def test_both_nodes_work(connected: str) -> None:
    seen: set[tuple[int, str]] = set()
    deadline = time.monotonic() + 60  # a node's first worker process takes seconds to start
    with closing(ray_map(connected)(process, count(), 0)) as results:
        while len({node for _, node in seen}) < 2:
            assert time.monotonic() < deadline
            seen.add(next(results))
    assert os.getpid() not in {pid for pid, _ in seen}


def test_a_task_has_one_thread_for_its_core(connected: str) -> None:
    assert set(ray_map(connected)(threads, range(2), 0)) == {"1"}


@pytest.mark.parametrize(("workers", "most"), [(0, 8), (1, 2), (3, 6)])
def test_tasks_may_be_endless_and_are_taken_as_results_are(
    connected: str, workers: int, most: int
) -> None:
    taken = 0

    def numbers() -> Iterator[int]:
        nonlocal taken
        for taken in count(1):
            yield taken - 1

    with closing(ray_map(connected)(square, numbers(), workers)) as results:
        for number in range(12):
            assert next(results) == number * number
            assert taken <= number + most


def test_an_error_of_the_function_keeps_its_type(connected: str) -> None:
    seen: list[int] = []
    with pytest.raises(PipelineError) as caught:
        seen.extend(ray_map(connected)(fail_at_three, range(9), 0))
    assert type(caught.value) is PipelineError
    assert str(caught.value) == "three is broken"
    assert seen == [0, 1, 2]


def test_a_task_is_retried_if_its_worker_dies(connected: str, tmp_path: Path) -> None:
    book = tmp_path / "book"
    tasks = [Visit(f"shard-{n}", book, int(n == 2)) for n in range(6)]
    assert list(ray_map(connected)(visit, tasks, 0)) == [task.name for task in tasks]
    assert book.read_text().split().count("shard-2") == 2


def test_a_task_that_ends_each_worker_is_named(connected: str, tmp_path: Path) -> None:
    book = tmp_path / "book"
    tasks = [Visit(f"shard-{n}", book, 99 * (n == 2)) for n in range(6)]
    seen: list[str] = []
    with pytest.raises(PipelineError, match="shard-2 ended its worker process 4 times"):
        seen.extend(ray_map(connected)(visit, tasks, 0))
    assert seen == ["shard-0", "shard-1"]
    assert book.read_text().split().count("shard-2") == 4


def test_leaving_the_loop_ends_running_tasks(connected: str, tmp_path: Path) -> None:
    book = tmp_path / "book"
    tasks = [Visit("first", book, 0), *(Visit(f"long-{n}", book, 0, 60) for n in range(9))]
    with closing(ray_map(connected)(visit, tasks, 2)) as results:
        assert next(results) == "first"
        deadline = time.monotonic() + 20
        while len(lines := book.read_text().splitlines()) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    workers = [int(line.split()[1]) for line in lines if line.startswith("long")]
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert len(book.read_text().splitlines()) <= 4  # the rest was never begun


SCRIPT = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in background
from contextlib import closing
from pathlib import Path
sys.path.insert(0, {tests!r})
from dpnet.pipeline.ray_map import ray_map
from test_ray_map import Visit, square, visit
assert list(ray_map("local")(square, range(5), 2)) == [0, 1, 4, 9, 16]
book = Path(sys.argv[1])
tasks = [Visit("first", book, 0), *(Visit("long", book, 0, 60) for n in range(9))]
with closing(ray_map("local")(visit, tasks, 2)) as results:
    for result in results:
        print(result, flush=True)
"""


def test_a_local_ray_ends_on_ctrl_c_and_leaves_nothing_behind(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    before = set(Path("/tmp").glob("dpnet-ray-*"))
    pipe = subprocess.PIPE
    command = [sys.executable, str(script), str(tmp_path / "book")]
    with subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    ) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "first\n", driver.communicate()[1]
        os.kill(driver.pid, signal.SIGINT)
        _, err = driver.communicate(timeout=30)
    assert driver.returncode
    assert err.rstrip().endswith("KeyboardInterrupt")
    assert set(Path("/tmp").glob("dpnet-ray-*")) <= before
