"""The metrics, one object in the words of the design; rendered for Prometheus on /metrics.

A registry of its own, so that two mounts in one test process do not collide. Counts only: no file
names, ids or other words of the user become labels.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCIES_S = (25e-6, 100e-6, 250e-6, 1e-3, 5e-3, 25e-3, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0)
_PREFIX = "stashcordfs_"


class Metrics:
    """Counters and gauges. Parts are handed this object; gauges may be given a function."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.operation_seconds = Histogram(
            _PREFIX + "operation_seconds",
            "File-system operations: time taken",
            ["name", "outcome"],
            buckets=_LATENCIES_S,
            registry=self.registry,
        )
        self.requests = self._counter("requests", "Requests sent to the API", "route", "status")
        self.rate_limited = self._counter("rate_limited", "429 answers met", "scope")
        self.cdn_requests = self._counter("cdn_requests", "Requests sent to the CDN", "status")
        self.messages = self._counter("messages", "Messages created since the mount")
        self.uploaded_bytes = self._counter("uploaded_bytes", "Bytes of attachments acknowledged")
        self.downloaded_bytes = self._counter("downloaded_bytes", "Bytes received from the CDN")
        self.uploads = self._counter("uploads", "Uploads, by outcome", "outcome")
        self.cache_hits = self._counter("cache_hits", "Reads answered by the block cache")
        self.cache_misses = self._counter("cache_misses", "Reads that had to fetch")
        self.evicted_bytes = self._counter("evicted_bytes", "Bytes evicted from the block cache")
        self.deduplicated_bytes = self._counter(
            "deduplicated_bytes", "Bytes that were on Discord already"
        )
        self.damaged_chunks = self._counter(
            "damaged_chunks", "Chunks that were missing or did not open"
        )
        self.task_failures = self._counter(
            "background_task_failures", "Background tasks that failed and were restarted", "task"
        )
        self.guarded_faults = self._counter(
            "guarded_faults", "Handlers that raised what they should not", "name"
        )
        self.cache_bytes = self._gauge("cache_bytes", "Bytes held by the block cache")
        self.dirty_bytes = self._gauge("dirty_bytes", "Bytes that are not on Discord yet")
        self.pending_packs = self._gauge("pending_packs", "Packs in the outbox")
        self.unsettled_intents = self._gauge("unsettled_intents", "Uploads of unclear outcome")
        self.oldest_dirty_seconds = self._gauge(
            "oldest_dirty_seconds", "Age of the oldest byte that is not on Discord yet"
        )
        self.read_only = self._gauge("read_only", "1 when this mount was fenced")
        self.breaker_open = self._gauge("breaker_open", "1 when we stopped asking Discord")

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, says, labels, registry=self.registry)

    def _gauge(self, name: str, says: str) -> Gauge:
        return Gauge(_PREFIX + name, says, registry=self.registry)

    @contextmanager
    def operation(
        self, name: str, *, clock: Callable[[], float] = time.perf_counter
    ) -> Iterator[None]:
        """Time one operation; its outcome is ok or error."""
        start = clock()
        outcome = "error"
        try:
            yield
            outcome = "ok"
        finally:
            self.operation_seconds.labels(name, outcome).observe(clock() - start)

    def observe(self, name: str, outcome: str, seconds: float) -> None:
        """Count one operation that was timed by the caller (cheaper than `operation`)."""
        self.operation_seconds.labels(name, outcome).observe(seconds)

    def total(self, counter: Counter) -> float:
        """A counter's sum over its labels, as `status` shows it."""
        return sum(
            sample.value
            for family in counter.collect()
            for sample in family.samples
            if sample.name.endswith("_total")
        )

    def render(self) -> bytes:
        """Return the exposition for Prometheus."""
        return generate_latest(self.registry)
