"""The limits in force: from the guild's boost tier, lowered when Discord refuses a size."""

from __future__ import annotations

from dataclasses import replace

from stashcordfs.types import Limits

MIB = 1 << 20
_BY_TIER = {0: 20 * MIB, 1: 20 * MIB, 2: 50 * MIB, 3: 100 * MIB}
_LADDER = (100 * MIB, 50 * MIB, 25 * MIB, 20 * MIB, 10 * MIB, 8 * MIB)


class LearnedLimits:
    """Starts at what an unboosted guild allows; a whole request stays under 25 MiB by the docs."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self.now = Limits()

    def learn_tier(self, premium_tier: int) -> None:
        """A guild's boost tier: a larger attachment, never a larger request."""
        allowed = _BY_TIER.get(premium_tier, 20 * MIB)
        most = min(allowed, self.now.max_request_bytes)
        self.now = replace(self.now, max_attachment_bytes=most)

    def refused(self, largest: int) -> bool:
        """An attachment of `largest` bytes was refused. False: there is no lower step."""
        for step in _LADDER:
            if step < min(largest, self.now.max_attachment_bytes):
                self.now = replace(self.now, max_attachment_bytes=step)
                return True
        return False
