"""What a process hands on to the next one about rate limits."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stashcordfs.discord.client import DiscordClient
from stashcordfs.discord.kept import KeptLimits
from stashcordfs.discord.limiter import RateLimiter, Route
from stashcordfs.errors import BreakerOpen

if TYPE_CHECKING:
    from pathlib import Path

POST = Route("POST", "/channels/{}/messages", "7")
OTHER = Route("POST", "/channels/{}/messages", "8")
PERIOD_S = 5.0


def answered(
    limiter: RateLimiter, now: float, *, remaining: int, reset_after: float = PERIOD_S
) -> None:
    headers = {
        "x-ratelimit-limit": "5",
        "x-ratelimit-remaining": str(remaining),
        "x-ratelimit-reset-after": str(reset_after),
        "x-ratelimit-bucket": "b",
    }
    limiter.learn(POST, 200, headers, None, now)
    limiter.release(POST, now)


def after(old: RateLimiter, now: float, *, elapsed: float) -> RateLimiter:
    """The next process's limiter, whose clock begins at 1000."""
    kept = json.loads(json.dumps(old.snapshot(now)))
    fresh = RateLimiter()
    fresh.restore(kept, 1000.0, elapsed)
    return fresh


def granted_at_once(limiter: RateLimiter, now: float = 1000.0) -> int:
    count = 0
    while count < 20 and limiter.reserve(POST, now) == 0:
        count += 1
    for _ in range(count):
        limiter.release(POST, now)
    return count


@given(used=st.integers(1, 5), elapsed=st.floats(0, 20))
def test_the_next_process_spends_what_is_left_of_the_window(used: int, elapsed: float) -> None:
    old = RateLimiter()
    for number in range(used):
        assert old.reserve(POST, 0.0) == 0
        answered(old, 0.0, remaining=4 - number)
    fresh = after(old, 0.0, elapsed=elapsed)
    assert granted_at_once(fresh) == (5 if elapsed >= PERIOD_S else 5 - used)
    if elapsed < PERIOD_S:
        wait = fresh.reserve(POST, 1000.0)
        assert wait == pytest.approx(PERIOD_S - elapsed, abs=0.1)
        assert granted_at_once(fresh, 1000.0 + wait) == 5


def test_a_request_that_was_in_flight_costs_a_whole_window() -> None:
    old = RateLimiter()
    assert old.reserve(POST, 0.0) == 0
    answered(old, 0.0, remaining=4)
    assert old.reserve(POST, 0.0) == 0
    fresh = after(old, 4.9, elapsed=0.0)
    assert fresh.reserve(POST, 1000.0) == pytest.approx(PERIOD_S, abs=0.1)
    assert granted_at_once(fresh, 1000.0 + PERIOD_S + 0.1) == 5


def test_a_first_request_that_was_never_answered_waits_a_usual_window() -> None:
    old = RateLimiter()
    assert old.reserve(POST, 0.0) == 0
    fresh = after(old, 1.0, elapsed=1.0)
    assert fresh.reserve(POST, 1000.0) == pytest.approx(4.0, abs=0.1)
    assert fresh.reserve(OTHER, 1000.0) == 0


def test_a_window_whose_answers_were_lost_is_waited_out() -> None:
    old = RateLimiter()
    assert old.reserve(POST, 0.0) == 0
    answered(old, 0.0, remaining=4)
    assert old.reserve(POST, 6.0) == 0  # the next window, which no answer dates
    old.release(POST, 6.0)
    fresh = after(old, 6.0, elapsed=1.0)
    assert granted_at_once(fresh) == 4
    assert fresh.reserve(POST, 1000.0) == pytest.approx(4.0, abs=0.1)


def test_refusals_and_bans_are_handed_on() -> None:
    old = RateLimiter(invalid_budget=20)
    assert old.reserve(POST, 0.0) == 0
    body = {"message": "slow down", "retry_after": 30.0, "global": False}
    old.learn(POST, 429, {"via": "1.1 google", "x-ratelimit-scope": "user"}, body, 0.0)
    old.release(POST, 0.0)
    fresh = after(old, 0.0, elapsed=10.0)
    assert fresh.reserve(POST, 1000.0) == pytest.approx(20.0, abs=0.1)
    assert fresh.breaker.invalid(1000.0) == 1
    old.breaker.trip(0.0, for_s=600.0)
    with pytest.raises(BreakerOpen):
        after(old, 0.0, elapsed=10.0).reserve(OTHER, 1000.0)
    assert after(old, 0.0, elapsed=601.0).reserve(OTHER, 1000.0) == 0


def answer(_request: httpx.Request) -> httpx.Response:
    headers = {
        "via": "1.1 google",
        "x-ratelimit-limit": "5",
        "x-ratelimit-remaining": "3",
        "x-ratelimit-reset-after": "5.0",
    }
    return httpx.Response(200, headers=headers, json={"id": "7", "type": 0})


async def test_a_client_leaves_a_file_and_the_next_one_reads_it(
    tmp_path: Path, autojump_clock: object
) -> None:
    def client(wall: float) -> DiscordClient:
        kept = KeptLimits(tmp_path / "limits.json", wall=lambda: wall)
        transport = httpx.MockTransport(answer)
        return DiscordClient(
            api_url="http://api.test/v10", token=lambda: "t", transport=transport, kept=kept
        )

    async with client(100.0) as first:
        await first.channel(7)
    async with client(101.0) as second:
        route = Route("GET", "/channels/{}", "7")
        now = second.clock()
        grants = 0
        while second.limiter.reserve(route, now) == 0:
            grants += 1
        assert grants == 3


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"at": 1}', b'{"at": 1, "buckets": [[1]]}'])
def test_a_damaged_file_tells_nothing(tmp_path: Path, damage: bytes) -> None:
    (tmp_path / "limits.json").write_bytes(damage)
    limiter = RateLimiter()
    kept = KeptLimits(tmp_path / "limits.json")
    kept.load(limiter, 0.0)
    assert limiter.reserve(POST, 0.0) == 0
    kept.save(limiter, 0.0)  # and is replaced
    fresh = RateLimiter()
    KeptLimits(tmp_path / "limits.json", wall=lambda: 0.0).load(fresh, 0.0)
    assert fresh.reserve(POST, 0.0) > 0
    kept.close()


def test_a_shorter_line_leaves_nothing_of_a_longer_one(tmp_path: Path) -> None:
    path = tmp_path / "limits.json"
    path.write_bytes(b"x" * 5000)
    kept = KeptLimits(path)
    kept.save(RateLimiter(), 0.0)
    assert json.loads(path.read_bytes())["buckets"] == []
    kept.close()


def test_a_disk_that_refuses_stops_nothing(tmp_path: Path) -> None:
    kept = KeptLimits(tmp_path / "missing" / "limits.json")
    kept.save(RateLimiter(), 0.0)
    kept.load(RateLimiter(), 0.0)
    kept.close()
