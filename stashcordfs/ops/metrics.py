"""The metrics, one object in the words of the design; rendered for Prometheus on /metrics.

A registry of its own, so that two mounts in one test process do not collide. Counts only: no file
names, ids or other words of the user become labels.
"""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from collections.abc import Iterator

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LATENCIES_S = (25e-6, 100e-6, 250e-6, 1e-3, 5e-3, 25e-3, 0.1, 0.5, 1.0, 5.0, 15.0, 60.0)
_PREFIX = "stashcordfs_"


class Durations(Collector):
    """A histogram by name, for one thread: a request of the kernel pays for it each time.

    The library's own takes locks and walks the bounds: three times as long.
    """

    def __init__(self, name: str, says: str) -> None:
        self._name = name
        self._says = says
        self._sums: dict[str, float] = {}
        self._counts: dict[str, list[int]] = {}

    def observe(self, name: str, seconds: float) -> None:
        """One more that took so long."""
        counts = self._counts.get(name)
        if counts is None:
            counts = self._counts[name] = [0] * (len(_LATENCIES_S) + 1)
            self._sums[name] = 0.0
        counts[bisect_left(_LATENCIES_S, seconds)] += 1
        self._sums[name] += seconds

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """For the exposition."""
        family = HistogramMetricFamily(self._name, self._says, labels=["name"])
        bounds = [*map(str, _LATENCIES_S), "+Inf"]
        for name, counts in self._counts.items():
            buckets = list(zip(bounds, accumulate(counts), strict=True))
            family.add_metric([name], buckets, self._sums[name])
        yield family


class Metrics:
    """Counters and gauges. Parts are handed this object; gauges may be given a function."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.operation_seconds = Durations(
            _PREFIX + "operation_seconds",
            "File-system operations: time taken, whatever their outcome",
        )
        self.registry.register(self.operation_seconds)
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
        self.suspends = self._counter("suspends", "Times that the machine has slept")
        self.token_rejected = self._gauge("token_rejected", "1 while Discord refuses the token")
        self.cache_bytes = self._gauge("cache_bytes", "Bytes held by the block cache")
        self.dirty_bytes = self._gauge("dirty_bytes", "Bytes that are not on Discord yet")
        self.pending_packs = self._gauge("pending_packs", "Packs in the outbox")
        self.damaged_blocks = self._gauge(
            "damaged_blocks", "Blocks whose content the last verify found lost"
        )
        self.missing_packs = self._gauge(
            "missing_packs", "Packs that files need and the last verify did not find"
        )
        self.missing_objects = self._gauge(
            "missing_objects", "Segments and checkpoints that the last verify found missing"
        )
        self.history_bytes = self._gauge(
            "history_bytes", "Bytes that Discord holds for earlier states alone (last census)"
        )
        self.garbage_bytes = self._gauge(
            "garbage_bytes", "Bytes on Discord that nothing needs (last census)"
        )
        self.collected_bytes = self._counter("collected_bytes", "Garbage that was deleted")
        self.gc_requests = self._counter("gc_requests", "Requests that collecting garbage has made")
        self.unsettled_uploads = self._gauge(
            "unsettled_uploads", "Uploads that Discord may or may not have carried out"
        )
        self.oldest_unsettled_seconds = self._gauge(
            "oldest_unsettled_seconds", "Age of the oldest upload whose outcome is not known"
        )
        self.discord_age_seconds = self._gauge(
            "discord_age_seconds", "Age of the oldest change or byte that Discord does not have"
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
