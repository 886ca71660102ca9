"""Who asks the limiter next: readers before background work, else first come, first served.

One line per route, since only requests of one route compete for the same bucket as a rule. Only
the head of a line asks, so that a grant cannot be snatched from one that waits longer.
"""

from __future__ import annotations

import bisect
import itertools
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

    from stashcordfs.discord.limiter import RateLimiter, Route

_Ticket = tuple[bool, int]


class GrantQueue:
    """Waits until the limiter grants. One loop; a cancelled waiter leaves its line."""

    def __init__(self, limiter: RateLimiter, clock: Callable[[], float]) -> None:
        self._limiter = limiter
        self._clock = clock
        self._lines: dict[Route, list[_Ticket]] = {}
        self._numbers = itertools.count()
        self._changed = trio.Event()

    async def granted(self, route: Route, *, background: bool) -> None:
        """Return when the request may go; the caller owes `release`. Raises BreakerOpen."""
        ticket = (background, next(self._numbers))
        line = self._lines.setdefault(route, [])
        bisect.insort(line, ticket)
        try:
            while True:
                changed = self._changed
                if line[0] != ticket:
                    await changed.wait()
                    continue
                wait = self._limiter.reserve(route, self._clock(), background=background)
                if wait <= 0:
                    return
                with trio.move_on_after(wait):
                    await changed.wait()
        finally:
            line.remove(ticket)
            if not line:
                self._lines.pop(route, None)
            self.wake()

    def release(self, route: Route) -> None:
        self._limiter.release(route, self._clock())
        self.wake()

    def wake(self) -> None:
        """Something changed: everybody who waits looks again."""
        self._changed.set()
        self._changed = trio.Event()
