"""The limits in force: known from the guild, lowered when the server refuses, never assumed.

A 413 does not say which limit was passed. So the attachment goes down a ladder of sizes that
Discord has had (100, 50, 25, 20, 10, 8 MiB) and smaller ones, for a proxy in between; then the
whole request is halved; down to what one block needs, since a block is never cut. What was lowered
is tried again one step higher after some messages that were accepted, ever more rarely while that
is refused: a boost may come back, and some refusals were not about the size.

Pure.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from stashcordfs.types import Limits

if TYPE_CHECKING:
    from collections.abc import Collection

_MIB = 1 << 20
_LADDER = tuple(n * _MIB for n in (100, 50, 25, 20, 10, 8, 4, 2, 1))
_TIERS = {2: 50 * _MIB, 3: 100 * _MIB}
_PATIENCE, _LONGEST_PATIENCE = 16, 16_384  # accepted messages before a step up


class LearnedLimits:
    """Limits that go down at each refusal, and slowly up again to what the guild should allow."""

    def __init__(self, start: Limits | None = None, *, least: Limits | None = None) -> None:
        """Start from what was kept, or from the defaults. A block fits into `least`."""
        self.limits = start or Limits()
        self._ceiling = self.limits
        wanted = least or Limits(_MIB, 1, _MIB)
        self._least_attachment_bytes = max(_MIB, wanted.max_attachment_bytes)
        self._least_request_bytes = max(_MIB, wanted.max_request_bytes)
        self._lowered = False
        self._accepted = 0
        self._patience = _PATIENCE
        self._raised = False  # by the last step up, which no refusal has answered yet

    def know_guild(self, premium_tier: int, features: Collection[str] = ()) -> Limits:
        """Take the guild's boost tier up; a size that was refused is not tried for that.

        An attachment larger than a request is of no use, so the request bounds it as well.
        """
        del features  # none changes the upload limit today; taken so that one can
        tier = _TIERS.get(premium_tier, Limits().max_attachment_bytes)
        tier = min(tier, self._ceiling.max_request_bytes)
        self._ceiling = replace(self._ceiling, max_attachment_bytes=tier)
        now = min(tier, self.limits.max_attachment_bytes) if self._lowered else tier
        self.limits = replace(self.limits, max_attachment_bytes=now)
        return self.limits

    def too_large(self, sizes: Collection[int]) -> bool:
        """Learn from a 413. False when there is nothing left to lower."""
        if self._raised:
            self._patience = min(2 * self._patience, _LONGEST_PATIENCE)
        self._lowered, self._raised, self._accepted = True, False, 0
        now = self.limits
        largest = min(max(sizes, default=0), now.max_attachment_bytes)
        lower = next((step for step in self._steps() if step < largest), 0)
        if lower:
            self.limits = replace(now, max_attachment_bytes=lower)
            return True
        half = min(now.max_request_bytes, sum(sizes)) // 2
        half = max(self._least_request_bytes, half)
        if half >= now.max_request_bytes:
            return False
        self.limits = replace(now, max_request_bytes=half)
        return True

    def accepted(self) -> None:
        """Learn from a message that was taken: after enough of them, try one step more."""
        if not self._lowered:
            return
        self._accepted += 1
        if self._accepted < self._patience:
            return
        if self._raised:
            self._patience = _PATIENCE  # the step has held
        self._accepted, self._raised = 0, True
        now, top = self.limits, self._ceiling
        if now.max_request_bytes < top.max_request_bytes:
            more = min(2 * now.max_request_bytes, top.max_request_bytes)
            self.limits = replace(now, max_request_bytes=more)
        elif now.max_attachment_bytes < top.max_attachment_bytes:
            steps = [step for step in self._steps() if step > now.max_attachment_bytes]
            more = min([*steps[-1:], top.max_attachment_bytes])
            self.limits = replace(now, max_attachment_bytes=more)
        else:
            self._lowered = self._raised = False

    def _steps(self) -> list[int]:
        """The ladder, down to what a block needs."""
        above = [step for step in _LADDER if step > self._least_attachment_bytes]
        return [*above, self._least_attachment_bytes]
