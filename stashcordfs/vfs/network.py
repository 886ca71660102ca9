"""Whether Discord can be reached, as requests tell it: who waits for its return is woken at once.

An answer of any kind proves the network; only a request that nobody answered speaks against it.
While it is gone and something waits, one small request a minute asks for it. Nothing here decides
how long an error of the server's own (5xx, 429) is waited for: those are answers.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

from stashcordfs.errors import (
    BreakerOpen,
    DiscordError,
    DiscordRefused,
    DiscordUnavailable,
    TokenRejected,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

_PROBE_EVERY_S = 60.0
_RETURN_EVERY_S = 60.0  # so that what answers and what does not cannot wake each other for ever


class Network:
    """One for a mount. `probe` makes one small request, without repeating it."""

    def __init__(self, *, probe: Callable[[], Awaitable[None]], clock: Callable[[], float]) -> None:
        """Believe in the network until a request says otherwise."""
        self.gone = False
        self._probe = probe
        self._clock = clock
        self._tried_s = clock()
        self._next_return_s = clock()
        self._returned = trio.Event()
        self._lost = trio.Event()

    @contextmanager
    def noticing(self) -> Iterator[None]:
        """A request to the API inside: its outcome tells of the network."""
        try:
            yield
        except DiscordUnavailable as error:
            if error.offline:
                self.lost()
            else:
                self.answered()
            raise
        except TokenRejected:  # may be remembered, not answered
            raise
        except DiscordRefused:
            self.answered()
            raise
        else:
            self.answered()

    def answered(self) -> None:
        """Some request of API or CDN was answered."""
        if self.gone and self._clock() >= self._next_return_s:
            self.wake()

    def lost(self) -> None:
        """A request to the API got no answer."""
        self.gone = True
        self._tried_s = self._clock()
        self._lost.set()

    def wake(self) -> None:
        """Let everybody who waits for the network's return try now."""
        self.gone = False
        self._next_return_s = self._clock() + _RETURN_EVERY_S
        if self._lost.is_set():  # else `run` waits for this one
            self._lost = trio.Event()
        self._returned.set()
        self._returned = trio.Event()

    async def returned(self) -> None:
        """Wait for the next return."""
        await self._returned.wait()

    async def run(self, wanted: Callable[[], bool]) -> None:
        """Ask for the network while it is gone, for ever; only when `wanted` says so."""
        while True:
            await self._lost.wait()
            returned = self._returned
            wait_s = self._tried_s + _PROBE_EVERY_S - self._clock()
            with trio.move_on_after(max(0.0, wait_s)):
                await returned.wait()
            if self.gone and self._clock() >= self._tried_s + _PROBE_EVERY_S:
                self._tried_s = self._clock()
                if wanted():
                    await self._ask()

    async def _ask(self) -> None:
        try:
            await self._probe()
        except BreakerOpen:  # nobody was asked
            return
        except DiscordUnavailable as error:
            if error.offline:
                self.lost()
                return
        except DiscordError:
            pass  # it is an answer
        self.wake()
