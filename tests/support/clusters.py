"""Real Ray clusters for tests: each node is a process of its own on this machine."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from dpnet.training.ray.start import RayStart, prepare_start

RAY = [sys.executable, "-m", "dpnet.training.ray.head"]
START_S = 120.0  # a busy machine is slow


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(true: Callable[[], object], what: str, seconds: float = START_S) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


@dataclass
class Node:
    """A node: `ray start` and all processes that it has started."""

    process: subprocess.Popen[bytes]

    def has(self, pid: int) -> bool:
        """Return whether a process belongs to this node."""
        return pid in self.processes()

    def processes(self) -> list[int]:
        return family(self.process.pid)

    def kill(self) -> None:
        """Kill all processes at once, like a power failure of the machine."""
        members = self.processes()
        for pid in members:  # so that no process notices or starts another
            send(pid, signal.SIGSTOP)
        for pid in {*members, *self.processes()}:
            send(pid, signal.SIGKILL)
        self.process.wait(30)


@dataclass
class Cluster:
    """A head without cores, and the nodes that run workers."""

    ray: RayStart
    environment: dict[str, str]
    head: Node | None = None
    nodes: list[Node] = field(default_factory=list)
    port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)

    @property
    def address(self) -> str:
        """Return the address of its control service."""
        return f"127.0.0.1:{self.port}"

    @property
    def dashboard(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def token(self) -> str:
        return self.ray.token_file.read_text()

    def start_head(self) -> None:
        self.head = self.start(
            "--head",
            "--num-cpus=0",
            f"--port={self.port}",
            f"--temp-dir={self.ray.files}",
            "--include-dashboard=true",
            f"--dashboard-port={self.dashboard_port}",
        )

    def kill(self) -> None:
        """Kill all nodes at once. `start_head` starts a new cluster at the same address."""
        for node in (*self.nodes, self.head):
            if node and node.process.poll() is None:
                node.kill()
        self.nodes, self.head = [], None

    def add_node(self, cpus: int = 1) -> Node:
        node = self.start(f"--address={self.address}", f"--num-cpus={cpus}")
        self.nodes.append(node)
        return node

    def start(self, *options: str) -> Node:
        log = self.ray.folder / "nodes.log"
        before = _starts(log)
        command = [*RAY, "start", "--block", "--node-ip-address=127.0.0.1", *options]
        command += [f"--object-store-memory={100 << 20}", "--disable-usage-stats"]
        command += ["--metrics-export-port=0", f"--dashboard-agent-listen-port={free_port()}"]
        with log.open("ab") as out:
            process = subprocess.Popen(
                command,
                env=self.environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

        def started() -> bool:
            assert process.poll() is None, log.read_text("utf-8", "replace")
            return _starts(log) > before

        wait_until(started, f"no node: {log}")
        return Node(process)

    def node_of(self, pid: int) -> Node:
        """Return the node that a process belongs to."""
        return next(node for node in self.nodes if node.has(pid))

    def process(self, text: str) -> int:
        """Return the process of the head with a command line that begins with `text`."""
        assert self.head
        return find_process(self.head.process.pid, text)

    def drain(self, node_id: str, seconds: int) -> None:
        """Announce that a node will be taken away."""
        when = f"--deadline-remaining-seconds={seconds}"
        reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=a test"]
        subprocess.run(
            [
                *RAY,
                "drain-node",
                f"--address={self.address}",
                f"--node-id={node_id}",
                *reason,
                when,
            ],
            env=self.environment,
            check=True,
            capture_output=True,
        )


def _starts(log: Path) -> int:
    return log.read_text("utf-8", "replace").count("Ray runtime started") if log.exists() else 0


@contextmanager
def ray_cluster(nodes: int, more: Mapping[str, str] | None = None) -> Iterator[Cluster]:
    """Start a cluster: a head with a dashboard that takes jobs, and `nodes` nodes of one core.

    Args:
        nodes: Number of nodes.
        more: More variables of the environment of all its processes.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "AWS_"))}
    environment |= more or {}
    with prepare_start("test-") as ray:
        # Ray accepts further nodes only if it is not on loopback alone.
        cluster = Cluster(ray, environment | ray.credentials)
        try:
            cluster.start_head()
            for _ in range(nodes):
                cluster.add_node()
            yield cluster
        finally:
            cluster.kill()


def family(ancestor: int) -> list[int]:
    """Return a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text("utf-8", "replace")
        except OSError:  # it has ended
            continue
        parent = int(text.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(status.parent.name))
    found = [ancestor]
    for pid in found:
        found += children.get(pid, [])
    return found


def find_process(ancestor: int, text: str) -> int:
    """Return the one descendant of `ancestor` with a command line that begins with `text`."""
    (found,) = [pid for pid in family(ancestor)[1:] if command_of(pid).startswith(text)]
    return found


def command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def alive(pid: int) -> bool:
    """Return whether a process runs. A zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def end_with_parent() -> None:
    """In a new process: ask Linux for a SIGTERM when the parent dies, even if it is killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def send(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
