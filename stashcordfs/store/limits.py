"""The limits in force: known from the guild, lowered when the server refuses, never assumed.

Pure; the caller keeps `limits` where it survives a restart.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stashcordfs.types import Limits

if TYPE_CHECKING:
    from collections.abc import Collection

_MIB = 1 << 20
_LADDER = tuple(n * _MIB for n in (100, 50, 25, 20, 10, 8))
_TIERS = {2: 50 * _MIB, 3: 100 * _MIB}
_LEAST_REQUEST_BYTES = 8 * _MIB


class LearnedLimits:
    """Limits that only go down, except as far as the guild's own tier is known to allow."""

    def __init__(self, start: Limits | None = None) -> None:
        """Start from what was kept, or from the defaults."""
        self.limits = start or Limits()
        self._refused_bytes: int | None = None  # what a server has refused: never tried again

    def know_guild(self, premium_tier: int, features: Collection[str] = ()) -> Limits:
        """Take the guild's boost tier up; a size that was refused stays refused.

        An attachment larger than a request is of no use, so the request bounds it as well.
        """
        del features  # none changes the upload limit today; taken so that one can
        tier = _TIERS.get(premium_tier, Limits().max_attachment_bytes)
        if self._refused_bytes is not None:
            tier = min(tier, self.limits.max_attachment_bytes)
        self.limits = replace(
            self.limits, max_attachment_bytes=min(tier, self.limits.max_request_bytes)
        )
        return self.limits

    def too_large(self, sizes: Collection[int]) -> bool:
        """Learn from a 413. False when there is nothing left to lower."""
        largest = max(sizes, default=0)
        now = self.limits
        self._refused_bytes = min(largest, self._refused_bytes or largest)
        lower = next((step for step in _LADDER if step < min(largest, now.max_attachment_bytes)), 0)
        if lower:
            self.limits = replace(now, max_attachment_bytes=lower)
            return True
        halved = max(_LEAST_REQUEST_BYTES, min(now.max_request_bytes, sum(sizes)) // 2)
        if halved >= now.max_request_bytes:
            return False
        self.limits = replace(now, max_request_bytes=halved)
        return True
