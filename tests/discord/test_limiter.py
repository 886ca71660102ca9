from __future__ import annotations

import heapq
import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stashcordfs.discord.breaker import Breaker
from stashcordfs.discord.limiter import RateLimiter, Route, retry_after_s
from stashcordfs.errors import BreakerOpen

POST = Route("POST", "/channels/{}/messages", "7")
GET = Route("GET", "/channels/{}/messages", "7")


def headers(limit: int, remaining: int, reset_after: float, **more: str) -> dict[str, str]:
    return {
        "x-ratelimit-limit": str(limit),
        "x-ratelimit-remaining": str(remaining),
        "x-ratelimit-reset-after": f"{reset_after:.3f}",
        "x-ratelimit-bucket": "b",
        "via": "1.1 google",
        **more,
    }


class Server:
    """A bucket of a fixed window that begins with the first request after the one before."""

    def __init__(self, limit: int, period: float) -> None:
        self.limit, self.period = limit, period
        self.end, self.used, self.refused, self.lost = -1.0, 0, 0, 0

    def arrive(self, now: float) -> int:
        if now >= self.end:
            self.end, self.used = now + self.period, 0
        if self.used >= self.limit:
            self.refused += 1
            return 429
        self.used += 1
        return 200

    def headers(self, now: float) -> dict[str, str]:
        if now >= self.end:
            return headers(self.limit, self.limit, 0.0)
        return headers(self.limit, self.limit - self.used, self.end - now)


def simulate(
    *,
    limit: int,
    period: float,
    requests: int,
    parallel: int,
    spread: float,
    lost: float,
    seed: int,
) -> tuple[Server, float]:
    """Requests with random transit times, some of whose answers are lost; the time all took.

    Uploads may take longer than a window; an answer's way back takes a part of one.
    """
    rng = random.Random(seed)
    server, limiter = Server(limit, period), RateLimiter()
    order = itertools.count()
    events: list[tuple[float, int, str, dict[str, str] | None]] = []
    left, flying, now, asking = requests, 0, 0.0, 0.0

    def push(at: float, what: str, answer: dict[str, str] | None = None) -> None:
        heapq.heappush(events, (at, next(order), what, answer))

    push(0.0, "ask")
    while left or flying:
        now, _, what, answer = heapq.heappop(events)
        if what == "arrive":
            # headers are written when the request has been carried out, some time later
            push(now + rng.uniform(0, spread), f"answer {server.arrive(now)}")
        elif what.startswith("answer"):
            gone = rng.random() < lost
            server.lost += gone
            back = what.replace("answer", "back")
            took = rng.uniform(0.001, min(spread, period / 3))
            push(now + took, back, None if gone else server.headers(now))
        elif what.startswith("back"):
            flying -= 1
            status = int(what.split()[1])
            left += status == 429
            if answer is not None:
                retry = float(answer["x-ratelimit-reset-after"])
                limiter.learn(POST, status, answer, {"retry_after": retry}, now)
            limiter.release(POST, now)
        wait = 0.0
        while left and flying < parallel and wait == 0.0:
            wait = limiter.reserve(POST, now)
            if wait == 0.0:
                left, flying = left - 1, flying + 1
                push(now + rng.uniform(0.001, spread), "arrive")
            elif not asking > now:
                asking = now + wait
                push(asking, "ask")
    return server, now


@settings(max_examples=300, deadline=None)
@given(
    limit=st.integers(1, 10),
    period=st.sampled_from([0.33, 1.0, 4.0, 5.0]),
    parallel=st.integers(1, 12),
    spread=st.floats(0.002, 8.0),
    seed=st.integers(0, 2**32),
)
def test_a_learned_bucket_is_never_exceeded_and_nobody_starves(
    limit: int, period: float, parallel: int, spread: float, seed: int
) -> None:
    requests = 40
    server, took = simulate(
        limit=limit,
        period=period,
        requests=requests,
        parallel=parallel,
        spread=spread,
        lost=0.0,
        seed=seed,
    )
    assert server.refused == 0
    assert took < (requests + 1) * (period + 3 * spread + 1)


@settings(max_examples=100, deadline=None)
@given(limit=st.integers(1, 6), parallel=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_lost_answers_cost_at_most_a_429_each_and_do_not_block(
    limit: int, parallel: int, seed: int
) -> None:
    server, took = simulate(
        limit=limit, period=5.0, requests=30, parallel=parallel, spread=0.02, lost=0.3, seed=seed
    )
    assert server.refused <= server.lost  # whether a lost one was counted cannot be known
    assert took < (31 + server.refused) * 6


def test_a_window_is_used_up_in_parallel_with_little_time_lost() -> None:
    _, took = simulate(limit=5, period=5.0, requests=100, parallel=8, spread=0.01, lost=0.0, seed=1)
    assert took < 19 * 5.0 * 1.04


def test_long_uploads_that_span_windows_do_not_halve_the_rate() -> None:
    _, took = simulate(limit=5, period=5.0, requests=100, parallel=5, spread=2.0, lost=0.0, seed=1)
    assert took < 20 * 5.0 * 1.7


def granted(limiter: RateLimiter, route: Route, now: float, **answer: object) -> None:
    assert limiter.reserve(route, now) == 0.0
    limiter.learn(
        route,
        int(str(answer.get("status", 200))),
        answer.get("headers", {}),  # type: ignore[arg-type]
        answer.get("body"),
        now,
    )
    limiter.release(route, now)


def test_an_unknown_route_has_one_request_in_flight() -> None:
    limiter = RateLimiter()
    assert limiter.reserve(POST, 0.0) == 0.0
    assert limiter.reserve(POST, 0.0) > 0
    assert limiter.reserve(Route("POST", POST.template, "8"), 0.0) == 0.0
    limiter.release(POST, 0.1)
    assert limiter.reserve(POST, 0.1) == 0.0


def test_a_route_without_limit_headers_is_held_by_the_global_budget_alone() -> None:
    limiter = RateLimiter(global_per_s=10)
    granted(limiter, GET, 0.0)
    assert all(limiter.reserve(GET, 0.5) == 0.0 for _ in range(9))
    assert limiter.reserve(GET, 0.5) == pytest.approx(0.5)
    assert limiter.reserve(GET, 1.0) == 0.0
    assert limiter.reserve(GET, 1.0) == pytest.approx(0.5)


def test_background_requests_leave_a_part_of_the_global_budget_to_readers() -> None:
    limiter = RateLimiter(global_per_s=10)
    granted(limiter, GET, 0.0)
    assert [limiter.reserve(GET, 0.1, background=True) for _ in range(4)] == [0.0] * 4
    assert limiter.reserve(GET, 0.1, background=True) > 0
    assert limiter.reserve(GET, 0.1) == 0.0


def test_an_error_without_headers_does_not_lift_the_limit_of_an_unknown_route() -> None:
    limiter = RateLimiter()
    granted(limiter, POST, 0.0, status=502)
    assert limiter.reserve(POST, 0.1) == 0.0
    assert limiter.reserve(POST, 0.1) > 0


def test_routes_that_share_a_bucket_hash_share_its_window() -> None:
    limiter = RateLimiter()
    granted(limiter, POST, 0.0, headers=headers(2, 1, 5.0))
    granted(limiter, GET, 0.1, headers=headers(2, 0, 4.9))
    assert limiter.reserve(POST, 0.2) == pytest.approx(4.85)
    assert limiter.reserve(POST, 5.06) == 0.0


def test_a_changed_bucket_hash_takes_the_requests_in_flight_along() -> None:
    limiter = RateLimiter()
    granted(limiter, POST, 0.0, headers=headers(3, 2, 5.0))
    assert limiter.reserve(POST, 0.1) == limiter.reserve(POST, 0.1) == 0.0
    changed = headers(3, 2, 5.0) | {"x-ratelimit-bucket": "c"}
    limiter.learn(POST, 200, changed, {}, 0.2)
    limiter.release(POST, 0.2)
    assert limiter.reserve(POST, 0.2) == 0.0
    assert limiter.reserve(POST, 0.2) > 0


def test_a_sub_limit_holds_back_its_own_route_only() -> None:
    limiter = RateLimiter()
    shared = headers(5, 4, 5.0, **{"x-ratelimit-scope": "shared"})
    body = {"code": 20028, "retry_after": 0.3, "message": "", "global": False}
    granted(limiter, POST, 0.0, status=429, headers=shared, body=body)
    assert limiter.reserve(POST, 0.0) == pytest.approx(0.35)
    assert limiter.reserve(GET, 0.0) == 0.0
    assert limiter.breaker.invalid(0.0) == 0


def test_a_global_429_holds_back_every_route() -> None:
    limiter = RateLimiter()
    limited = {"via": "1.1 google", "x-ratelimit-global": "true"}
    body = {"retry_after": 2.0, "global": True}
    granted(limiter, POST, 0.0, status=429, headers=limited, body=body)
    assert limiter.reserve(GET, 0.0) == pytest.approx(2.05)
    assert limiter.breaker.invalid(0.0) == 1


@pytest.mark.parametrize(
    ("limited", "body", "seconds"),
    [
        ({"retry-after": "120"}, None, 120.0),
        ({}, {"code": 0, "message": "blocked"}, 60.0),
        ({"via": "1.1 google"}, None, 60.0),
    ],
)
def test_a_429_of_cloudflare_opens_the_breaker(
    limited: dict[str, str], body: object, seconds: float
) -> None:
    limiter = RateLimiter()
    granted(limiter, POST, 0.0, status=429, headers=limited, body=body)
    with pytest.raises(BreakerOpen):
        limiter.reserve(GET, seconds - 0.1)
    assert limiter.reserve(GET, seconds) == 0.0


def test_refused_requests_slow_down_at_one_percent_and_stop_at_ten() -> None:
    breaker = Breaker(budget=1000)
    for _ in range(10):
        breaker.count(0.0)
    breaker.granted(1.0)
    assert breaker.wait(1.25) == pytest.approx(0.75)
    for second in range(90):
        breaker.count(float(second))
    with pytest.raises(BreakerOpen, match="100 requests"):
        breaker.wait(90.0)
    assert breaker.wait(800.0) == 0.0


def test_401_and_403_count_towards_the_ban() -> None:
    limiter = RateLimiter()
    granted(limiter, GET, 0.0, status=401)
    granted(limiter, GET, 0.0, status=403)
    granted(limiter, GET, 0.0, status=404)
    assert limiter.breaker.invalid(0.0) == 2


def test_idle_buckets_are_forgotten() -> None:
    limiter = RateLimiter()
    for channel in range(50):
        route = Route("GET", "/c", str(channel))
        granted(limiter, route, float(channel), headers=headers(5, 4, 5.0))
    assert limiter.reserve(POST, 2000.0) == 0.0
    assert len(limiter._buckets) == 1


def test_when_all_answers_of_a_window_are_lost_the_route_goes_on_after_a_window() -> None:
    limiter = RateLimiter()
    granted(limiter, POST, 0.0, headers=headers(2, 1, 5.0))
    assert limiter.reserve(POST, 6.0) == limiter.reserve(POST, 6.0) == 0.0
    assert limiter.reserve(POST, 6.0) > 0
    limiter.release(POST, 7.0)
    limiter.release(POST, 7.0)
    assert limiter.reserve(POST, 7.0) == pytest.approx(5.05)
    assert limiter.reserve(POST, 12.1) == 0.0


@pytest.mark.parametrize(
    ("head", "body", "seconds"),
    [
        ({"retry-after": "2"}, {"retry_after": 1.25}, 1.25),
        ({"retry-after": "2"}, {"retry_after": float("nan")}, 2.0),
        ({"retry-after": "soon"}, None, None),
        ({"retry-after": "-1"}, "text", None),
    ],
)
def test_the_wait_asked_for_is_read_from_the_body_first(
    head: dict[str, str], body: object, seconds: float | None
) -> None:
    assert retry_after_s(head, body) == seconds
