"""The metrics of a server for Prometheus."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from data_prep.core.text import printable

OUTCOMES = ("done", "refused", "failed", "cancelled")
_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counts of requests, the length of the queue and the version that answers."""

    def __init__(self, waiting: Callable[[], int], open_requests: Callable[[], int]) -> None:
        """Create the metrics.

        Args:
            waiting: returns how many requests wait for the thread that computes.
            open_requests: returns how many requests are read, waiting or computed.
        """
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "dpnet_serve_requests",
            "Requests to fill a photo, by outcome.",
            ["outcome"],
            registry=self._registry,
        )
        for outcome in OUTCOMES:
            self._requests.labels(outcome)
        self._seconds = Histogram(
            "dpnet_serve_seconds",
            "Seconds of computing of one request.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._model = Gauge(
            "dpnet_serve_model",
            "1 for the version that answers.",
            ["model"],
            registry=self._registry,
        )
        queue = Gauge(
            "dpnet_serve_queue", "Requests that wait to be computed.", registry=self._registry
        )
        queue.set_function(waiting)
        at_once = Gauge(
            "dpnet_serve_open_requests",
            "Requests that are read, waiting or computed.",
            registry=self._registry,
        )
        at_once.set_function(open_requests)

    def count(self, outcome: str) -> None:
        """Count a request that has ended."""
        self._requests.labels(outcome).inc()

    def observe(self, seconds: float) -> None:
        """Note how long a request was computed."""
        self._seconds.observe(seconds)

    def text(self, model: str) -> bytes:
        """Return all metrics in Prometheus's format; `model` is the id that answers, or ""."""
        self._model.clear()
        if model:
            self._model.labels(printable(model)).set(1)
        return generate_latest(self._registry)
