"""Rate limits without I/O: when may a request go? The clock is an argument, monotonic seconds.

The client asks `reserve` before each request, tells each answer to `learn`, and calls `release`
when the request has ended, answered or not (after `learn`). Not thread-safe; one event loop.

Limits are learned from headers, never assumed, and handed on to the next process (`snapshot`). A
bucket counts what *may* be counted against it: a request in flight when the window ends may land in
the next one, so it is charged there until its answer tells. All times come from `Reset-After`,
since the two hosts' clocks differ.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stashcordfs.discord.breaker import Breaker

_MARGIN_S = 0.05  # after a reset: servers' windows differ by some milliseconds
_UNANSWERED_WAIT_S = 0.25  # nothing known yet: look again, or sooner when an answer wakes us
_DEFAULT_RETRY_S = 1.0
_CLOUDFLARE_RETRY_S = 60.0
_STALE_S = 600.0
_UNKNOWN_PERIOD_S = 5.0  # the longest window that is usual
_FOREGROUND_SHARE = 5  # of the global budget, background requests leave these to readers


@dataclass(frozen=True, slots=True)
class Route:
    """What Discord limits together, as far as known before the first answer.

    `major` is the channel or guild id; `sub` parts a route whose limits depend on a message's age.
    """

    method: str
    template: str
    major: str = ""
    sub: str = ""


class _Bucket:
    """One limit: `spare` requests may still go in the window that ends at `end`."""

    __slots__ = ("end", "floor", "in_flight", "limit", "period", "spare", "touched")

    def __init__(self, now: float) -> None:
        self.limit: int | None = None  # None: no answer yet; 0: the route sends no limit
        self.spare = 0
        self.floor = 0  # the lowest Remaining seen in this window
        self.in_flight = 0
        self.end: float | None = None  # None: a window that no answer has dated yet
        self.period = 0.3  # the longest Reset-After seen; the shortest window known is 0.33 s
        self.touched = now

    def wait(self, now: float) -> float:
        self.touched = now
        if self.limit is None:
            return _UNANSWERED_WAIT_S if self.in_flight else 0.0
        if self.limit == 0:
            return 0.0
        if self.end is not None and now >= self.end + _MARGIN_S:
            self.end = None
            self.spare = self.limit - self.in_flight
        if self.spare > 0:
            return 0.0
        if self.end is None:
            return _UNANSWERED_WAIT_S
        return max(0.001, self.end + _MARGIN_S - now)

    def take(self) -> None:
        self.in_flight += 1
        self.spare -= 1

    def learn(self, limit: int, remaining: int, *, reset_after: float, now: float) -> None:
        """Take in an answer's window.

        Answers overtake each other, so nothing here may raise `spare` beyond what the lowest
        Remaining of the window leaves to the requests still in flight, and `end` only grows. An
        old window's answer that is taken for the new one's costs a moment, never a 429. Only an
        answer that was on its way back for half a window could be taken for an old one's.
        """
        end = now + reset_after
        others = max(0, self.in_flight - 1)
        first, self.limit = not self.limit, max(1, limit)
        self.period = max(self.period, reset_after)
        if self.end is not None and end < self.end - self.period / 2:
            return  # a late answer about a window that is over
        self.floor = remaining if first or self.end is None else min(self.floor, remaining)
        self.end = end if self.end is None else max(self.end, end)
        self.spare = min(self.floor, max(self.floor - others, -others if first else self.spare))

    def release(self, now: float) -> None:
        self.in_flight -= 1
        if self.limit and self.end is None and self.spare <= 0 and not self.in_flight:
            self.end = now + self.period  # every answer was lost: one whole window must pass

    def kept(self, now: float) -> list[float]:
        if self.end is None:  # spent, and no answer has said in which window
            left = self.period if self.limit and self.spare < self.limit else 0.0
        else:
            left = max(0.0, self.end - now)
        return [self.limit or 0, self.period, self.spare, left, self.in_flight]

    @classmethod
    def restored(cls, kept: Sequence[float], now: float, elapsed: float) -> _Bucket | None:
        """What a process that has ended left; None when it says nothing about the next request."""
        limit, period, spare, left, in_flight = kept
        left = min(left, period) - elapsed
        bucket = cls(now)
        bucket.limit, bucket.period = max(1, int(limit)), period
        if in_flight:  # answered or not, and in which window, nobody knows
            left = max(period, _UNKNOWN_PERIOD_S if not limit else 0.0) - elapsed
            spare = 0
        elif not limit:
            return None
        if left > 0:
            bucket.spare = bucket.floor = min(bucket.limit, int(spare))
            bucket.end = now + left
        else:
            bucket.spare = bucket.limit
        return bucket


_Template = tuple[str, str, str]


class RateLimiter:
    """All buckets of one token, the global budget and the breaker."""

    def __init__(self, global_per_s: int = 45, *, invalid_budget: int = 10_000) -> None:
        self.breaker = Breaker(budget=invalid_budget)
        self._global_per_s = global_per_s
        self._grants: deque[float] = deque(maxlen=global_per_s)
        self._global_until = 0.0
        self._hashes: dict[_Template, str] = {}
        self._buckets: dict[tuple[str, str], _Bucket] = {}
        self._blocked: dict[Route, float] = {}
        self._held: dict[Route, deque[_Bucket]] = {}
        self._swept = 0.0

    def reserve(self, route: Route, now: float, *, background: bool = False) -> float:
        """0.0: granted, and counted in flight. Else seconds after which to ask again."""
        self._sweep(now)
        wait = max(
            self.breaker.wait(now),
            self._global_wait(now, background=background),
            self._blocked.get(route, 0.0) - now,
        )
        bucket = self._bucket(route, now)
        wait = max(wait, bucket.wait(now))
        if wait > 0:
            return wait
        bucket.take()
        self._held.setdefault(route, deque()).append(bucket)
        self._grants.append(now)
        self.breaker.granted(now)
        return 0.0

    def learn(
        self, route: Route, status: int, headers: Mapping[str, str], body: object, now: float
    ) -> None:
        """Take in an answer. Header names are in lower case; `body` is parsed JSON or None."""
        if status == 429:
            self._learn_refusal(route, headers, body, now)
        elif status in (401, 403):
            self.breaker.count(now)
        limit = _number(headers, "x-ratelimit-limit")
        remaining = _number(headers, "x-ratelimit-remaining")
        reset_after = _number(headers, "x-ratelimit-reset-after")
        if limit is None or remaining is None or reset_after is None:
            bucket = self._bucket(route, now)
            if bucket.limit is None and 200 <= status < 300:
                bucket.limit = 0
            return
        bucket = self._home(route, headers.get("x-ratelimit-bucket"), now)
        bucket.learn(int(limit), int(remaining), reset_after=reset_after, now=now)

    def release(self, route: Route, now: float) -> None:
        """A reserved request has ended."""
        held = self._held[route]
        held.popleft().release(now)
        if not held:
            del self._held[route]

    def snapshot(self, now: float) -> dict[str, object]:
        """What the next process should know, as JSON can hold it; times count from `now`."""
        return {
            "hashes": [[*template, found] for template, found in self._hashes.items()],
            "buckets": [
                [*key, *bucket.kept(now)]
                for key, bucket in self._buckets.items()
                if bucket.limit or bucket.in_flight
            ],
            "global_s": max(0.0, self._global_until - now),
            "blocked": [
                [route.method, route.template, route.major, route.sub, until - now]
                for route, until in self._blocked.items()
                if until > now
            ],
            "breaker": self.breaker.snapshot(now),
        }

    def restore(self, kept: Mapping[str, Any], now: float, elapsed: float) -> None:
        """Go on where another process ended, `elapsed` seconds ago.

        A request that was in flight then may have been counted in any window: a whole one must
        pass. ValueError, TypeError or KeyError for what no `snapshot` has made.
        """
        hashes = {(m, t, sub): str(found) for m, t, sub, found in kept["hashes"]}
        buckets = {
            (str(key), str(major)): bucket
            for key, major, *fields in kept["buckets"]
            if (bucket := _Bucket.restored([float(f) for f in fields], now, elapsed))
        }
        blocked = {
            Route(m, t, major, sub): now + float(left) - elapsed
            for m, t, major, sub, left in kept["blocked"]
        }
        self._global_until = now + float(kept["global_s"]) - elapsed
        self.breaker.restore(kept["breaker"], now, elapsed)
        self._hashes, self._buckets, self._blocked = hashes, buckets, blocked

    def _learn_refusal(
        self, route: Route, headers: Mapping[str, str], body: object, now: float
    ) -> None:
        fields = body if isinstance(body, Mapping) else {}
        retry = retry_after_s(headers, body)
        scope = headers.get("x-ratelimit-scope")
        if scope != "shared":
            self.breaker.count(now)
        if "via" not in headers or "retry_after" not in fields:
            # Cloudflare, not the API: its answers have no Via, or are no JSON of the API's form
            self.breaker.trip(now, for_s=_CLOUDFLARE_RETRY_S if retry is None else retry)
            return
        until = now + (_DEFAULT_RETRY_S if retry is None else retry) + _MARGIN_S
        if fields.get("global") is True or scope == "global":
            self._global_until = max(self._global_until, until)
        else:
            self._blocked[route] = max(self._blocked.get(route, 0.0), until)

    def _global_wait(self, now: float, *, background: bool) -> float:
        wait = self._global_until - now
        share = self._global_per_s
        if background and share > _FOREGROUND_SHARE:
            share -= _FOREGROUND_SHARE
        if len(self._grants) >= share:
            wait = max(wait, self._grants[-share] + 1.0 - now)
        return wait

    def _bucket(self, route: Route, now: float) -> _Bucket:
        template = (route.method, route.template, route.sub)
        key = (self._hashes.get(template, " ".join(template)), route.major)
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = _Bucket(now)
        return bucket

    def _home(self, route: Route, bucket_hash: str | None, now: float) -> _Bucket:
        """The bucket that an answer names; the route's requests in flight move there."""
        bucket = self._bucket(route, now)
        template = (route.method, route.template, route.sub)
        if bucket_hash is None or self._hashes.get(template) == bucket_hash:
            return bucket
        self._hashes[template] = bucket_hash
        home = self._bucket(route, now)
        held = self._held.get(route, deque())
        for number, old in enumerate(held):
            old.in_flight -= 1
            home.in_flight += 1
            home.spare -= 1
            held[number] = home
        return home

    def _sweep(self, now: float) -> None:
        """Forget what has been idle for long: a volume's life sees many channels."""
        if now - self._swept < _STALE_S:
            return
        self._swept = now
        self._blocked = {route: until for route, until in self._blocked.items() if until > now}
        self._buckets = {
            key: bucket
            for key, bucket in self._buckets.items()
            if bucket.in_flight
            or now - bucket.touched < _STALE_S
            or (bucket.end is not None and bucket.end > now)
        }


def retry_after_s(headers: Mapping[str, str], body: object) -> float | None:
    """How long the server asks to wait: the body's fraction first, then the rounded header."""
    if isinstance(body, Mapping):
        value = body.get("retry_after")
        if isinstance(value, int | float) and math.isfinite(value) and value >= 0:
            return float(value)
    return _number(headers, "retry-after")


def _number(headers: Mapping[str, str], name: str) -> float | None:
    try:
        value = float(headers[name])
    except (KeyError, ValueError):
        return None
    return value if math.isfinite(value) and value >= 0 else None
