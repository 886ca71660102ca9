"""The HTTP connections of one client, to the API and to the CDN, which can all be dropped at once.

After the machine has slept, a pooled connection looks alive and is not: the first request on it
would hang until its timeout. The two pools are apart because the CDN's never holds the token.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import httpx

_API_CONNECTIONS, _CDN_CONNECTIONS = 16, 64
_CLOSE_S = 1.0  # a dead peer must not hold up who comes back


class Connections:
    """Two HTTP clients, made by `make(connections)`. One loop."""

    def __init__(self, make: Callable[[int], httpx.AsyncClient]) -> None:
        self._make = make
        self._under_way: set[trio.CancelScope] = set()
        self.api = make(_API_CONNECTIONS)
        self.cdn = make(_CDN_CONNECTIONS)

    @contextmanager
    def breakable(self) -> Iterator[trio.CancelScope]:
        """An exchange inside: `drop` ends it, and then the scope has `cancelled_caught`."""
        with trio.CancelScope() as scope:
            self._under_way.add(scope)
            try:
                yield scope
            finally:
                self._under_way.discard(scope)

    async def drop(self) -> None:
        """Close all connections, end what is under way on them, and go on with new ones."""
        old = (self.api, self.cdn)
        self.api, self.cdn = self._make(_API_CONNECTIONS), self._make(_CDN_CONNECTIONS)
        for scope in tuple(self._under_way):
            scope.cancel()
        await self._close(*old)

    async def aclose(self) -> None:
        await self._close(self.api, self.cdn)

    async def _close(self, *clients: httpx.AsyncClient) -> None:
        for http in clients:
            with trio.move_on_after(_CLOSE_S):
                await http.aclose()
