"""What the service counts and times, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from mdn.serving.calls import Call

__all__ = ["CONTENT_TYPE_LATEST", "Metrics"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """The numbers of one service.

    Args:
        waiting: how many requests wait now.
    """

    def __init__(self, waiting: Callable[[], int]) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "mdn_requests",
            "Requests that were answered.",
            ["endpoint", "status"],
            registry=self._registry,
        )
        self._seconds = Histogram(
            "mdn_request_seconds",
            "From the first byte of a request to its answer.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._batch_requests = Histogram(
            "mdn_batch_requests",
            "Requests that the model answered at once.",
            buckets=_SIZES,
            registry=self._registry,
        )
        self._batch_rows = Histogram(
            "mdn_batch_rows",
            "Rows that the model answered at once.",
            buckets=_SIZES,
            registry=self._registry,
        )
        Gauge(
            "mdn_waiting_requests", "Requests that wait for the model.", registry=self._registry
        ).set_function(waiting)
        ProcessCollector(registry=self._registry)

    def request(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request."""
        self._requests.labels(endpoint, status).inc()
        self._seconds.labels(endpoint).observe(seconds)

    def batch(self, calls: Sequence[Call]) -> None:
        """Count a batch."""
        self._batch_requests.observe(len(calls))
        self._batch_rows.observe(sum(call.size for call in calls))

    def text(self) -> bytes:
        """Return all of it in the format of Prometheus."""
        return generate_latest(self._registry)
