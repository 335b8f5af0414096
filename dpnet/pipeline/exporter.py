"""An HTTP server for a root: metrics for Prometheus and the reports of evaluations.

    python -m dpnet.exporter ROOT --port 9808

The metrics describe trainings, datasets and champions. The server reads the root when Prometheus
asks, at most every 10 seconds. `dpnet_storage_up` is 0 while the root cannot be read.

Requests that the pages of other sites make are refused, and those under other names than the
machine's and those in DPNET_SERVER_NAMES, with commas between them.

With DPNET_REPORTS_PASSWORD=user:password in the environment, every request needs that password
(HTTP basic authentication). Only `/health` needs none: it says that the server runs, and reads
nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import ThreadingWSGIServer
from prometheus_client.registry import Collector

from data_prep.core.environment import ALL, wrong_variable
from data_prep.core.errors import ConfigError, PipelineError, StorageError
from data_prep.core.logs import start_logging
from data_prep.core.standard_streams import prepare_streams
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from data_prep.core.text import printable
from data_prep.core.web_guard import (
    ASK_PASSWORD,
    PROTECTIVE,
    REPORTS_PASSWORD,
    SERVER_NAMES,
    WRONG_PASSWORD,
    has_password,
    is_loopback,
    own_host,
    refusal,
)
from dpnet.evaluation.report_script import POLICY
from dpnet.pipeline.root_metrics import METRICS, MetricValue, RootReader

HOST, PORT = "127.0.0.1", 9808
HEALTH = "/health"  # for the probes of Kubernetes
READ_EVERY_S = 10.0
WAIT_S = 5.0  # how long a scrape waits for a reading; Prometheus waits 10 seconds
STALE_AFTER_S = 60.0  # an older reading is not exported
_REPORT = re.compile(r"/(evaluations/[0-9a-f]{12}/report\.html)")


class RootCollector(Collector):
    """A collector that reads the root in a thread.

    A storage that does not answer is tried again for a minute, but a scrape needs an answer soon.
    """

    def __init__(self, store: Store) -> None:
        self._reader = RootReader(store)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._values: list[MetricValue] | None = None  # None if the root could not be read
        self._read_at = float("-inf")

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Return all metrics, from the last reading if a new one is not ready in time."""
        with self._lock:
            reading = self._thread is not None and self._thread.is_alive()
            if not reading and time.monotonic() - self._read_at >= READ_EVERY_S:
                self._thread = threading.Thread(target=self._read, name="dpnet-read", daemon=True)
                self._thread.start()
            thread = self._thread
        if thread is not None:
            thread.join(WAIT_S)
        is_stale = time.monotonic() - self._read_at >= STALE_AFTER_S
        values = None if is_stale else self._values
        exported = [
            MetricValue("dpnet_up", (), 1.0),
            MetricValue("dpnet_storage_up", (), float(values is not None)),
            *(values or []),
        ]
        for name, (description, labels) in METRICS.items():
            family = GaugeMetricFamily(name, description, labels=labels)
            for each in exported:
                if each.name == name:
                    family.add_metric([printable(label) for label in each.labels], each.value)
            yield family

    def _read(self) -> None:
        try:
            self._values = self._reader.read(time.time())
        except (StorageError, OSError):
            self._values = None
        self._read_at = time.monotonic()


class _QuietHandler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Log no requests."""


def serve(
    store: Store,
    port: int = 0,
    host: str = HOST,
    password: str = "",
    listener: socket.socket | None = None,
    names: Collection[str] = (),
) -> tuple[WSGIServer, int]:
    """Start an HTTP server that answers requests in threads.

    Args:
        store: The root.
        port: The port to listen on, 0 to 65535; 0 means any free port.
        host: The address to listen on.
        password: `user:password` that every request needs; empty for none.
        listener: A socket that listens already. It replaces the port. The server closes it.
        names: Names of the server that its machine does not know, such as that of a Service.

    Returns:
        The server, which the caller shuts down, and its port.

    Raises:
        PipelineError: The port cannot be used.
    """
    registry = CollectorRegistry()
    registry.register(RootCollector(store))
    server = _Server(listener or _listen(host, port))
    if not is_loopback(host):
        names = (host, socket.gethostname(), socket.getfqdn(), *names)
    app = _with_reports(store, make_wsgi_app(registry))
    server.set_app(_guarded(app, own_host(server.server_port, names), password))
    threading.Thread(target=server.serve_forever, name="dpnet-exporter", daemon=True).start()
    return server, server.server_port


def _listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address. Raises PipelineError if it cannot be used."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise PipelineError(
            f"the exporter cannot listen on {host}:{port}: {error}. Choose another --port, or 0 for"
            " any free port."
        ) from None


class _Server(ThreadingWSGIServer):
    """A WSGI server on a socket that listens already."""

    def __init__(self, listener: socket.socket) -> None:
        host, port = listener.getsockname()[:2]
        super().__init__((host, port), _QuietHandler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener
        self.server_name, self.server_port = host, port
        self.setup_environ()


def _guarded(app: Any, is_own: Callable[[str], bool], password: str) -> Any:
    """Return a WSGI application that refuses what `data_prep/core/web_guard.py` refuses.

    Args:
        app: The application that answers the other requests.
        is_own: Returns whether a `Host` header names this server.
        password: `user:password` that every request needs; empty for none.
    """

    def answer(environ: dict[str, Any], start: Any) -> Any:
        headers = {
            name.removeprefix("HTTP_").replace("_", "-").lower(): [value]
            for name, value in environ.items()
            if name.startswith("HTTP_")
        }
        reason, status, ask = refusal(environ["REQUEST_METHOD"], headers, is_own), "403", []
        if reason is None and environ.get("PATH_INFO") == HEALTH:
            start("200 OK", [("Content-Type", "text/plain; charset=utf-8"), *PROTECTIVE])
            return [b"running\n"]
        if reason is None and password and not has_password(headers, password):
            reason, status, ask = WRONG_PASSWORD, "401", [ASK_PASSWORD]
        if reason is not None:
            kind = ("Content-Type", "text/plain; charset=utf-8")
            start(f"{status} Refused", [kind, *PROTECTIVE, *ask])
            return [f"{reason}\n".encode()]

        def start_with_headers(status: str, given: list[tuple[str, str]], *rest: Any) -> Any:
            kept = [each for each in given if not each[0].lower().startswith("access-control-")]
            return start(status, [*kept, *PROTECTIVE], *rest)

        return app(environ, start_with_headers)

    return answer


def _with_reports(store: Store, metrics: Any) -> Any:
    """Return a WSGI application that serves the reports, and `metrics` for all other paths."""

    def answer(environ: dict[str, Any], start: Any) -> Any:
        page = _REPORT.fullmatch(environ.get("PATH_INFO", ""))
        if page is None:
            return metrics(environ, start)
        status, body, kind = "200 OK", b"", "text/html; charset=utf-8"
        try:
            body = _read_inside(store, page[1])
        except FileNotFoundError:
            status, body, kind = "404 Not Found", b"This report does not exist.", "text/plain"
        except (OSError, StorageError):
            status, body, kind = (
                "503 Service Unavailable",
                b"The storage does not answer.",
                "text/plain",
            )
        start(status, [("Content-Type", kind), ("Content-Security-Policy", POLICY)])
        return [body]

    return answer


def _read_inside(store: Store, key: str) -> bytes:
    """Read an object of the root. A symbolic link that leaves the root is no object of it."""
    if store.local_folder is not None:
        folder = Path(store.local_folder).resolve()
        path = Path(os.path.realpath(folder / key))  # resolve() fails on a loop of links
        if not path.is_relative_to(folder):
            raise FileNotFoundError(key)
        key = path.relative_to(folder).as_posix()
        if not _REPORT.fullmatch(f"/{key}"):
            raise FileNotFoundError(key)
    return store.read(key)


def main(arguments: list[str] | None = None) -> int:
    """Serve a root until a SIGINT or SIGTERM. Return the exit status."""
    start_logging()
    prepare_streams()
    parser = argparse.ArgumentParser(
        "python -m dpnet.exporter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("root", help="a folder or s3://bucket/prefix")
    parser.add_argument(
        "--port",
        type=int,
        default=PORT,
        help="port to listen on, 0 for any free port (default: %(default)s)",
    )
    parser.add_argument("--host", default=HOST, help="address to listen on (default: %(default)s)")
    # `dpnet up` opens the socket itself, so that no other program can take its port.
    parser.add_argument("--listener", type=int, metavar="FD", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    ended = threading.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, frame: ended.set())
    try:
        if wrong := wrong_variable(ALL):
            raise ConfigError(wrong)
        password = os.environ.pop(REPORTS_PASSWORD, "")
        given = None if args.listener is None else socket.socket(fileno=args.listener)
        names = tuple(filter(None, os.environ.get(SERVER_NAMES, "").split(",")))
        server, port = serve(open_store(args.root), args.port, args.host, password, given, names)
    except PipelineError as error:
        print(f"dpnet: {error}", file=sys.stderr, flush=True)
        return 2 if isinstance(error, ConfigError) else 1
    print(f"http://{args.host}:{port}/metrics", flush=True)
    ended.wait()
    server.shutdown()
    return 0
