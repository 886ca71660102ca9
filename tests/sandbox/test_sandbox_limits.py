from __future__ import annotations

import pytest

from stashcordfs.sandbox.cdn import parse_range
from stashcordfs.sandbox.ids import EPOCH_MS, Clock, Snowflakes, clean_filename, time_of
from stashcordfs.sandbox.limits import Limits

WALL = 1_800_000_000.0


def made(age: float) -> int:
    return (int((WALL - age) * 1000) - EPOCH_MS) << 22


def taken(limits: Limits, route: str, count: int, now: float, message: int | None = None):
    return [limits.take(route, "1", now=now, wall=WALL, message_id=message) for _ in range(count)]


def test_five_creates_in_five_seconds_then_429_until_the_window_ends():
    limits = Limits()
    answers = taken(limits, "create_message", 6, 10.0)
    assert [a.retry_after for a in answers] == [None] * 5 + [5.0]
    assert answers[0].headers["X-RateLimit-Remaining"] == "4"
    assert answers[5].headers["X-RateLimit-Reset-After"] == "5.000"
    assert answers[0].headers["X-RateLimit-Bucket"] == answers[5].headers["X-RateLimit-Bucket"]
    assert limits.take("create_message", "2", now=10.0, wall=WALL).retry_after is None
    assert limits.take("create_message", "1", now=15.0, wall=WALL).retry_after is None


@pytest.mark.parametrize(
    ("age", "limit", "period"), [(1, 5, 1.0), (60, 3, 0.33), (15 * 86_400, 30, 4.0)]
)
def test_deletes_have_three_buckets_by_age(age, limit, period):
    answers = taken(Limits(), "delete_message", limit + 1, 0.0, made(age))
    assert [a.retry_after for a in answers] == [None] * limit + [pytest.approx(period)]


def test_fifty_requests_a_second_over_all_but_for_webhooks():
    limits = Limits()
    assert all(a.retry_after is None for a in taken(limits, "channel", 50, 0.0))
    (last,) = taken(limits, "channel", 1, 0.25)
    assert (last.scope, last.retry_after) == ("global", 0.75)
    assert "X-RateLimit-Bucket" not in last.headers
    assert taken(limits, "webhook", 1, 0.25)[0].retry_after is None


def test_old_edits_are_limited_further_and_unannounced():
    answers = taken(Limits(), "edit_message", 4, 0.0, made(7200))
    assert (answers[3].code, answers[3].retry_after) == (30046, 6.0)
    assert answers[3].headers["X-RateLimit-Remaining"] == "1"


def test_all_webhooks_of_a_channel_share_thirty_a_minute():
    limits = Limits()
    assert [limits.webhook_channel("1", 0.0) for _ in range(31)] == [None] * 30 + [60.0]


@pytest.mark.parametrize(
    ("sent", "kept", "title"),
    [
        ("hello (world).png", "hello_world.png", None),
        ("_a b_", "a_b", None),
        ("Ab0-c.bin", "Ab0-c.bin", None),
        ("日本.txt", "unknown.txt", "日本.txt"),
        ("...", "unknown", "..."),
    ],
)
def test_names_are_cleaned(sent, kept, title):
    assert clean_filename(sent, "unknown") == (kept, title)


def test_ids_only_grow_and_tell_their_time():
    ids = Snowflakes(Clock(1000.0))
    first, second = ids.next(), ids.next()
    assert second > first
    assert time_of(first) == pytest.approx(Clock(1000.0).wall(), abs=5)
    assert Snowflakes(Clock(), 1 << 62).next() == (1 << 62) + 1


@pytest.mark.parametrize(
    ("header", "span"),
    [
        (None, None),
        ("bytes=0-0", (0, 1)),
        ("bytes=5-", (5, 10)),
        ("bytes=-3", (7, 10)),
        ("bytes=8-99", (8, 10)),
        ("bytes=5-2", None),
        ("bytes=0-1,4-5", None),
        ("bytes=-", None),
        ("lines=1-2", None),
    ],
)
def test_ranges(header, span):
    assert parse_range(header, 10) == span


@pytest.mark.parametrize("header", ["bytes=10-", "bytes=-0"])
def test_ranges_beyond_the_end(header):
    with pytest.raises(ValueError, match=r"end|empty"):
        parse_range(header, 10)
