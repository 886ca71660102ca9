"""Rate limits as the API keeps them. No I/O; the clock is an argument, seconds.

Windows are fixed: one begins with the first request that finds none, and ends after its period.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from hashlib import md5

from stashcordfs.sandbox.ids import EPOCH_MS

_GLOBAL = (50, 1.0)
_DAY_S = 86_400.0
_HOUR_S = 3600.0

# name -> (requests, seconds); the names are those of the routes. Figures: observed, none published.
_RULES: dict[str, tuple[int, float]] = {
    "create_message": (5, 5.0),
    "list_messages": (5, 5.0),
    "get_message": (5, 5.0),
    "edit_message": (5, 5.0),
    "delete_message": (3, 0.33),
    "bulk_delete": (1, 3.0),
    "get_pins": (6, 5.0),
    "pin": (5, 5.0),
    "unpin": (5, 5.0),
    "webhook": (5, 2.0),
    "gateway_bot": (2, 5.0),
    "refresh_urls": (5, 5.0),
}
_YOUNG_DELETE = ("delete_message.young", 5, 1.0)
_OLD_DELETE = ("delete_message.old", 30, 4.0)
_OLD_EDIT = ("edit_message.old", 3, 6.0)
_CHANNEL_UPDATE = ("update_channel.name", 2, 600.0)
_WEBHOOKS_OF_CHANNEL = ("webhooks.channel", 30, 60.0)


@dataclass(slots=True)
class _Window:
    limit: int
    period: float
    end: float = -math.inf
    used: int = 0

    def take(self, now: float) -> bool:
        if now >= self.end:
            self.end, self.used = now + self.period, 0
        if self.used >= self.limit:
            return False
        self.used += 1
        return True


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to answer with; `retry_after` is None when the request may go on."""

    headers: dict[str, str]
    retry_after: float | None = None
    scope: str = "user"
    code: int | None = None


class Limits:
    def __init__(self) -> None:
        self._windows: dict[tuple[str, str], _Window] = {}
        self.generation = 0  # another one gives buckets other hashes

    def _window(self, name: str, major: str, limit: int, period: float) -> _Window:
        if len(self._windows) > 10_000:
            self._windows.clear()
        return self._windows.setdefault((name, major), _Window(limit, period))

    def take(
        self, route: str, major: str, *, now: float, wall: float, message_id: int | None = None
    ) -> Verdict:
        """Count one request; `wall` is Unix time, for the headers and the message's age."""
        if route != "webhook":
            overall = self._window("global", "", *_GLOBAL)
            if not overall.take(now):
                return Verdict({"X-RateLimit-Global": "true"}, overall.end - now, "global")
        age = wall - ((message_id >> 22) + EPOCH_MS) / 1000 if message_id is not None else 0.0
        name, rule = _bucket(route, age if message_id is not None else None)
        if rule is None:
            return Verdict({})
        window = self._window(name, major, *rule)
        free = window.take(now)
        headers = self._headers(name, window, now=now, wall=wall)
        if not free:
            return Verdict(headers, window.end - now)
        if route == "edit_message" and age > _HOUR_S:
            old = self._window(_OLD_EDIT[0], major, *_OLD_EDIT[1:])
            if not old.take(now):
                return Verdict(headers, old.end - now, code=30046)
        return Verdict(headers)

    def webhook_channel(self, channel: str, now: float) -> float | None:
        """The limit that all webhooks of a channel share; it shows only as a 429."""
        window = self._window(_WEBHOOKS_OF_CHANNEL[0], channel, *_WEBHOOKS_OF_CHANNEL[1:])
        return None if window.take(now) else window.end - now

    def channel_update(self, channel: str, now: float) -> float | None:
        """Name and topic have a limit of their own, which no header shows."""
        window = self._window(_CHANNEL_UPDATE[0], channel, *_CHANNEL_UPDATE[1:])
        return None if window.take(now) else window.end - now

    def _headers(self, name: str, window: _Window, *, now: float, wall: float) -> dict[str, str]:
        after = max(0.0, window.end - now)
        digest = md5(f"{name}/{self.generation}".encode(), usedforsecurity=False).hexdigest()
        return {
            "X-RateLimit-Limit": str(window.limit),
            "X-RateLimit-Remaining": str(window.limit - window.used),
            "X-RateLimit-Reset": f"{wall + after:.3f}",
            "X-RateLimit-Reset-After": f"{after:.3f}",
            "X-RateLimit-Bucket": digest,
        }


def _bucket(route: str, age: float | None) -> tuple[str, tuple[int, float] | None]:
    """Deletes have three buckets, by the message's age; what is not there counts as young."""
    if route == "delete_message":
        if age is None or age < 10:
            return _YOUNG_DELETE[0], _YOUNG_DELETE[1:]
        if age > 14 * _DAY_S:
            return _OLD_DELETE[0], _OLD_DELETE[1:]
    return route, _RULES.get(route)
