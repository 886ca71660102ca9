from __future__ import annotations

import pytest

from stashcordfs.ops.metrics import Metrics


def test_operations_are_timed_by_name_and_outcome() -> None:
    metrics = Metrics()
    times = iter([1.0, 1.2, 5.0, 5.5])
    with metrics.operation("read", clock=lambda: next(times)):
        pass
    with pytest.raises(OSError, match="no"), metrics.operation("read", clock=lambda: next(times)):
        raise OSError("no")
    metrics.observe("write", "ok", 0.1)
    text = metrics.render().decode()
    assert 'operation_seconds_sum{name="read",outcome="ok"} 0.19' in text
    assert 'operation_seconds_sum{name="read",outcome="error"} 0.5' in text
    assert 'operation_seconds_count{name="write",outcome="ok"} 1.0' in text


def test_totals_are_summed_over_labels_and_two_objects_do_not_meet() -> None:
    metrics, other = Metrics(), Metrics()
    metrics.requests.labels("POST messages", "200").inc()
    metrics.requests.labels("GET messages", "429").inc(2)
    assert metrics.total(metrics.requests) == 3
    assert other.total(other.requests) == 0
    metrics.dirty_bytes.set_function(lambda: 42)
    assert b"stashcordfs_dirty_bytes 42.0" in metrics.render()
