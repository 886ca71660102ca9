"""The ban of an address that is refused too often. No I/O; the clock is an argument, seconds.

Answers of 401, 403 and 429 count, 429s of a shared limit do not. Beyond `after` of them within
`window_s`, Cloudflare answers every call of that address in the API's place, whatever its token.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque

_COUNTED = (401, 403, 429)


class Bans:
    def __init__(self) -> None:
        self._refused: defaultdict[str, deque[float]] = defaultdict(deque)
        self._until: dict[str, float] = {}
        self.invalid = 0  # all that counted, of all addresses
        self.banned_answers = 0

    def banned(self, address: str, now: float) -> bool:
        """Whether Cloudflare answers now; counts the answer when it does."""
        shut = now < self._until.get(address, -math.inf)
        self.banned_answers += shut
        return shut

    def count(
        self,
        address: str,
        status: int,
        scope: str,
        *,
        now: float,
        after: int,
        window_s: float,
        ban_s: float,
    ) -> None:
        """One more answer; with `after` 0 nobody is banned."""
        if status not in _COUNTED or scope == "shared":
            return
        self.invalid += 1
        times = self._refused[address]
        times.append(now)
        while times and times[0] <= now - window_s:
            times.popleft()
        if 0 < after <= len(times):
            self._until[address] = now + ban_s
            times.clear()
