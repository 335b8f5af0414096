"""S3 servers for tests: moto, Ceph, and a proxy that injects faults."""

from __future__ import annotations

import http.client
import os
import secrets
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

import pytest

BUCKET = "dpnet-test"
_SHARED_SCRIPT = Path(__file__).parents[3] / "shared/tools/s3-ceph.sh"
CEPH_SCRIPT = Path(os.environ.get("DPNET_S3_SCRIPT") or _SHARED_SCRIPT)  # start DIR PORT, stop DIR
CEPH_ATTEMPTS = 6
CEPH_PROGRAMS = ("radosgw", "radosgw-admin", "ceph", "ceph-mon", "ceph-osd", "ceph-mgr")


@dataclass(frozen=True)
class Server:
    """The address of an S3 server and its access key."""

    endpoint: str
    access_key: str = "test"
    secret_key: str = "test"

    def environment(self) -> dict[str, str]:
        """Return the AWS settings for this server, without the user's own configuration."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
        }

    def use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make this process and its children use this server until the end of the test."""
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        for name, value in self.environment().items():
            monkeypatch.setenv(name, value)

    def make_bucket(self) -> None:
        """Create the bucket for tests."""
        import boto3

        session = boto3.session.Session(self.access_key, self.secret_key)
        client = session.client("s3", endpoint_url=self.endpoint, region_name="us-east-1")
        client.create_bucket(Bucket=BUCKET)

    @staticmethod
    def fresh_root() -> str:
        """Return the URI of a new prefix."""
        return f"s3://{BUCKET}/{secrets.token_hex(6)}"


@contextmanager
def moto_server() -> Iterator[Server]:
    """Start moto's server in memory. It checks requests, but no signatures or rights."""
    pytest.importorskip("moto.server")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield Server(f"http://{host}:{port}")
    finally:
        server.stop()


@contextmanager
def ceph_server() -> Iterator[Server]:
    """Start Ceph on one node, in about 20 s. Skip the test if Ceph is not installed."""
    if not CEPH_SCRIPT.exists():
        pytest.skip(f"no S3 server script at {CEPH_SCRIPT}: name one in DPNET_S3_SCRIPT")
    missing = [name for name in CEPH_PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(f"Ceph is not installed ({', '.join(missing)}): .ci/run does it")
    # The folder contains sockets, and their paths have a length limit.
    folder = Path(tempfile.mkdtemp(prefix="ceph", dir="/tmp"))
    # The daemons are not children of this process. The keeper stops them when this process ends,
    # even if it is killed.
    stop = f'read -r _; for at in {folder}/*/; do bash "{CEPH_SCRIPT}" stop "$at"; done'
    keeper = subprocess.Popen(
        ["bash", "-c", f"{stop}; rm -rf {folder}"], stdin=subprocess.PIPE, start_new_session=True
    )
    try:
        for attempt in range(CEPH_ATTEMPTS):
            settings = _start_ceph(folder / str(attempt))
            if settings:
                break
        else:
            pytest.fail(f"Ceph did not start in {CEPH_ATTEMPTS} attempts")
        yield Server(
            settings["AWS_ENDPOINT_URL"],
            settings["AWS_ACCESS_KEY_ID"],
            settings["AWS_SECRET_ACCESS_KEY"],
        )
    finally:
        keeper.stdin.close()
        keeper.wait(timeout=60)


def _start_ceph(folder: Path) -> dict[str, str]:
    """Start Ceph in `folder` and return its settings; an empty dict if it did not start.

    On a busy machine Ceph's disk daemon may start before it knows the cluster, and fail.
    """
    folder.mkdir()
    with (folder / "out").open("w+b") as out:  # no pipe: the daemons would keep it open
        started = subprocess.run(
            ["bash", str(CEPH_SCRIPT), "start", str(folder), str(_two_free_ports())],
            stdout=out,
            stderr=out,
            timeout=180,
            check=False,
        )
        out.seek(0)
        words = [word.partition("=") for word in out.read().decode(errors="replace").split()]
    settings = {name: value for name, _, value in words if name.startswith("AWS_")}
    return settings if started.returncode == 0 else {}


def _two_free_ports() -> int:
    """Return a free port that is followed by a free port."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


@dataclass
class Fault:
    """A fault for the next `times` requests with this method and this part of the path."""

    kind: Literal["answer", "reset", "truncate", "stall", "hang", "lose", "ignore conditions"]
    times: int = 1
    method: str = ""
    path: str = ""
    status: int = 503  # of "answer"
    code: str = "SlowDown"  # of "answer"
    keep: float = 0.5  # of "truncate" and "stall": the share of the body that is sent
    seconds: float = 1.0  # "stall": until the connection closes; "hang": until the answer begins


@dataclass
class FaultProxy:
    """A proxy with the address `server`. `requests` are the requests so far."""

    server: Server
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    start: Callable[[], None] = lambda: None
    stop: Callable[[], None] = lambda: None
    running: bool = False

    @contextmanager
    def outage(self) -> Iterator[None]:
        """Refuse and break all connections inside the block."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def inject(self, fault: Fault) -> None:
        with self.lock:
            self.faults.append(fault)

    def count(self, method: str, path: str = "") -> int:
        """Count the requests so far with this method and with `path` in their URL."""
        with self.lock:
            return sum(m == method and path in p for m, p, _ in self.requests)

    def reset(self) -> None:
        with self.lock:
            self.requests.clear()
            self.faults.clear()

    def next_fault(self, method: str, path: str, headers: dict[str, str]) -> Fault | None:
        with self.lock:
            self.requests.append((method, path, headers))
            for fault in self.faults:
                if fault.times and fault.method in ("", method) and fault.path in path:
                    fault.times -= 1
                    return fault
        return None


@contextmanager
def fault_proxy(upstream: Server) -> Iterator[FaultProxy]:
    """Run a proxy that passes requests to `upstream` unless a fault was injected."""
    address = urlsplit(upstream.endpoint)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if not proxy.running:
                self._break()
                return
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            headers = dict(self.headers.items())
            fault = proxy.next_fault(self.command, self.path, headers)
            kind = fault.kind if fault else ""
            if fault and kind == "answer":
                self._answer(fault.status, fault.code)
                return
            if kind == "reset":
                self._break()
                return
            if kind == "ignore conditions":
                headers = {
                    n: v
                    for n, v in headers.items()
                    if n.lower() not in ("if-match", "if-none-match")
                }
            connection = http.client.HTTPConnection(str(address.hostname), address.port)
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in headers.items():
                if name.lower() not in ("connection", "expect"):
                    connection.putheader(name, value)
            connection.endheaders(body)
            answer = connection.getresponse()
            data = answer.read()
            length = answer.getheader("Content-Length")
            passed = [
                (name, value)
                for name, value in answer.getheaders()
                if name.lower() not in ("connection", "transfer-encoding", "content-length")
            ]
            connection.close()
            if kind == "lose":
                self._break()
                return
            if fault and kind == "hang":
                time.sleep(fault.seconds)
            self.send_response(answer.status)
            for name, value in passed:
                self.send_header(name, value)
            if answer.status != 204:
                whole = length if self.command == "HEAD" else len(data)
                self.send_header("Content-Length", str(whole or 0))
            self.end_headers()
            if fault and kind in ("truncate", "stall"):
                self.wfile.write(data[: int(len(data) * fault.keep)])
                self.wfile.flush()
                if kind == "stall":
                    time.sleep(fault.seconds)
                self.close_connection = True
                return
            self.wfile.write(data)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

        def _answer(self, status: int, code: str) -> None:
            data = b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code></Error>".encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _break(self) -> None:
            """Close the connection with a reset."""
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:
            pass

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    server: ThreadingHTTPServer
    thread: threading.Thread

    def start() -> None:
        nonlocal server, thread
        server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        proxy.running = True

    def stop() -> None:
        proxy.running = False
        server.shutdown()
        thread.join()
        server.server_close()

    own = Server(f"http://127.0.0.1:{port}", upstream.access_key, upstream.secret_key)
    proxy = FaultProxy(own, start=start, stop=stop)
    start()
    try:
        yield proxy
    finally:
        stop()
