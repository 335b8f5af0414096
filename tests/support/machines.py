"""Machines of a test, on this machine, that share a network and no files that Ray or we write.

A machine is a network namespace whose only link ends at a bridge. Its processes also have a mount
namespace in which the given folder and /dev/shm are empty. So what they exchange goes through the
network, and a cut of the link is what a broken switch or a lost machine is.
"""

from __future__ import annotations

import asyncio
import secrets
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from clusters import end_with_parent, wait_until

RAY_PORT, DASHBOARD_PORT = 6379, 8265
_HIDE = (
    'mount -t tmpfs -o size=2g tmpfs "$0" && mount -t tmpfs -o size=1g tmpfs /dev/shm && exec "$@"'
)


def run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"


@dataclass
class Machine:
    """A machine of a network, and its part of a Ray cluster.

    Attributes:
        name: of its network namespace.
        address: its IP address.
        link: the end of its link at the bridge.
        process: its `ray start`, or None.
    """

    name: str
    address: str
    link: str
    process: subprocess.Popen[bytes] | None = None

    def cut(self) -> None:
        """Cut the machine off the network. Its processes run on."""
        run("ip", "link", "set", self.link, "down")


@dataclass
class Network:
    """A bridge, and the machines that are connected to it.

    Attributes:
        folder: hidden from all machines; Ray's files of each machine are here.
        prefix: the first three numbers of all addresses.
        environment: of every process of Ray.
    """

    folder: Path
    prefix: str
    bridge: str
    environment: dict[str, str]
    machines: list[Machine] = field(default_factory=list)

    @property
    def here(self) -> str:
        """Return this machine's address in the network."""
        return f"{self.prefix}.1"

    @property
    def dashboard(self) -> str:
        return f"http://{self.machines[0].address}:{DASHBOARD_PORT}"

    def machine(self) -> Machine:
        """Connect a new machine."""
        number = len(self.machines) + 2
        name = f"{self.bridge}m{number}"
        machine = Machine(name, f"{self.prefix}.{number}", f"{name}l")
        self.machines.append(machine)
        run("ip", "netns", "add", name)
        run(
            "ip", "link", "add", machine.link, "type", "veth", "peer", "name", "eth0", "netns", name
        )
        run("ip", "link", "set", machine.link, "master", self.bridge, "up")
        run("ip", "-n", name, "addr", "add", f"{machine.address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            run("ip", "-n", name, "link", "set", device, "up")
        # Ray finds its own address by the route to the internet, without sending anything.
        run("ip", "-n", name, "route", "add", "default", "via", self.here)
        return machine

    def command_on(self, machine: Machine, words: Sequence[str]) -> list[str]:
        """Return a command that runs on a machine, beside its Ray if it has started one."""
        if machine.process is not None:
            return ["nsenter", "-t", str(machine.process.pid), "-n", "-m", *words]
        inside = ["unshare", "--mount", "sh", "-c", _HIDE, str(self.folder), *words]
        return ["ip", "netns", "exec", machine.name, *inside]

    def start_ray(self, cpus: int) -> Machine:
        """Start Ray on a new machine: the head of the cluster on the first one."""
        machine = self.machine()
        head = machine is self.machines[0]
        words = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block"]
        words += ["--disable-usage-stats", f"--num-cpus={cpus}", "--metrics-export-port=0"]
        words += [f"--node-ip-address={machine.address}", f"--object-store-memory={100 << 20}"]
        if head:
            words += ["--head", f"--port={RAY_PORT}", f"--temp-dir={self.folder}/ray"]
            words += ["--include-dashboard=true", "--dashboard-host=0.0.0.0"]
            words += [f"--dashboard-port={DASHBOARD_PORT}"]
        else:
            words += [f"--address={self.machines[0].address}:{RAY_PORT}"]
        log = self.folder / f"{machine.name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                self.command_on(machine, words),
                env=self.environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
        machine.process = process

        def started() -> bool:
            text = log.read_text("utf-8", "replace")
            assert process.poll() is None, text
            return "Ray runtime started" in text

        wait_until(started, f"no Ray on {machine.name}: {log}")
        return machine

    def close(self) -> None:
        """End every process of the machines, and remove them."""
        for machine in self.machines:
            found = subprocess.run(
                ["ip", "netns", "pids", machine.name], capture_output=True, text=True
            )
            if pids := found.stdout.split():
                subprocess.run(["kill", "-9", *pids], capture_output=True)
            if machine.process is not None:
                machine.process.wait(30)
            subprocess.run(["ip", "netns", "del", machine.name], capture_output=True)
        subprocess.run(["ip", "link", "del", self.bridge], capture_output=True)
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def network(folder: Path, environment: Mapping[str, str]) -> Iterator[Network]:
    """Make a bridge. Skip the test where that is not allowed.

    Args:
        folder: a short path, because Ray makes sockets below it.
        environment: of Ray on every machine.
    """
    if shutil.which("ip") is None or shutil.which("nsenter") is None:
        pytest.skip("no network namespaces here: ip and nsenter are missing")
    bridge = f"dp{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "link", "add", bridge, "type", "bridge"], capture_output=True)
    if made.returncode:
        pytest.skip("no network namespaces here: making a bridge is not allowed")
    prefix = f"10.203.{secrets.randbelow(254) + 1}"
    network = Network(folder, prefix, bridge, dict(environment))
    try:
        run("ip", "addr", "add", f"{network.here}/24", "dev", bridge)
        run("ip", "link", "set", bridge, "up")
        yield network
    finally:
        network.close()


@contextmanager
def forwarded(address: str, port: int) -> Iterator[int]:
    """Pass connections to a free port at `address` on to a port of 127.0.0.1. Yield that port."""
    listener = socket.socket()
    listener.bind((address, 0))
    loop = asyncio.new_event_loop()

    async def pipe(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(1 << 16):
                target.write(data)
                await target.drain()
        except OSError:
            pass
        finally:
            target.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        await asyncio.gather(pipe(reader, upstream[1]), pipe(upstream[0], writer))

    async def serve() -> Any:
        return await asyncio.start_server(connected, sock=listener)

    loop.run_until_complete(serve())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield int(listener.getsockname()[1])
    finally:
        loop.call_soon_threadsafe(_end, loop)
        thread.join()
        loop.close()
        listener.close()


def _end(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel everything that runs, and then stop."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    asyncio.gather(*tasks, return_exceptions=True).add_done_callback(lambda _: loop.stop())
