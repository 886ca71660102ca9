"""Notices that the machine has slept, and tells those who must not go on as if it had not.

CLOCK_MONOTONIC stands still during a suspend, CLOCK_BOOTTIME does not (clock_gettime(2)); trio's
timers are of the first kind. What counts time for others, such as limits, links and the server's
memory of a nonce, takes `boottime`.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

import trio

from stashcordfs.errors import StashcordError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

log = logging.getLogger(__name__)

_EVERY_S = 5.0
_LEAST_S = 3.0  # a shorter sleep breaks no connection


def boottime() -> float:
    """Seconds since the machine's start, those that it slept included."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def monotonic() -> float:
    """Seconds since the machine's start, without those that it slept."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


class SleepWatch:
    """Calls each of `resumed`, in order, after the machine has slept. `run` is supervised.

    A fault of one is logged and keeps none of the others from being called: they are hurried, not
    needed, since everything that waits goes on by itself in the end.
    """

    def __init__(
        self,
        resumed: Sequence[Callable[[], Awaitable[None]]],
        *,
        boottime: Callable[[], float] = boottime,
        monotonic: Callable[[], float] = monotonic,
    ) -> None:
        """First those who make the network usable, last those who use it."""
        self.resumed = list(resumed)
        self.suspends = 0
        self._boottime = boottime
        self._monotonic = monotonic

    async def run(self) -> None:
        """Look every few seconds, for ever."""
        before = self._asleep_s()
        while True:
            await trio.sleep(_EVERY_S)
            now = self._asleep_s()
            if now - before >= _LEAST_S:
                await self._woken(now - before)
            before = now

    def _asleep_s(self) -> float:
        return self._boottime() - self._monotonic()

    async def _woken(self, slept_s: float) -> None:
        self.suspends += 1
        log.info("the machine has slept for %.0f s", slept_s)
        for call in self.resumed:
            try:
                await call()
            except StashcordError as error:
                log.warning("after a sleep of the machine: %s", error)
