"""The invalid-request breaker: stops asking long before Discord bans the host. No I/O.

Discord bans an address after 10,000 answers of 401, 403 or 429 within 10 minutes. At 1 % of that
the breaker spaces requests out; at 10 % it refuses them until the window has moved on. An answer
of Cloudflare's own (a 429 that is not the API's) means that the ban is near or there: it opens
the breaker at once.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from stashcordfs.errors import BreakerOpen

if TYPE_CHECKING:
    from collections.abc import Sequence

_WINDOW_S = 600.0
_SLOT_S = 5.0  # counts are kept per slot, so that a flood costs no memory
_SLOW_SPACING_S = 1.0
_LONGEST_SHUT_S = 86_400.0  # what a file says is not believed beyond a day


class Breaker:
    def __init__(self, *, budget: int = 10_000) -> None:
        self._slow_at = max(1, budget // 100)
        self._open_at = max(2, budget // 10)
        self._slots: deque[tuple[float, int]] = deque()
        self._total = 0
        self._shut_until = 0.0
        self._last_grant = float("-inf")

    def count(self, now: float) -> None:
        """One more answer that counts towards the ban."""
        if self._slots and now - self._slots[-1][0] < _SLOT_S:
            begun, number = self._slots.pop()
            self._slots.append((begun, number + 1))
        else:
            self._slots.append((now, 1))
        self._total += 1

    def trip(self, now: float, *, for_s: float) -> None:
        """Cloudflare itself answered: nothing is sent for a while."""
        self._shut_until = max(self._shut_until, now + for_s)

    def invalid(self, now: float) -> int:
        """How many such answers the last 10 minutes hold."""
        while self._slots and now - self._slots[0][0] >= _WINDOW_S + _SLOT_S:
            self._total -= self._slots.popleft()[1]
        return self._total

    def wait(self, now: float) -> float:
        """Seconds until the next request is allowed; raises BreakerOpen when none is for long."""
        if now < self._shut_until:
            raise BreakerOpen(
                f"Discord's edge blocks this address; no request for {self._shut_until - now:.0f} s"
            )
        number = self.invalid(now)
        if number >= self._open_at:
            raise BreakerOpen(
                f"{number} requests were refused within 10 minutes; check token and permissions"
            )
        if number >= self._slow_at:
            return max(0.0, self._last_grant + _SLOW_SPACING_S - now)
        return 0.0

    def granted(self, now: float) -> None:
        self._last_grant = now

    def snapshot(self, now: float) -> list[list[float]]:
        """Ages and numbers of the refused, then for how long nothing may be sent."""
        return [*([now - at, number] for at, number in self._slots), [self._shut_until - now, 0]]

    def restore(self, kept: Sequence[Sequence[float]], now: float, elapsed: float) -> None:
        """Take up a `snapshot` that another process made `elapsed` seconds ago."""
        *slots, (shut_s, _) = [(float(first), int(number)) for first, number in kept]
        self._slots = deque((now - age - elapsed, number) for age, number in slots)
        self._total = sum(number for _, number in self._slots)
        self._shut_until = now + min(shut_s, _LONGEST_SHUT_S) - elapsed
