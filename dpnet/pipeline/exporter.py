"""What lies under a root over HTTP: metrics for Prometheus (trainings, datasets, champions) and the
reports of evaluations.

    python -m dpnet.exporter ROOT --port 9808

It reads the store when it is asked and at most every EVERY_S seconds, and small objects alone; of
those that are damaged or missing it tells nothing. Where storage does not answer, that is told.
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
from data_prep.core.manifest import read_manifest
from data_prep.core.paths import MANIFEST
from data_prep.core.storage.open import open_store
from data_prep.core.storage.store import Store
from dpnet.model_store.records import CHAMPION
from dpnet.tracking.run_log import STATUS

HOST, PORT = "127.0.0.1", 9808
EVERY_S = 10.0  # between two looks at the store
WAIT_S = 5.0  # for which a scrape waits for one; Prometheus gives up after 10 seconds
STALE_S = 60.0  # after which what was seen last is not told any more
FRESH_S = 3600.0  # for which a training that has ended is still told of
_REPORT = re.compile(r"/(evaluations/[0-9a-f]{12}/report\.html)")
_NOTHING_ELSE = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # of a report

# Name, what it is, and its labels. All are gauges.
METRICS = {
    "dpnet_up": ("The exporter answers.", ()),
    "dpnet_storage_up": ("The root can be read.", ()),
    "dpnet_train_step": ("Steps made.", ("run",)),
    "dpnet_train_steps": ("Steps to make.", ("run",)),
    "dpnet_train_claimed": ("A runner holds the run's lease: it is meant to go on.", ("run",)),
    "dpnet_train_last_progress_timestamp_seconds": ("Time of the last step.", ("run",)),
    "dpnet_train_images_per_second": ("Speed of all workers, without validation.", ("run",)),
    "dpnet_train_data_wait_share": ("Share of the time spent waiting for data.", ("run",)),
    "dpnet_train_loss": ("Mean of a loss over the last steps.", ("run", "loss")),
    "dpnet_train_gpu_memory_gb": ("Most memory used on the first GPU.", ("run",)),
    "dpnet_train_skipped_steps": ("Steps left out, not finite.", ("run",)),
    "dpnet_train_skipped_samples": ("Samples left out, damaged.", ("run",)),
    "dpnet_validation_hole_psnr": ("Last validation, in dB.", ("run",)),
    "dpnet_dataset_samples": (
        "Samples in the newest version.",
        ("dataset", "split", "version"),
    ),
    "dpnet_dataset_failed": ("Items of the newest version that are no sample.", ("dataset",)),
    "dpnet_champion_version": ("Version of the model that is in use.", ("model",)),
    "dpnet_champion_hole_psnr": ("Its evaluation's mean over bins, in dB.", ("model",)),
}


class Sample(NamedTuple):
    name: str
    labels: tuple[str, ...]
    value: float


class Reader:
    """What a root tells, as samples; remembers what cannot change any more."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._ended: set[str] = set()  # folders of trainings that are no longer told of
        self._versions: dict[str, dict[str, Any]] = {}  # summaries by the datasets' folders

    def read(self, now: float) -> list[Sample]:
        """At the time `now`, seconds since 1970. Raises StorageError or OSError."""
        top = self.store.local_folder
        if top is not None and not top.is_dir():
            raise StorageError(f"{top} is no folder: check the root.")
        samples: list[Sample] = []
        for folder in self.store.folders("runs"):
            samples += self._training(folder, now)
        for folder in self.store.folders("images"):
            samples += self._dataset(folder)
        for folder in self.store.folders("registry"):
            samples += self._champion(folder)
        return samples

    def _training(self, folder: str, now: float) -> list[Sample]:
        if folder in self._ended:
            return []
        status = self._json(f"{folder}/{STATUS}")
        try:
            old = now - float(status.get("time", 0)) > FRESH_S
            if old and self.store.exists(f"{folder}/{MANIFEST}"):
                self._ended.add(folder)
                return []
            claimed = self.store.exists(f"{folder}/lease.json")
            return list(_of_training(folder.rpartition("/")[2], status, claimed))
        except _DAMAGED:
            return []

    def _dataset(self, folder: str) -> list[Sample]:
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
            return list(_of_dataset(folder.rpartition("/")[2], newest)) if newest else []
        except _DAMAGED:
            return []

    def _champion(self, folder: str) -> list[Sample]:
        record, model = self._json(f"{folder}/{CHAMPION}.json"), folder.rpartition("/")[2]
        try:
            return [
                Sample("dpnet_champion_version", (model,), float(record["version"])),
                Sample("dpnet_champion_hole_psnr", (model,), float(record["hole_psnr"])),
            ]
        except _DAMAGED:
            return []

    def _json(self, key: str) -> dict[str, Any]:
        """The mapping in an object; empty where there is none."""
        try:
            record = json.loads(self.store.read(key))
        except (FileNotFoundError, ValueError):
            return {}
        return record if isinstance(record, dict) else {}


_DAMAGED = (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError)


def _of_training(run: str, status: dict[str, Any], claimed: bool) -> Iterator[Sample]:
    def sample(name: str, value: Any) -> Sample:
        return Sample(name, (run,), float(value))

    yield sample("dpnet_train_step", status["step"])
    yield sample("dpnet_train_steps", status["steps"])
    yield sample("dpnet_train_claimed", claimed)
    yield sample("dpnet_train_last_progress_timestamp_seconds", status["time"])
    if validation := status.get("validation"):
        yield sample("dpnet_validation_hole_psnr", validation["hole_psnr"])
    if not (train := status.get("train")):
        return
    yield sample("dpnet_train_images_per_second", train["images_per_second"])
    share = train["data_seconds"] / max(train["seconds"], 1e-9)
    yield sample("dpnet_train_data_wait_share", share)
    for loss, value in train["losses"].items():
        yield Sample("dpnet_train_loss", (run, loss), float(value))
    for name in ("skipped_steps", "skipped_samples"):
        yield sample(f"dpnet_train_{name}", train[name])
    if "gpu_memory_gb" in train:
        yield sample("dpnet_train_gpu_memory_gb", train["gpu_memory_gb"])


def _of_dataset(dataset: str, summary: dict[str, Any]) -> Iterator[Sample]:
    for split, figures in summary["splits"].items():
        labels = (dataset, split, str(summary["version"]))
        yield Sample("dpnet_dataset_samples", labels, float(figures["samples"]))
    yield Sample("dpnet_dataset_failed", (dataset,), float(summary["failed"]))


class RootCollector(Collector):
    """Reads in a thread, because storage that does not answer is tried again for a minute, and a
    scrape has to be answered all the same."""

    def __init__(self, store: Store) -> None:
        self._reader = Reader(store)
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._seen: list[Sample] | None = None  # None where the root could not be read
        self._at = float("-inf")

    def collect(self) -> Iterator[GaugeMetricFamily]:
        with self._lock:
            working = self._thread is not None and self._thread.is_alive()
            if not working and time.monotonic() - self._at >= EVERY_S:
                self._thread = threading.Thread(target=self._read, name="dpnet-look", daemon=True)
                self._thread.start()
            thread = self._thread
        if thread is not None:
            thread.join(WAIT_S)
        seen = self._seen if time.monotonic() - self._at < STALE_S else None
        samples = [
            Sample("dpnet_up", (), 1.0),
            Sample("dpnet_storage_up", (), float(seen is not None)),
            *(seen or []),
        ]
        for name, (what, labels) in METRICS.items():
            family = GaugeMetricFamily(name, what, labels=labels)
            for each in samples:
                if each.name == name:
                    family.add_metric(each.labels, each.value)
            yield family

    def _read(self) -> None:
        try:
            self._seen = self._reader.read(time.time())
        except (StorageError, OSError):
            self._seen = None
        self._at = time.monotonic()


def serve(store: Store, port: int = 0, host: str = HOST) -> tuple[WSGIServer, int]:
    """Answer scrapes in threads, on a free port where `port` is 0: the server, to be shut down, and
    its port. Raises PipelineError where the port cannot be had."""
    registry = CollectorRegistry()
    registry.register(RootCollector(store))
    try:
        server, _ = start_http_server(port, host, registry)
        server.set_app(_with_reports(store, make_wsgi_app(registry)))
    except (OSError, OverflowError) as error:
        raise PipelineError(
            f"the exporter cannot listen on {host}:{port} ({error}): choose another --port, or 0"
            " for a free one."
        ) from None
    return server, server.server_port


def _with_reports(store: Store, metrics: Any) -> Any:
    """The application that shows an evaluation's report and leaves all else to `metrics`."""

    def answer(environ: dict[str, Any], start: Any) -> Any:
        page = _REPORT.fullmatch(environ.get("PATH_INFO", ""))
        if page is None:
            return metrics(environ, start)
        status, body, kind = "200 OK", b"", "text/html; charset=utf-8"
        try:
            body = store.read(page[1])
        except FileNotFoundError:
            status, body, kind = "404 Not Found", b"There is no such report.", "text/plain"
        except (OSError, StorageError):
            status, body, kind = "503 Service Unavailable", b"Storage is away.", "text/plain"
        start(status, [("Content-Type", kind), ("Content-Security-Policy", _NOTHING_ELSE)])
        return [body]

    return answer


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m dpnet.exporter", description=__doc__)
    parser.add_argument("root", help="a folder or s3://bucket/prefix")
    parser.add_argument("--port", type=int, default=PORT, help="0 takes a free one")
    parser.add_argument("--host", default=HOST, help="address to listen on")
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
