"""An HTTP server for a root: metrics for Prometheus and the reports of evaluations.

    python -m dpnet.exporter ROOT --port 9808

The metrics describe trainings, datasets and champions. The server reads the store when Prometheus
asks, at most every READ_EVERY_S seconds, and only small objects. It leaves out damaged and missing
objects. `dpnet_storage_up` is 0 while the storage does not answer.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, make_wsgi_app, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from data_prep.core.errors import PipelineError, StorageError
from data_prep.core.logs import start_logging
from data_prep.core.manifest import read_manifest
from data_prep.core.paths import (
    IMAGES,
    REGISTRY,
    RUNS,
    champion_key,
    lease_key,
    manifest_key,
)
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from dpnet.tracking.run_log import STATUS

HOST, PORT = "127.0.0.1", 9808
READ_EVERY_S = 10.0
WAIT_S = 5.0  # how long a scrape waits for a reading; Prometheus waits 10 seconds
STALE_AFTER_S = 60.0  # an older reading is not exported
KEEP_ENDED_S = 3600.0  # how long a finished training is exported
_REPORT = re.compile(r"/(evaluations/[0-9a-f]{12}/report\.html)")
# A report shows its own images and styles, and loads nothing.
_REPORT_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"

# The description and the labels of each metric. All metrics are gauges.
METRICS = {
    "dpnet_up": ("The exporter answers.", ()),
    "dpnet_storage_up": ("The root can be read.", ()),
    "dpnet_train_step": ("Steps done.", ("run",)),
    "dpnet_train_steps": ("Steps of the whole training.", ("run",)),
    "dpnet_train_claimed": (
        "A runner holds the run's lease, or was killed while it held it.",
        ("run",),
    ),
    "dpnet_train_last_progress_timestamp_seconds": ("Time of the last step.", ("run",)),
    "dpnet_train_images_per_second": ("Speed of all workers, without validation.", ("run",)),
    "dpnet_train_data_wait_share": ("Share of the time that the workers wait for data.", ("run",)),
    "dpnet_train_loss": ("Mean of a loss over the last logged steps.", ("run", "loss")),
    "dpnet_train_gpu_memory_gb": ("Maximum memory used on the first GPU, in GB.", ("run",)),
    "dpnet_train_skipped_steps": (
        "Steps skipped because a loss or gradient was not finite.",
        ("run",),
    ),
    "dpnet_train_skipped_samples": ("Samples skipped because they were damaged.", ("run",)),
    "dpnet_validation_hole_psnr": ("Hole PSNR of the last validation, in dB.", ("run",)),
    "dpnet_dataset_samples": (
        "Samples in the newest version.",
        ("dataset", "split", "version"),
    ),
    "dpnet_dataset_failed": ("Items of the newest version that could not be used.", ("dataset",)),
    "dpnet_champion_version": ("Version number of the champion.", ("model",)),
    "dpnet_champion_hole_psnr": (
        "Hole PSNR of the champion's evaluation, mean over bins, in dB.",
        ("model",),
    ),
}


class MetricValue(NamedTuple):
    """One value of a metric, with the values of its labels."""

    name: str
    labels: tuple[str, ...]
    value: float


class RootReader:
    """The reader of a root's metrics. It remembers the objects that cannot change any more."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._ended: set[str] = set()  # folders of trainings that are no longer exported
        self._versions: dict[str, dict[str, Any]] = {}  # summaries by version folder

    def read(self, now: float) -> list[MetricValue]:
        """Read all metrics.

        Args:
            now: The current time, in seconds since 1970.

        Raises:
            StorageError: The store does not answer.
            OSError: The folder cannot be read.
        """
        local = self.store.local_folder
        if local is not None and not local.is_dir():
            raise StorageError(f"the root {local} cannot be read: it is not a folder.")
        values: list[MetricValue] = []
        for folder in self.store.folders(RUNS):
            values += self._training(folder, now)
        for folder in self.store.folders(IMAGES):
            values += self._dataset(folder)
        for folder in self.store.folders(REGISTRY):
            values += self._champion(folder)
        return values

    def _training(self, folder: str, now: float) -> list[MetricValue]:
        if folder in self._ended:
            return []
        status = self._json(f"{folder}/{STATUS}")
        try:
            is_old = now - float(status.get("time", 0)) > KEEP_ENDED_S
            if is_old and self.store.exists(manifest_key(folder)):
                self._ended.add(folder)
                return []
            claimed = self.store.exists(lease_key(folder))
            return list(_training_values(folder.rpartition("/")[2], status, claimed))
        except _DAMAGED:
            return []

    def _dataset(self, folder: str) -> list[MetricValue]:
        for version in self.store.folders(folder):
            if version not in self._versions:
                try:
                    self._versions[version] = read_manifest(self.store, version).summary
                except StorageError:
                    raise
                except PipelineError:  # not committed yet, or damaged
                    continue
        summaries = [v for key, v in self._versions.items() if key.startswith(f"{folder}/")]
        try:
            newest = max(summaries, key=lambda summary: int(summary["version"]), default=None)
            return list(_dataset_values(folder.rpartition("/")[2], newest)) if newest else []
        except _DAMAGED:
            return []

    def _champion(self, folder: str) -> list[MetricValue]:
        model = folder.rpartition("/")[2]
        record = self._json(champion_key(model))
        try:
            return [
                MetricValue("dpnet_champion_version", (model,), float(record["version"])),
                MetricValue("dpnet_champion_hole_psnr", (model,), float(record["hole_psnr"])),
            ]
        except _DAMAGED:
            return []

    def _json(self, key: str) -> dict[str, Any]:
        """Return the JSON object under `key`; an empty one if it is missing or damaged."""
        try:
            record = json.loads(self.store.read(key))
        except (FileNotFoundError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}


_DAMAGED = (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError)


def _training_values(run: str, status: dict[str, Any], claimed: bool) -> Iterator[MetricValue]:
    def metric(name: str, value: Any) -> MetricValue:
        return MetricValue(name, (run,), float(value))

    yield metric("dpnet_train_step", status["step"])
    yield metric("dpnet_train_steps", status["steps"])
    yield metric("dpnet_train_claimed", claimed)
    yield metric("dpnet_train_last_progress_timestamp_seconds", status["time"])
    if validation := status.get("validation"):
        yield metric("dpnet_validation_hole_psnr", validation["hole_psnr"])
    if not (train := status.get("train")):
        return
    yield metric("dpnet_train_images_per_second", train["images_per_second"])
    share = train["data_seconds"] / max(train["seconds"], 1e-9)
    yield metric("dpnet_train_data_wait_share", share)
    for loss, value in train["losses"].items():
        yield MetricValue("dpnet_train_loss", (run, loss), float(value))
    for name in ("skipped_steps", "skipped_samples"):
        yield metric(f"dpnet_train_{name}", train[name])
    if "gpu_memory_gb" in train:
        yield metric("dpnet_train_gpu_memory_gb", train["gpu_memory_gb"])


def _dataset_values(dataset: str, summary: dict[str, Any]) -> Iterator[MetricValue]:
    for split, figures in summary["splits"].items():
        labels = (dataset, split, str(summary["version"]))
        yield MetricValue("dpnet_dataset_samples", labels, float(figures["samples"]))
    yield MetricValue("dpnet_dataset_failed", (dataset,), float(summary["failed"]))


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
                    family.add_metric(each.labels, each.value)
            yield family

    def _read(self) -> None:
        try:
            self._values = self._reader.read(time.time())
        except (StorageError, OSError):
            self._values = None
        self._read_at = time.monotonic()


def serve(store: Store, port: int = 0, host: str = HOST) -> tuple[WSGIServer, int]:
    """Start an HTTP server that answers requests in threads.

    Args:
        store: The root.
        port: The port to listen on, 0 to 65535; 0 means any free port.
        host: The address to listen on.

    Returns:
        The server, which the caller shuts down, and its port.

    Raises:
        PipelineError: The port cannot be used.
    """
    registry = CollectorRegistry()
    registry.register(RootCollector(store))
    try:
        server, _ = start_http_server(port, host, registry)
        server.set_app(_with_reports(store, make_wsgi_app(registry)))
    except (OSError, OverflowError) as error:
        raise PipelineError(
            f"the exporter cannot listen on {host}:{port}: {error}. Choose another --port, or 0 for"
            " any free port."
        ) from None
    return server, server.server_port


def _with_reports(store: Store, metrics: Any) -> Any:
    """Return a WSGI application that serves the reports, and `metrics` for all other paths."""

    def answer(environ: dict[str, Any], start: Any) -> Any:
        page = _REPORT.fullmatch(environ.get("PATH_INFO", ""))
        if page is None:
            return metrics(environ, start)
        status, body, kind = "200 OK", b"", "text/html; charset=utf-8"
        try:
            body = store.read(page[1])
        except FileNotFoundError:
            status, body, kind = "404 Not Found", b"This report does not exist.", "text/plain"
        except (OSError, StorageError):
            status, body, kind = (
                "503 Service Unavailable",
                b"The storage does not answer.",
                "text/plain",
            )
        start(status, [("Content-Type", kind), ("Content-Security-Policy", _REPORT_POLICY)])
        return [body]

    return answer


def main(arguments: list[str] | None = None) -> int:
    """Serve a root until a SIGINT or SIGTERM. Return the exit status."""
    start_logging()
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
    args = parser.parse_args(arguments)
    ended = threading.Event()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, lambda number, frame: ended.set())
    try:
        server, port = serve(open_store(args.root), args.port, args.host)
    except PipelineError as error:
        print(f"dpnet: {error}", file=sys.stderr, flush=True)
        return 1
    print(f"http://{args.host}:{port}/metrics", flush=True)
    ended.wait()
    server.shutdown()
    return 0
