from __future__ import annotations

from stashcordfs.ops.metrics import Metrics


def test_totals_are_summed_over_labels_and_two_objects_do_not_meet() -> None:
    metrics, other = Metrics(), Metrics()
    metrics.task_failures.labels("uploader").inc()
    metrics.task_failures.labels("commits").inc(2)
    assert metrics.total(metrics.task_failures) == 3
    assert other.total(other.task_failures) == 0
    metrics.follow(metrics.requests, 5)
    metrics.follow(metrics.requests, 7)
    assert metrics.total(metrics.requests) == 7
    for seconds in (25e-6, 0.5, 0.6, 1000.0):
        metrics.operation_seconds.observe("read", seconds)
    rendered = metrics.render()
    assert b'operation_seconds_count{name="read"} 4.0' in rendered
    assert b'operation_seconds_bucket{le="2.5e-05",name="read"} 1.0' in rendered
    assert b'operation_seconds_bucket{le="0.5",name="read"} 2.0' in rendered
    assert b'operation_seconds_bucket{le="60.0",name="read"} 3.0' in rendered
    assert b'operation_seconds_sum{name="read"} 1001.1' in rendered
    metrics.dirty_bytes.set_function(lambda: 42)
    assert b"stashcordfs_dirty_bytes 42.0" in metrics.render()
