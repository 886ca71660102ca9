"""The metrics, one object in the words of the design; rendered for Prometheus on /metrics.

A registry of its own, so that two mounts in one test process do not collide. Counts only: no file
names, ids or other words of the user become labels.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCIES_S = (25e-6, 100e-6, 250e-6, 1e-3, 5e-3, 25e-3, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0)
_PREFIX = "stashcordfs_"


class Metrics:
    """Counters and gauges. Parts are handed this object; gauges may be given a function."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.operation_seconds = Histogram(
            _PREFIX + "operation_seconds",
            "File-system operations: time taken, whatever their outcome",
            ["name"],
            buckets=_LATENCIES_S,
            registry=self.registry,
        )
        self.requests = self._counter("requests", "Requests sent to the API")
        self.rate_limited = self._counter("rate_limited", "429 answers met")
        self.invalid_requests = self._counter(
            "invalid_requests", "Answers that count toward Discord's ban: 401, 403, 429"
        )
        self.messages = self._counter("messages", "Messages created since the mount")
        self.sent_bytes = self._counter("sent_bytes", "Bytes sent to the API")
        self.received_bytes = self._counter("received_bytes", "Bytes received from API and CDN")
        self.uploaded_bytes = self._counter("uploaded_bytes", "Bytes of files acknowledged")
        self.upload_failures = self._counter("upload_failures", "Uploads to be repeated")
        self.task_failures = self._counter(
            "background_task_failures", "Background tasks that failed and were restarted", "task"
        )
        self.guarded_faults = self._counter(
            "guarded_faults", "Handlers that raised what they should not", "name"
        )
        self.cache_bytes = self._gauge("cache_bytes", "Bytes held by the block cache")
        self.dirty_bytes = self._gauge("dirty_bytes", "Bytes that are not on Discord yet")
        self.pending_packs = self._gauge("pending_packs", "Packs in the outbox")
        self.damaged_blocks = self._gauge(
            "damaged_blocks", "Blocks whose content the last verify found lost"
        )
        self.oldest_dirty_seconds = self._gauge(
            "oldest_dirty_seconds", "Age of the oldest byte that is not on Discord yet"
        )

    def _counter(self, name: str, says: str, *labels: str) -> Counter:
        return Counter(_PREFIX + name, says, labels, registry=self.registry)

    def _gauge(self, name: str, says: str) -> Gauge:
        return Gauge(_PREFIX + name, says, registry=self.registry)

    @staticmethod
    def follow(counter: Counter, total: float) -> None:
        """Bring a counter up to a total that another part counts."""
        seen = Metrics.total(counter)
        counter.inc(max(0.0, total - seen))

    @staticmethod
    def total(counter: Counter) -> float:
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
