"""Room for the block cache: its hard cap, the free-space guard, and how writers are slowed down.

Writers are paced before they must stop: above three quarters of the dirty budget each byte costs
time, so that the rate falls smoothly to what uploading frees. Then they wait, as long as uploading
or evicting makes progress. Readers never wait here: what has no room is served without being kept.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from stashcordfs.errors import FsError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_MIB = 1 << 20
_FREE_SPACE_EVERY_BYTES = 16 * _MIB
_PACED_FROM = 0.75  # of the dirty budget
_PACE_S_PER_MIB = 0.2  # at the budget's end: 5 MiB/s, below what any channel takes
_EVICT_AT_LEAST_BYTES = 32 * _MIB


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """Bounds of the block cache in bytes; how long a write waits without any progress, in s."""

    max_bytes: int
    min_free_bytes: int
    dirty_bytes: int
    deadline_s: float = 60.0


class Room:
    """What is used, and the waits for more. One loop; nothing here touches a block."""

    def __init__(
        self,
        limits: CacheLimits,
        *,
        free_bytes: Callable[[], int],
        evict: Callable[[int], Awaitable[int]],
        clock: Callable[[], float],
    ) -> None:
        """`free_bytes` asks the disk; `evict` frees at least so many bytes, if it can."""
        self.limits = limits
        self.used_bytes = 0
        self.dirty_bytes = 0
        self.pressure = trio.Event()  # set: upload everything, somebody waits
        self._free_bytes = free_bytes
        self._evict = evict
        self._clock = clock
        self._free = -1
        self._unchecked = 0
        self._turn = trio.Lock()
        self._progress = trio.Event()
        self._moved_s = 0.0  # when something was uploaded or freed last
        self._waiters = 0

    async def for_write(self, length: int) -> None:
        """Return when dirty bytes may be added. ENOSPC when nothing moves for the deadline."""
        if self._turn.locked() or self._over() > 0 or not self._fits(length, dirty=True):
            since_s = self._clock()
            async with self._turn:  # first come, first served: no later write overtakes
                await self._pace(length)
                await self._wait_for(length, since_s)
        self._unchecked += length

    async def for_clean(self, length: int) -> bool:
        """Whether so many clean bytes may be kept; evicts others for them."""
        while not self._fits(length, dirty=False):
            if not await self._evict(max(length, _EVICT_AT_LEAST_BYTES)):
                return False
            self._free = -1
        self._unchecked += length
        return True

    def progressed(self) -> None:
        """Tell waiting writers that something was uploaded or freed."""
        self._moved_s = self._clock()
        if self._waiters:
            self._progress.set()
            self._progress = trio.Event()

    async def _pace(self, length: int) -> None:
        if self._over() > 0:
            await trio.sleep(length / _MIB * _PACE_S_PER_MIB * self._over())

    def _over(self) -> float:
        """How far into the last quarter of the dirty budget, from 0 to 1."""
        over = self.dirty_bytes / max(1, self.limits.dirty_bytes) - _PACED_FROM
        return min(1.0, over / (1 - _PACED_FROM))

    def _fits(self, length: int, *, dirty: bool) -> bool:
        limits = self.limits
        if dirty and self.dirty_bytes + length > limits.dirty_bytes:
            return False
        return self.used_bytes + length <= limits.max_bytes and self._has_free_space(length)

    def _has_free_space(self, length: int) -> bool:
        if self._free < 0 or self._unchecked + length > _FREE_SPACE_EVERY_BYTES:
            self._free, self._unchecked = self._free_bytes(), 0
        return self._free - self._unchecked - length >= self.limits.min_free_bytes

    async def _wait_for(self, length: int, since_s: float) -> None:
        """`since_s`: when the writer came. Time in line counts, or a line would wait for ever."""
        while not self._fits(length, dirty=True):
            self._free = -1
            if not self._fits(length, dirty=False) and await self._evict(
                max(length, _EVICT_AT_LEAST_BYTES)
            ):
                self._moved_s = self._clock()
                continue
            self.pressure.set()
            self._waiters += 1
            try:
                left_s = max(since_s, self._moved_s) + self.limits.deadline_s - self._clock()
                with trio.move_on_after(max(0.0, left_s)) as scope:
                    await self._progress.wait()
            finally:
                self._waiters -= 1
            if scope.cancelled_caught:
                raise FsError(errno.ENOSPC, "the cache is full of data that Discord does not have")
