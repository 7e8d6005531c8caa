"""What Prometheus reads at /metrics."""

from __future__ import annotations

import time
from typing import Any

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from .admission import Gate

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """Of one application, with the memory and the processor time of its process.

    Args:
        gate: whose number of requests is the length of the queue.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, gate: Gate) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "dynamic_dino_requests",
            "Requests for detections, by the HTTP status of their answer.",
            ["status"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "dynamic_dino_request_seconds",
            "Time from the head of an accepted request to its answer.",
            registry=self.registry,
            buckets=SECONDS,
        )
        self.batch = Histogram(
            "dynamic_dino_batch_size",
            "Images that went through the detector together.",
            registry=self.registry,
            buckets=(1, 2, 4, 8, 16, 32, 64),
        )
        queue = Gauge(
            "dynamic_dino_queue_length",
            "Requests that are accepted and not yet answered.",
            registry=self.registry,
        )
        queue.set_function(lambda: gate.inside)

    def page(self) -> bytes:
        return generate_latest(self.registry)


class Measured:
    """ASGI middleware: counts the answers of one address, and times those that are no refusals at
    the door."""

    def __init__(self, app: Any, metrics: Metrics, path: str) -> None:
        self.app, self.metrics, self.path = app, metrics, path

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] != self.path:
            await self.app(scope, receive, send)
            return
        start, status, seconds = time.perf_counter(), 500, None

        async def noted(message: dict) -> None:
            nonlocal status, seconds
            if message["type"] == "http.response.start":  # its end may wait for the client
                status, seconds = message["status"], time.perf_counter() - start
            await send(message)

        try:
            await self.app(scope, receive, noted)
        finally:
            self.metrics.requests.labels(str(status)).inc()
            if status not in (429, 503):
                self.metrics.seconds.observe(seconds or time.perf_counter() - start)
